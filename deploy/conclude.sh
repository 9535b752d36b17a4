# shellcheck shell=bash
# Sourced by install.sh: whether Sluice works, and what is wrong if it does not.

# Above the 5 s that a program stays up with a fault of its disk: what has run longer stays.
readonly STAYS_S=7
readonly START_TIMEOUT_S=60
# Once the programs stay up: for the broker to answer, and for a passing row of health to pass.
readonly SETTLE_TIMEOUT_S=8
# An ending more than this is no coincidence.
readonly ENDINGS_MAX=1

control() { "$PREFIX/venv/bin/supervisorctl" -c "$PREFIX/supervisord.conf" "$@"; }

# Remember how far the logs go; call it before the start.
mark_logs() {
  declare -gA LOG_FROM=()
  local log
  for log in "$LOG"/*.log; do
    [ ! -f "$log" ] || LOG_FROM[$log]=$(stat -c %s "$log")
  done
}

# What a log has got since mark_logs. One that is shorter now was rotated.
since_start() { # <log>
  local from=${LOG_FROM[$1]:-0}
  [ -f "$1" ] || return 0
  [ "$(stat -c %s "$1")" -ge "$from" ] || from=0
  tail -c "+$((from + 1))" "$1"
}

# Print "name state", and " up" where it has been up for STAYS_S, of each program.
program_states() {
  # Its exit code is 3 where one does not run, which is no error here.
  { control status 2>/dev/null || true; } | awk -v stays="$STAYS_S" '{
    up = ""
    if ($2 == "RUNNING" && match($0, /uptime .*$/)) {
      text = substr($0, RSTART + 7)
      n = split(text, part, /[:, ]+/)
      if (text ~ /day/ || part[n - 2] * 3600 + part[n - 1] * 60 + part[n] >= stays) up = " up"
    }
    print $1, $2 up
  }'
}

# supervisorctl's exit code counts STARTING as running.
programs_stay() {
  local states
  states=$(program_states)
  [ -n "$states" ] && ! grep -qv ' RUNNING up$' <<<"$states"
}

# Whether it is already certain that they do not: given up, or ending again and again.
programs_fail() {
  grep -q ' FATAL' <<<"$(program_states)" || [ -n "$(ending_programs)" ]
}

# Print each program that has ended more than ENDINGS_MAX times since the start, and how.
ending_programs() {
  since_start "$LOG/supervisord.log" |
    sed -nE 's/^.* exited: ([^ ]+) \((.*); (not )?expected\)$/\1 (\2)/p' |
    sort | uniq -c | awk -v max="$ENDINGS_MAX" '$1 > max { $1 = ""; print substr($0, 2) }'
}

# Ask the spool, as its own user: root would leave files of root's behind.
ask_spool() { # <SQL>
  (cd / && as_sluice sqlite3 -readonly -separator $'\t' -cmd '.timeout 3000' \
    "$(setting SPOOL_DIR)/spool.db" "$1" 2>/dev/null)
}

# Whether the collector has its broker: by the spool's view, else by its log.
broker_connected() {
  local state
  if state=$(ask_spool 'select state from broker'); then
    [ "$state" = connected ]
  elif [[ $(setting LOG_LEVEL) =~ ^(DEBUG|INFO)$ ]]; then
    since_start "$LOG/collector.log" | grep -E '"message": "connected"|collector: connected ' >/dev/null
  else
    # It would not say so; but it would say that it cannot.
    ! since_start "$LOG/collector.log" | grep 'retry_in_s' >/dev/null
  fi
}

# What is wrong at present, a row each; nothing where the spool cannot be asked.
health() { # <condition on a row>
  ask_spool "select severity, name, detail, remedy from health where $1" || true
}

broken() { [ -n "$(health "severity = 'CRITICAL'")" ]; }

settled() { broker_connected && ! broken; }

decided() { programs_stay || programs_fail; }

# The last words of a program that matter: of its log since the start.
last_words() { # <program> <how many>
  since_start "$LOG/$1.log" | sed -nE \
    -e 's/^.*"severity": "(CRITICAL|ERROR|WARNING)", "message": "(([^"\\]|\\.)*)".*$/\1: \2/p' \
    -e 's/^[^ ]+ (CRITICAL|ERROR|WARNING) [^ ]+: (.*)$/\1: \2/p' |
    sed 's/\\"/"/g' | tail -n "$2"
}

# Print why it does not work; nothing where it does.
shortcomings() {
  local name state rest
  while read -r name state rest; do
    if ! [[ $state == RUNNING && $rest == up ]]; then
      printf '%s does not stay up (%s):\n' "$name" "$state"
      last_words "$name" 2 | sed 's/^/    /'
    fi
  done < <(program_states)
  ending_programs | sed 's/^/it ended several times: /'
  if ! broker_connected; then
    printf 'the collector is not connected to the broker %s:%s:\n' \
      "$(setting MQTT_BROKER)" "$(setting MQTT_PORT)"
    last_words collector 1 | sed 's/^/    /'
  fi
  health "severity = 'CRITICAL'" | while IFS=$'\t' read -r _ name state rest; do
    printf '%s: %s\n    %s\n' "$name" "$state" "$rest"
  done
}

conclude() {
  local wrong=
  wait_until "$START_TIMEOUT_S" decided || true
  if programs_stay && ! wait_until "$SETTLE_TIMEOUT_S" settled || ! programs_stay; then
    wrong=$(shortcomings)
  fi
  say
  say "\$ supervisorctl status"
  control status || true
  if [ -n "$wrong" ]; then
    printf '\n' >&2
    printf '%s\n' "$wrong" | sed 's/^/  | /' >&2
    die "Sluice is installed, but does not work yet (see above). Its programs go on trying." \
      "Everything that is wrong: sudo sqlite3 -readonly -line $(setting SPOOL_DIR)/spool.db 'select * from health'" \
      "What each program says:   sudo tail -n 20 $LOG/collector.log    (or forwarder-pubsub.log, ...)" \
      "Settings:                 sudoedit $ETC/sluice.env and sudo supervisorctl restart all"
  fi
  health "severity <> 'CRITICAL'" | while IFS=$'\t' read -r severity name detail remedy; do
    warn "$severity $name: $detail ($remedy)"
  done
  cat <<END

Sluice is installed. APP_ENV is $(setting APP_ENV). Next:

  sudoedit $ETC/sluice.env
      settings: APP_ENV, project, topic, table
  sudo supervisorctl restart all
      after each change of them
  sudo sqlite3 -readonly -line $(setting SPOOL_DIR)/spool.db 'select * from backlog'
      where every reading is

To do without sudo: usermod -aG $ACCOUNT ${SUDO_USER:-YOURNAME}, then log in again.
END
}
