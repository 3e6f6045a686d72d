#!/bin/sh
# Install what the guest needs: a kernel that runs as a process, real NFS servers, the tools of the filesystems, nothing else.
# Arguments name more packages (../cluster/install.sh).
#
# Idempotent and quiet: 20 ms when nothing is missing. Needs Debian or Ubuntu, root, and apt sources that work.
# The packages bring services (rpcbind, nfs-server, nfs-ganesha). The guest wants their programs only, and this machine must not
# start to serve NFS because somebody ran a test: policy-rc.d forbids the start now, `systemctl disable` the one after a reboot.
set -eu

packages="
  user-mode-linux kmod iproute2 nftables util-linux
  nfs-kernel-server nfs-common rpcbind nfs-ganesha nfs-ganesha-vfs dbus
  xfsprogs e2fsprogs btrfs-progs quota attr acl libnfs-utils
  $*
"
# wide_registers.c: only on processors where the guest's kernel cannot do without.
if grep -qw amx_tile /proc/cpuinfo && ! command -v cc >/dev/null; then packages="$packages gcc libc6-dev"; fi
units="rpcbind.socket rpcbind.service nfs-server.service nfs-client.target nfs-blkmap.service nfs-ganesha.service nfs-ganesha-lock.service quota.service quotarpc.service
etcd.service containerd.service"
policy=/usr/sbin/policy-rc.d

missing() {
  for package in $packages; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || printf '%s ' "$package"
  done
}

install() {
  # shellcheck disable=SC2086  # a list of words
  DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install -y --no-install-recommends $1
}

restore_policy() {
  rm -f "$policy"
  if [ -e "$saved" ] || [ -L "$saved" ]; then mv "$saved" "$policy"; fi
}

wanted=$(missing)
[ -n "$wanted" ] || exit 0
command -v apt-get >/dev/null || { echo "install.sh: the guest needs Debian's packages and there is no apt-get: $wanted" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "install.sh: run as root to install: $wanted" >&2; exit 1; }

# One at a time: two would save each other's policy-rc.d. The second one finds nothing left to do.
exec 9>/run/lock/tatami-uml-install
flock 9
wanted=$(missing)
[ -n "$wanted" ] || exit 0

saved=$policy.tatami-saved
log=$(mktemp)
# A run that was killed left its own policy behind and the real one saved: that one is put back first.
if [ -e "$saved" ] || [ -L "$saved" ]; then restore_policy; fi
if [ -e "$policy" ] || [ -L "$policy" ]; then mv "$policy" "$saved"; fi
trap 'restore_policy; rm -f "$log"' EXIT
trap 'exit 130' INT TERM HUP
printf '#!/bin/sh\nexit 101\n' >"$policy"
chmod 755 "$policy"

echo "install.sh: installing $wanted"
# The lists are fetched only where they turn out to be missing or old: most machines have them.
if ! install "$wanted" >"$log" 2>&1; then
  if ! { apt-get -qq -o DPkg::Lock::Timeout=300 update && install "$wanted"; } >>"$log" 2>&1; then
    cat "$log" >&2
    exit 1
  fi
fi
if [ -d /run/systemd/system ]; then
  for unit in $units; do
    # Only what this run brought: a machine that served NFS before goes on serving it.
    case " $wanted " in *" $(dpkg-query -S "/lib/systemd/system/$unit" 2>/dev/null | cut -d: -f1) "*) systemctl --quiet disable "$unit" ;; esac
  done
fi
