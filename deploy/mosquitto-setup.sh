# shellcheck shell=bash
# The Mosquitto of this machine; sourced by install.sh, whose functions and names it uses.
#
# A plant may have a broker here already. Whatever Debian's package has not put into its
# configuration makes it the plant's, and then nothing of it is changed, nor is it restarted: a
# listener more may be one too many for the port, and allow_anonymous is that of all listeners.
# Otherwise Sluice's drop-in is first tried by a second Mosquitto, with a port and directories of
# its own. The broker is restarted only with what has worked there, and gets back what it had if
# it does not take clients then. At any moment, what is on the disk is a configuration that works,
# so the machine may be switched off at any moment.

readonly MOSQUITTO=/usr/sbin/mosquitto
readonly MOSQUITTO_CONF=/etc/mosquitto/mosquitto.conf
readonly MOSQUITTO_LOG=/var/log/mosquitto/mosquitto.log
readonly BROKER_PORT=1883
# What stood in the drop-in's place, until the new one has proved itself; empty: nothing did.
# It does not end in .conf, so Mosquitto does not read it.
readonly FORMER_DROP_IN=$DROP_IN.former
# The sums of the drop-ins that were installed: another one was edited by the operator.
readonly DROP_IN_SUMS=$ETC/mosquitto-drop-in.sha256
readonly BROKER_START_S=10
readonly BROKER_STOP_S=60
# Longer than any trial: it ends by itself if the installer is killed meanwhile.
readonly TRIAL_LIMIT_S=30

set_up_mosquitto() {
  local plants ours=$SOURCE/deploy/mosquitto.conf
  # The package starts it, now and at each boot: it would take the port from another broker.
  if [ -n "$(missing_packages mosquitto)" ] && [ -z "$(foreign_listener)" ]; then
    apt_install mosquitto
  fi
  plants=$(signs_of_plants_broker)
  if [ -n "$plants" ]; then
    leave_plants_broker "$plants"
  elif drop_in_was_edited; then
    say "$DROP_IN was edited here: it stays as it is."
    rm -f "$FORMER_DROP_IN"
    start_where_none_answers broker_answers "$(broker_port)"
  elif [ -e "$FORMER_DROP_IN" ] || ! have_same_settings "$DROP_IN" "$ours"; then
    change_drop_in
  else
    # Other words in the comments are no reason to restart it.
    cmp -s "$DROP_IN" "$ours" || put_drop_in "$ours"
    start_where_none_answers broker_accepts "$BROKER_PORT"
  fi
  warn_of_per_listener_settings
}

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

drop_in_was_edited() {
  [ -e "$DROP_IN" ] &&
    ! cmp -s "$DROP_IN" "$SOURCE/deploy/mosquitto.conf" &&
    ! cmp -s "$DROP_IN" "$PREFIX/app/deploy/mosquitto.conf" &&
    ! grep -qsxF "$(drop_in_sum "$DROP_IN")" "$DROP_IN_SUMS"
}

have_same_settings() { # <file> <file>
  [ "$(settings_in "$1" | cut -d: -f3-)" = "$(settings_in "$2" | cut -d: -f3-)" ]
}

drop_in_sum() { sha256sum <"$1" | cut -d' ' -f1; } # <file>

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

# ----------------------------------------------------------------- our drop-in

change_drop_in() {
  local wanted=$SOURCE/deploy/mosquitto.conf
  try_drop_in "$wanted" || die_with_its_words \
    "Mosquitto does not work with $wanted; the broker was not touched." \
    "Correct that file, or set MQTT_BROKER in $ETC/sluice.env to a broker of your own."
  # One that is there already is of a run that was killed: it is what last worked.
  if [ ! -e "$FORMER_DROP_IN" ]; then
    if [ -e "$DROP_IN" ]; then
      replace_file "$FORMER_DROP_IN" <"$DROP_IN"
    else
      replace_file "$FORMER_DROP_IN" </dev/null
    fi
  fi
  put_drop_in "$wanted"
  if restart_mosquitto && wait_until "$BROKER_START_S" broker_accepts; then
    rm -f "$FORMER_DROP_IN"
    say "Mosquitto takes clients on 127.0.0.1:$BROKER_PORT"
  else
    take_drop_in_back
  fi
}

put_drop_in() { # <file>
  {
    cat "$DROP_IN_SUMS" 2>/dev/null || true
    drop_in_sum "$1"
  } | sort -u | replace_file "$DROP_IN_SUMS"
  replace_file "$DROP_IN" <"$1"
}

# By rename, and on the disk: after a power cut it is the old one or the new one.
replace_file() { # <file>; the content is standard input
  cat >"$1.new"
  chmod 0644 "$1.new"
  sync "$1.new"
  mv -f "$1.new" "$1"
  sync "$(dirname "$1")"
}

take_drop_in_back() {
  local words outcome
  words=$(cat "$COMMAND_LOG")
  if [ -s "$FORMER_DROP_IN" ]; then
    mv -f "$FORMER_DROP_IN" "$DROP_IN"
  else
    rm -f "$DROP_IN"
  fi
  outcome="It runs again as before; $DROP_IN was taken back."
  # As before may be without our listener: that it answers is enough.
  if restart_mosquitto && wait_until "$BROKER_START_S" service_answers; then
    rm -f "$FORMER_DROP_IN"
  else
    outcome="$DROP_IN was taken back, but Mosquitto does not start without it either."
  fi
  printf '%s\n' "$words" >"$COMMAND_LOG"
  die_with_its_words "Mosquitto does not take clients on port $BROKER_PORT with Sluice's settings. $outcome" \
    "Does another program have a port that it needs? Then free that port, or use that broker:" \
    "MQTT_BROKER and MQTT_PORT in $ETC/sluice.env. Then run this again."
}

die_with_its_words() { # <what happened> [what to do next ...]
  printf '\nMosquitto says:\n' >&2
  grep -v '^[[:space:]]*$' "$COMMAND_LOG" | tail -n 12 | sed 's/^/  | /' >&2 || true
  die "$@"
}

# Whether a second Mosquitto takes clients with this drop-in; what it says is in $COMMAND_LOG.
# The same configuration otherwise, and as the same user; ports and directories are its own.
try_drop_in() { # <drop-in>
  local place port process result=0
  quietly true # the file
  place=$(mktemp -d /tmp/sluice-mosquitto.XXXXXX)
  port=$(unused_ports)
  mkdir "$place/conf.d"
  {
    grep -vE '^[[:space:]]*(pid_file|persistence_location|log_dest|include_dir)[[:space:]]' "$MOSQUITTO_CONF"
    printf 'persistence_location %s/\nlog_dest stderr\ninclude_dir %s/conf.d\n' "$place" "$place"
  } >"$place/mosquitto.conf"
  awk -v port="$port" '$1 == "listener" { $2 = port++ } { print }' "$1" >"$place/conf.d/sluice.conf"
  chown -R mosquitto: "$place"
  # Without the descriptor of the installer's lock, which it would keep after a kill.
  timeout -k 2 "$TRIAL_LIMIT_S" "$MOSQUITTO" -c "$place/mosquitto.conf" \
    >"$COMMAND_LOG" 2>&1 </dev/null 9>&- &
  process=$!
  wait_until "$BROKER_START_S" trial_is_decided "$port" "$process" || true
  accepts_on "$port" || result=1
  kill "$process" 2>/dev/null || true
  wait "$process" || true
  rm -rf "$place"
  return "$result"
}

trial_is_decided() { accepts_on "$1" || ! kill -0 "$2" 2>/dev/null; } # <port> <process>

# A port below the range of outgoing connections that is free, with the next ones.
unused_ports() {
  local port
  until
    port=$((20000 + RANDOM % 10000))
    [ -z "$(for n in 0 1 2 3; do listening_sockets $((port + n)); done)" ]
  do :; done
  say "$port"
}

# ----------------------------------------------------------- starting, asking

# The return code with which a broker answers the CONNECT of a client without a name and a
# password (0 is welcome, 4 and 5 are not); nothing where no broker answers.
connect_code() { # <port>
  local answer
  # shellcheck disable=SC2016 # $1 is for the other bash
  answer=$(timeout 3 bash -c 'exec 3<>"/dev/tcp/localhost/$1" &&
      printf "\020\014\000\004MQTT\004\002\000\074\000\000" >&3 && head -c 4 <&3' bash "$1" 2>/dev/null |
    od -An -tx1 | tr -d ' \n' || true)
  [[ ! $answer =~ ^2002..(..)$ ]] || say "$((16#${BASH_REMATCH[1]}))"
}

accepts_on() { [ "$(connect_code "$1")" = 0 ]; } # <port>
broker_accepts() { accepts_on "$BROKER_PORT"; }
broker_answers() { (exec 3<>"/dev/tcp/127.0.0.1/$(broker_port)") 2>/dev/null; }
service_answers() { service_runs && [ -n "$(connect_code "$BROKER_PORT")" ]; }

# A broker that runs, and is slow to answer (it may be reading its queue), is not restarted.
start_where_none_answers() { # <how to ask it> <port>
  if ! service_runs || ! wait_until "$BROKER_START_S" "$1"; then
    restart_mosquitto || die_with_its_words "Mosquitto does not start." \
      "More: tail $MOSQUITTO_LOG, or journalctl -u mosquitto -n 20"
    wait_until "$BROKER_START_S" "$1" || die "Mosquitto does not answer on port $2." \
      "Its reason: tail $MOSQUITTO_LOG" \
      "Another program on that port? ss -ltnp 'sport = :$2'"
  fi
  say "Mosquitto answers on 127.0.0.1:$2"
}

# Restart it, or start it; what it says is in $COMMAND_LOG if that fails.
restart_mosquitto() {
  local begin size
  quietly true # the file
  begin=$(date +%s)
  size=$(stat -c %s "$MOSQUITTO_LOG" 2>/dev/null || say 0)
  if systemd_runs; then
    systemctl --quiet enable mosquitto 2>/dev/null || true
    # After some failures in a row systemd would refuse to start it at all.
    systemctl reset-failed mosquitto 2>/dev/null || true
    systemctl restart mosquitto >"$COMMAND_LOG" 2>&1 || true
  else
    start_mosquitto_alone || return 1
  fi
  wait_until "$BROKER_START_S" restart_is_decided || true
  if systemd_runs; then
    # What it says before it has a log.
    journalctl -u mosquitto -t mosquitto --since "@$begin" -o cat --no-pager -q \
      >>"$COMMAND_LOG" 2>/dev/null || true
  fi
  [ ! -r "$MOSQUITTO_LOG" ] || tail -c "+$((size + 1))" "$MOSQUITTO_LOG" >>"$COMMAND_LOG"
  service_runs
}

restart_is_decided() { ! service_runs || [ -n "$(connect_code "$(broker_port)")" ]; }

start_mosquitto_alone() {
  local pid
  pid=$(service_process)
  # By its id: the plant may have other brokers of the same user. It saves its queue before it
  # ends; only then may the next one read it.
  if [ -n "$pid" ]; then
    kill -TERM "$pid" || true
    if ! wait_until "$BROKER_STOP_S" mosquitto_stopped; then
      say "the running Mosquitto (process $pid) does not stop" >"$COMMAND_LOG"
      return 1
    fi
  fi
  # Not the init script: it writes, as root, the pid file that Mosquitto then cannot
  # write, and Mosquitto ends. The directory is the unit's business otherwise.
  install -d -m 0755 -o mosquitto -g mosquitto /run/mosquitto
  rm -f /run/mosquitto/mosquitto.pid
  # By its pid file: another Mosquitto on this machine (a demo's) is not this one.
  start-stop-daemon --start --quiet --background --pidfile /run/mosquitto/mosquitto.pid \
    --exec "$MOSQUITTO" -- -c "$MOSQUITTO_CONF" 9>&- >"$COMMAND_LOG" 2>&1 || return 1
  # It returns before the program runs; one that has ended already is as good.
  wait_until 2 service_runs || true
}

service_runs() { [ -n "$(service_process)" ]; }

mosquitto_stopped() { ! service_runs; }
