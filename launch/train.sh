#!/usr/bin/env bash
# Starts one run through the `deepspeed` launcher. Run `bash launch/train.sh --help`.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash launch/train.sh [options] [train|score] CONFIG.yaml [--set key=value ...]
       bash launch/train.sh [options] doctor [CONFIG.yaml]

Trains what CONFIG.yaml says through the `deepspeed` launcher, or scores given answers by its PRM
(score; see `amrlhf score --help` for its options), or looks whether machines, network and folders
are fit for that (doctor; see `amrlhf doctor --help`). Processes = TP x PP x DP: parallel.tensor and
parallel.pipeline are in the YAML, the rest is data parallel. With GPUs one process gets one GPU (on one
machine those of CUDA_VISIBLE_DEVICES, as numbers), else the processes share the CPU cores.

  --processes N    on this machine alone (default: all GPUs, or 2 on a CPU)
  --hostfile F     on several machines, one line `HOST slots=N` each, by pdsh and ssh; folder, data
                   and environment have to be at the same place on all of them
  --node-rank R    without ssh: start this script on each machine, R is its line in F, from 0
  --master H:P     host and port that the ranks meet at, with --hostfile (default: F's first host
                   and MASTER_PORT, else a port that is free here; 29500 with --node-rank)
  --logs DIR       the ranks' logs (default: runs/NAME/logs/attempt-NN, a new one)
  --set ...        override keys of the YAML, such as --set optimizer.lr=1e-6 parallel.pipeline=2
  --help           this text

Examples:
  bash launch/train.sh configs/prm_demo.yaml
  bash launch/train.sh --processes 4 configs/ppo_demo.yaml --set parallel.pipeline=2 rollout.top_k=50
  bash launch/train.sh --hostfile hosts configs/ppo_qwen2_7b.yaml
  bash launch/train.sh --hostfile hosts doctor configs/ppo_qwen2_7b.yaml

Files named here are looked for where you are, then in the repository; paths inside the YAML and in
--set count from the repository's root. The console shows rank 0; every rank's output is in the
folder of --logs. Ctrl-C or SIGTERM: the run saves at the end of its last completed step and leaves;
again: it ends at once. Started again, it goes on from its newest checkpoint. The exit code is the
run's: 0 done, 2 a mistake in the input, 3 stopped by the watchdog (no progress for
engine.watchdog_seconds), 75 asked to stop, start it again, 130 and 143 ended at once by Ctrl-C and
SIGTERM, 247 a process was killed, 137 this script or its launcher was (the ranks then end too), 1
another error; the last line then names the rank that failed first. Variables: VENV (default
.venv), MASTER_PORT (default: a free one), OMP_NUM_THREADS (default: cores / processes); what other
nodes get of the environment is in runs/NAME/.deepspeed_env.
TEXT
}

fail() {
    echo "train.sh: $1" >&2
    exit 2
}

PROCESSES="" HOSTFILE="" NODE_RANK="" MEET="" LOGS=""
while [[ $# -gt 0 ]]; do
    case "$1" in
        --processes) [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || fail "--processes needs a number (see --help)"; PROCESSES="$2"; shift 2 ;;
        --hostfile) [[ -f "${2:-}" ]] || fail "--hostfile needs a file (got '${2:-}')"; HOSTFILE="$(realpath "$2")"; shift 2 ;;
        --node-rank) [[ "${2:-}" =~ ^[0-9]+$ ]] || fail "--node-rank needs a number (see --help)"; NODE_RANK="$2"; shift 2 ;;
        --master) [[ "${2:-}" =~ ^[^:]+:[0-9]+$ ]] || fail "--master needs HOST:PORT (see --help)"; MEET="$2"; shift 2 ;;
        --logs) [[ -n "${2:-}" ]] || fail "--logs needs a folder (see --help)"; LOGS="$(realpath -sm -- "$2")"; shift 2 ;;
        --help | -h) usage; exit 0 ;;
        -*) fail "unknown option '$1' (see --help)" ;;
        *) break ;;
    esac
done
COMMAND=train
case "${1:-}" in
    train | score | doctor) COMMAND="$1"; shift ;;
    plan | config | show-masks | status)
        fail "only train, score and doctor are launched, call ${VENV:-.venv}/bin/amrlhf $*" ;;
esac
[[ $# -gt 0 || "$COMMAND" == doctor ]] || fail "give the CONFIG.yaml of a run, see configs/ (and --help)"
[[ -n "$HOSTFILE" || -z "$NODE_RANK$MEET" ]] || fail "--node-rank and --master need a --hostfile"
[[ -z "$HOSTFILE" || -z "$PROCESSES" ]] || fail "--processes is for one machine: the hostfile has slots=N"
[[ -z "$HOSTFILE" || -n "$NODE_RANK" ]] || command -v pdsh >/dev/null ||
    fail "pdsh is not installed: install it, or start this script on each machine with --node-rank"

# The ranks run in the repository: what is named from here needs its whole path.
WORDS=() OPTION=""
for WORD in "$@"; do
    [[ ! "$WORD" =~ ^--(processes|hostfile|node-rank|master|logs)(=|$) ]] ||
        fail "${WORD%%=*} is the launcher's: it goes before CONFIG.yaml (see --help)"
    if [[ "$WORD" =~ ^(--(answers|out|folder|json))=(.*)$ ]]; then
        WORDS+=("${BASH_REMATCH[1]}") OPTION="${BASH_REMATCH[1]}" WORD="${BASH_REMATCH[3]}"
    fi
    if [[ -f "$WORD" || ("$OPTION" =~ ^--(out|folder|json)$ && "$WORD" != "~"*) ]]; then
        WORD="$(realpath -sm -- "$WORD")"
    fi
    WORDS+=("$WORD") OPTION="$WORD"
done
set -- "${WORDS[@]}"
[[ ! -d "${VENV:-}" ]] || VENV="$(realpath -s -- "$VENV")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
[[ -x "$VENV/bin/deepspeed" ]] || fail "nothing is installed in $VENV: bash launch/install.sh"
BIN="$(cd "$VENV/bin" && pwd)"
# Without the NVIDIA driver there is nothing to ask torch for, which takes seconds.
GPUS=0
[[ ! -e /proc/driver/nvidia && ! -e /dev/nvidiactl && ! -e /dev/dxg ]] || # the last: WSL2
    GPUS="$("$BIN/python" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"
PROCESSES="${PROCESSES:-$((GPUS > 0 ? GPUS : 2))}"
if [[ -z "$HOSTFILE" && "$GPUS" -gt 0 && "$PROCESSES" -gt "$GPUS" ]]; then
    fail "--processes $PROCESSES, but $GPUS GPUs are visible: one process needs one GPU"
fi
export TOKENIZERS_PARALLELISM=false
[[ "$GPUS" -gt 0 ]] || export DS_ACCELERATOR=cpu
PREPARED="$("$BIN/python" -m megatron_amrlhf.launching.prepare --processes "$PROCESSES" \
    ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NODE_RANK:+--node-rank "$NODE_RANK"} \
    ${LOGS:+--logs "$LOGS"} -- "$COMMAND" "$@")"
[[ "$PREPARED" == FOLDER=* ]] || { echo "$PREPARED"; exit 0; } # a command's --help
eval "$PREPARED" # FOLDER LOGS PORT HOSTS HOST_NAMES MASTER SLOTS THREADS HIDDEN
export OMP_NUM_THREADS="$THREADS" AMRLHF_HOSTS="$HOST_NAMES" AMRLHF_PREPARED=1

OPTIONS=(--log_level critical --no_local_rank)
# The doctor's rank 0 speaks for all, also where the folder for logs is what is wrong.
[[ "$COMMAND" == doctor ]] || OPTIONS+=(--enable_each_rank_log "$LOGS")
if [[ -n "$HOSTFILE" ]]; then
    [[ -z "$NODE_RANK" ]] || { PORT=29500; OPTIONS+=(--no_ssh --node_rank "$NODE_RANK"); }
    MEET="${MEET:-$MASTER:${MASTER_PORT:-$PORT}}"
    OPTIONS+=(--hostfile "$HOSTFILE" --master_addr "${MEET%:*}")
    MASTER_PORT="${MEET##*:}"
    export DS_ENV_FILE="$FOLDER/.deepspeed_env"
elif [[ "$GPUS" -gt 0 ]]; then
    # The launcher ignores CUDA_VISIBLE_DEVICES when --num_gpus is given, so the devices are named.
    VISIBLE="${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}"
    [[ "$VISIBLE" =~ ^[0-9]+(,[0-9]+)*$ ]] ||
        fail "CUDA_VISIBLE_DEVICES=$VISIBLE: the deepspeed launcher takes numbers only, such as 0,1 (nvidia-smi -L)"
    OPTIONS+=(--include "localhost:$(cut -d, -f "1-$PROCESSES" <<<"$VISIBLE")")
    unset CUDA_VISIBLE_DEVICES
else
    export LOCAL_SIZE="$PROCESSES" # spares the launcher its count of NUMA nodes, which needs numactl
    OPTIONS+=(--num_gpus "$PROCESSES")
fi
OPTIONS+=(--master_port "${MASTER_PORT:-$PORT}")
# Rank 0 writes into its log; its progress bars go straight to the terminal, if this is one.
[[ ! -t 2 ]] || export AMRLHF_TERMINAL="$(readlink "/proc/$$/fd/2")"

# A first signal asks the run to stop, a second one ends it. Ranks of other nodes see the file; the
# launcher itself would end every run of this user there, so on several nodes it is not asked.
GROUP="" FOLLOWER="" REQUESTS=0 SIGNALLED=0 STARTED="$(date +%s)"
group_lives() { kill -0 -- "-$GROUP" 2>/dev/null; }
wait_for_group() { # so many seconds at most
    local second
    for ((second = 0; second < $1; second++)); do group_lives && sleep 1 || return 0; done
}
end_group() {
    [[ "$HOSTS" -gt 1 && -z "$NODE_RANK" ]] || kill -TERM -- "-$GROUP" 2>/dev/null || true
    wait_for_group 30
    kill -KILL -- "-$GROUP" 2>/dev/null || true
}
# Where this script is killed, its end of a pipe is closed without a word: then the run is ended. The
# ranks notice it by the stop file, and tell it; what is left after that is killed.
exec {ALIVE}> >(
    exec >/dev/null 2>&1
    trap '' INT TERM HUP
    while read -r WORD; do
        [[ "$WORD" != over ]] || exit 0
        GROUP="$WORD"
    done
    [[ "$COMMAND" != train ]] || echo "now script" >"$FOLDER/stop" || true
    [[ -n "$GROUP" ]] || exit 0 # killed within a moment of starting the launcher
    [[ "$COMMAND" != train ]] || wait_for_group 15
    end_group
)
WATCHER=$!
tell() { (echo "$1" >&"$ALIVE") 2>/dev/null || true; }
leave() { # leaves no process behind
    tell over
    wait "$WATCHER" || true
    exit "$1"
}
end_now() { # $1: why, where it was not asked for
    # The doctor's may be that of another run.
    [[ "$COMMAND" == doctor ]] || echo "now ${1:-}" >"$FOLDER/stop" || true
    end_group
}
stop() {
    SIGNALLED=1 REQUESTS=$((REQUESTS + 1))
    if [[ "$REQUESTS" == 1 && "$COMMAND" == train ]]; then
        if echo "SIG$1" >"$FOLDER/stop" || [[ -e "$FOLDER/stop" ]]; then # empty on a full disk
            echo "train.sh: the run saves and stops; once more to end it at once" >&2
        else
            echo "train.sh: the run cannot be asked to stop; once more to end it at once" >&2
        fi
        return 0 # without a number it would be that of the interrupted wait, on which set -e exits
    fi
    trap '' INT TERM HUP
    GROUP="${GROUP:-${!:-}}" # just started
    end_now
    [[ -z "$FOLLOWER" ]] || kill -KILL "$FOLLOWER" 2>/dev/null || true
    # The ranks may be gone before one of them has noted the end.
    [[ "$HOSTS" -gt 1 || "$COMMAND" != train ]] ||
        "$BIN/python" -m megatron_amrlhf status "$FOLDER" --ended-since "$STARTED" >/dev/null || true
    leave "$2"
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop HUP 129' HUP

status() { cat "$FOLDER/status.json" 2>/dev/null || true; }
BEFORE="$(status)"
# The launcher passes no signal on: killed alone, it leaves its ranks behind. Job control gives it a
# process group of its own, so that the signals of a terminal reach this script alone.
set -m
env "${HIDDEN[@]/#/--unset=}" "$BIN/deepspeed" "${OPTIONS[@]}" --module megatron_amrlhf "$COMMAND" "$@" </dev/null {ALIVE}>&- &
GROUP=$!
set +m
tell "$GROUP"
if [[ "${NODE_RANK:-0}" == 0 && "$COMMAND" != doctor ]]; then
    (
        exec {ALIVE}>&-
        # A signal to the whole job reaches it too, and the run goes on for a while. Bash can miss
        # that a child has died of the signal on which it is acting itself, and wait for ever.
        trap '' INT TERM HUP
        GONE=0
        until (cd "$LOGS" 2>/dev/null && compgen -G "*_rank0.log") >/dev/null; do # $LOGS is no pattern
            [[ "$GONE" == 0 ]] || exit 0
            if group_lives; then sleep 0.2; else GONE=1; fi # looks once more
        done
        exec tail -q -n +1 -s 0.2 -F --pid="$GROUP" "$LOGS"/*_rank0.log 2>/dev/null
    ) &
    FOLLOWER=$!
fi
while :; do
    CODE=0 SIGNALLED=0
    wait "$GROUP" || CODE=$?
    [[ "$SIGNALLED" == 1 ]] || break # a signal ends the wait, not the run
done

CAUSE=""
# Killed by a signal, the launcher may have left its ranks behind.
if [[ "$CODE" -gt 128 ]] && group_lives; then
    CAUSE="cause: the launcher was killed (out of memory, or by hand)"
    end_now launcher
fi
# DeepSpeed says 0 where its launcher on a node, or pdsh, was killed: the run itself knows better.
if [[ "$CODE/$COMMAND/${NODE_RANK:-0}" == 0/train/0 ]]; then
    NOW="$(status)"
    if [[ "$NOW" == "$BEFORE" || ! "$NOW" =~ '"state": "'(finished|preempted) ]]; then
        CODE=1 CAUSE="cause: the launcher ended before the run (killed: out of memory, or by hand)"
        end_now launcher
    fi
fi
[[ -z "$FOLLOWER" ]] || wait "$FOLLOWER" || true

# Lines of a rank whose log the console has not shown.
show_rank() {
    [[ "$1" != 0 || "${NODE_RANK:-0}" != 0 ]] || return 0
    tail -q -n "$2" "$LOGS"/*_rank"$1".log >&2 2>/dev/null || true
}
case "$COMMAND/$CODE" in
    */0 | */75 | */130 | doctor/[12]) ;;
    */2) # one rank has said what is wrong
        grep -qs '^error' "$LOGS"/*_rank0.log || grep -hs '^error' "$LOGS"/*.log | head -n 1 >&2
        ;;
    doctor/*) echo "train.sh: the doctor has not ended as it should (exit code $CODE)" >&2 ;;
    *)
        [[ -n "$CAUSE" ]] ||
            CAUSE="$("$BIN/python" -m megatron_amrlhf status "$FOLDER" --ended-since "$STARTED")" || CAUSE=""
        [[ ! "$CAUSE" =~ ^cause:\ .*rank\ ([0-9]+)\  ]] || show_rank "${BASH_REMATCH[1]}" 20
        echo "train.sh: the run failed (exit code $CODE), ${CAUSE:-see $LOGS}" >&2
        ;;
esac
leave "$CODE"
