#!/usr/bin/env bash
# The main job in one command, on a fresh machine. Run `bash launch/quickstart.sh --help`.
# megatron_amrlhf/launching/demonstration.py plans its runs, launch/train.sh starts them.
set -euo pipefail

LAUNCH="$(dirname "$(realpath -s -- "${BASH_SOURCE[0]}")")"
fail() {
    echo "quickstart.sh: $1" >&2
    exit 2
}

# What is wrong with the options is told before anything is installed.
ALGORITHM=rejection_sampling OPTIONS=()
one_of() {
    local choice choices="${*:3}"
    for choice in $choices; do [[ "$2" != "$choice" ]] || return 0; done
    fail "$1 must be one of ${choices// /, } (got '$2')"
}
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help | -h) exec cat "$LAUNCH/help/quickstart.txt" ;;
        --) break ;;
        --algorithm | --model | --steps | --dtype | --tp | --pp | --processes | --name | --prm)
            [[ $# -ge 2 && -n "$2" ]] || fail "$1 needs a value (see --help)" ;;
        *) fail "unknown option '$1' (see --help)" ;;
    esac
    VALUE="$2"
    case "$1" in
        --algorithm)
            one_of "$1" "$2" ppo dpo rejection_sampling grpo kto
            ALGORITHM="$2"
            ;;
        --dtype) one_of "$1" "$2" auto float32 bfloat16 ;;
        --model) [[ ! -e "$2" ]] || VALUE="$(cd "$(dirname "$2")" && pwd)/$(basename "$2")" ;;
        --steps | --tp | --pp | --processes)
            [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a number of at least 1 (got '$2')" ;;
    esac
    OPTIONS+=("$1=$VALUE")
    shift 2
done
[[ "${1:-}" != -- ]] || shift

cd "$LAUNCH/.."
export VENV="${VENV:-.venv}"
echo "[1/4] environment $VENV"
bash launch/install.sh
python() { "$VENV/bin/python" "$@"; }
COUNT='import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)'
PLAN="$(python -m megatron_amrlhf.launching.demonstration --gpus "$(python -c "$COUNT")" \
    --venv "$VENV" --algorithm "$ALGORITHM" ${OPTIONS[@]+"${OPTIONS[@]}"} -- "$@")"
eval "$PLAN" # PROCESSES LAYOUT PRM_FOLDER FOLDER HAS_PRM PRM_RUN RUN DONE

WITH_PARENT=(env)
! command -v setpriv >/dev/null || WITH_PARENT=(setpriv --pdeathsig TERM)
# Runs one training as a child that gets the signals to this script: the first one asks it to save
# and stop, a second one ends it. It stops, too, where this script is killed.
train() {
    "${WITH_PARENT[@]}" bash launch/train.sh --processes "$PROCESSES" "$1" --set "${@:2}" &
    local child=$! code signalled
    trap 'signalled=1; kill -TERM "$child" 2>/dev/null || true' INT TERM HUP
    while :; do
        code=0 signalled=0
        wait "$child" || code=$?
        [[ "$signalled" == 1 ]] || break
    done
    trap - INT TERM HUP
    [[ "$code" == 0 ]] || exit "$code"
}

# Says how long the runs will take, and remembers the seconds of each.
estimate() {
    local seconds
    seconds="$(python -m megatron_amrlhf.launching.estimate --processes "$PROCESSES" "$@")" ||
        exit $?
    mapfile -t EXPECTED <<<"$seconds"
}

echo "[2/4] demonstration data data/demo"
python tools/make_demo_data.py data/demo

if [[ -n "$HAS_PRM" ]]; then
    estimate --run "${RUN[@]}"
    echo "[3/4] process reward model: $PRM_FOLDER is there"
else
    estimate --run "${PRM_RUN[@]}" --run "${RUN[@]}"
    echo "[3/4] process reward model: $PRM_FOLDER ($LAYOUT)"
    AMRLHF_SECONDS_TO_FOLLOW="${EXPECTED[1]:-0}" train "${PRM_RUN[@]}"
fi

echo "[4/4] $ALGORITHM: $FOLDER ($LAYOUT)"
train "${RUN[@]}"
echo "$DONE"
