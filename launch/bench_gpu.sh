#!/usr/bin/env bash
# Measures training and decoding on one GPU within nine minutes: JSON and Markdown tables.
#
#   launch/bench_gpu.sh [--wheels DIR] [--output DIR] [--seconds N] [--remat R] [--python PYTHON]
#                       [--dry-run]
#   launch/bench_gpu.sh --wheels wheels --output runs/h200
#
#   --wheels DIR     folder of wheels: packages that PYTHON lacks are installed from it into OUTPUT/packages
#   --output DIR     folder for the results (default: runs/bench_gpu)
#   --seconds N      time for all (default: 520); what does not fit in it is left out, and noted
#   --remat R        model.remat (default: names; nothing for a GPU of less than 100 GB)
#   --python PYTHON  one that has jax with CUDA, flax, optax and orbax (default: python3)
#
# The enwik8 (190M) and pg19 (1.3B) shapes in bfloat16: training at T = 2k to 131k with a constant number of
# tokens a step, VQ against exact attention through cuDNN's flash kernel; the attention cores alone, exact
# attention without that kernel (full) too; and decoding at several contexts. Nothing is downloaded.

set -u
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

wheels='' output=runs/bench_gpu seconds=520 remat=names python=python3
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) wheels=$(option_value wheels "$@") || exit ; shift 2 ;;
    --output) output=$(option_value output "$@") || exit ; shift 2 ;;
    --seconds) seconds=$(option_value seconds "$@") || exit ; shift 2 ;;
    --remat) remat=$(option_value remat "$@") || exit ; shift 2 ;;
    --python) python=$(option_value python "$@") || exit ; shift 2 ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) help; exit ;;
    *) die 2 "unknown option $1; see $script --help" ;;
  esac
done
whole_number --seconds "$seconds" 60
[ -z "$wheels" ] || [ -d "$wheels" ] || die 2 "--wheels $wheels is not a folder"
run mkdir -p "$output" || die 2 "--output $output: cannot be made"

# module:package of what tvq imports.
needed=(jax:jax flax:flax optax:optax orbax.checkpoint:orbax-checkpoint absl:absl-py etils:etils grain:grain
  ml_collections:ml-collections numpy:numpy)
missing=()
if [ "$dry" = no ]; then
  for pair in "${needed[@]}"; do
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('${pair%%:*}') is None)" 2>/dev/null ||
      missing+=("${pair#*:}")
  done
fi
# The sources of this checkout run, whether or not the package is installed.
export PYTHONPATH="$root:$output/packages${PYTHONPATH:+:$PYTHONPATH}"
if [ "${#missing[@]}" -gt 0 ]; then
  [ -n "$wheels" ] || die 2 "$python lacks ${missing[*]}; give a folder of wheels with --wheels"
  "$python" -m pip install --quiet --no-index --no-deps --find-links "$wheels" --target "$output/packages" \
    "${missing[@]}" || die 2 "cannot install ${missing[*]} from $wheels"
fi

# Nearly all of the memory for jax.
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.94
enwik8=(--config="$root/configs/base.py" --config.model.dtype=bfloat16 --config.model.remat="$remat"
  --config.model.attend_across_documents=true)
pg19=("${enwik8[@]}" --config.model.n_vocab=32000 --config.model.d_model=2048 --config.model.d_v=4096
  --config.optimizer.name=adafactor)

failed=0
bench() { # bench SHARE NAME ARGUMENTS...: in a share of the time, in per cent
  local limit=$((seconds * $1 / 100)) name=$2
  shift 2
  # What is under way when the time is up may end.
  run timeout $((limit * 12 / 10)) "$python" -m tvq bench "$@" --seconds="$limit" --output="$output/$name" ||
    { say "$name failed with exit code $?"; failed=1; }
}
# Compiling takes most of the time: 10 to 25 s a case, 80 s before the first number of decoding.
bench 23 decode decode "${enwik8[@]}" --contexts=8192,131072 --batch_sizes=1,32
bench 21 enwik8 train "${enwik8[@]}" --lengths=2048,8192 --n_token=131072 --formulations=auto,flash
bench 15 long train "${enwik8[@]}" --lengths=32768,131072 --n_token=131072 --formulations=auto
bench 11 pg19 train "${pg19[@]}" --lengths=8192 --n_token=32768 --formulations=auto
bench 13 attention attention "${enwik8[@]}" --lengths=2048,8192 --n_token=32768 --formulations=auto,flash,full
[ "$dry" = no ] || exit 0

for name in decode enwik8 long pg19 attention; do
  [ ! -f "$output/$name/bench.md" ] || cat "$output/$name/bench.md"
done >"$output/bench.md"
nvidia-smi --query-gpu=name,clocks.sm,clocks.max.sm,power.draw,power.limit,driver_version --format=csv >>"$output/bench.md"
say "results: $output/bench.md and $output/*/bench.json"
exit "$failed"
