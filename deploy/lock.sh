#!/usr/bin/env bash
# Write the three lock files anew from pyproject.toml. Needs uv on PATH.
#
# Whoever installs takes exactly these versions, byte for byte (hashes); which
# server they come from is the installing machine's own choice, so no address
# and no index option may appear in a lock.
#
#   deploy/lock.sh              keep what still fits, add what is missing
#   deploy/lock.sh --upgrade    move everything to its newest allowed version
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Everything is named that anything requires, so that pip --require-hashes takes a lock with or
# without --no-deps. Debian 12's pip counts NAME and NAME[EXTRA] as two things, and wants a hash
# of each.
with_and_without_extras() {
  awk '
    function flush() { printf "%s%s", plain, block; plain = block = "" }
    /^[^ ]/ { flush(); extras = /^[a-z0-9-]+\[/ }
    { block = block $0 "\n" }
    extras { sub(/\[[^]]*\]/, ""); plain = plain $0 "\n" }
    END { flush() }'
}

compile() { # <lock> <what it is for> [uv arguments ...]
  local lock=$1 purpose=$2 body
  shift 2
  body=$(mktemp)
  # uv prefers the versions that its output file already names.
  cp -f "$lock" "$body" 2>/dev/null || true
  uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
    --no-strip-extras --no-header --no-emit-index-url --no-emit-find-links --no-annotate \
    --quiet --output-file "$body" "$@" >/dev/null
  {
    printf '# %s\n# Written by deploy/lock.sh from pyproject.toml; do not edit by hand.\n' "$purpose"
    with_and_without_extras <"$body"
  } >"$lock"
  chmod 644 "$lock"
  rm -f "$body"
}

# The second and third agree with the one before, so that what is tested and
# shown is what is installed.
compile requirements.lock 'What Sluice runs with.' "$@"
compile requirements-dev.lock 'The same, and what the tests need.' \
  --extra dev --constraint requirements.lock
compile requirements-demo.lock 'The same, and a broker in Python for demos without Mosquitto.' \
  --constraint requirements-dev.lock - <<<amqtt
