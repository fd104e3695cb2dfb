#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest:
#   bash launch/test.sh                       all tests, several files at a time
#   bash launch/test.sh -m "not slow" -x      without the slow ones, stop at the first failure
#   bash launch/test.sh -n 0 -s FILE          one after the other, with what they print
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV="${VENV:-.venv}"
bash launch/install.sh --test
CORES="$(getconf _NPROCESSORS_ONLN)"
# Tests start several processes each, and wait for them: one worker a core, one thread a process.
export OMP_NUM_THREADS=1
exec "$VENV/bin/python" -m pytest -n "$((CORES < 8 ? CORES : 8))" --no-loadscope-reorder "$@"
