# Sourced by the scripts beside it: find_environment EXTRA sets $root, and $bin to the active environment's, else that of .venv
# in this checkout, else that of the path; without one it says how to make it, with the package's EXTRA, such as '[cuda]'.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

find_environment() {
  for bin in "${VIRTUAL_ENV:-/nowhere}/bin" "$root/.venv/bin" "$(dirname "$(command -v fireopd || echo /nowhere/fireopd)")"; do
    [ -x "$bin/fireopd" ] && return
  done
  echo "no environment with fireopd; expected: python3 -m venv $root/.venv && $root/.venv/bin/pip install -e '$root$1'" >&2
  exit 2
}
