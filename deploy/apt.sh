# shellcheck shell=bash
# Sourced by install.sh and tests/environment.sh: apt-get that waits while another one is at work.

# A new machine updates itself at its first start, which takes minutes.
APT_WAIT_S=300

# apt's own DPkg::Lock::Timeout is for dpkg's locks alone: at the locks of the package lists and of
# the archive it gives up at once.
apt_get() { # <file for its output> <arguments ...>
  local log=$1 deadline=$((SECONDS + APT_WAIT_S)) holder told=
  shift
  until LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
    apt-get -qq "$@" >"$log" 2>&1 </dev/null; do
    # "Unable to lock" also follows a lock that cannot be opened at all: on a read-only disk.
    if grep -q '^E: Could not open lock file ' "$log"; then return 1; fi
    grep -qE '^E: (Could not get lock|Unable to (lock|acquire)) ' "$log" || return 1
    holder=$(sed -nE 's/^E: Could not get lock ([^ ]+)\. It is held by process ([0-9]+ \([^)]*\)).*/process \2 has \1/p' "$log" | head -n 1)
    if [ "$SECONDS" -ge "$deadline" ]; then
      printf 'E: waited %s s for it: %s\n' "$APT_WAIT_S" "${holder:-another apt or dpkg}" >>"$log"
      return 1
    fi
    if [ "$told" != "${holder:-yes}" ]; then
      printf 'apt is in use (%s): waiting for it, %s s at most ...\n' \
        "${holder:-another apt or dpkg}" "$APT_WAIT_S" >&2
      told=${holder:-yes}
    fi
    sleep 1
  done
}
