#!/usr/bin/env bash
# Install what the benchmarks need and run them. Arguments go to python -m bench:
#   bench/run.sh                           everything, which takes an hour or more
#   bench/run.sh ingest                    one comparison
#   bench/run.sh chain --rounds 1 --count 20000
#   bench/run.sh --help                    the names
#
# The table goes to standard output, the figures to bench/results/ as JSON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tests' own environment, made in the same way and told by the same mark (tests/run.sh).
readonly VENV=.venv-tests
readonly LOCK=requirements-dev.lock
readonly PACKAGES=(mosquitto mosquitto-clients sqlite3 python3-venv strace)

note() { printf '==> %s\n' "$*" >&2; }
die() {
  printf 'bench/run.sh: %s\n' "$*" >&2
  exit 1
}

install_packages() {
  local package missing=()
  command -v dpkg-query >/dev/null || return 0
  for package in "${PACKAGES[@]}"; do
    # shellcheck disable=SC2016 # ${Status} is for dpkg-query
    [ "$(dpkg-query -W -f='${Status}' "$package" 2>/dev/null)" = 'install ok installed' ] ||
      missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  [ "$(id -u)" -eq 0 ] || die "not installed, and only root can: ${missing[*]}"
  note "apt-get install ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get -o DPkg::Lock::Timeout=180 -qq update
  apt-get -o DPkg::Lock::Timeout=180 -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
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
  key="$key $PWD"
  if [ "$(cat "$VENV/.made-from" 2>/dev/null)" = "$key" ]; then return; fi
  note "$VENV from $LOCK, with $("$python" --version)"
  rm -rf "$VENV"
  "$python" -m venv "$VENV"
  "$VENV/bin/python" -m pip --quiet --disable-pip-version-check install --no-input \
    --only-binary :all: --no-deps --require-hashes -r "$LOCK" 2> >(grep -v '^WARNING: Location' >&2)
  printf '%s' "$key" >"$VENV/.made-from"
}

install_packages
make_venv
exec "$VENV/bin/python" -m bench "$@"
