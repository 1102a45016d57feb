#!/usr/bin/env bash
# Train on every GPU of this machine: launch/local_gpu.sh [CONFIG.yaml | key=value]...
# The environment is the active one, else .venv of this checkout. Not run on a GPU yet.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for bin in "${VIRTUAL_ENV:-/nowhere}/bin" "$root/.venv/bin" "$(dirname "$(command -v fireopd || echo /nowhere/fireopd)")"; do
  [ -x "$bin/fireopd" ] && break
done
if [ ! -x "$bin/fireopd" ]; then
  echo "no environment with fireopd; expected: python3 -m venv $root/.venv && $root/.venv/bin/pip install -e '$root[cuda]'" >&2
  exit 2
fi
if ! "$bin/python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("jax_plugins.xla_cuda13") is None)' 2>/dev/null; then
  echo "$bin has no CUDA plugin of JAX; expected: $bin/pip install -e '$root[cuda]'" >&2
  exit 2
fi
exec env JAX_PLATFORMS=cuda "$bin/fireopd" train "$@"
