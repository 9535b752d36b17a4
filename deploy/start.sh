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
# Its answer is a process id only where a supervisord is there to give it.
answers() {
  "$prefix/venv/bin/supervisorctl" -c "$prefix/supervisord.conf" pid 2>/dev/null |
    grep -qE '^[0-9]+$'
}
# Not counting the dead that no process has waited for (a container without an init).
supervisord() {
  pgrep --runstates D,R,S,T,t,I -u "$account" -f "^$prefix/venv.*/bin/supervisord -c"
}

# One that is ending would take the socket of the next one with it.
seconds=0
while supervisord >/dev/null; do
  if answers; then
    exit 0
  fi
  if [ "$seconds" -ge 60 ]; then
    echo "start.sh: a supervisord runs, and does not answer (its socket was removed, or it" >&2
    echo "  hangs). End it, then run this again: sudo kill $(supervisord | tr '\n' ' ')" >&2
    exit 1
  fi
  sleep 1
  seconds=$((seconds + 1))
done

install -d -m 0750 -o "$account" -g "$account" /run/sluice
cd /
# A clean environment: a variable of this shell would win over the settings file.
exec runuser -u "$account" -- env -i PATH=/usr/local/bin:/usr/bin:/bin LANG=C.UTF-8 \
  HOME=/var/lib/sluice "$prefix/venv/bin/supervisord" -c "$prefix/supervisord.conf"
