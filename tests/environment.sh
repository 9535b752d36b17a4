# shellcheck shell=bash
# The tests' own environment, for the scripts that source this in the repository's root:
# Debian's packages, and .venv-tests from requirements-dev.lock. Messages go to standard error.

readonly VENV=.venv-tests
readonly LOCK=requirements-dev.lock

# shellcheck source=deploy/apt.sh
. deploy/apt.sh

note() { printf '\n==> %s\n' "$*" >&2; }
die() {
  printf '%s: %s\n' "$0" "$*" >&2
  exit 1
}

install_packages() { # <note or die, where only root could> <package ...>
  local otherwise=$1 package missing=() log
  shift
  command -v dpkg-query >/dev/null || return 0
  for package in "$@"; do
    # shellcheck disable=SC2016 # ${Status} is for dpkg-query
    [ "$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null)" = 'install ok installed' ] ||
      missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  if [ "$(id -u)" -ne 0 ]; then
    "$otherwise" "not installed, and only root can: ${missing[*]}; what needs them will fail"
    return 0
  fi
  note "apt-get install ${missing[*]}"
  log=$(mktemp)
  if ! { apt_get "$log" update &&
    apt_get "$log" install -y --no-install-recommends "${missing[@]}"; }; then
    cat "$log" >&2
    rm -f "$log"
    die "apt-get cannot install ${missing[*]}"
  fi
  rm -f "$log"
}

# The first Python that can do it: pyenv's, Debian's, any.
find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.11 /usr/bin/python3 python3.12 python3.13; do
    if "$candidate" -c 'import ensurepip, sqlite3, ssl, sys, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return 0
    fi
  done
  die "no Python 3.11, 3.12 or 3.13 with venv; sudo apt-get install python3 python3-venv"
}

make_venv() {
  local python key
  python=$(find_python)
  key=$({ cat "$LOCK"; "$python" -c 'import sys; print(sys.version, sys.base_prefix)'; } | sha256sum)
  # Renamed or copied, an environment's scripts would call the old place.
  key="$key $PWD"
  if [ "$(cat "$VENV/.made-from" 2>/dev/null)" = "$key" ]; then return; fi
  note "$VENV from $LOCK, with $("$python" --version)"
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
  # pip warns of each mirror that lacks a package; its errors come all the same.
  "$VENV/bin/python" -m pip --quiet --disable-pip-version-check install --no-input \
    --only-binary :all: --no-deps --require-hashes -r "$LOCK" 2> >(grep -v '^WARNING: Location' >&2)
  printf '%s' "$key" >"$VENV/.made-from"
}
