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

# ----------------------------------------------------------------- our drop-in

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
