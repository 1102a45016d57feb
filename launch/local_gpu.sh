#!/usr/bin/env bash
# Train on every GPU of this machine: launch/local_gpu.sh [CONFIG.yaml | key=value]...
# The environment is the active one, else .venv of this checkout. Not run on a GPU yet.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_environment '[cuda]'
if ! "$bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("jax_plugins.xla_cuda13") is None)' 2>/dev/null; then
  echo "$bin has no CUDA plugin of JAX; expected: $bin/pip install -e '$root[cuda]'" >&2
  exit 2
fi
exec env JAX_PLATFORMS=cuda "$bin/fireopd" train "$@"
