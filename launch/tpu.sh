#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice, or of several, from your own machine. Needs gcloud, logged in.
#
#   launch/tpu.sh run --name NAME --zone ZONE --type v5litepod-16 --version v2-alpha-tpuv5-lite [--spot] \
#     -- .venv/bin/tvq train --config=configs/debug.py --workdir=gs://BUCKET/run1
#
#   create    make the slice, if there is none, and wait until it is ready   (--type, --version)
#   setup     copy this checkout at its commit to all workers and install it there
#   train     start the command after -- on all workers, under supervision
#   run       create, setup, train, then follow worker 0; a slice that is preempted is deleted and made again,
#             and the run resumes from its last checkpoint. If the run is there already, only follows it
#   status    the slice, and what each worker does
#   logs      follow the output of a worker (--worker, default 0); Ctrl-C leaves the run alone
#   stop      all save at the same step and end
#   delete    stop, then delete the slice; --now deletes without saving
#
#   --name, --zone, --project    of the slice (--project: gcloud's own default)
#   --slices N                   N slices of this type (NAME-0, NAME-1, ...) as one run: multislice. For every
#                                command; workers are counted through all slices
#   --type, --version            accelerator type and runtime version, for create and run
#   --spot | --preemptible       cheaper, may be taken away
#   --queued                     through a queued resource of the same name, as several slices always are. For
#                                every command
#   --restarts N                 run: slices to make again (default 50); workers: failures to forgive (default 10)
#   --install CMD                how workers install, in the checkout (default: make setup)
#   --dirty                      copy the files as they are, not the commit
#   --poll S, --grace S          seconds between looks at the cloud (30); for saving when stopping (300)
#   --dry-run                    print every command instead
#
# The only state is the cloud's: any command can be given again, from any machine.

set -u
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

at_once=16 # gcloud processes in parallel: each takes about 100 MB here
name='' zone='' project=() type='' version='' price=() slices=1 queued=no restarts='' install='make setup' dirty=no
poll=30 grace=300 worker=0 now=no command=() nodes=() per_slice=''

options() {
  while [ $# -gt 0 ]; do
    case $1 in
      --name) name=$(option_value name "$@") || exit ; shift 2 ;;
      --zone) zone=$(option_value zone "$@") || exit ; shift 2 ;;
      --project) project=("--project=$(option_value project "$@")") || exit ; shift 2 ;;
      --type) type=$(option_value type "$@") || exit ; shift 2 ;;
      --version) version=$(option_value version "$@") || exit ; shift 2 ;;
      --spot | --preemptible) price=("$1"); shift ;;
      --slices) slices=$(option_value slices "$@") || exit ; shift 2 ;;
      --queued) queued=yes; shift ;;
      --restarts) restarts=$(option_value restarts "$@") || exit ; shift 2 ;;
      --install) install=$(option_value install "$@") || exit ; shift 2 ;;
      --dirty) dirty=yes; shift ;;
      --poll) poll=$(option_value poll "$@") || exit ; shift 2 ;;
      --grace) grace=$(option_value grace "$@") || exit ; shift 2 ;;
      --worker) worker=$(option_value worker "$@") || exit ; shift 2 ;;
      --now) now=yes; shift ;;
      --dry-run) dry=yes; shift ;;
      --) shift; command=("$@"); break ;;
      *) die 2 "unknown option $1; see $script --help" ;;
    esac
  done
  [ -n "$name" ] || die 2 "--name is missing; see $script --help"
  [ -n "$zone" ] || die 2 "--zone is missing; see $script --help"
  [ -z "$restarts" ] || whole_number --restarts "$restarts" 0
  whole_number --grace "$grace" 1
  whole_number --worker "$worker" 0
  whole_number --slices "$slices" 1
  nodes=("$name")
  if [ "$slices" -gt 1 ]; then
    queued=yes # there is no other way to several slices
    mapfile -t nodes < <(seq -f "$name-%.0f" 0 $((slices - 1)))
  fi
  [ "$queued" = no ] || [ "${price[*]-}" != --preemptible ] || die 2 "a queued resource is --spot, not --preemptible"
}

need_type() {
  [ -n "$type" ] || die 2 "--type is missing, for example v5litepod-16"
  [ -n "$version" ] || die 2 "--version is missing; list them: gcloud compute tpus versions list --zone=$zone"
}

need_command() {
  [ "${#command[@]}" -gt 0 ] || die 2 "no command after --; see $script --help"
}

# --- the slice --------------------------------------------------------------------------------------------

tpu() { # tpu VERB ARGUMENTS...: gcloud's command on this slice
  gcloud compute tpus "$@" --zone="$zone" ${project[@]+"${project[@]}"}
}

show_tpu() { # the same, or printed under --dry-run
  run gcloud compute tpus "$@" --zone="$zone" ${project[@]+"${project[@]}"}
}

state_of() { # state_of KIND NAME FIELD: ABSENT when there is none; nothing when gcloud fails otherwise
  local text
  if text=$(tpu "$1" describe "$2" --format="value($3)" 2>&1); then
    echo "${text##*$'\n'}"
  elif [[ $text == *NOT_FOUND* || $text == *"not found"* ]]; then
    echo ABSENT
  else
    say "gcloud: ${text##*$'\n'}"
  fi
}

state() { # READY when all slices are, else what the first is that is not: CREATING, PREEMPTED, ABSENT, ...
  local node seen=''
  for node in "${nodes[@]}"; do
    seen=$(state_of tpu-vm "$node" state)
    [ "$seen" = READY ] || break
  done
  # Before its slices are there, and after they are gone, the queued resource has the word.
  [ "$seen" != ABSENT ] || [ "$queued" = no ] || seen=$(state_of queued-resources "$name" state.state)
  echo "$seen"
}

create() {
  need_type
  if [ "$dry" = no ] && [ "$(state)" != ABSENT ]; then
    say "$name is there already"
  elif [ "$queued" = yes ]; then
    local ids=(--node-id="$name")
    [ "$slices" -eq 1 ] || ids=(--node-count="$slices" --node-prefix="$name")
    show_tpu queued-resources create "$name" "${ids[@]}" --accelerator-type="$type" \
      --runtime-version="$version" ${price[@]+"${price[@]}"} || die 1 "could not queue for $name"
  else
    show_tpu tpu-vm create "$name" --accelerator-type="$type" --version="$version" \
      ${price[@]+"${price[@]}"} || die 1 "could not create $name"
  fi
  [ "$dry" = no ] || return 0
  local seen='' last=''
  while seen=$(state); [ "$seen" != READY ]; do
    [ "$seen" = "$last" ] || say "$name is ${seen:-unknown}; waiting"
    last=$seen
    case $seen in
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
        die 1 "$name is $seen; delete it first: $script delete --now"
        ;;
      ABSENT) die 1 "$name is gone again" ;;
    esac
    sleep "$poll"
  done
  say "$name is ready"
}

remove() {
  if [ "$queued" = yes ]; then
    show_tpu queued-resources delete "$name" --force --quiet
  else
    show_tpu tpu-vm delete "$name" --quiet
  fi
}

# --- its workers ------------------------------------------------------------------------------------------

count_workers() { # sets per_slice; all slices are of one type
  local text
  [ -z "$per_slice" ] || return 0
  text=$(tpu tpu-vm describe "${nodes[0]}" --format='value(networkEndpoints[].ipAddress)') ||
    die 1 "$name in $zone cannot be asked for its workers"
  per_slice=$(grep -c . <<<"${text//[;,]/$'\n'}")
}

on_worker() { # on_worker I COMMAND: in its home
  local slice=0 i=$1
  if [ "$slices" -gt 1 ] && [ "$i" -gt 0 ]; then
    count_workers
    slice=$((i / per_slice)) i=$((i % per_slice))
    [ "$slice" -lt "$slices" ] || die 2 "there are $((per_slice * slices)) workers, 0 to $((per_slice * slices - 1))"
  fi
  show_tpu tpu-vm ssh "${nodes[slice]}" --worker="$i" --command="$2"
}

# The same command on all workers, some at a time; says which failed, with its last lines.
on_all() { # on_all WHAT COMMAND
  local node
  if [ "$dry" = yes ]; then
    for node in "${nodes[@]}"; do
      show_tpu tpu-vm ssh "$node" --worker=EACH --command="$2"
    done
    return
  fi
  local n folder i failed=0 asked=()
  count_workers
  n=$((per_slice * slices))
  folder=$(mktemp -d)
  for ((i = 0; i < n; i++)); do
    while [ "$(jobs -pr | wc -l)" -gt "$at_once" ]; do sleep 0.1; done
    { on_worker "$i" "$2" >"$folder/$i" 2>&1 </dev/null; echo $? >"$folder/$i.code"; } &
    asked+=($!)
  done
  wait "${asked[@]}" # and not for a log that is being followed
  for ((i = 0; i < n; i++)); do
    if [ "$(cat "$folder/$i.code")" -ne 0 ]; then
      failed=$((failed + 1))
      say "$1 failed on worker $i of $n; its last lines:"
      tail -n 20 "$folder/$i" | sed "s/^/  [worker $i] /" >&2
    elif [ "$1" = status ]; then
      sed "s/^/worker $i: /" "$folder/$i"
    fi
  done
  rm -r "$folder"
  [ "$failed" -eq 0 ]
}

commit() { git -C "$root" rev-parse --short=12 HEAD; }

setup() {
  if [ "$dirty" = no ] && [ -n "$(git -C "$root" status --porcelain)" ]; then
    die 2 "the checkout has changes that are in no commit; commit them, or give --dirty"
  fi
  local archive node
  archive=$(mktemp -d)/tvq.tgz
  if [ "$dirty" = yes ]; then
    git -C "$root" ls-files -z --cached --others --exclude-standard | (cd "$root" && xargs -0 ls -d 2>/dev/null) |
      tar -C "$root" -czf "$archive" -T - || die 1 "could not pack $root"
  else
    git -C "$root" archive --format=tar.gz -o "$archive" HEAD || die 1 "could not pack $root"
  fi
  for node in "${nodes[@]}"; do
    show_tpu tpu-vm scp "$archive" "$node:tvq.tgz" --worker=all || die 1 "could not copy to all workers of $node"
  done
  rm -r "$(dirname "$archive")"
  # Files of an older commit must not stay; whatever else is there may.
  on_all setup "mkdir -p tvq && cd tvq && { [ ! -x launch/worker.sh ] || launch/worker.sh report | \
grep -v '^running' || { echo 'a run is in progress; stop it first'; exit 1; }; } && \
{ [ ! -e run.files ] || grep -v '/\$' run.files | xargs -d '\\n' rm -f; } && tar -xzvf ../tvq.tgz >run.files && $install" ||
    die 1 "setup failed"
  [ "$dry" = yes ] || say "installed commit $(commit) on all workers"
}

train() {
  need_command
  local text
  text=$(quoted launch/worker.sh start --restarts "${restarts:-10}" --notice launch/notice_gce.sh \
    -- env "TVQ_COMMIT=$(commit)" "${command[@]}")
  on_all start "cd tvq && $text" || die 1 "not started on all workers; see above, then: $script stop"
  [ "$dry" = yes ] || say "started on all workers"
}

report="if [ -x tvq/launch/worker.sh ]; then tvq/launch/worker.sh report; else echo absent; fi"

status() {
  if [ "$dry" = yes ]; then
    show_tpu tpu-vm describe "${nodes[0]}" --format='value(state)'
  else
    local seen
    seen=$(state)
    echo "$name: ${seen:-unknown}"
    [ "$seen" = READY ] || return 0
  fi
  on_all status "$report"
}

logs() {
  trap 'say "left the log; the run continues"; exit 0' INT
  on_worker "$worker" "tail -n 100 -F tvq/run.log"
}

stop() {
  on_all stop "[ ! -x tvq/launch/worker.sh ] || tvq/launch/worker.sh stop $grace" ||
    die 1 "not stopped on all workers; try again with a longer --grace"
  [ "$dry" = yes ] || say "saved and stopped on all workers"
}

delete() {
  if [ "$now" = no ] && { [ "$dry" = yes ] || [ "$(state)" = READY ]; }; then
    stop
  fi
  remove || die 1 "could not delete $name"
}

# --- all of it, through preemptions -----------------------------------------------------------------------

follow() { # until the run has ended (its exit code), worker 0 has lost it (201) or the slice is gone (200)
  local tail_pid looks=0 code=''
  set -m # a process group of its own: gcloud's ssh ends with it
  on_worker 0 "tail -n 20 -F tvq/run.log" 2>/dev/null </dev/null &
  tail_pid=$!
  set +m
  trap 'kill -- "-$tail_pid" 2>/dev/null; say "left; the run continues. Again: the same command"; exit 0' INT
  while [ -z "$code" ]; do
    sleep "$poll"
    case $(state) in
      READY)
        case $(on_worker 0 "$report" 2>/dev/null) in
          'ended 0:'*) code=0 ;;
          'ended '*) code=$(on_worker 0 "cat tvq/run.code") ;;
          lost* | absent*) code=201 ;;
        esac
        ;;
      '') ;; # gcloud itself failed: ask again
      *) code=200 ;;
    esac
    looks=$((looks + 1))
    # A worker that was rebooted alone is missed by the others until its process is back.
    if [ -z "$code" ] && [ $((looks % 20)) -eq 0 ]; then
      on_all revive "tvq/launch/worker.sh revive"
    fi
  done
  trap - INT
  kill -- "-$tail_pid" 2>/dev/null
  wait "$tail_pid" 2>/dev/null
  return "$code"
}

run_all() {
  need_type
  need_command
  local budget=${restarts:-50} made=0 there=no seen code
  if [ "$dry" = yes ]; then
    create && setup && train && logs
    return
  fi
  while :; do
    seen=$(state)
    case $seen in
      PREEMPTED | TERMINATED | STOPPED | SUSPENDED | FAILED)
        there=yes
        say "$name was taken away ($seen); making it again"
        remove || say "could not delete $name; trying on"
        ;;
    esac
    code=200
    if (create); then
      there=yes
      if on_worker 0 "$report" 2>/dev/null | grep -q ^running || (stop && setup && train); then
        follow
        code=$?
      elif [ "$(state)" = READY ]; then
        die 1 "the run could not be started on $name, see above; the slice is still there"
      fi
    elif [ "$there" = no ]; then
      exit 1
    else
      sleep "$poll"
    fi
    if [ "$code" -ne 200 ] && [ "$code" -ne 201 ]; then
      [ "$code" -eq 0 ] || status
      say "the run ended with exit code $code; the slice is still there: $script delete --name $name --zone $zone"
      exit "$code"
    fi
    made=$((made + 1))
    [ "$made" -le "$budget" ] || die 1 "$name was taken away $made times; --restarts $budget are used up"
    say "restart $made of $budget"
  done
}

what=${1:-}
[ $# -eq 0 ] || shift
case $what in
  -h | --help) help ;;
  create | setup | train | status | logs | stop | delete) options "$@"; "$what" ;;
  run) options "$@"; run_all ;;
  *) die 2 "create, setup, train, run, status, logs, stop or delete? see $script --help" ;;
esac
