# Shared by the scripts of this folder; sourced, never run.
# shellcheck shell=bash

# shellcheck disable=SC2034  # used by the scripts that source this
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=launch/$(basename "$0")
dry=no

# In a shell of its own: if the reader of our words is gone (| tee, and Ctrl-C), SIGPIPE ends that one alone.
say() { (printf '%s: %s\n' "$script" "$*" >&2) || true; }

die() { # die CODE MESSAGE...
  local code=$1
  shift
  say "$@"
  exit "$code"
}

# The comment at the top of the calling script is its help text.
help() {
  sed -n '2,/^$/ s/^# \{0,1\}//p' "$0"
}

# What to type to get this very command.
quoted() {
  local text
  text=$(printf '%q ' "$@")
  printf '%s' "${text% }"
}

# Runs a command, or under --dry-run prints it.
run() {
  if [ "$dry" = yes ]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# option_value NAME "$@": the value of --NAME VALUE, which must be there.
option_value() {
  [ $# -ge 3 ] || die 2 "$2 needs a value; see $script --help"
  printf '%s' "$3"
}

whole_number() { # whole_number NAME VALUE LOWEST
  case $2 in
    '' | *[!0-9]*) die 2 "$1 must be a whole number, not '$2'" ;;
  esac
  [ "$2" -ge "$3" ] || die 2 "$1 must be at least $3, not $2"
}
