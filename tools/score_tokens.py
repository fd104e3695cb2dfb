r"""Scores the tokens of given answers by a PRM: ``amrlhf score`` as a script.

The launcher starts it on several processes (TP x PP x DP as CONFIG.yaml says):

    deepspeed --num_gpus 4 --no_local_rank tools/score_tokens.py CONFIG.yaml \
        --answers answers.jsonl --out runs/scores
"""

from __future__ import annotations

import sys

from megatron_amrlhf.interrupts import loading

if __name__ == "__main__":
    with loading():
        from megatron_amrlhf.cli import main
    sys.exit(main(["score", *sys.argv[1:]]))
