#!/usr/bin/env bash
# Installs Sluice on Debian 12, or shows it: see ./install.sh --help
set -Eeuo pipefail
umask 022

SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly SOURCE

readonly PREFIX=/opt/sluice
readonly ETC=/etc/sluice
readonly SPOOL=/var/lib/sluice
readonly LOG=/var/log/sluice
readonly RUN=/run/sluice
readonly UNIT=/etc/systemd/system/sluice.service
readonly DROP_IN=/etc/mosquitto/conf.d/sluice.conf
readonly WRAPPER=/usr/local/bin/supervisorctl
readonly ACCOUNT=sluice

# What the installation itself needs: code, environment, logs.
readonly INSTALL_MIN_MIB=1024
readonly DEMO_MIN_MIB=512
readonly STOP_TIMEOUT_S=60

# Output of commands that are worth reading only when they fail.
COMMAND_LOG=

# Absent only where there is no full checkout, which is refused before they are needed.
for part in apt settings mosquitto-setup mosquitto-plant conclude; do
  if [ -e "$SOURCE/deploy/$part.sh" ]; then
    # shellcheck source=deploy/apt.sh
    # shellcheck source=deploy/settings.sh
    # shellcheck source=deploy/mosquitto-setup.sh
    # shellcheck source=deploy/mosquitto-plant.sh
    # shellcheck source=deploy/conclude.sh
    . "$SOURCE/deploy/$part.sh"
  fi
done
unset part

usage() {
  cat <<END
Sluice: a store-and-forward gate between MQTT sensors and Google Cloud.

  sudo ./install.sh                  install on Debian 12, or upgrade
  ./install.sh --demo [--seconds N]  show it: no cloud, broker or root needed
  sudo ./install.sh --uninstall      remove the programs, keep settings and data
  ./install.sh --version             say which release this is

Install:
  MQTT_BROKER=HOST, MQTT_PORT=PORT     (environment) use that broker; without
                                       them a broker of the plant's own on this
                                       machine is left as it is; if there is
                                       none, Mosquitto is installed, for this
                                       machine only (loopback)
  Code goes to $PREFIX, data to $SPOOL, settings to
  $ETC/sluice.env: written once, never overwritten; APP_ENV=LOCAL
  until you change it. A second run upgrades; readings wait in the broker.

Demo:
  --seconds N        stop by itself after N seconds (default: at Ctrl-C)
  --dir DIRECTORY    where everything lies (default: ./demo-data)
  --broker NAME      mosquitto, or amqtt (in Python, installed into the demo's
                     directory); default: mosquitto where it can be had; root's
                     demo installs it (apt-get), without its service

A mirror or proxy for Python packages is pip's own business: PIP_INDEX_URL,
HTTPS_PROXY or pip.conf.
END
}

say() { printf '%s\n' "$*"; }
step() { printf '\n==> %s\n' "$*"; }
warn() { printf 'install.sh: warning: %s\n' "$*" >&2; }

die() { # <what happened> [what to do next ...]
  printf '\ninstall.sh: %s\n' "$1" >&2
  shift
  [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
  exit 1
}

unexpected() { # <line> <code>
  printf '\ninstall.sh: line %s failed with code %s, which nobody foresaw.\n' "$1" "$2" >&2
  printf '  Run it again; if it stays, report it with: bash -x ./install.sh\n' >&2
}
trap 'unexpected "$LINENO" "$?"' ERR
trap '[ -z "$COMMAND_LOG" ] || rm -f "$COMMAND_LOG"' EXIT

is_root() { [ "$(id -u)" -eq 0 ]; }
systemd_runs() { [ -d /run/systemd/system ]; }

# Run a command quietly; its output is in $COMMAND_LOG afterwards.
quietly() {
  [ -n "$COMMAND_LOG" ] || COMMAND_LOG=$(mktemp)
  "$@" >"$COMMAND_LOG" 2>&1 </dev/null
}

die_of_command() { # <what failed> <next step>
  grep -vE '^WARNING: |^\s*$' "$COMMAND_LOG" | tail -n 15 | sed 's/^/  | /' >&2 || true
  if grep -qiE 'temporary failure|could not resolve|name resolution|network is unreachable|NewConnectionError|connection (refused|timed out)|could not connect|max retries' "$COMMAND_LOG"; then
    die "$1: the network, or the server, cannot be reached." \
      "Check the connection and the name service (getent hosts debian.org)." \
      "Behind a proxy: export HTTPS_PROXY and HTTP_PROXY; with sudo: sudo -E ./install.sh"
  fi
  if grep -qi 'no space left' "$COMMAND_LOG"; then
    die "$1: the disk is full." "See df -h, make room, run this again."
  fi
  die "$1." "$2"
}

# ------------------------------------------------------------------ the machine

existing_ancestor() { # <path>
  local path=$1
  while [ ! -d "$path" ]; do path=$(dirname "$path"); done
  printf '%s\n' "$path"
}

free_mib() { # <path, which need not exist>
  df --output=avail -BM "$(existing_ancestor "$1")" | tail -n 1 | tr -dc '0-9'
}

require_space() { # <path> <MiB>
  local free
  free=$(free_mib "$1")
  [ "$free" -ge "$2" ] || die "the disk is too small: $1 has $free MiB free, $2 MiB are needed." \
    "Make room (df -h $(existing_ancestor "$1")) or give it a larger disk, then run this again."
}

require_debian() {
  local id='' version=''
  if [ -r /etc/os-release ]; then
    # shellcheck source=/dev/null
    id=$(. /etc/os-release && printf '%s' "${ID:-}")
    # shellcheck source=/dev/null
    version=$(. /etc/os-release && printf '%s' "${VERSION_ID:-}")
  fi
  case "$id $version" in
    'debian 12') ;;
    'debian 13') warn "this is Debian 13; Sluice is tested on Debian 12." ;;
    *) die "this is not Debian 12 but '${id:-unknown} ${version:-}'." \
      "Install on a Debian 12 VM; ./install.sh --demo runs on any Linux with Python 3.11." ;;
  esac
}

missing_packages() { # <package ...>
  local package
  for package in "$@"; do
    # shellcheck disable=SC2016 # ${Status} is for dpkg-query
    [ "$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null)" = 'install ok installed' ] ||
      printf '%s\n' "$package"
  done
}

apt_install() { # <package ...>
  local missing
  mapfile -t missing < <(missing_packages "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  say "apt-get install ${missing[*]}"
  [ -n "$COMMAND_LOG" ] || COMMAND_LOG=$(mktemp)
  apt_get "$COMMAND_LOG" update ||
    die_of_command "apt-get update failed" "Correct it (sudo apt-get update), then run this again."
  apt_get "$COMMAND_LOG" install -y --no-install-recommends "${missing[@]}" ||
    die_of_command "apt-get cannot install ${missing[*]}" \
      "Try it by hand (sudo apt-get install ${missing[*]}), then run this again."
}

# ------------------------------------------------------------ Python environment

usable_python() { # <program>
  "$1" -c 'import ensurepip, sqlite3, ssl, sys, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

# Build DIRECTORY/venv from a lock. Its real place is named after the lock and the
# Python, so an upgrade builds the new one while the old one still runs, and an
# unchanged one is used again.
build_venv() { # <directory> <lock> <python>
  local directory=$1 lock=$2 python=$3 key venv
  key=$({ cat "$lock"; "$python" -c 'import sys; print(sys.version, sys.base_prefix)'; } |
    sha256sum | cut -c 1-12)
  venv=$directory/venvs/$key
  if [ ! -e "$venv/.complete" ]; then
    say "Python packages from $(basename "$lock") ..."
    rm -rf "$venv"
    mkdir -p "$directory/venvs"
    quietly "$python" -m venv "$venv" ||
      die_of_command "python -m venv failed" "Install it: sudo apt-get install python3-venv"
    # Wheels only: nothing is compiled, and no build tool comes in unchecked.
    quietly "$venv/bin/python" -m pip install --disable-pip-version-check --no-input \
      --only-binary :all: --no-deps --require-hashes -r "$lock" ||
      die_of_command "pip cannot install $(basename "$lock")" \
        "See above; a mirror is set with PIP_INDEX_URL or pip.conf."
    touch "$venv/.complete"
  fi
  NEW_VENV=venvs/$key
}

use_new_venv() { # <directory>
  ln -sfn "$NEW_VENV" "$1/venv"
  find "$1/venvs" -mindepth 1 -maxdepth 1 ! -path "$1/$NEW_VENV" -exec rm -rf {} +
}

# -------------------------------------------------------------------------- demo

demo() {
  local directory=$1 seconds=$2 broker=$3 lock=requirements.lock python candidate
  mkdir -p "$directory" 2>/dev/null ||
    die "cannot create $directory." "Choose another directory: ./install.sh --demo --dir DIRECTORY"
  directory=$(cd "$directory" && pwd)
  [ -w "$directory" ] || die "cannot write in $directory." \
    "It is another user's; choose another: ./install.sh --demo --dir DIRECTORY"
  # The demo starts afresh each time, so it must not start in a directory of yours.
  if [ ! -e "$directory/.sluice-demo" ] && [ -n "$(ls -A "$directory")" ]; then
    die "$directory is not empty, and not a demo's directory." \
      "Choose another: ./install.sh --demo --dir DIRECTORY"
  fi
  touch "$directory/.sluice-demo"
  require_space "$directory" "$DEMO_MIN_MIB"

  choose_demo_broker "$broker"
  broker=$DEMO_BROKER
  if [ "$broker" = amqtt ]; then lock=requirements-demo.lock; fi
  python=
  for candidate in "${PYTHON:-python3}" /usr/bin/python3 python3.11 python3.12 python3.13; do
    if usable_python "$candidate"; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ] && is_root && command -v apt-get >/dev/null; then
    apt_install python3 python3-venv
    python=/usr/bin/python3
  fi
  [ -n "$python" ] || die "no Python 3.11, 3.12 or 3.13 with venv found." \
    "Install it (sudo apt-get install python3 python3-venv), or name one: PYTHON=/path/to/python3"

  # Two demos in one directory would pull the environment from under each other.
  exec 9>"$directory/.prepare.lock"
  flock -n 9 || die "a demo is already running, or being prepared, in $directory." \
    "Stop it, or choose another directory: ./install.sh --demo --dir DIRECTORY"
  build_venv "$directory" "$SOURCE/$lock" "$python"
  use_new_venv "$directory"

  [ -z "$COMMAND_LOG" ] || rm -f "$COMMAND_LOG"
  cd "$SOURCE"
  local arguments=(--dir "$directory" --broker "$broker")
  [ -z "$seconds" ] || arguments+=(--seconds "$seconds")
  # exec: signals reach the demo itself. The lock's descriptor goes along.
  exec "$directory/venv/bin/python" -m demo "${arguments[@]}"
}

# Set DEMO_BROKER to the one that was asked for, or to the best to be had: before the
# environment is built, which takes a while.
choose_demo_broker() { # <mosquitto, amqtt or nothing>
  DEMO_BROKER=amqtt
  [ "$1" != amqtt ] || return 0
  if ! have_mosquitto && is_root && command -v apt-get >/dev/null; then
    # A subshell, for its trap, and because a failure leads to the other broker.
    (install_mosquitto_unstarted) >&2 || true
  fi
  if have_mosquitto; then
    DEMO_BROKER=mosquitto
  elif [ "$1" = mosquitto ]; then
    die "--broker mosquitto: Mosquitto is not installed." \
      "Install it (sudo apt-get install mosquitto), or take --broker amqtt, which needs no root."
  fi
}

# Debian keeps it where an unprivileged user's PATH does not lead.
have_mosquitto() { PATH=$PATH:/usr/sbin:/usr/local/sbin command -v mosquitto >/dev/null; }

# Debian starts a service as soon as it is installed; the demo has a broker of its
# own, and wants nothing on port 1883. Call in a subshell: it sets a trap of its own.
install_mosquitto_unstarted() {
  local policy=/usr/sbin/policy-rc.d own=
  # What the caller has made is the caller's to remove.
  COMMAND_LOG=
  [ -e "$policy" ] || own=$policy
  # shellcheck disable=SC2064 # its present value is meant
  trap "rm -f \"\$COMMAND_LOG\" $own" EXIT
  if [ -n "$own" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
  fi
  apt_install mosquitto
}

# ----------------------------------------------------------------------- install

install_all() {
  is_root || die "this needs root." "Run: sudo ./install.sh    (or, without root: ./install.sh --demo)"
  require_debian
  require_space "$PREFIX" "$INSTALL_MIN_MIB"
  require_space "$SPOOL" "$INSTALL_MIN_MIB"
  [ -e "$SOURCE/collector" ] || die "$SOURCE does not hold the programs." "Run it from a full checkout."
  take_lock
  # From here on nothing depends on where it was called.
  cd /

  step "Packages"
  apt_install python3 python3-venv sqlite3 procps

  step "User, directories"
  create_account
  create_directories

  step "Programs in $PREFIX"
  build_venv "$PREFIX" "$SOURCE/requirements.lock" /usr/bin/python3
  stage_code

  # With the new programs' own reader, and before anything that runs is touched.
  step "Settings"
  create_settings
  apply_settings
  if ! own_broker_given; then
    step "Mosquitto"
    set_up_mosquitto
  fi

  step "Start"
  stop_sluice
  swap_code
  write_wrapper
  mark_logs
  start_sluice
  conclude
}

# Not in /run/lock, where every user may leave a link to a file that root would then empty.
take_lock() {
  umask 077
  exec 9>/run/sluice-install.lock
  umask 022
  flock -n 9 || die "another install.sh is running." "Wait for it to end."
}

create_account() {
  getent group "$ACCOUNT" >/dev/null || groupadd --system "$ACCOUNT"
  getent passwd "$ACCOUNT" >/dev/null ||
    useradd --system --gid "$ACCOUNT" --home-dir "$SPOOL" --no-create-home \
      --shell /usr/sbin/nologin "$ACCOUNT"
}

create_directories() {
  install -d -m 0755 "$PREFIX"
  install -d -m 0750 -o root -g "$ACCOUNT" "$ETC"
  # setgid: every new file belongs to the group that may read it.
  install -d -m 2750 -o "$ACCOUNT" -g "$ACCOUNT" "$SPOOL" "$LOG"
  install -d -m 0750 -o "$ACCOUNT" -g "$ACCOUNT" "$RUN"
  # As left by a supervisord that root has run by hand.
  take_files "$LOG" '*.log' '*.log.*'
  # supervisord.conf finds everything beside itself.
  ln -sfn "$ETC" "$PREFIX/etc"
  ln -sfn "$LOG" "$PREFIX/log"
  ln -sfn "$RUN" "$PREFIX/run"
  ln -sfn app/supervisord.conf "$PREFIX/supervisord.conf"
}

# Copy what runs, and what an operator may want at hand, beside the running code.
stage_code() {
  local new=$PREFIX/app.new entry
  rm -rf "$new"
  mkdir "$new"
  for entry in "$SOURCE"/*; do
    case $(basename "$entry") in
      tests | bench | build | demo-data) continue ;;
    esac
    if [ -f "$entry" ] || [ -f "$entry/__init__.py" ] ||
      [ "$entry" = "$SOURCE/deploy" ] || [ "$entry" = "$SOURCE/docs" ]; then
      cp -R --no-preserve=ownership "$entry" "$new/"
    fi
  done
  find "$new" -name __pycache__ -type d -prune -exec rm -rf {} +
  chown -R root:root "$new"
  chmod -R u=rwX,go=rX "$new"
}

swap_code() {
  use_new_venv "$PREFIX"
  rm -rf "$PREFIX/app.old"
  [ ! -e "$PREFIX/app" ] || mv "$PREFIX/app" "$PREFIX/app.old"
  mv "$PREFIX/app.new" "$PREFIX/app"
  rm -rf "$PREFIX/app.old"
  # The user sluice cannot write here, so compile now and not at each start.
  (cd "$PREFIX/app" && "$PREFIX/venv/bin/python" -m compileall -q . >/dev/null) ||
    die "the programs do not compile." "Is the checkout complete? (git status)"
}

# supervisorctl looks for its configuration in the current directory before /etc, so
# the command that people type names ours.
write_wrapper() {
  if [ -e "$WRAPPER" ] && ! grep -qs "$PREFIX/supervisord.conf" "$WRAPPER"; then
    warn "$WRAPPER is not ours and stays; use $PREFIX/venv/bin/supervisorctl -c $PREFIX/supervisord.conf"
    return
  fi
  if [ -e /usr/bin/supervisorctl ]; then
    warn "supervisorctl now means Sluice's; Debian's is /usr/bin/supervisorctl"
  fi
  install -m 0755 "$PREFIX/app/deploy/supervisorctl.sh" "$WRAPPER.new"
  mv "$WRAPPER.new" "$WRAPPER"
}

# ------------------------------------------------------------------------- start

wait_until() { # <seconds> <command ...>
  local deadline=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$deadline" ] || return 1
    sleep 0.2
  done
}

sluice_stopped() { ! pgrep -u "$ACCOUNT" -f "^$PREFIX/venv" >/dev/null; }

# Orderly: every program finishes the batch in hand. Readings wait in the broker.
stop_sluice() {
  if systemd_runs && [ -e "$UNIT" ]; then systemctl stop sluice; fi
  if [ -S "$RUN/supervisor.sock" ] && supervisorctl_quietly shutdown; then
    wait_until "$STOP_TIMEOUT_S" sluice_stopped || true
  fi
  # What a killed supervisord has left behind.
  if ! sluice_stopped; then
    pkill -TERM -u "$ACCOUNT" -f "^$PREFIX/venv" || true
    wait_until 15 sluice_stopped || pkill -KILL -u "$ACCOUNT" -f "^$PREFIX/venv" || true
  fi
}

supervisorctl_quietly() { # <arguments ...>
  "$PREFIX/venv/bin/supervisorctl" -c "$PREFIX/supervisord.conf" "$@" >/dev/null 2>&1
}

start_sluice() {
  if systemd_runs; then
    install -m 0644 "$SOURCE/deploy/sluice.service" "$UNIT"
    systemctl daemon-reload
    quietly systemctl enable sluice || die_of_command "systemctl enable sluice failed" "See above."
    quietly systemctl start sluice ||
      die_of_command "the service does not start" "Its reason: journalctl -u sluice -n 30"
  else
    say "systemd does not run here: after a restart of the machine, start Sluice with"
    say "  sudo $PREFIX/app/deploy/start.sh"
    quietly "$PREFIX/app/deploy/start.sh" 9>&- ||
      die_of_command "supervisord does not start" "Its reason: tail $LOG/supervisord.log"
  fi
}

# --------------------------------------------------------------------- uninstall

uninstall() {
  is_root || die "this needs root." "Run: sudo ./install.sh --uninstall"
  take_lock
  stop_sluice
  if [ -e "$UNIT" ]; then
    systemctl disable sluice || true
    rm -f "$UNIT"
    systemctl daemon-reload || true
  fi
  if grep -qs "$PREFIX/supervisord.conf" "$WRAPPER"; then rm -f "$WRAPPER"; fi
  rm -rf "$PREFIX" "$RUN"
  say "Sluice is removed. These stay, and hold your settings and readings:"
  say "  $ETC  $SPOOL  $LOG  the user $ACCOUNT"
  [ ! -e "$DROP_IN" ] || say "Mosquitto stays too, with $DROP_IN (it may hold readings)."
}

# -------------------------------------------------------------------------- main

main() {
  local mode=install directory=$PWD/demo-data seconds='' broker=''
  while [ $# -gt 0 ]; do
    case $1 in
      --demo) mode=demo ;;
      --uninstall) mode=uninstall ;;
      --seconds | --dir | --broker)
        [ $# -ge 2 ] || die "$1 needs a value." "See ./install.sh --help"
        case $1 in
          --seconds) seconds=$2 ;;
          --dir) directory=$2 ;;
          --broker) broker=$2 ;;
        esac
        shift
        ;;
      --version)
        say "Sluice $(sed -nE 's/^version = "(.*)"$/\1/p' "$SOURCE/pyproject.toml")"
        exit 0
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      *) die "unknown argument: $1" "See ./install.sh --help" ;;
    esac
    shift
  done
  [[ -z $seconds || $seconds =~ ^[1-9][0-9]*$ ]] || die "--seconds $seconds: a whole number, please."
  [[ $broker =~ ^(|mosquitto|amqtt)$ ]] || die "--broker $broker: mosquitto or amqtt, please."
  case $mode in
    demo) demo "$directory" "$seconds" "$broker" ;;
    uninstall) uninstall ;;
    install) install_all ;;
  esac
}

main "$@"
