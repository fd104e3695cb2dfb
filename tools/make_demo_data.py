"""Write the demonstration data: step-labelled arithmetic problems and prompts."""

from __future__ import annotations

import sys

from megatron_amrlhf.arguments import Parser
from megatron_amrlhf.data.demo import NUM_HELDOUT, NUM_PROBLEMS, write_demo_data
from megatron_amrlhf.errors import tells_user_errors

DESCRIPTION = """\
Write the demonstration data into FOLDER. Nothing is downloaded; the same seed gives the same files.

  prm_train.jsonl, prm_heldout.jsonl
      {"prompt", "steps", "labels", "answer"}: arithmetic word problems with a solution in steps.
      About half of the solutions carry a planted error; a step's label is 1 if it and all steps
      before it are right, else 0. Train a reward model on them (algorithm kind: prm).
  pairs_train.jsonl, pairs_heldout.jsonl
      {"prompt", "chosen", "rejected"}: a right and a wrong solution of each of these problems.
      Train an outcome reward model on them (kind: orm).
  prompts_train.jsonl, prompts_heldout.jsonl
      {"prompt", "answer" (problems only)}: the same problems mixed with general prompts in English
      and Chinese. Train the policy on them (kind: ppo, grpo, dpo, kto, ...).
  demo.json
      the parameters and the sha256 of each file.

Train and held-out files share no problem. A second call with the same parameters changes nothing;
files that this tool did not write are never overwritten."""

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
        default=NUM_PROBLEMS,
        metavar="N",
        help="problems for training (default: %(default)s)",
    )
    parser.add_argument(
        "--num-heldout",
        type=int,
        default=NUM_HELDOUT,
        metavar="N",
        help="held-out problems (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    written = write_demo_data(
        options.folder, options.seed, options.num_problems, options.num_heldout
    )
    state = "written" if written else "already there, unchanged"
    print(f"{options.folder}: demonstration data {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
