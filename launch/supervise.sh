#!/usr/bin/env bash
# Starts a command again when it fails or was preempted.
#
#   launch/supervise.sh [--restarts N] [--backoff S] [--settled S] [--notice CMD] [--record FILE] [--dry-run]
#                       -- COMMAND...
#
#   --restarts N   failures to forgive in all (default 10); being preempted is not a failure
#   --backoff S    seconds before the first restart (default 2), doubled at each quick failure, at most 60
#   --settled S    a run that lasted this long was no quick failure (default 120)
#   --notice CMD   a program that ends with 0 when this machine is about to be taken away; the command is
#                  then asked to save (SIGTERM)
#   --record FILE  FILE.pid gets the number of this process, FILE.code its exit code at the end
#
# Exit codes of the command: 0 done; 2 wrong configuration or input, and 3 diverged, given up at once; 75 stopped
# and saved, started again; all others are failures. SIGTERM, SIGINT or SIGHUP to this script reach the command
# as one SIGTERM, and it is not started again.

set -u
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

restarts=10 backoff=2 settled=120 notice='' record=''
while [ $# -gt 0 ]; do
  case $1 in
    --restarts) restarts=$(option_value restarts "$@") || exit ; shift 2 ;;
    --backoff) backoff=$(option_value backoff "$@") || exit ; shift 2 ;;
    --settled) settled=$(option_value settled "$@") || exit ; shift 2 ;;
    --notice) notice=$(option_value notice "$@") || exit ; shift 2 ;;
    --record) record=$(option_value record "$@") || exit ; shift 2 ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) help; exit ;;
    --) shift; break ;;
    *) die 2 "unknown option $1; see $script --help" ;;
  esac
done
[ $# -gt 0 ] || die 2 "no command after --; see $script --help"
whole_number --restarts "$restarts" 0
whole_number --backoff "$backoff" 0
whole_number --settled "$settled" 1
if [ "$dry" = yes ]; then
  run "$@"
  exit
fi

if [ -n "$record" ]; then
  echo $$ >"$record.pid"
  trap 'echo $? >"$record.code"' EXIT
fi

child='' watcher='' pause='' stopping=no
stop() {
  stopping=yes
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null
  [ -z "$pause" ] || kill "$pause" 2>/dev/null
}
trap stop TERM INT HUP

# Bash's wait ends early when a signal comes: wait until the process is really gone, then take its code.
wait_for() {
  local code=0
  while kill -0 "$1" 2>/dev/null; do
    wait "$1"
    code=$?
    # 127: bash has already handed out the code of a process that was gone. -1: a signal came in the midst of it.
    [ "$code" -ge 0 ] && [ "$code" -le 128 ] && return "$code"
  done
  wait "$1"
  local last=$?
  [ "$last" -eq 127 ] || code=$last
  [ "$code" -ge 0 ] || code=143 # bash has lost it: that of the SIGTERM that we sent on
  return "$code"
}

# The machine's own notice of its end; asks the child to save, once.
watch() {
  local program over=no
  trap 'over=yes' TERM
  "$notice" &
  program=$!
  trap 'kill "$program" 2>/dev/null; exit' TERM
  if [ "$over" = yes ]; then
    kill "$program" 2>/dev/null
  elif wait "$program" && kill -TERM "$1" 2>/dev/null; then
    say "this machine is about to go; asked to save"
  fi
}

failures=0 delay=$backoff
while :; do
  started=$SECONDS
  "$@" &
  child=$!
  [ "$stopping" = no ] || kill -TERM "$child" 2>/dev/null
  if [ -n "$notice" ]; then
    watch "$child" &
    watcher=$!
  fi
  wait_for "$child"
  code=$?
  child=''
  if [ -n "$watcher" ]; then
    kill "$watcher" 2>/dev/null
    watcher=''
  fi
  lasted=$((SECONDS - started))
  [ "$code" -ne 0 ] || exit 0
  [ "$code" -ne 2 ] || die 2 "wrong configuration or input (exit 2): a restart would not help"
  [ "$code" -ne 3 ] || die 3 "diverged (exit 3): a restart would diverge again"
  [ "$stopping" = no ] || die "$code" "stopped (exit $code)"
  if [ "$lasted" -ge "$settled" ]; then
    delay=$backoff
  fi
  # A command that is preempted again and again at once makes no progress either.
  if [ "$code" -ne 75 ] || [ "$lasted" -lt "$settled" ]; then
    failures=$((failures + 1))
  fi
  [ "$failures" -le "$restarts" ] || die "$code" "exit $code after ${lasted} s; $restarts restarts are used up"
  say "exit $code after ${lasted} s; starting again in $delay s ($failures of $restarts restarts used)"
  sleep "$delay" &
  pause=$!
  [ "$stopping" = no ] || kill "$pause" 2>/dev/null
  wait_for "$pause"
  pause=''
  [ "$stopping" = no ] || die "$code" "stopped (exit $code)"
  delay=$((delay * 2 > 60 ? 60 : delay * 2))
done
