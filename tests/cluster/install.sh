#!/bin/sh
# Install what the cluster is made of besides what ../cluster/binaries builds: etcd, containerd and what they call. Starts no service.
set -eu
exec "$(dirname "$0")/../uml/install.sh" \
  etcd-server containerd runc containernetworking-plugins conntrack iptables busybox-static openssl buildah debootstrap
