# shellcheck shell=bash
# Sourced by install.sh, with mosquitto-setup.sh: whose the broker of this machine is, and what a
# plant is told whose broker it is. Nothing here changes anything.

# ------------------------------------------------------- whose broker is it?

# What shows that the broker is the plant's: a line each. Nothing: it is ours to set up.
signs_of_plants_broker() {
  foreign_service
  foreign_settings
  foreign_listener
  # Without MQTT_BROKER this is a broker on this machine that the operator has named.
  if [ ! -e "$DROP_IN" ] && [ "$(broker_port)" != "$BROKER_PORT" ]; then
    say "$ETC/sluice.env: MQTT_PORT=$(broker_port)"
  fi
}

broker_port() {
  local port
  port=$(setting MQTT_PORT)
  printf '%s\n' "${port:-$BROKER_PORT}"
}

# A service that does not run Debian's command, or is not to run at all.
foreign_service() {
  local command
  systemd_runs || return 0
  if [ "$(systemctl show -p LoadState --value mosquitto)" = masked ]; then
    say "mosquitto.service is masked"
    return 0
  fi
  command=$(systemctl show -p ExecStart --value mosquitto |
    sed -nE 's/.*argv\[\]=([^;]*[^; ]) *;.*/\1/p')
  case $command in
    '' | "$MOSQUITTO -c $MOSQUITTO_CONF") ;;
    *) say "mosquitto.service runs: $command" ;;
  esac
}

# Settings that are neither Debian's nor ours, as FILE:LINE:SETTING, and Debian's that are gone.
foreign_settings() {
  local line packaged=no main=
  if [ ! -e "$MOSQUITTO_CONF" ]; then
    [ -n "$(missing_packages mosquitto)" ] || say "$MOSQUITTO_CONF is missing"
    return 0
  fi
  if is_as_packaged "$MOSQUITTO_CONF"; then packaged=yes; fi
  while IFS= read -r line; do
    case $line in
      "$DROP_IN":*) ;;
      "$MOSQUITTO_CONF":*)
        main+=${line#"$MOSQUITTO_CONF":*:}$'\n'
        if [ "$packaged" = no ] && ! is_debians "${line#"$MOSQUITTO_CONF":*:}"; then say "$line"; fi
        ;;
      *) say "$line" ;;
    esac
  done < <(broker_settings)
  [ "$packaged" = no ] || return 0
  while IFS= read -r line; do
    grep -qxF -- "$line" <<<"$main" || say "$MOSQUITTO_CONF: without \"$line\""
  done < <(debians_settings)
}

is_as_packaged() { # <configuration file of the package mosquitto>
  local sum
  # shellcheck disable=SC2016 # ${Conffiles} is for dpkg-query
  sum=$(dpkg-query -W -f='${Conffiles}\n' mosquitto 2>/dev/null |
    awk -v file="$1" '$1 == file { print $2 }' || true)
  [ -n "$sum" ] && [ "$(md5sum <"$1" | cut -d' ' -f1)" = "$sum" ]
}

# For a file in which only comments were changed.
debians_settings() {
  cat <<END
pid_file /run/mosquitto/mosquitto.pid
persistence true
persistence_location /var/lib/mosquitto/
log_dest file $MOSQUITTO_LOG
include_dir /etc/mosquitto/conf.d
END
}

is_debians() { debians_settings | grep -qxF -- "$1"; } # <setting>

# FILE:LINE:SETTING of each setting, in the order in which Mosquitto reads them.
broker_settings() {
  local line file
  while IFS= read -r line; do
    printf '%s\n' "$line"
    [[ ${line#*:*:} =~ ^[[:space:]]*include_dir[[:space:]]+(.*[^/[:space:]]) ]] || continue
    while IFS= read -r file; do
      settings_in "$file"
    done < <(find "${BASH_REMATCH[1]}" -maxdepth 1 -name '*.conf' 2>/dev/null | LC_ALL=C sort -f)
  done < <(settings_in "$MOSQUITTO_CONF")
}

settings_in() { # <file>
  [ -r "$1" ] || return 0
  awk '{ sub(/[ \t\r]+$/, "") } !/^[ \t]*(#|$)/ { print FILENAME ":" FNR ":" $0 }' "$1"
}

# The process of Debian's service; nothing where it does not run.
service_process() {
  local pid
  [ -x "$MOSQUITTO" ] || return 0
  if systemd_runs; then
    pid=$(systemctl show -p MainPID --value mosquitto)
    [ "${pid:-0}" -eq 0 ] || say "$pid"
  else
    # Of this namespace: on a container's host this would find the container's as well. And not
    # the dead that no parent has buried (a container without an init).
    pgrep --ns $$ --nslist pid,mnt --runstates D,R,S,T,t,I -o -f -x \
      "($MOSQUITTO|mosquitto) (-d )?-c $MOSQUITTO_CONF( -d)?" || true
  fi
}

# Another program that listens on the broker's port, whatever its address: a line.
foreign_listener() {
  local inode service holder name
  service=$(service_process)
  for inode in $(listening_sockets "$BROKER_PORT"); do
    if [ -n "$service" ] && [ -n "$(holds "$service" "$inode")" ]; then continue; fi
    holder=$(holds '[0-9]*' "$inode" | cut -d/ -f3)
    name=$(cat "/proc/${holder:-none}/comm" 2>/dev/null) || name='a program that is not seen from here'
    say "port $BROKER_PORT: in use by $name${holder:+ (process $holder)}, not by Debian's mosquitto.service"
    return 0
  done
}

listening_sockets() { # <port>
  local tables=(/proc/net/tcp)
  [ ! -r /proc/net/tcp6 ] || tables+=(/proc/net/tcp6)
  awk -v port="$(printf ':%04X$' "$1")" '$4 == "0A" && $2 ~ port { print $10 }' "${tables[@]}"
}

holds() { # <process id or pattern> <socket's inode>: the descriptor
  # Processes come and go while it looks; the pattern is to be expanded.
  # shellcheck disable=SC2086
  find /proc/$1/fd -lname "socket:\[$2\]" -print -quit 2>/dev/null || true
}

# --------------------------------------------------------- the plant's broker

leave_plants_broker() { # <signs>
  local port=$BROKER_PORT code
  port=$(broker_port)
  say "The broker on this machine is the plant's own. Nothing of it is changed:"
  # A bridge's password, or a plugin's, is not for a terminal.
  head -n 12 <<<"$1" | sed -E 's/^/  /
    s/:[[:space:]]*((remote_)?password|bridge_psk|(auth|plugin)_opt_[^[:space:]]+)[[:space:]].*/:\1 .../'
  code=$(connect_code "$port")
  case $code in
    0) say "It takes clients without a password on localhost:$port." ;;
    4 | 5) say "It answers on localhost:$port, and wants a user and a password." ;;
    '') say "It does not speak MQTT on localhost:$port (not running, TLS, another port?)." ;;
    *) say "It refuses a client on localhost:$port (CONNACK code $code)." ;;
  esac
  say_what_is_needed "$code"
  warn_of_opened_listeners
}

say_what_is_needed() { # <CONNACK code of a client without a name>
  say
  say 'What the collector needs of it (docs/operations.md, "The plant'\''s own broker"):'
  if [ "$1" != 0 ] && [ -z "$(setting MQTT_USERNAME)" ]; then
    cat <<END
- A user that may subscribe to the sensors' topics:
    mosquitto_passwd PASSWORD_FILE_OF_THE_BROKER sluice
    systemctl reload mosquitto                       (reads it; no restart)
    install -m 0400 -o $ACCOUNT /dev/stdin $ETC/mqtt-password
  and in $ETC/sluice.env (MQTT_TLS_CA_FILE too, where it wants TLS):
    MQTT_BROKER=localhost
    MQTT_PORT=$(broker_port)
    MQTT_USERNAME=sluice
    MQTT_PASSWORD_FILE=$ETC/mqtt-password
  then: sudo supervisorctl restart collector
END
  fi
  cat <<END
- So that nothing is lost while Sluice, or the broker, is away, in its own
  configuration (why: $SOURCE/deploy/mosquitto.conf):
$(recommended persistence "keeps what is queued over a restart")
$(recommended autosave_interval "default 1800: what a kill loses")
$(recommended max_queued_messages "default 1000; what comes beyond is dropped")
$(recommended max_queued_bytes "the same in bytes; memory: twice that")
$(recommended max_inflight_messages "default 20: slow on a slow disk")
END
}

# The setting as our own drop-in has it, and why.
recommended() { # <name> <why>
  printf '    %-28s %s\n' "$(grep -E "^$1 " "$SOURCE/deploy/mosquitto.conf")" "$2"
}

# allow_anonymous is that of every listener, unless it is given per listener. Ours is older than
# the plant's listener then, and sensors may have come to need it, so it is not taken back here.
warn_of_opened_listeners() {
  local line opened
  [ -e "$DROP_IN" ] || return 0
  opened=$(broker_settings | awk -v ours="$DROP_IN:" '
    { setting = $0; sub(/^[^:]*:[0-9]+:[ \t]*/, "", setting); split(setting, word, /[ \t]+/) }
    word[1] == "allow_anonymous" { last = word[2] == "true" && index($0, ours) == 1 ? $0 : "" }
    word[1] == "per_listener_settings" && word[2] == "true" { exit }
    word[1] == "listener" || word[1] == "port" { at = index($0, ours) == 1 ? 0 : ++count; lines[at] = $0 }
    # Without a certificate, or a key, no client comes as far as a name.
    word[1] == "require_certificate" && word[2] == "true" || word[1] == "psk_hint" { delete lines[at] }
    END {
      if (last == "") exit
      for (at = 1; at <= count; at++) if (at in lines) found = found "\n" lines[at]
      if (found != "") print last found
    }')
  [ -n "$opened" ] || return 0
  warn "$(head -n 1 <<<"$opened")"
  {
    say "  holds for every listener, so these take clients without a password as well:"
    tail -n +2 <<<"$opened" | sed 's/^/    /'
    say "  Replace that line by \"allow_anonymous false\" and a password_file (the recipe is in"
    say "  the same file), give the collector a password, then: systemctl restart mosquitto"
  } >&2
}

warn_of_per_listener_settings() {
  local given
  given=$(broker_settings | grep -E ':[[:space:]]*per_listener_settings[[:space:]]+true' || true)
  [ -z "$given" ] || warn "$given: with Mosquitto 2.0.12 and later (2.0.11 is not" \
    "affected) what it queues for Sluice while Sluice is away never comes." \
    "Change to one of the two recipes in $SOURCE/deploy/mosquitto.conf."
}
