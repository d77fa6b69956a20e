#!/usr/bin/env bash
# The part of launch/tpu.sh that runs on a worker, in its checkout. State: run.pid, run.code, run.log.
#
#   launch/worker.sh start [SUPERVISE OPTIONS] -- COMMAND...    in a session of its own; refused if one runs
#   launch/worker.sh revive                                     start again what a reboot ended, else nothing
#   launch/worker.sh stop SECONDS                               ask to save, and wait for the end
#   launch/worker.sh report                                     running, ended CODE, lost or absent; last line

set -u
cd "$(dirname "$0")/.." || exit

pid=$(cat run.pid 2>/dev/null)
last_line() { tail -n 1 run.log 2>/dev/null; }

# A number alone may be another process's after a reboot.
alive() { [ -n "$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -q 'supervise\.sh --record run'; }

begin() { # begin ARGUMENTS OF supervise.sh
  rm -f run.code run.pid
  printf '%q ' "$@" >run.command
  # Outlives this connection, and needs nothing installed.
  setsid nohup launch/supervise.sh --record run "$@" >>run.log 2>&1 </dev/null &
  while kill -0 "$!" 2>/dev/null; do
    [ ! -e run.pid ] || return 0
    sleep 0.5
  done
  [ ! -e run.pid ] || return 0
  last_line
  return 1
}

case ${1:-} in
  start)
    shift
    if alive; then
      echo "a run is in progress, process $pid; stop it first"
      exit 1
    fi
    begin "$@"
    ;;
  revive)
    if [ -n "$pid" ] && [ ! -e run.code ] && ! alive; then
      echo "starting again"
      eval "begin $(cat run.command)"
    fi
    ;;
  stop)
    alive || exit 0
    kill -TERM "$pid"
    for ((i = 0; i < $2; i++)); do
      alive || exit 0
      sleep 1
    done
    last_line
    echo "process $pid still runs after $2 s"
    exit 1
    ;;
  report)
    if alive; then
      echo "running: $(last_line)"
    elif [ -e run.code ]; then
      echo "ended $(cat run.code): $(last_line)"
    elif [ -n "$pid" ]; then
      echo "lost: $(last_line)"
    else
      echo absent
    fi
    ;;
  *)
    sed -n '2,/^$/ s/^# \{0,1\}//p' "$0"
    [ "${1:-}" = --help ]
    ;;
esac
