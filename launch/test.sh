#!/usr/bin/env bash
# Installs what the tests need, checks the code and runs the tests. See `bash launch/test.sh --help`.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash launch/test.sh [pytest's arguments]

Installs what the tests need (launch/install.sh --test), checks the code with ruff (lint and format)
and mypy (types), less than a minute in all, and runs the tests; all arguments go to pytest.
The checks are left out where a file or folder of tests, or -k, chooses some of the tests.

  --help   this text

Examples:
  bash launch/test.sh                       the checks, then all tests, several files at a time
  bash launch/test.sh -m "not slow" -x      without the slow ones, stop at the first failure
  bash launch/test.sh -n 0 -s FILE          one after the other, with what they print; no checks

Variables: VENV (default .venv).
TEXT
}

case "${1:-}" in --help | -h) usage; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV="${VENV:-.venv}"
bash launch/install.sh --test

chooses_tests() {
    local argument
    for argument in "$@"; do
        [[ "$argument" == -k* || -e "${argument%%::*}" ]] && return 0
    done
    return 1
}

if ! chooses_tests "$@"; then # the same as in .pre-commit-config.yaml
    "$VENV/bin/ruff" check
    "$VENV/bin/ruff" format --check
    "$VENV/bin/mypy"
fi
CORES="$(getconf _NPROCESSORS_ONLN)"
# Tests start several processes each, and wait for them, those of Slurm most of the time: a worker
# more than cores, one thread a process.
export OMP_NUM_THREADS=1
exec "$VENV/bin/python" -m pytest -n "$((CORES < 8 ? CORES + 1 : 9))" --no-loadscope-reorder "$@"
