#!/usr/bin/env bash
# Starts one run through the `deepspeed` launcher. Run `bash launch/run.sh --help`.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash launch/run.sh [--processes N] [train|score] CONFIG.yaml [--set key=value ...]

Trains what CONFIG.yaml says on N processes of this machine, through the `deepspeed` launcher, or
scores given answers by its PRM (score; see `amrlhf score --help` for its options).
Processes = TP x PP x DP: parallel.tensor and parallel.pipeline are in the YAML, the rest is data
parallel. With GPUs one process gets one GPU (CUDA_VISIBLE_DEVICES is respected), else the
processes share the CPU cores.

  --processes N   default: all GPUs, or 2 on a CPU
  --set ...       override keys of the YAML, such as --set optimizer.lr=1e-6 parallel.pipeline=2
  --help          this text

Examples:
  bash launch/run.sh configs/prm_demo.yaml
  bash launch/run.sh --processes 4 configs/ppo_demo.yaml --set parallel.pipeline=2 rollout.top_k=50

The exit code is the run's: 0 done, 2 a mistake in the input, 3 stopped by the watchdog (no progress
for engine.watchdog_seconds), 247 a process was killed, 1 another error; the last line names the
rank that failed first. Ctrl-C ends all processes; started
again, a run goes on from its newest checkpoint. Variables: VENV (default .venv), MASTER_PORT
(default: a free one), OMP_NUM_THREADS (default: cores / processes).
TEXT
}

fail() {
    echo "run.sh: $1" >&2
    exit 2
}

PROCESSES=""
while [[ $# -gt 0 ]]; do
    case "$1" in
        --processes) [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "--processes needs a number (see --help)"; PROCESSES="$2"; shift 2 ;;
        --help | -h) usage; exit 0 ;;
        -*) fail "unknown option '$1' (see --help)" ;;
        *) break ;;
    esac
done
COMMAND=train
case "${1:-}" in train | score) COMMAND="$1"; shift ;; esac
[[ $# -gt 0 ]] || fail "give the CONFIG.yaml of a run, see configs/ (and --help)"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
[[ -x "$VENV/bin/deepspeed" ]] || fail "nothing is installed in $VENV: bash launch/install.sh"
BIN="$(cd "$VENV/bin" && pwd)"

GPUS="$("$BIN/python" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"
PROCESSES="${PROCESSES:-$((GPUS > 0 ? GPUS : 2))}"
CORES="$(env -u OMP_NUM_THREADS nproc)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > PROCESSES ? CORES / PROCESSES : 1))}"
export TOKENIZERS_PARALLELISM=false
PORT="${MASTER_PORT:-$("$BIN/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}"

if [[ "$GPUS" -gt 0 ]]; then
    [[ "$PROCESSES" -le "$GPUS" ]] || fail "--processes $PROCESSES, but $GPUS GPUs are visible: one process needs one GPU"
    # The launcher ignores CUDA_VISIBLE_DEVICES when --num_gpus is given, so the devices are named.
    VISIBLE="${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}"
    WHERE=(--include "localhost:$(cut -d, -f "1-$PROCESSES" <<<"$VISIBLE")")
    unset CUDA_VISIBLE_DEVICES
else
    # LOCAL_SIZE spares the launcher its count of NUMA nodes, which needs numactl.
    export DS_ACCELERATOR=cpu LOCAL_SIZE="$PROCESSES"
    WHERE=(--num_gpus "$PROCESSES")
fi

STARTED="$(date +%s)"
# The launcher passes no signal on: killed alone, it leaves its ranks behind. Job control gives it a
# process group of its own, and a signal to this script goes to the whole group.
set -m
"$BIN/deepspeed" --log_level critical "${WHERE[@]}" --master_port "$PORT" --no_local_rank \
    --module megatron_amrlhf "$COMMAND" "$@" </dev/null &
GROUP=$!
set +m
stop() {
    trap '' INT TERM HUP
    kill -TERM -- "-$GROUP" 2>/dev/null || true
    for _ in {1..30}; do
        kill -0 -- "-$GROUP" 2>/dev/null || exit "$1"
        sleep 1
    done
    kill -KILL -- "-$GROUP" 2>/dev/null || true
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP
CODE=0
wait "$GROUP" || CODE=$?
case "$CODE" in
    0 | 2 | 130) ;; # 2: the run has said what is wrong
    *)
        CAUSE="$("$BIN/python" -m megatron_amrlhf status "$@" --ended-since "$STARTED")" || CAUSE=""
        echo "run.sh: the run failed (exit code $CODE), ${CAUSE:-see above}" >&2
        ;;
esac
exit "$CODE"
