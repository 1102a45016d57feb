#!/usr/bin/env bash
# One run in two processes of this machine, on virtual CPU devices: what a pod does, without a pod.
#   launch/two_processes.sh [CONFIG.yaml | key=value]...      DEVICES=2 of each process, PORT=8476
# The environment is the active one, else .venv of this checkout. Ctrl-C stops and saves, as for one process.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_environment ''
export JAX_PLATFORMS=cpu JAX_NUM_PROCESSES=2 JAX_COORDINATOR_ADDRESS="127.0.0.1:${PORT:-8476}"
# With JAX's default scheduler, virtual devices may wait for one another's collectives for ever.
export XLA_FLAGS="--xla_force_host_platform_device_count=${DEVICES:-2} \
--xla_cpu_enable_concurrency_optimized_scheduler=false ${XLA_FLAGS:-}"

JAX_PROCESS_ID=1 "$bin/fireopd" train "$@" --distributed &
follower=$!
status=0
JAX_PROCESS_ID=0 "$bin/fireopd" train "$@" --distributed || status=$?
wait "$follower" || status=$((status ? status : $?))
exit "$status"
