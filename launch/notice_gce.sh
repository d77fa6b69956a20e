#!/usr/bin/env bash
# Ends with 0 when Google Cloud announces that this machine is preempted or about to be maintained.
# For launch/supervise.sh --notice. On a machine without the metadata server it waits for ever.

set -u
server=http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1/instance
ask() { curl --silent --fail --max-time 5 --header "Metadata-Flavor: Google" "$server/$1"; }
until [ "$(ask preempted)" = TRUE ] || [[ $(ask maintenance-event) == TERMINATE* ]]; do
  sleep "${1:-5}"
done
