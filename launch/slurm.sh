#!/usr/bin/env bash
# Runs a command on the nodes of a SLURM job: one process a node, each with all GPUs of its node.
#
#   launch/slurm.sh submit [--nodes N] [--gpus G] [--time T] [--name NAME] [--restarts N] [--dry-run]
#                          [--sbatch "OTHER SBATCH OPTIONS"] -- COMMAND...
#   launch/slurm.sh stop JOB [--dry-run]     save, end, and do not requeue
#   launch/slurm.sh logs JOB                 follow the output; Ctrl-C leaves the job alone
#
#   launch/slurm.sh submit --nodes 4 --gpus 8 --time 24:00:00 -- .venv/bin/tvq train --config=... --workdir=...
#
# Defaults: one node, 8 GPUs a node (0: none), 24 hours. Two minutes before the time is over, and when the
# job is preempted, all processes save at the same step and the job is queued again to resume.

set -u
# In the job this file is a copy elsewhere; the job starts in the checkout.
if [ "${1:-}" = job ]; then
  # shellcheck source=launch/common.sh
  . launch/common.sh
else
  # shellcheck source=launch/common.sh
  . "$(dirname "$0")/common.sh"
fi

submit() {
  local nodes=1 gpus=8 time=24:00:00 name=tvq restarts=10 other=()
  while [ $# -gt 0 ]; do
    case $1 in
      --nodes) nodes=$(option_value nodes "$@") || exit ; shift 2 ;;
      --gpus) gpus=$(option_value gpus "$@") || exit ; shift 2 ;;
      --time) time=$(option_value time "$@") || exit ; shift 2 ;;
      --name) name=$(option_value name "$@") || exit ; shift 2 ;;
      --restarts) restarts=$(option_value restarts "$@") || exit ; shift 2 ;;
      --sbatch)
        option_value sbatch "$@" >/dev/null || exit
        read -ra other <<<"$2"
        shift 2
        ;;
      --dry-run) dry=yes; shift ;;
      --) shift; break ;;
      *) die 2 "unknown option $1; see $script --help" ;;
    esac
  done
  [ $# -gt 0 ] || die 2 "no command after --; see $script --help"
  whole_number --nodes "$nodes" 1
  whole_number --gpus "$gpus" 0
  whole_number --restarts "$restarts" 0
  [ "$gpus" -eq 0 ] || other=("--gpus-per-node=$gpus" ${other[@]+"${other[@]}"})
  run mkdir -p "$root/logs" || die 1 "cannot make $root/logs"
  run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node=1 --time="$time" --chdir="$root" \
    --requeue --open-mode=append --signal=TERM@120 --output="logs/%x-%j.out" ${other[@]+"${other[@]}"} \
    "$root/launch/slurm.sh" job "$restarts" "$@"
}

# Inside the job, on its first node. SIGTERM goes to the steps, SIGUSR1 (see stop) to this shell.
job() {
  local restarts=$1 stopping=no step code
  shift
  trap 'stopping=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  # --wait: a process that ends makes the others end, not at once (they may be saving) but soon.
  srun --wait=180 launch/supervise.sh --restarts "$restarts" -- "$@" &
  step=$!
  while :; do
    wait "$step"
    code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  say "job $SLURM_JOB_ID ended with exit code $code"
  # 143: SIGTERM came before the run had begun, and there was nothing to save.
  if { [ "$code" -eq 75 ] || [ "$code" -eq 143 ]; } && [ "$stopping" = no ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}

command=${1:-}
[ $# -eq 0 ] || shift
case $command in
  -h | --help) help ;;
  submit) submit "$@" ;;
  job) job "$@" ;;
  stop)
    [ "${2:-}" != --dry-run ] || dry=yes
    [ -n "${1:-}" ] || die 2 "which job? see $script --help"
    run scancel --signal=USR1 --batch "$1"
    ;;
  logs)
    [ -n "${1:-}" ] || die 2 "which job? see $script --help"
    compgen -G "$root/logs/*-$1.out" >/dev/null || die 1 "no log of job $1 in $root/logs yet"
    trap 'say "left the log; the job continues"; exit 0' INT
    tail -n 100 -F "$root"/logs/*-"$1".out
    ;;
  *) die 2 "submit, stop or logs? see $script --help" ;;
esac
