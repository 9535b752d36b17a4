# shellcheck shell=bash
# The broker's part of install.sh, which sources this file and has the other functions.
#
# A broker that is set up already is the plant's: neither its files nor the running
# broker are touched. Only where Mosquitto is as Debian ships it, it gets our drop-in:
# tried first, put there in one step, and taken back when the broker does not come up.

readonly MOSQUITTO_CONF=/etc/mosquitto/mosquitto.conf
readonly SHIPPED_DROP_IN=$SOURCE/deploy/mosquitto.conf
# installed: the drop-in as it was last put there. pending/: a change is under way, and
# the broker may still run with the configuration before; former: the drop-in before.
readonly DROP_IN_STATE=$ETC/mosquitto
readonly DROP_IN_PENDING=$DROP_IN_STATE/pending
# A fixed place: what a killed run leaves there, the next one removes.
readonly TRIAL=/run/sluice-mosquitto-trial
readonly TRIAL_TIMEOUT_S=10
# It reads a queue of up to 256 MiB before it serves.
readonly MOSQUITTO_START_TIMEOUT_S=30
readonly MOSQUITTO_STOP_TIMEOUT_S=15
readonly MQTT_ANSWER_TIMEOUT_S=2

set_up_mosquitto() {
  local own port
  port=$(broker_port)
  own=$(foreign_mosquitto_settings)
  warn_of_per_listener_settings
  warn_of_open_listeners
  # So that it is known for ours when this release is gone from $PREFIX.
  if [ -e "$DROP_IN" ] && [ ! -e "$DROP_IN_PENDING" ] && drop_in_is_ours; then
    record_drop_in "$DROP_IN"
  fi
  if [ -n "$own" ]; then
    leave_the_plants_broker "$own"
    return
  fi
  if [ -e "$DROP_IN" ] && ! drop_in_is_ours; then
    say "$DROP_IN was edited here: it stays as it is."
  elif [ -e "$DROP_IN_PENDING" ] || ! cmp -s "$DROP_IN" "$SHIPPED_DROP_IN"; then
    change_drop_in
  fi
  if ! broker_answers "$port"; then
    remember_the_log
    if ! restart_mosquitto || ! wait_for_mosquitto "$port"; then
      show_what_mosquitto_said
      die "Mosquitto does not answer on port $port." \
        "Its log: /var/log/mosquitto/mosquitto.log" \
        "Is that the port of its listener? grep -r listener /etc/mosquitto"
    fi
  fi
  say "Mosquitto answers on 127.0.0.1:$port"
}

broker_port() {
  local port
  port=$(setting MQTT_PORT)
  printf '%s\n' "${port:-1883}"
}

# ------------------------------------------------------------ whose broker is it?

# What is set here and not by Debian or by us, a line each; nothing where there is none.
foreign_mosquitto_settings() {
  local place directive port unit all expected
  expected=$(debian_directives)
  all=$(mosquitto_directives)
  while IFS=$'\t' read -r place directive; do
    if [ -z "$place" ] || [ "${place%:*}" = "$DROP_IN" ]; then continue; fi
    if [ "${place%:*}" != "$MOSQUITTO_CONF" ] || ! grep -qxF "$directive" <<<"$expected"; then
      printf '%s: %s\n' "$place" "$directive"
    fi
  done <<<"$all"
  # A setting that is gone is a change as well.
  while IFS= read -r directive; do
    cut -f 2 <<<"$all" | grep -xF "$directive" >/dev/null ||
      printf '%s: without "%s"\n' "$MOSQUITTO_CONF" "$directive"
  done < <(grep -vx 'pid_file .*' <<<"$expected")
  for unit in /etc/systemd/system/mosquitto.service{,.d/*.conf}; do
    grep -HnsE '^[[:space:]]*ExecStart=.+' "$unit" |
      grep -v ":ExecStart=/usr/sbin/mosquitto -c $MOSQUITTO_CONF\$" || true
  done
  while read -r port; do
    foreign_listener "$port"
  done < <(sed -nE 's/^listener ([0-9]+).*/\1/p' "$SHIPPED_DROP_IN" | sort -u)
}

# As in the package of Debian 12; Debian 11 had the pid file in /var/run.
debian_directives() {
  printf '%s\n' 'pid_file /run/mosquitto/mosquitto.pid' \
    'pid_file /var/run/mosquitto/mosquitto.pid' \
    'persistence true' 'persistence_location /var/lib/mosquitto/' \
    'log_dest file /var/log/mosquitto/mosquitto.log' 'include_dir /etc/mosquitto/conf.d'
}

# All that Mosquitto reads, in its order: FILE:LINE, a tab, the directive.
mosquitto_directives() {
  local place directive file
  while IFS=$'\t' read -r place directive; do
    printf '%s\t%s\n' "$place" "$directive"
    [[ $directive == 'include_dir '* ]] || continue
    # As Mosquitto lists it: hidden files too, sorted by their bytes.
    while IFS= read -r file; do
      directives_of "$file"
    done < <(find "${directive#include_dir }" -mindepth 1 -maxdepth 1 -name '?*.conf' 2>/dev/null |
      LC_ALL=C sort)
  done < <(directives_of "$MOSQUITTO_CONF")
}

directives_of() { # <file>
  [ -r "$1" ] || return 0
  awk '{ sub(/[ \t\r]+$/, ""); sub(/^[ \t]+/, ""); gsub(/ +/, " ") }
    /^(#|$)/ { next } { print FILENAME ":" FNR "\t" $0 }' "$1"
}

# Name the processes that would keep our listener from its port, and are not Mosquitto's service.
foreign_listener() { # <port>
  local uid inode pid service
  service=$(mosquitto_pids)
  while read -r uid inode; do
    pid=$(find /proc/[0-9]*/fd -lname "socket:\\[$inode\\]" 2>/dev/null |
      head -n 1 | cut -d / -f 3) || true
    # In a container not even root may see another user's descriptors.
    if [ -z "$pid" ] && [ "$uid" = "$(id -u mosquitto)" ]; then pid=$(head -n 1 <<<"$service"); fi
    if [ -z "$pid" ] || ! grep -qx "$pid" <<<"$service"; then
      printf 'port %s: taken by %s\n' "$1" "$(describe_process "$pid")"
    fi
  done < <(
    # 0A: it listens. Only the addresses which 127.0.0.1 collides with.
    cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | awk -v port="$(printf '%04X' "$1")" '
      $4 == "0A" && $2 ~ "^(0+|0100007F|0+FFFF00000100007F):" port "$" { print $8, $10 }'
  )
}

describe_process() { # <pid, or nothing>
  local name=''
  [ -z "$1" ] || read -r name 2>/dev/null <"/proc/$1/comm" || true
  printf '%s\n' "${name:-an unknown process}${1:+ (process $1)}"
}

indented() { # <lines>
  printf '%s\n' "$1" | sed 's/^/  /'
}

leave_the_plants_broker() { # <what is its own, a line each>
  # A run that was cut off may have left ours there: it opens what is not ours.
  if drop_in_is_unproven; then put_former_drop_in_back; fi
  rm -rf "$DROP_IN_PENDING"
  cat <<END
Mosquitto is set up here by others, so it is taken for the plant's own broker:
its files and the running broker stay as they are. What is not as Debian has it:
$(indented "$1" | head -n 12)
What Sluice needs of that broker:
  a listener it can reach, a user who may subscribe to MQTT_TOPIC, and in its
  configuration (with the reasons: $SOURCE/deploy/mosquitto.conf)
  persistence true                without it a restart loses what is queued
  autosave_interval 5             a kill or power cut loses 5 s of it, not 1800
  max_queued_messages 1000000     beyond it (1,000 unless set) messages are
  max_queued_bytes 268435456      acknowledged to the sensor, then dropped
  max_inflight_messages 1000      with 20, a slow disk holds everything up
Then name it in $ETC/sluice.env:
  MQTT_BROKER=localhost
  MQTT_PORT=$(plants_port "$1")
  MQTT_USERNAME=sluice
  MQTT_PASSWORD_FILE=$ETC/mqtt-password
and: sudo supervisorctl restart all. Step by step: docs/operations.md, "The
plant's own broker".
END
  local port
  port=$(broker_port)
  if broker_answers "$port"; then
    say "A broker answers on 127.0.0.1:$port, which Sluice tries until you name one."
  else
    warn "no broker answers on 127.0.0.1:$port, where Sluice tries until you name one."
  fi
}

# A guess: the first of the plant's listeners.
plants_port() { # <what is its own>
  local port
  port=$(sed -nE 's/^[^ ]+: (listener|port) ([0-9]+).*/\2/p' <<<"$1" | head -n 1)
  printf '%s\n' "${port:-$(broker_port)}"
}

# ---------------------------------------------------------------------- warnings

warn_of_per_listener_settings() {
  mosquitto_directives | cut -f 2 | grep -x 'per_listener_settings true' >/dev/null || return 0
  warn "per_listener_settings is true. With Mosquitto 2.0.12 and later (2.0.11 is not" \
    "affected) what it queues for Sluice while Sluice is away never comes." \
    "Change to one of the two recipes in $SOURCE/deploy/mosquitto.conf."
}

warn_of_open_listeners() {
  local open
  open=$(listeners_opened_by_drop_in)
  [ -n "$open" ] || return 0
  warn "anonymous clients may connect to these listeners, because of our drop-in:"
  indented "$open" >&2
  printf '  %s\n' "Close them: recipe (2) in $SOURCE/deploy/mosquitto.conf," \
    "in $DROP_IN, then restart Mosquitto." >&2
}

# The listeners that "allow_anonymous true" of the drop-in opens, apart from its own on this
# machine's loopback. Without per_listener_settings the last such line counts, for all of them.
listeners_opened_by_drop_in() {
  mosquitto_directives | awk -F '\t' -v drop_in="$DROP_IN:" -v ours='listener 1883 127.0.0.1' '
    $2 == "per_listener_settings true" { each = 1 }
    $2 ~ /^listener / || $2 ~ /^port / { n++; place[n] = $1; text[n] = $2 }
    $2 == "require_certificate true" { certified[n] = 1 }
    $2 ~ /^allow_anonymous / {
      all = 0; own[n] = 0
      if ($2 == "allow_anonymous true" && index($1, drop_in) == 1) { all = own[n] = $1 }
    }
    END {
      for (i = 1; i <= n; i++) {
        why = each ? own[i] : all
        if (!why || certified[i] || (text[i] == ours && index(place[i], drop_in) == 1)) continue
        print place[i] ": " text[i] " (" why ": allow_anonymous true)"
      }
    }'
}

# ------------------------------------------------------------------- the drop-in

drop_in_is_ours() {
  local known
  for known in "$SHIPPED_DROP_IN" "$PREFIX/app/deploy/mosquitto.conf" \
    "$DROP_IN_STATE/installed" "$DROP_IN_PENDING/former"; do
    if cmp -s "$DROP_IN" "$known"; then return 0; fi
  done
  return 1
}

# Every step may be the last one, and the machine may restart after it: the configuration
# is always either the former or the new one, which was tried, and "pending" stays until
# the broker serves with the new one.
change_drop_in() {
  recover_from_a_cut_off_change
  try_drop_in
  install -d -m 0755 "$(dirname "$DROP_IN")"
  begin_pending
  record_drop_in "$SHIPPED_DROP_IN"
  put_file "$SHIPPED_DROP_IN" "$DROP_IN"
  remember_the_log
  if restart_mosquitto && wait_for_mosquitto "$(listener_port)"; then
    rm -rf "$DROP_IN_PENDING"
    return
  fi
  show_what_mosquitto_said
  put_former_drop_in_back
  local now="Mosquitto runs again with the configuration before."
  if ! restart_mosquitto || ! wait_for_mosquitto "$(listener_port)"; then
    now="Nor does it come up with the configuration before: /var/log/mosquitto/mosquitto.log"
  fi
  rm -rf "$DROP_IN_PENDING"
  die "Mosquitto does not come up with $DROP_IN, which was taken back." "$now" \
    "Its reason is above; remove it, then run this again." \
    "Or use another broker: MQTT_BROKER=HOST ./install.sh"
}

# Where a run was ended between the change and the look at the broker, and that is down: it has
# to come up before anything else is tried, which may fail as well.
recover_from_a_cut_off_change() {
  if drop_in_is_unproven && ! broker_answers "$(listener_port)"; then
    put_former_drop_in_back
    restart_mosquitto || true
  fi
}

# The run that put it there did not live to see the broker serve with it.
drop_in_is_unproven() {
  [ -e "$DROP_IN_PENDING" ] && cmp -s "$DROP_IN" "$DROP_IN_STATE/installed"
}

listener_port() { sed -nE 's/^listener ([0-9]+).*/\1/p' "$SHIPPED_DROP_IN" | head -n 1; }

begin_pending() {
  if drop_in_is_unproven; then return; fi
  rm -rf "$DROP_IN_PENDING" "$DROP_IN_PENDING.new"
  mkdir -p "$DROP_IN_PENDING.new"
  if [ -e "$DROP_IN" ]; then put_file "$DROP_IN" "$DROP_IN_PENDING.new/former"; fi
  mv "$DROP_IN_PENDING.new" "$DROP_IN_PENDING"
  sync "$DROP_IN_STATE"
}

record_drop_in() { # <the file that is, or will be, the drop-in>
  mkdir -p "$DROP_IN_STATE"
  cmp -s "$1" "$DROP_IN_STATE/installed" || put_file "$1" "$DROP_IN_STATE/installed"
}

# Mosquitto reads *.conf only, so it never sees a half-written one.
put_file() { # <from> <to>
  install -m 0644 "$1" "$2.new"
  sync "$2.new"
  mv "$2.new" "$2"
  sync "$(dirname "$2")"
}

put_former_drop_in_back() {
  if [ -e "$DROP_IN_PENDING/former" ]; then
    put_file "$DROP_IN_PENDING/former" "$DROP_IN"
    record_drop_in "$DROP_IN_PENDING/former"
  else
    rm -f "$DROP_IN"
  fi
}

# Start a Mosquitto with the new configuration, on other ports and files, and let it answer.
try_drop_in() {
  local attempt port
  for attempt in 1 2 3; do
    port=$((20000 + RANDOM % 10000))
    if trial_runs "$port"; then
      rm -rf "$TRIAL"
      return
    fi
    # Another program was quicker on that port: it is no fault of the configuration.
    grep -qs 'Address already in use' "$TRIAL/said" "$TRIAL/log" || break
  done
  # Which of the two files has it depends on how far Mosquitto came.
  { cat "$TRIAL/said" "$TRIAL/log" 2>/dev/null || true; } | tail -n 8 |
    sed "s|$TRIAL|/etc/mosquitto|g; s/^/  | /" >&2
  rm -rf "$TRIAL"
  die "Mosquitto does not start with $SHIPPED_DROP_IN (tried on port $port, attempt $attempt)." \
    "Nothing was changed; the running broker was not touched. Its reason is above." \
    "Is the file changed? (git status) Or is the disk full? (df -h)"
}

trial_runs() { # <first port>
  local pid result=0
  rm -rf "$TRIAL"
  install -d -m 0750 -o mosquitto -g mosquitto "$TRIAL" "$TRIAL/conf.d" "$TRIAL/data"
  sed -E "s|^include_dir .*|include_dir $TRIAL/conf.d|; s|^pid_file .*|pid_file $TRIAL/pid|
    s|^persistence_location .*|persistence_location $TRIAL/data/|
    s|^log_dest file .*|log_dest file $TRIAL/log|" "$MOSQUITTO_CONF" >"$TRIAL/mosquitto.conf"
  # In the same lines, so that what Mosquitto says of them fits.
  awk -v port="$1" '/^listener / { $2 = port++ } { print }' "$SHIPPED_DROP_IN" \
    >"$TRIAL/conf.d/sluice.conf"
  # It ends with us. As another user at once: a change of users would undo that.
  setpriv --reuid=mosquitto --regid=mosquitto --init-groups --pdeathsig=KILL \
    /usr/sbin/mosquitto -c "$TRIAL/mosquitto.conf" >"$TRIAL/said" 2>&1 </dev/null 9>&- &
  pid=$!
  wait_until "$TRIAL_TIMEOUT_S" trial_is_decided "$pid" "$1" || true
  if ! broker_answers "$1" || ! kill -0 "$pid" 2>/dev/null; then result=1; fi
  kill -KILL "$pid" 2>/dev/null || true
  wait "$pid" 2>/dev/null || true
  return "$result"
}

trial_is_decided() { # <pid> <port>
  broker_answers "$2" || ! kill -0 "$1" 2>/dev/null
}

# -------------------------------------------------------------------- the service

# Whether a broker answers to an MQTT client there, with whatever result.
broker_answers() { # [port]
  local first port=${1:-$(broker_port)}
  (
    exec 3<>"/dev/tcp/127.0.0.1/$port" || exit 1
    # CONNECT of MQTT 3.1.1, a clean session without a name; the answer begins with 0x20.
    printf '\x10\x0c\x00\x04MQTT\x04\x02\x00\x05\x00\x00' >&3
    IFS= read -r -t "$MQTT_ANSWER_TIMEOUT_S" -n 1 -u 3 first
    [ "$first" = $'\x20' ]
  ) 2>/dev/null
}

# Our port answers, and it is the service which does.
wait_for_mosquitto() { # <port>
  wait_until "$MOSQUITTO_START_TIMEOUT_S" mosquitto_is_decided "$1" || true
  broker_answers "$1" && [ -z "$(foreign_listener "$1")" ]
}

mosquitto_is_decided() { # <port>
  # systemd starts it again and again, and has already told of a first failure.
  broker_answers "$1" || { ! systemd_runs && mosquitto_stopped; }
}

restart_mosquitto() {
  if systemd_runs; then
    quietly systemctl enable mosquitto || true
    # After some failures in a row it would refuse to start even what is right.
    quietly systemctl reset-failed mosquitto || true
    quietly systemctl restart mosquitto
    return
  fi
  # It saves its queue before it ends; only then may the next one read it.
  signal_mosquitto
  wait_until "$MOSQUITTO_STOP_TIMEOUT_S" mosquitto_stopped ||
    die "the running Mosquitto does not stop." \
      "Stop it by hand (pgrep -a mosquitto), then run this again."
  # Not the init script: it writes, as root, the pid file that Mosquitto then cannot
  # write, and Mosquitto ends. The directory is the unit's business otherwise.
  install -d -m 0755 -o mosquitto -g mosquitto /run/mosquitto
  rm -f /run/mosquitto/mosquitto.pid
  # By its pid file: another Mosquitto on this machine (a demo's) is not this one.
  start-stop-daemon --start --quiet --background --pidfile /run/mosquitto/mosquitto.pid \
    --output /run/mosquitto/start.log --exec /usr/sbin/mosquitto -- \
    -c "$MOSQUITTO_CONF" 9>&- || return 1
  # It is there a moment later; until then "stopped" would mean nothing.
  wait_until 2 mosquitto_started || true
}

# The service's processes: not another Mosquitto of this machine, nor one in a container.
# Not counting the dead that no parent has buried (a container without an init).
mosquitto_pids() {
  local pid command="^(/usr/sbin/)?mosquitto( -[dv])* -c $MOSQUITTO_CONF( |\$)"
  for pid in $(pgrep --runstates D,R,S,T,t,I -f "$command"); do
    # One number: it has no other one in a namespace of its own.
    if grep -qsE '^NSpid:[[:space:]]+[0-9]+$' "/proc/$pid/status"; then printf '%s\n' "$pid"; fi
  done
}

signal_mosquitto() {
  local pid
  for pid in $(mosquitto_pids); do kill -TERM "$pid" 2>/dev/null || true; done
}

mosquitto_started() { [ -n "$(mosquitto_pids)" ] || [ -s /run/mosquitto/start.log ]; }
mosquitto_stopped() { [ -z "$(mosquitto_pids)" ]; }

# Only what it says from here on is about this start.
remember_the_log() {
  LOG_START=$(($(stat -c %s /var/log/mosquitto/mosquitto.log 2>/dev/null || echo 0) + 1))
  LOG_SINCE=$(date +%s)
  rm -f /run/mosquitto/start.log
}

# On the error output, as what install.sh itself has to say about it comes there.
show_what_mosquitto_said() {
  {
    tail -c "+$LOG_START" /var/log/mosquitto/mosquitto.log 2>/dev/null || true
    if systemd_runs; then
      journalctl -u mosquitto --since "@$LOG_SINCE" -o cat -q 2>/dev/null || true
    else
      cat /run/mosquitto/start.log 2>/dev/null || true
    fi
  } | grep -iE 'error|unable|denied|invalid' | sort -u | tail -n 8 | sed 's/^/  | /' >&2 || true
}
