#!/bin/sh
# Written by install.sh: supervisorctl, with the configuration of Sluice
# (/opt/sluice/supervisord.conf), and a word on how to start what does not run.

prefix=/opt/sluice
run=/run/sluice

control() { "$prefix/venv/bin/supervisorctl" -c "$prefix/supervisord.conf" "$@"; }

how_to_start() {
  echo "Sluice does not run: there is no supervisord to answer. Readings wait in the broker."
  if [ -d /run/systemd/system ]; then
    echo "  Start it:     sudo systemctl start sluice"
    echo "  Why it ended: journalctl -u sluice -n 30"
  else
    # /run is empty after a restart of the machine: the script makes /run/sluice again.
    echo "  Start it:     sudo $prefix/app/deploy/start.sh"
    echo "  Why it ended: tail /var/log/sluice/supervisord.log"
  fi
} >&2

if [ -d "$run" ] && [ ! -x "$run" ]; then
  echo "Only root and the group sluice may control Sluice: sudo supervisorctl $*" >&2
  echo "  or: sudo usermod -aG sluice $(id -un), then log in again" >&2
  exit 4
fi
if [ ! -S "$run/supervisor.sock" ]; then
  how_to_start
  exit 4
fi
control "$@"
code=$?
# A killed supervisord leaves its socket behind.
if [ "$code" -ne 0 ] && ! control pid 2>/dev/null | grep -qE '^[0-9]+$'; then
  how_to_start
fi
exit "$code"
