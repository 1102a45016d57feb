#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice that exists:
#   NAME=my-v5p-64 ZONE=us-east5-a launch/tpu_pod.sh CONFIG.yaml run.dir=/mnt/shared/runs/one [key=value]...
# Needs gcloud, the checkout at the same PLACE of every host, its environment there in .venv (pip install -e '.[tpu]'), and
# run.dir, models and data on a file system of all hosts. Not run on a TPU yet.
set -euo pipefail

: "${NAME:?expected the name of the TPU slice}" "${ZONE:?expected its zone}"
place=${PLACE:-fireopd-jax}
# Quoted once for the shell of the hosts.
printf -v arguments '%q ' "$@"
run="cd $place && JAX_PLATFORMS=tpu .venv/bin/fireopd train ${arguments}--distributed"
# JAX learns the other hosts' addresses from the slice. A spot slice that is taken away sends SIGTERM, and the run saves; begin
# this script again, with the same run.dir, once there is a slice again. MAX_TRIES starts it anew after a failure.
for ((try = 1; try <= ${MAX_TRIES:-1}; try++)); do
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$run" && exit 0
  status=$?
  [ "$status" -eq 2 ] && break # refused: a mistake in the configuration, or in the data
done
exit "$status"
