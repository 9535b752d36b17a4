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

# shellcheck source=tests/environment.sh
. tests/environment.sh

install_packages die mosquitto mosquitto-clients sqlite3 python3-venv strace
make_venv
exec "$VENV/bin/python" -m bench "$@"
