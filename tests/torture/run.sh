#!/usr/bin/env bash
# Try to break the promise, for as long as you like:
#   tests/torture/run.sh --hours 0.5
#   tests/torture/run.sh --hours 8 --seed 4711 --only kills
#   tests/torture/run.sh --turn kills:60:1234    a turn that failed, once more
#
# Prints the seed, what was done and what was seen, and in the end a table of the
# sums; the exit code is 0 only if nothing was lost and everything added up. An
# hour on two cores is 1,000 kills, 10,000 images of power cuts, 2,000,000 random
# inputs, and each other part several times. tests/run.sh makes the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

readonly PYTHON=.venv-tests/bin/python
[ -x "$PYTHON" ] || {
  printf 'tests/torture/run.sh: first run tests/run.sh once, which makes %s\n' "${PYTHON%/bin/*}" >&2
  exit 1
}
exec "$PYTHON" -m tests.torture "$@"
