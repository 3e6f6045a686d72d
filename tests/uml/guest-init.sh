#!/bin/sh
# Process 1 of the guest, a user-mode Linux whose root is this machine's root directory, by hostfs and read-only.
#
# hostfs cannot be exported (NFSv4 needs an exportable /) nor be written without touching the machine. So the first stage builds
# a root on tmpfs, binds the machine's programs into it and turns it into /; the second mounts what a system has, loads the
# modules, and runs the job. `run_dir` (kernel command line) is the one directory of the machine that the guest can write to: the
# job comes from there, the exit code goes there.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8

if [ "$1" != second ]; then
  mount -t tmpfs -o mode=755 root /mnt || exit 1
  cd /mnt || exit 1
  mkdir dev etc home host media mnt old opt out proc root run scratch srv sys tmp usr var
  chmod 700 root
  for name in bin sbin lib lib32 lib64 libx32; do
    if [ -L /$name ]; then cp -P /$name .; elif [ -d /$name ]; then mkdir $name && mount --bind /$name $name; fi
  done
  mount --bind /usr usr
  mount --bind /opt opt
  # A copy, because tools write there (mtab, exports.d, ganesha); what is unreadable or odd in it is not worth a failed boot.
  cp -a /etc/. etc/ 2>/dev/null
  mkdir -p var/cache var/lib/nfs var/log var/tmp
  ln -s /run var/run
  ln -s /run/lock var/lock
  mount -t hostfs -o "$run_dir" none out || exit 1
  cp out/guest-init.sh init
  pivot_root . old
  exec env -i PATH="$PATH" HOME="$HOME" LANG="$LANG" /bin/sh /init second
fi

mount -t proc proc /proc
umount -l /old
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o ptmxmode=666 devpts /dev/pts
for place in /run /dev/shm /tmp /var/lib/nfs; do mount -t tmpfs -o mode=1777 tmpfs $place; done
mkdir -m 755 /run/lock /run/rpcbind /run/dbus
ln -sfn /proc/self/fd /dev/fd
# rpc.mountd and ganesha read mtab; without it mountd crashes, and every later mount waits for it without end.
ln -sf /proc/self/mounts /etc/mtab
: >/etc/exports
ulimit -n 65536
ip link set lo up
hostname guest

# The machine's tree stays visible, read-only, wherever the job says that it needs it: the checkout, the virtualenv, its Python.
mount -t hostfs -o ro,/ none /host
. /out/job.sh
printf '%s\n' "$VISIBLE" | while read -r path; do
  [ -n "$path" ] || continue
  if [ -d "/host$path" ]; then mkdir -p "$path"; else mkdir -p "${path%/*}"; : >"$path"; fi
  mount --bind "/host$path" "$path"
done

# The kernel calls /sbin/modprobe by itself, too, and it would look into /lib/modules, which the machine's packages own.
mkdir -p /run/modules/lib/modules
ln -s "/usr/lib/uml/modules/$(uname -r)" /run/modules/lib/modules/
printf '#!/bin/sh\nexec /sbin/modprobe -d /run/modules "$@"\n' >/run/modules/modprobe
chmod 755 /run/modules/modprobe
echo /run/modules/modprobe >/proc/sys/kernel/modprobe
for module in loop nfsd nfsv3 nfsv4 quota_v2 veth bridge sch_netem nf_tables; do /run/modules/modprobe $module || echo "init: no module $module"; done

# A disk of its own, empty unless whoever boots put something on it: images and filesystems may be larger than the guest's memory.
# The file behind it on the machine is sparse.
if [ -b /dev/ubda ]; then
  # mkfs refuses a disk with a filesystem on it: one that cannot be mounted keeps what it has, and the guest stops here.
  mount -t xfs -o noatime /dev/ubda /scratch 2>/dev/null || { mkfs.xfs -q -K /dev/ubda && mount -o noatime /dev/ubda /scratch; } || {
    dmesg | tail -n 20
    echo "init: the disk cannot be mounted"
    exit 1
  }
fi

echo "init: up after $(cut -d' ' -f1 /proc/uptime) s"
job
code=$?
dmesg >/out/dmesg.txt 2>/dev/null
echo $code >/out/exit-code
# Straight off: unmounting would wait for servers that the tests left dead, and nothing in here outlives the guest.
echo o >/proc/sysrq-trigger
sleep 60
