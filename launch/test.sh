#!/usr/bin/env bash
# Installs what the tests need and runs them; arguments go to pytest:
#   bash launch/test.sh                       all tests
#   bash launch/test.sh -m "not slow" -x      without the slow ones, stop at the first failure
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV="${VENV:-.venv}"
bash launch/install.sh --test
# Tests start several processes each; one thread a process keeps them from waiting on each other.
export OMP_NUM_THREADS=1
exec "$VENV/bin/python" -m pytest "$@"
