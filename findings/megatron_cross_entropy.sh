#!/usr/bin/env bash
# megatron-core 0.16.1: vocab_parallel_cross_entropy leaves probabilities where the logits were.
#
#   Float32 logits are overwritten by their softmax, so whatever reads them after the loss (an
#   entropy, a second loss, a log) gets other numbers, without an error: the same call with the same
#   tensor gives another loss. bfloat16 logits stay, for they are copied to float32 first; so a
#   program that is right in bfloat16 is wrong in float32.
#
# Expected: the loss only reads its arguments, as torch.nn.functional.cross_entropy does.
#
# Seen: python 3.11, torch 2.13.0, megatron-core 0.16.1, on a CPU:
#   float32: loss 0.4076, logits [2, 1, 0] are now [0.6652, 0.2447, 0.09], loss again 0.7972
#   bfloat16: loss 0.4076, logits [2, 1, 0] are now [2.0, 1.0, 0.0], loss again 0.4076
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet torch==2.13.0 megatron-core==0.16.1
venv/bin/python -W ignore - <<'PYTHON'
import sys

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

torch.distributed.init_process_group(
    "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
)
parallel_state.initialize_model_parallel()

seen = {
    "float32": (0.4076, [0.6652, 0.2447, 0.09], 0.7972),
    "bfloat16": (0.4076, [2.0, 1.0, 0.0], 0.4076),
}
found = {}
for name in seen:
    logits = torch.tensor([[[2.0, 1.0, 0.0]]], dtype=getattr(torch, name))  # [T, B, V]
    target = torch.tensor([[0]])
    first = round(vocab_parallel_cross_entropy(logits, target).item(), 4)
    after = [round(x, 4) for x in logits.flatten().tolist()]
    second = round(vocab_parallel_cross_entropy(logits, target).item(), 4)
    found[name] = (first, after, second)
    print(f"{name}: loss {first}, logits [2, 1, 0] are now {after}, loss again {second}")
torch.distributed.destroy_process_group()
sys.exit(found != seen)
PYTHON
