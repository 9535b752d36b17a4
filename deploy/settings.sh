# shellcheck shell=bash
# Sourced by install.sh: the settings file, read by the programs' own reader, and what it names.

# What the programs make of the file; empty until read_settings.
declare -A SETTINGS=()

# Names that the programs give to files in SPOOL_DIR: no other is ever touched there.
readonly SPOOL_NAMES=('*.db' '*.db-*' '*.db.*' '*.lock' ballast doorbell 'identity.*')
# The spool's default limit (SPOOL_MAX_BYTES) and some air.
readonly SPOOL_WANTED_MIB=$((11 * 1024))

# Fill SETTINGS from a file, as the given user reads it; on failure $COMMAND_LOG says why.
read_settings() { # <file> <user>
  local entry entries
  [ -n "$COMMAND_LOG" ] || COMMAND_LOG=$(mktemp)
  entries=$(mktemp)
  # A clean environment: the file is asked about, not this shell's variables.
  if ! (cd "$PREFIX/app.new" && runuser -u "$2" -- env -i \
    PATH=/usr/bin:/bin LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 \
    "$PREFIX/$NEW_VENV/bin/python" -m lifecycle.shellsettings "$1") \
    >"$entries" 2>"$COMMAND_LOG" </dev/null; then
    rm -f "$entries"
    return 1
  fi
  SETTINGS=()
  while IFS= read -r -d '' entry; do SETTINGS[${entry%%=*}]=${entry#*=}; done <"$entries"
  rm -f "$entries"
}

# The value of a setting, its default included.
setting() { printf '%s\n' "${SETTINGS[$1]:-}"; } # <name>

# Whether the settings file itself names it.
given() { [[ ${SETTINGS[GIVEN]:-} == *" $1 "* ]]; } # <name>

# Whether the operator has named a broker.
own_broker_given() { given MQTT_BROKER; }

# What the programs would refuse (exit 78) is refused here, in their words, before anything that
# runs is stopped.
check_settings() { # <file> <user>
  if read_settings "$1" "$2"; then return; fi
  sed 's/^/  | /' "$COMMAND_LOG" >&2 || true
  if [ "$1" != "$ETC/sluice.env" ]; then
    rm -f "$1"
    die "these settings cannot work; nothing was changed." \
      "Correct MQTT_BROKER and MQTT_PORT, then run this again."
  fi
  die "the settings in $1 cannot work; what runs was not touched." \
    "Correct them (sudoedit $1), then run this again. (Read as the user $2.)" \
    "Variables of the unit (systemctl edit sluice) are not seen here: put them into the file."
}

create_settings() {
  local file=$ETC/sluice.env new=$ETC/sluice.env.new free
  rm -f "$new"
  if [ -e "$file" ]; then
    say "$file stays as it is"
    make_settings_readable "$file"
    return
  fi
  # Under another name until it is whole: a run that is cut short leaves no half of it.
  install -m 0640 -o root -g "$ACCOUNT" "$SOURCE/deploy/sluice.env" "$new"
  enter_setting "$new" INSTANCE_ID "$(default_instance_id)"
  if [ -n "${MQTT_BROKER:-}" ]; then
    enter_setting "$new" MQTT_BROKER "$MQTT_BROKER"
    enter_setting "$new" MQTT_PORT "${MQTT_PORT:-1883}"
  fi
  free=$(free_mib "$SPOOL")
  if [ "$free" -lt "$SPOOL_WANTED_MIB" ]; then
    enter_setting "$new" SPOOL_MAX_BYTES "$((free * 7 / 10))MiB"
    warn "only $free MiB are free for $SPOOL: SPOOL_MAX_BYTES is set to 70 % of that."
  fi
  check_settings "$new" root
  mv "$new" "$file"
  say "$file written; APP_ENV=LOCAL sends nothing to the cloud"
}

# Fill SETTINGS, and see to it that the programs can read and write what they name.
apply_settings() {
  local file=$ETC/sluice.env
  check_settings "$file" root
  take_spool_directory "$(setting SPOOL_DIR)"
  check_settings "$file" "$ACCOUNT"
  if [ -n "${MQTT_BROKER:-}" ] && [ "$(setting MQTT_BROKER)" != "$MQTT_BROKER" ]; then
    warn "MQTT_BROKER=$MQTT_BROKER is not in $file; set it there."
  fi
}

# As lifecycle/settings.py makes it of the host name; written down, it does not follow it.
default_instance_id() {
  local id
  id=$(uname -n | sed -E 's/[^A-Za-z0-9._-]/-/g; s/^[._-]+//' | cut -c 1-200)
  printf '%s\n' "${id:-sluice}"
}

enter_setting() { # <file> <name> <value>
  [[ $3 =~ ^[A-Za-z0-9._:-]+$ ]] || die "$2='$3' is not a host name or a number."
  sed -i -E "s|^#?$2=.*|$2=$3|" "$1"
}

# An editor that writes a new file leaves root's group on it; its content is not touched.
make_settings_readable() { # <file>
  if as_sluice test -r "$1"; then return; fi
  chgrp "$ACCOUNT" "$1"
  chmod g+r "$1"
  say "$1 could not be read by the programs: the group $ACCOUNT may read it now"
}

# ------------------------------------------------- what belongs to the user sluice

as_sluice() { runuser -u "$ACCOUNT" -- "$@"; }

take_spool_directory() { # <directory>
  if [ ! -e "$1" ]; then
    install -d -m 2750 -o "$ACCOUNT" -g "$ACCOUNT" "$1"
    say "$1 created for the spool"
  fi
  [ -d "$1" ] || die "SPOOL_DIR $1 is not a directory." "Correct it: sudoedit $ETC/sluice.env"
  if ! may_use "$1"; then
    # A disk of its own comes with a lost+found. What holds other things is another's.
    if [ -z "$(strangers "$1")" ]; then
      chown "$ACCOUNT:$ACCOUNT" "$1/."
      chmod 2750 "$1/."
      say "$1 now belongs to $ACCOUNT"
    fi
    may_use "$1" || die "SPOOL_DIR $1 cannot be written by the user $ACCOUNT." \
      "It holds other things, or cannot be entered: namei -l $1" \
      "Give the spool a directory of its own: sudo install -d -m 2750 -o $ACCOUNT -g $ACCOUNT $1/sluice" \
      "and set SPOOL_DIR=$1/sluice: sudoedit $ETC/sluice.env"
  fi
  take_files "$1" "${SPOOL_NAMES[@]}"
}

may_use() { as_sluice test -r "$1" -a -w "$1" -a -x "$1"; } # <directory>

# What there is in a directory that Sluice has not made.
strangers() { # <directory>
  local names
  find_names "${SPOOL_NAMES[@]}"
  find "$1/." -mindepth 1 -maxdepth 1 ! \( "${names[@]}" \) ! -name lost+found
}

# Set names to the test of find for these file names.
find_names() { # <pattern ...>
  local pattern
  names=(-false)
  for pattern in "$@"; do names+=(-o -name "$pattern"); done
}

# Give Sluice's files in a directory back to the user sluice, as after a copy made by root. The
# directory is that user's, who must not be able to have root give away anything else: links are
# not followed, a file that has another name elsewhere stays, and -execdir never looks up a path.
take_files() { # <directory> <pattern ...>
  local directory=$1 names foreign find=(env PATH=/usr/sbin:/usr/bin:/sbin:/bin find "$1/." -ignore_readdir_race -maxdepth 1)
  shift
  find_names "$@"
  foreign=(-type f \( "${names[@]}" \) \( ! -user "$ACCOUNT" -o ! -group "$ACCOUNT" \))
  "${find[@]}" "${foreign[@]}" -links 1 \
    -printf "${directory%/}/%f belonged to %u:%g, and belongs to $ACCOUNT now\n" \
    -execdir chown -h "$ACCOUNT:$ACCOUNT" {} + || true # a log may be rotated meanwhile
  "${find[@]}" "${foreign[@]}" -links +1 -printf \
    "install.sh: warning: ${directory%/}/%f belongs to %u:%g and has several names: it stays\n" >&2
  # As that user, who can change the mode of no other's file.
  as_sluice "${find[@]}" -type f -user "$ACCOUNT" \( "${names[@]}" \) \
    \( ! -perm -640 -o -perm /027 \) \
    -printf "${directory%/}/%f had the mode %m, and has 640 now\n" -exec chmod 640 {} + || true
}
