#!/usr/bin/env bash
# Starts one run of N processes on this machine, each under supervision.
#
#   launch/local.sh N [--cpu-devices K | --gpus-each K] [--port P] [--dry-run] [SUPERVISE OPTIONS] -- COMMAND...
#   launch/local.sh 2 --cpu-devices 4 -- .venv/bin/tvq train --config=configs/debug.py --workdir=runs/two
#
#   --cpu-devices K   each process gets K CPU devices: a multi-host run to debug without accelerators
#   --gpus-each K     process 0 gets GPUs 0..K-1, process 1 the next K, and so on
#   --port P          the coordinator's port, P + 1 is used too (default: free ones)
#
# Ctrl-C or SIGTERM asks all to save and stop. One process drives all GPUs of a box by itself: this is for
# several processes. SUPERVISE OPTIONS: see launch/supervise.sh --help.

set -u
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

n='' port='' cpu='' gpus='' supervise=()
while [ $# -gt 0 ]; do
  case $1 in
    --cpu-devices) cpu=$(option_value cpu-devices "$@") || exit ; shift 2 ;;
    --gpus-each) gpus=$(option_value gpus-each "$@") || exit ; shift 2 ;;
    --port) port=$(option_value port "$@") || exit ; shift 2 ;;
    --restarts | --backoff | --settled | --notice)
      option_value supervise "$@" >/dev/null || exit
      supervise+=("$1" "$2")
      shift 2
      ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) help; exit ;;
    --) shift; break ;;
    -*) die 2 "unknown option $1; see $script --help" ;;
    *)
      [ -z "$n" ] || die 2 "unexpected $1; the command follows --"
      n=$1
      shift
      ;;
  esac
done
[ -n "$n" ] || die 2 "how many processes? see $script --help"
whole_number N "$n" 1
[ $# -gt 0 ] || die 2 "no command after --; see $script --help"
[ -z "$cpu" ] || whole_number --cpu-devices "$cpu" 1
[ -z "$gpus" ] || whole_number --gpus-each "$gpus" 1
[ -z "$cpu" ] || [ -z "$gpus" ] || die 2 "--cpu-devices and --gpus-each exclude each other"

taken() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }
while [ -z "$port" ] || { taken "$port" || taken $((port + 1)); }; do
  port=$((12000 + 2 * (RANDOM % 4000)))
done

settings() { # settings PROCESS: its variables
  if [ "$n" -gt 1 ]; then
    echo "TVQ_COORDINATOR=127.0.0.1:$port"
    echo "TVQ_N_PROCESS=$n"
    echo "TVQ_PROCESS_ID=$1"
  fi
  if [ -n "$cpu" ]; then
    echo "JAX_PLATFORMS=cpu"
    echo "JAX_NUM_CPU_DEVICES=$cpu"
  fi
  if [ -n "$gpus" ]; then
    echo "CUDA_VISIBLE_DEVICES=$(seq -s , $(($1 * gpus)) $(($1 * gpus + gpus - 1)))"
  fi
}

children=() codes=()
for ((i = 0; i < n; i++)); do
  mapfile -t variables < <(settings "$i")
  start=(env ${variables[@]+"${variables[@]}"} "$root/launch/supervise.sh" ${supervise[@]+"${supervise[@]}"} -- "$@")
  if [ "$dry" = yes ]; then
    run "${start[@]}"
  else
    "${start[@]}" &
    children[i]=$!
  fi
done
[ "$dry" = no ] || exit 0

stop() { kill -TERM "${children[@]}" 2>/dev/null; }
trap stop TERM INT HUP

# One that gives up takes the others with it: they would wait for it in vain.
result=0 left=$n
while [ "$left" -gt 0 ]; do
  for i in "${!children[@]}"; do
    if [ -z "${codes[i]:-}" ] && ! kill -0 "${children[i]}" 2>/dev/null; then
      wait "${children[i]}"
      codes[i]=$?
      left=$((left - 1))
      if [ "${codes[i]}" -ne 0 ]; then
        say "process $i ended with exit code ${codes[i]}"
        [ "$result" -ne 0 ] || result=${codes[i]}
        [ "$left" -eq 0 ] || stop
      fi
    fi
  done
  sleep 0.2
done
exit "$result"
