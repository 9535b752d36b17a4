#!/bin/sh
# Starts Sluice: by systemd where that runs, otherwise supervisord itself, after having made
# /run/sluice, which no restart of a machine leaves. Harmless where it runs already.
#
#   sudo /opt/sluice/app/deploy/start.sh
set -eu

prefix=/opt/sluice
account=sluice

if [ "$(id -u)" -ne 0 ]; then
  echo "start.sh: this needs root: sudo $prefix/app/deploy/start.sh" >&2
  exit 1
fi
if [ -d /run/systemd/system ]; then
  exec systemctl start sluice
fi
install -d -m 0750 -o "$account" -g "$account" /run/sluice
# Its answer is a process id only where a supervisord is there to give it.
if "$prefix/venv/bin/supervisorctl" -c "$prefix/supervisord.conf" pid 2>/dev/null |
  grep -qE '^[0-9]+$'; then
  exit 0
fi
cd /
# A clean environment: a variable of this shell would win over the settings file.
exec runuser -u "$account" -- env -i PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 \
  HOME=/var/lib/sluice "$prefix/venv/bin/supervisord" -c "$prefix/supervisord.conf"
