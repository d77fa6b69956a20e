#!/usr/bin/env bash
# Checks tvq on one GPU in stages, each of which leaves its results: does it work, where does the time go, how fast.
#
#   launch/check_gpu.sh [--output DIR] [--stages LIST] [--seconds N] [--tiny] [--python PYTHON]
#   launch/check_gpu.sh --output runs/h100 --stages works,profile
#
#   --output DIR     folder for the results (default: runs/check_gpu); summary.txt is the result of all stages
#   --stages LIST    of works, profile and speed (default: all, in this order)
#   --seconds N      limit of the tests on the device (default: 170); speed has 360
#   --tiny           a rehearsal: small models and few steps, on any device
#   --python PYTHON  one with jax, what tvq needs, pytest and pytest-xdist (default: python3)
#
# works, all side by side: the debug model trained, killed and resumed bitwise with train.reproducible, evaluated,
# sampled; parity with the original program, linear and quadratic attention and decoding in full float32; the
# enwik8 recipe's memory, predicted and used. profile: the enwik8 and pg19 recipes. speed: launch/bench_gpu.sh.

# shellcheck disable=SC2329  # a part is called by its name
set -u
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

output=runs/check_gpu stages=works,profile,speed seconds=170 tiny=no python=python3
while [ $# -gt 0 ]; do
  case $1 in
    --output) output=$(option_value output "$@") || exit ; shift 2 ;;
    --stages) stages=$(option_value stages "$@") || exit ; shift 2 ;;
    --seconds) seconds=$(option_value seconds "$@") || exit ; shift 2 ;;
    --python) python=$(option_value python "$@") || exit ; shift 2 ;;
    --tiny) tiny=yes; shift ;;
    -h | --help) help; exit ;;
    *) die 2 "unknown option $1; see $script --help" ;;
  esac
done
whole_number --seconds "$seconds" 10
[[ $stages =~ ^(works|profile|speed)(,(works|profile|speed))*$ ]] ||
  die 2 "--stages are some of works, profile and speed with commas between, not '$stages'"
mkdir -p "$output" || die 2 "--output $output: cannot be made"
runs=$(mktemp -d) || die 1 "no temporary folder"
trap 'rm -rf "$runs"' EXIT
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # several programs share the device

steps=120
[ "$tiny" = no ] || steps=8
debug=(--config="$root/configs/debug.py" --config.train.steps="$steps" --config.checkpoint.every="$((steps / 2))"
  --config.log.every="$((steps / 4))" --config.evaluate.every=0 --config.sample.every="$steps"
  --config.sample.length=64 --config.train.reproducible=true)
enwik8=(--config="$root/configs/base.py" --config.model.dtype=bfloat16 --config.train.global_batch_size=16
  --config.model.attend_across_documents=true)
pg19=("${enwik8[@]}" --config.model.n_vocab=32000 --config.model.d_model=2048 --config.model.d_v=4096
  --config.optimizer.name=adafactor)
small=(--config.model.n_layer=1 --config.model.d_model=64 --config.model.d_k=16 --config.model.d_v=64
  --config.model.n_code=16 --config.model.block_len=32 --config.model.mem_len=32 --config.train.sequence_len=128
  --config.train.update_len=64 --config.train.global_batch_size=2 --config.model.n_vocab=259
  --config.data.source=text --config.data.path="$root/README.md")
[ "$tiny" = no ] || { debug+=("${small[@]}"); enwik8+=("${small[@]}"); pg19+=("${small[@]}"); }

tvq() { "$python" -m tvq "$@"; }

# part NAME COMMAND...: in a log of its own; its exit code and duration go into the summary.
part() {
  local name=$1 start=$SECONDS code=0
  shift
  "$@" >"$output/$name.log" 2>&1 || code=$?
  echo "$name: exit code $code after $((SECONDS - start)) s" | tee -a "$output/summary.txt"
  return "$code"
}

unbroken() {
  tvq train "${debug[@]}" --workdir="$runs/unbroken" &&
    tvq eval --workdir="$runs/unbroken" --split=validation &&
    tvq sample --workdir="$runs/unbroken" --prompt="import " --length=100
}

killed() {
  "$python" -m tvq train "${debug[@]}" --workdir="$runs/killed" &
  local process=$!
  while kill -0 "$process" 2>/dev/null && [ ! -d "$runs/killed/checkpoints/$((steps / 2))" ]; do sleep 0.1; done
  kill -9 "$process" && wait "$process"
  ls "$runs/killed/checkpoints"
  tvq train "${debug[@]}" --workdir="$runs/killed"
}

# A test in full float32 on the device; Ctrl-C, so that pytest tells what failed until then.
on_device() {
  local tests=(tests/test_parity.py tests/model/test_attention.py tests/model/test_full.py
    tests/model/test_transformer.py)
  local some=(-k "not nucleus and not optim" -n 6)
  [ "$tiny" = no ] || { tests=(tests/model/test_full.py); some=(-k documents -n 0); }
  cd "$root" || return
  XLA_FLAGS='' JAX_DEFAULT_MATMUL_PRECISION=highest timeout -s INT "$seconds" \
    "$python" -m pytest -v --tb=short -p no:cacheprovider -o filterwarnings=default "${some[@]}" "${tests[@]}"
}

memory() {
  tvq train "${enwik8[@]}" --workdir="$runs/enwik8" --config.train.steps=16 --config.log.every=8 \
    --config.evaluate.every=0 --config.sample.every=0
}

compare() { # rows of two runs, less what a clock says
  "$python" - "$runs/unbroken/metrics.jsonl" "$runs/killed/metrics.jsonl" <<'PY'
import json, sys
clock = ("second", "goodput", "data_wait", "memory", "model_flops_use")
rows = [
    [{k: v for k, v in json.loads(line).items() if not any(word in k for word in clock)} for line in open(path)]
    for path in sys.argv[1:]
]
print("the killed run is bitwise the unbroken one:", rows[0] == rows[1], f"({len(rows[0])} rows)")
sys.exit(rows[0] != rows[1])
PY
}

works() {
  part unbroken unbroken & local a=$!
  part killed killed & local b=$!
  part on_device on_device & local c=$!
  part memory memory & local d=$!
  local failed=0 process
  for process in "$a" "$b" "$c" "$d"; do wait "$process" || failed=1; done
  part resumed compare || failed=1
  cat "$output/resumed.log" | tee -a "$output/summary.txt"
  grep -h '^memory' "$output/memory.log" | tee -a "$output/summary.txt"
  return "$failed"
}

profile() {
  part profile_enwik8 tvq profile "${enwik8[@]}" --output="$output/trace_enwik8"
  part profile_pg19 tvq profile "${pg19[@]}" --output="$output/trace_pg19"
  tail -n 24 "$output"/profile_*.log
}

speed() {
  local rehearsed=()
  [ "$tiny" = no ] || rehearsed=(--dry-run)
  part speed "$root/launch/bench_gpu.sh" --output "$output/bench" --seconds 360 --python "$python" "${rehearsed[@]}"
}

command -v nvidia-smi >/dev/null && nvidia-smi | tee "$output/nvidia-smi.txt"
failed=0
for stage in ${stages//,/ }; do
  case $stage in
    works) works ;;
    profile) profile ;;
    speed) speed ;;
  esac || failed=1
done
exit "$failed"
