#!/usr/bin/env bash
# Install what the tests need, lint, check types, test. Arguments go to pytest:
#   tests/run.sh                         everything
#   tests/run.sh tests/test_demo.py -x   a part of it
#
# Everything is tried, whatever fails before; pytest comes last, and the exit code
# is 0 only if all of it was in order.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck source=tests/environment.sh
. tests/environment.sh

failed=()
check() { # <command ...>
  note "$*"
  "$@" || failed+=("$1 ${2:-}")
}

install_packages note \
  mosquitto mosquitto-clients openssl sqlite3 python3-venv strace procps iproute2 mount shellcheck
make_venv
PATH=$PWD/$VENV/bin:$PATH
export PATH

check ruff check --extend-exclude "$VENV"
check ruff format --check --extend-exclude "$VENV"
check mypy
if command -v shellcheck >/dev/null; then
  check shellcheck install.sh tests/{environment,run,torture/run}.sh tests/harness/*.sh bench/run.sh deploy/*.sh .ci/run
fi
if [ ${#failed[@]} -gt 0 ]; then
  note "NOT IN ORDER: ${failed[*]} (the exit code will be 1, whatever pytest says)"
fi

note "pytest $*"
code=0
python -m pytest "$@" || code=$?
[ ${#failed[@]} -eq 0 ] || [ "$code" -ne 0 ] || code=1
exit "$code"
