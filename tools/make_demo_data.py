"""Write the demonstration data: step-labelled arithmetic problems and prompts."""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import sys

from megatron_amrlhf.arguments import Parser
from megatron_amrlhf.demo.data import COUNTS, write_demo_data
from megatron_amrlhf.errors import tells_user_errors

DESCRIPTION = """\
Write the demonstration data into FOLDER. Nothing is downloaded; the same seed gives the same files.

  prm_train.jsonl, prm_heldout.jsonl
      {"prompt", "steps", "labels", "answer"}: sums of small numbers with a solution in steps, and
      one solved example ("history"). About half of the solutions carry a planted error; a step's
      label is 1 if it and all steps before it are right, else 0. Train a reward model on them
      (algorithm kind: prm).
  pairs_train.jsonl, pairs_heldout.jsonl
      {"prompt", "chosen", "rejected"}: a right and a wrong solution of each of these problems.
      Train an outcome reward model on them (kind: orm).
  prompts_train.jsonl, prompts_heldout.jsonl
      {"prompt", "answer"}: the same problems. Train the policy on them (kind: ppo, grpo, dpo, ...).
  demo.json
      the parameters and the sha256 of each file.

Train and held-out files share no problem. A second call with the same parameters changes nothing;
files that this tool did not write are never overwritten.

--problems words writes word problems of two to five steps instead, their prompts mixed with general
ones in English and Chinese: more like what a user trains on, and beyond a model of 135M
parameters."""

EXAMPLE = """\
example:
  python tools/make_demo_data.py data/demo --seed 0
  python tools/make_demo_data.py data/small --num-problems 64 --num-heldout 16"""


@tells_user_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the tool; returns the exit code (2: a mistake in the arguments or the folder)."""
    parser = Parser(description=DESCRIPTION, epilog=EXAMPLE)
    parser.add_argument("folder", metavar="FOLDER", help="where to write; made if missing")
    parser.add_argument("--seed", type=int, default=0, help="0 or more (default: %(default)s)")
    parser.add_argument(
        "--num-problems",
        type=int,
        metavar="N",
        help=f"problems for training (default: {COUNTS['sums'][0]}, words {COUNTS['words'][0]})",
    )
    parser.add_argument(
        "--num-heldout",
        type=int,
        metavar="N",
        help=f"held-out problems (default: {COUNTS['sums'][1]}, words {COUNTS['words'][1]})",
    )
    parser.add_argument(
        "--problems", choices=list(COUNTS), default="sums", help="kind (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    written = write_demo_data(
        options.folder, options.seed, options.num_problems, options.num_heldout, options.problems
    )
    state = "written" if written else "already there, unchanged"
    print(f"{options.folder}: demonstration data {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
