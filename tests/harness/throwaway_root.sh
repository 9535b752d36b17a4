#!/usr/bin/env bash
# The first process of a throw-away root (tests/harness/throwaway_root.py), called in namespaces of
# its own: turns an overlay over the machine's root into its root, tidies it, and buries the dead.
#
#   throwaway_root.sh DIRECTORY CHECKOUT [OPT]
#
# DIRECTORY is only a place to mount at. CHECKOUT appears as /checkout, read-only. OPT is what /opt
# has at first; without it, it is empty.
set -euo pipefail

directory=$1 checkout=$2 opt=${3:-}

mount --make-rprivate /
# Memory: nothing is left of it, and a sync costs nothing.
mount -t tmpfs -o mode=755 throwaway "$directory"
mkdir "$directory"/{upper,work,opt-upper,opt-work,no-opt,root}
root=$directory/root
mount -t overlay -o "lowerdir=/,upperdir=$directory/upper,workdir=$directory/work" \
  throwaway "$root"
# A mount of its own: an overlay takes no two directories of which one is below the other.
mount -t overlay throwaway-opt "$root/opt" \
  -o "lowerdir=${opt:-$directory/no-opt},upperdir=$directory/opt-upper,workdir=$directory/opt-work"
# Only the machine's root itself is below: whatever else is mounted there is absent.
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
# Absent where the namespaces do not allow it; nothing here depends on it.
mount -t sysfs -o ro sysfs "$root/sys" || true
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mkdir -m 1777 "$root/run/lock"
mkdir -p "$root/checkout"
mount --bind "$checkout" "$root/checkout"
mount -o remount,bind,ro "$root/checkout"
mkdir -p "$root/old-root"
cd "$root"
pivot_root . old-root
umount -l /old-root
rmdir /old-root
hash -r

hostname plant
ip link set lo up
# What the machine may have of Sluice and of a broker's use; the Debian packages stay.
rm -rf /etc/sluice /var/lib/sluice /var/log/sluice /usr/local/bin/supervisorctl \
  /etc/systemd/system/sluice.service /etc/mosquitto/conf.d/*.conf /var/lib/mosquitto/*.db
if getent passwd sluice >/dev/null; then userdel sluice; fi
if getent group sluice >/dev/null; then groupdel sluice; fi

trap 'exit 0' TERM
echo ready
exec >/dev/null 2>&1
# bash buries every child that ends, also those whose parents ended before.
while :; do
  sleep 3600 &
  wait $! || true
done
