"""Submits runs to Slurm by a site's settings; see --help.

Each CONFIG.yaml is a run. Several of them, and --sweep, make a job array: every configuration with
every combination of values. --first is trained before all of them, such as the PRM before the
policies that it scores; they start when it has ended well.

examples (from the repository's root):
  .venv/bin/python launch/slurm/submit.py --site site.yaml configs/ppo_qwen2_7b.yaml --dry-run
  .venv/bin/python launch/slurm/submit.py --site site.yaml --first configs/prm_qwen2_7b.yaml \\
      configs/ppo_qwen2_7b.yaml --sweep run.seed=0,1,2 mask.kind=adaptive,none
"""

from __future__ import annotations

if __name__ == "__main__":
    from megatron_amrlhf.interrupts import end_at_once

    end_at_once()

import argparse
import os
import subprocess
import sys
from pathlib import Path

from megatron_amrlhf.arguments import Parser
from megatron_amrlhf.errors import UserError, tells_user_errors
from megatron_amrlhf.launching.batch_script import Run, list_runs, render
from megatron_amrlhf.launching.site import load_site

TEMPLATE = Path(__file__).resolve().with_name("train.sbatch")
ROOT = TEMPLATE.parents[2]


@tells_user_errors
def main() -> int:
    options = parse()
    site = load_site(options.site)
    os.chdir(ROOT)  # as the job does, for the paths in the runs' YAML
    world_size = site.nodes * site.processes_per_node
    stages = [[options.first]] if options.first else []
    stages.append(options.configs)
    jobs = []
    for configs in stages:
        is_last = configs is stages[-1]
        sweep = options.sweep if is_last else []
        runs = list_runs(configs, options.overrides if is_last else [], sweep, world_size)
        jobs.append((runs, render(TEMPLATE.read_text(encoding="utf-8"), site, runs, ROOT)))
    previous: str | None = None
    for runs, script in jobs:
        if options.dry_run:
            print(script, end="")
        elif options.test_only:
            sbatch(script, ["--test-only"])
        else:
            previous = submit(runs, script, previous)
    return 0


def submit(runs: list[Run], script: str, after: str | None) -> str:
    """Submits a script; the job's id."""
    runs[0].folder.mkdir(parents=True, exist_ok=True)  # Slurm does not make the output's folder
    chain = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    job_id = sbatch(script, ["--parsable", *chain]).split(";")[0].strip()
    names = ", ".join(run.name for run in runs)
    print(f"job {job_id}: {names}" + (f", after job {after}" if after else ""))
    return job_id


def sbatch(script: str, options: list[str]) -> str:
    """What sbatch says.

    Raises:
        UserError: Slurm refuses the job, or there is no Slurm.
    """
    try:
        answer = subprocess.run(
            ["sbatch", *options], input=script, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError("sbatch is not here: call this on a login node, or use --dry-run") from None
    said = " ".join(answer.stderr.split())
    if answer.returncode != 0:
        raise UserError(f"Slurm refuses the job: {said}")
    if said:
        print(said)
    return answer.stdout


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("configs", type=os.path.abspath, nargs="+", metavar="CONFIG.yaml")
    parser.add_argument("--site", type=Path, required=True, help="the cluster's settings")
    parser.add_argument(
        "--first",
        type=os.path.abspath,
        metavar="CONFIG.yaml",
        help="a run that the others wait for",
    )
    parser.add_argument("--sweep", nargs="+", action="extend", default=[], metavar="KEY=V1,V2")
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override keys of the runs, not of --first",
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--dry-run", action="store_true", help="print the batch scripts")
    ways.add_argument("--test-only", action="store_true", help="ask Slurm whether it takes them")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
