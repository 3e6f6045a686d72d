#!/bin/sh
# The job of a guest that is a node: all that a node has before its services start. ../uml/guest-init.sh runs it, as root of a root
# directory of the guest's own, with a disk at /scratch and what the machine may see of it at /out.
#   guest-node.sh NAME ADDRESS/BITS GATEWAY AGENT_PORT [ROUTE...]
set -eu
name=$1 address=$2 gateway=$3 port=$4
shift 4
here=$(dirname "$0")

hostname "$name"
ip address add "$address" dev vec0
ip link set vec0 up
ip route add default via "$gateway"
for route; do
  # shellcheck disable=SC2086  # words
  ip route add $route
done
for module in overlay br_netfilter nf_conntrack; do /run/modules/modprobe $module; done
# kube-proxy and the kubelet call iptables, and this kernel knows only its older interface for address translation.
for program in iptables ip6tables; do
  for more in "" -save -restore; do ln -sf /usr/sbin/$program-legacy$more /etc/alternatives/$program$more; done
done
for module in ip_tables iptable_nat iptable_filter iptable_mangle ip6_tables ip6table_nat ip6table_filter ip6table_mangle; do
  /run/modules/modprobe $module
done
echo 1 >/proc/sys/net/ipv4/ip_forward

# Version 2: the guest's kernel has one processor and no cpuset, which version 1 would demand.
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in cpu io memory pids; do echo +$controller >/sys/fs/cgroup/cgroup.subtree_control; done
# cadvisor looks for a clock speed, and the guest's processor names none.
sed 's/^bogomips.*/&\ncpu MHz\t\t: 2400.000/' /proc/cpuinfo >/run/cpuinfo
mount --bind /run/cpuinfo /proc/cpuinfo

# What a node still has after a power cut; lib/nfs is where a server remembers its clients, who may then take back what they had open.
mountpoint -q /scratch
for place in lib/kubelet lib/containerd lib/cni lib/nfs lib/tatami log/pods log/containers tmp; do
  mkdir -p /scratch/var/$place /var/$place
  mount --bind /scratch/var/$place /var/$place
done
# The programs' page cache is the guest's only where they are executed from a file system of the machine: no copy is needed.
for place in lib/cluster lib/cluster-programs; do mkdir -p /var/$place; done
mount --bind /out/cluster /var/lib/cluster
mount --bind "/host$(cat /out/programs)" /var/lib/cluster-programs
mkdir -p /run/netns
mount --make-rshared /

echo "node: up after $(cut -d' ' -f1 /proc/uptime) s"
exec python3 -S -E "$here/guest_agent.py" "${address%/*}" "$port" /out/token
