#!/usr/bin/env bash
# Prints an indexed Kubernetes job with its headless service: one process a pod. For GKE, or any cluster.
#
#   launch/gke.sh --name NAME --image IMAGE --hosts N [--limit RESOURCE=COUNT] [--select LABEL=VALUE]...
#                 [--restarts N] -- ARGUMENTS OF tvq
#
#   launch/gke.sh --name run1 --image REGISTRY/tvq:tpu --hosts 4 --limit google.com/tpu=4 \
#     --select cloud.google.com/gke-tpu-topology=4x4 \
#     --select cloud.google.com/gke-tpu-accelerator=tpu-v5-lite-podslice \
#     -- train --config=configs/debug.py --workdir=gs://BUCKET/run1 | kubectl apply -f -
#
# A pod that fails is started again by Kubernetes, on average --restarts times a pod (default 20). One that was
# evicted, or stopped and saved with exit code 75 as all do when one is, is started again and not counted. Exit
# codes 2, a wrong configuration, and 3, diverged, end the job at once. `kubectl delete job NAME` asks all pods
# to save and gives them two minutes.

set -u
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

name='' image='' hosts='' limit='' restarts=20 selectors=()
while [ $# -gt 0 ]; do
  case $1 in
    --name) name=$(option_value name "$@") || exit ; shift 2 ;;
    --image) image=$(option_value image "$@") || exit ; shift 2 ;;
    --hosts) hosts=$(option_value hosts "$@") || exit ; shift 2 ;;
    --limit) limit=$(option_value limit "$@") || exit ; shift 2 ;;
    --select)
      option_value select "$@" >/dev/null || exit
      selectors+=("$2")
      shift 2
      ;;
    --restarts) restarts=$(option_value restarts "$@") || exit ; shift 2 ;;
    --dry-run) shift ;; # it only prints
    -h | --help) help; exit ;;
    --) shift; break ;;
    *) die 2 "unknown option $1; see $script --help" ;;
  esac
done
for needed in name image hosts; do
  [ -n "${!needed}" ] || die 2 "--$needed is missing; see $script --help"
done
[ $# -gt 0 ] || die 2 "no arguments of tvq after --; see $script --help"
whole_number --hosts "$hosts" 1
whole_number --restarts "$restarts" 0
[[ $name =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] || die 2 "--name must be lower-case letters, digits and -, not '$name'"
[[ -z $limit || $limit == *=* ]] || die 2 "--limit must be RESOURCE=COUNT, not '$limit'"

# A YAML string in single quotes.
string() { printf "'%s'" "${1//\'/\'\'}"; }

cat <<YAML
apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: $name
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
spec:
  completionMode: Indexed
  completions: $hosts
  parallelism: $hosts
  backoffLimit: $((restarts * hosts))
  podFailurePolicy:
    rules:
      - action: FailJob
        onExitCodes:
          containerName: tvq
          operator: In
          values: [2, 3]
      - action: Ignore
        onExitCodes:
          containerName: tvq
          operator: In
          values: [75]
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: 120
YAML
if [ "${#selectors[@]}" -gt 0 ]; then
  echo "      nodeSelector:"
  for selector in "${selectors[@]}"; do
    [[ $selector == *=* ]] || die 2 "--select must be LABEL=VALUE, not '$selector'"
    echo "        ${selector%%=*}: $(string "${selector#*=}")"
  done
fi
cat <<YAML
      containers:
        - name: tvq
          image: $(string "$image")
          args:
YAML
for argument in "$@"; do
  echo "            - $(string "$argument")"
done
cat <<YAML
          env:
            - name: TVQ_COORDINATOR
              value: '$name-0.$name:8482'
            - name: TVQ_N_PROCESS
              value: '$hosts'
          ports:
            - containerPort: 8482
            - containerPort: 8483
YAML
if [ -n "$limit" ]; then
  cat <<YAML
          resources:
            limits:
              ${limit%%=*}: $(string "${limit#*=}")
YAML
fi
