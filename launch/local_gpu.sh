#!/usr/bin/env bash
# Train on every GPU of this machine: launch/local_gpu.sh CONFIG.yaml [key=value ...]
# Requires `pip install -e ".[cuda]"` in the root of the checkout. Not run on a GPU yet.
set -euo pipefail
exec env JAX_PLATFORMS=cuda fireopd train "$@"
