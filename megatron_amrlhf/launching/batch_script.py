"""Batch scripts made of launch/slurm/train.sbatch, a site's settings and the runs of a sweep."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.config.checks import check_run
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded
from megatron_amrlhf.launching.site import Site, quoted

END_OF_SETTINGS = "# end of the settings\n"


@dataclass(frozen=True)
class Run:
    """One run: its name, its folder's parent, and the arguments of ``amrlhf train``."""

    name: str
    folder: Path
    arguments: tuple[str, ...]


def list_runs(
    configs: Sequence[str], overrides: Sequence[str], sweep: Sequence[str], world_size: int
) -> list[Run]:
    """Every configuration with every combination of the swept values, each checked.

    Args:
        configs: paths of runs' YAML files.
        overrides: ``key=value`` for all of them.
        sweep: ``key=value,value`` texts; the run's name says which value it has.
        world_size: ranks of a run.

    Raises:
        UserError: a run is wrong, or two have the same name.
    """
    choices = [_choices(text) for text in sweep]
    runs = []
    for config, values in itertools.product(configs, itertools.product(*choices)):
        keys = [*overrides, *values]
        found = load_config(config, keys)
        if values:
            name = "-".join([found.run.name, *(_short(value) for value in values)])
            keys.append(f"run.name={name}")
            found = load_config(config, keys)
        check_run(found, world_size)  # files may be made by an earlier job of the chain
        arguments = (config, *(["--set", *keys] if keys else []))
        runs.append(Run(found.run.name, expanded(found.run.folder), arguments))
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"run.name: {', '.join(twice)} twice: each run needs a name of its own")
    return runs


def render(template: str, site: Site, runs: Sequence[Run], home: Path) -> str:
    """A whole batch script; a job array where there are several runs.

    Args:
        template: the text of train.sbatch.
        site: the cluster's settings.
        runs: as ``list_runs`` gives them.
        home: the repository's root, where the job runs.
    """
    _, _, body = template.partition(END_OF_SETTINGS)
    assert body, "train.sbatch has lost its mark"
    name = re.sub(r"[^A-Za-z0-9._-]", "-", runs[0].name) if len(runs) == 1 else "amrlhf-sweep"
    number = "%j" if len(runs) == 1 else "%A_%a"
    options = [f"--job-name={name}", *site.options]
    options.append(quoted("output", f"{runs[0].folder}/slurm-{name}-{number}.out"))
    if len(runs) > 1:
        options.append(f"--array=0-{len(runs) - 1}")
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options), ""]
    lines += [f"module load {shlex.quote(module)}" for module in site.modules]
    lines += site.setup
    lines += [f"export {key}={shlex.quote(value)}" for key, value in site.variables.items()]
    lines.append(f"export AMRLHF_HOME={shlex.quote(str(home))}")
    if len(runs) == 1:
        lines.append(f"set -- {shlex.join(runs[0].arguments)}")
    else:
        cases = [f"    {i}) set -- {shlex.join(run.arguments)} ;;" for i, run in enumerate(runs)]
        lines += ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    return "\n".join(lines) + "\n" + body


def _choices(text: str) -> list[str]:
    key, equals, values = text.partition("=")
    choices = _outside_brackets(values)
    if not equals or not key or not all(choices):
        raise UserError(f"--sweep {text}: must look like section.key=value,value")
    return [f"{key}={value}" for value in choices]


def _outside_brackets(values: str) -> list[str]:
    """The parts between commas; those within brackets belong to a value."""
    parts, depth = [""], 0
    for sign in values:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _short(override: str) -> str:
    """``run.seed=1`` as ``seed1``, fit for a folder's name."""
    key, _, value = override.partition("=")
    text = key.rpartition(".")[2] + value
    return "".join(sign if sign.isalnum() or sign in "._" else "-" for sign in text)
