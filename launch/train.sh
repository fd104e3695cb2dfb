#!/usr/bin/env bash
# Starts one run through the `deepspeed` launcher. Run `bash launch/train.sh --help`.
# megatron_amrlhf/launching/start.py says how it is started, outcome.py what its end means; this
# script passes signals on, shows rank 0, and leaves no process behind.
set -euo pipefail

FROM="$PWD" LAUNCH="$(dirname "$(realpath -s -- "${BASH_SOURCE[0]}")")"
case "${1:-}" in --help | -h) exec cat "$LAUNCH/help/train.txt" ;; esac
[[ ! -d "${VENV:-}" ]] || VENV="$(realpath -s -- "$VENV")"
cd "$LAUNCH/.."
VENV="${VENV:-.venv}"
if [[ ! -x "$VENV/bin/deepspeed" ]]; then
    echo "train.sh: nothing is installed in $VENV: bash launch/install.sh" >&2
    exit 2
fi
BIN="$(cd "$VENV/bin" && pwd)"
# Without the NVIDIA driver there is nothing to ask torch for, which takes seconds.
GPUS=0 COUNT='import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)'
[[ ! -e /proc/driver/nvidia && ! -e /dev/nvidiactl && ! -e /dev/dxg ]] || # the last: WSL2
    GPUS="$("$BIN/python" -c "$COUNT")"
export TOKENIZERS_PARALLELISM=false
[[ "$GPUS" -gt 0 ]] || export DS_ACCELERATOR=cpu
START="$("$BIN/python" -m megatron_amrlhf.launching.start --from "$FROM" --gpus "$GPUS" -- "$@")"
[[ "$START" == FOLDER=* ]] || { echo "$START"; exit 0; } # a command's --help
eval "$START" # FOLDER LOGS COMMAND NODE_RANK NUM_HOSTS BY_SSH LAST_ATTEMPT ENVIRONMENT LAUNCHER

# A first signal asks the run to stop, a second one ends it. Ranks of other nodes see the file; the
# launcher itself would end every run of this user there, so on several nodes it is not asked.
GROUP="" FOLLOWER="" REQUESTS=0 SIGNALLED=0 STARTED="$(date +%s)"
group_lives() { kill -0 -- "-$GROUP" 2>/dev/null; }
wait_for_group() { # so many seconds at most
    local second
    for ((second = 0; second < $1; second++)); do group_lives && sleep 1 || return 0; done
}
end_group() {
    [[ -n "$BY_SSH" ]] || kill -TERM -- "-$GROUP" 2>/dev/null || true
    wait_for_group 30
    kill -KILL -- "-$GROUP" 2>/dev/null || true
}
# Where this script is killed, its end of a pipe is closed without a word: then the run is ended.
# The ranks notice it by the stop file, and tell it; what is left after that is killed.
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
    [[ "$NUM_HOSTS" -gt 1 || "$COMMAND" != train ]] ||
        "$BIN/python" -m megatron_amrlhf status "$FOLDER" --ended-since "$STARTED" \
            >/dev/null || true
    leave "$2"
}
trap 'stop INT 130' INT
trap 'stop TERM 143' TERM
trap 'stop HUP 129' HUP

# The launcher passes no signal on: killed alone, it leaves its ranks behind. Job control gives it a
# process group of its own, so that the signals of a terminal reach this script alone.
set -m
env "${ENVIRONMENT[@]}" "$BIN/deepspeed" "${LAUNCHER[@]}" </dev/null {ALIVE}>&- &
GROUP=$!
set +m
tell "$GROUP"
follow_rank_0() {
    exec {ALIVE}>&-
    # A signal to the whole job reaches it too, and the run goes on for a while. Bash can miss
    # that a child has died of the signal on which it is acting itself, and wait for ever.
    trap '' INT TERM HUP
    local gone=0
    until (cd "$LOGS" 2>/dev/null && compgen -G "*_rank0.log") >/dev/null; do # $LOGS is no pattern
        [[ "$gone" == 0 ]] || exit 0
        if group_lives; then sleep 0.2; else gone=1; fi # looks once more
    done
    exec tail -q -n +1 -s 0.2 -F --pid="$GROUP" "$LOGS"/*_rank0.log 2>/dev/null
}
if [[ "$NODE_RANK" == 0 && "$COMMAND" != doctor ]]; then
    follow_rank_0 &
    FOLLOWER=$!
fi
while :; do
    CODE=0 SIGNALLED=0
    wait "$GROUP" || CODE=$?
    [[ "$SIGNALLED" == 1 ]] || break # a signal ends the wait, not the run
done

# Killed by a signal, the launcher may have left its ranks behind.
KILLED="" REST="" SHOWN=() LAST="train.sh: the run ended (exit code $CODE), see $LOGS"
if [[ "$CODE" -gt 128 ]] && group_lives; then KILLED=--launcher-killed; fi
eval "$("$BIN/python" -m megatron_amrlhf.launching.outcome run $KILLED --command "$COMMAND" \
    --code "$CODE" --node-rank "$NODE_RANK" --folder "$FOLDER" --logs "$LOGS" \
    --since "$STARTED" --last-attempt "$LAST_ATTEMPT")" # CODE REST SHOWN LAST
[[ -z "$KILLED$REST" ]] || end_now launcher
[[ -z "$FOLLOWER" ]] || wait "$FOLLOWER" || true
[[ ${#SHOWN[@]} == 0 ]] || tail -q -n 20 "${SHOWN[@]}" >&2 2>/dev/null || true
[[ -z "$LAST" ]] || echo "$LAST" >&2
leave "$CODE"
