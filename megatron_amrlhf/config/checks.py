"""Rules that tie several keys together, checked before any process group starts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_amrlhf.config.algorithm_section import PolicySection
from megatron_amrlhf.config.cut import pipeline_cut
from megatron_amrlhf.config.deepspeed import resolve_deepspeed
from megatron_amrlhf.config.engine_rules import axis_problems, engine_problems
from megatron_amrlhf.config.layout import ParallelSection
from megatron_amrlhf.config.reward_rules import reward_problems
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.config.section import one_of
from megatron_amrlhf.config.unread_rules import unread_problems
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import expanded, why_no_file

LEAST_TEMPERATURE = 1e-4  # float32 logits divided by it stay finite
CRITIC_SIGNALS = ("td_error", "advantage")


def check_run(config: Config, world_size: int) -> None:
    """Checks the run against itself and against the number of processes.

    Raises:
        UserError: names every broken rule on one line, each with its fix.
    """
    problems = [*_run_problems(config), *_layout_problems(config, world_size)]
    problems += [*axis_problems(config.parallel), *engine_problems(config)]
    if not config.algorithm.trains_reward_model:
        if config.data.format == "prompts":
            problems += _rollout_problems(config)
        problems += [
            *_label_problems(config),
            *_signal_problems(config),
            *_group_problems(config),
            *config.algorithm.problems(config),
            *reward_problems(config),
            *unread_problems(config),
        ]
    _raise_if(problems)


def check_files(config: Config, world_size: int | None = None, answers: str | None = None) -> None:
    """Checks the local files that the run names (the model may be a hub id).

    Args:
        config: the run.
        world_size: number of processes; None: not known.
        answers: file of given answers that are to be scored: then the run's data are not read, the
            reward models always, and the statistics that a threshold reads may be what the scores
            are for; None: the run is to be trained.

    Raises:
        UserError: names every file that is missing, and what is wrong in DeepSpeed's, on one line.
    """
    problems = [*_missing_model(config.model.path)]
    if answers is not None or not config.algorithm.trains_reward_model:
        problems += _missing_reward_models(config)
    if answers is None:
        problems += _missing_data(config)
    elif why := why_no_file(answers):
        problems.append(f"--answers {answers}: {why}")
    if (folder := config.engine.nvme_folder) and not _is_writable(expanded(folder)):
        problems.append(f"engine.nvme_folder: {folder}: cannot be made or written")
    parallel = config.parallel
    replicas = world_size // (parallel.tensor * parallel.pipeline) if world_size else None
    try:
        resolve_deepspeed(config, replicas, "actor", trainable=True)
    except UserError as error:
        problems.append(str(error))
    _raise_if(problems)


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder that is there or can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _missing_model(name: str) -> Iterator[str]:
    """A model that is no hub id (``NAME`` or ``OWNER/NAME``) has to be there."""
    if name.startswith("pip:") or expanded(name).is_dir():
        return
    if name.endswith(".gguf"):
        if why := why_no_file(name):
            yield f"model.path: {name}: {why}"
    elif name.startswith(("/", "~", ".")) or name.count("/") > 1:
        yield f"model.path: {name}: no such folder"


def _missing_data(config: Config) -> Iterator[str]:
    for key, name in (("data.train", config.data.train), ("data.heldout", config.data.heldout)):
        if name is not None and (why := why_no_file(name)):
            yield f"{key}: {name}: {why}"
    offline, reads_it = config.mask.offline_file, not config.algorithm.trains_reward_model
    if reads_it and offline and (why := why_no_file(offline)):
        yield f"mask.offline_file: {offline}: {why} (tools/score_tokens.py makes it)"


def _missing_reward_models(config: Config) -> Iterator[str]:
    for key, folder, kind in (
        ("reward_model.path", config.reward_model.path, "prm"),
        ("reward_model.orm_path", config.reward_model.orm_path, "orm"),
    ):
        if folder and not expanded(folder).is_dir():
            yield f"{key}: {folder}: no such folder, train a {kind} first"


def check_total_steps(config: Config, steps: int) -> None:
    """Checks what depends on the number of the run's steps, once the data have told it.

    Raises:
        UserError: nothing of the run is left after the warm-up.
    """
    _raise_if(_warmup_problems(config, steps))


def check_model(config: Config, hf_config: Mapping[str, Any]) -> None:
    """Checks the parallel sizes against a model.

    Args:
        config: the run.
        hf_config: the content of the model's Hugging Face ``config.json``.

    Raises:
        UserError: its sizes do not divide, on one line.
    """
    heads = hf_config["num_attention_heads"]
    tensor = config.parallel.tensor
    split = (
        (heads, "attention heads"),
        (hf_config.get("num_key_value_heads") or heads, "key-value heads"),
        (hf_config["intermediate_size"], "feed-forward units"),
    )
    problems = [
        f"parallel.tensor = {tensor} does not divide the model's {count} {unit}: "
        f"use {_choices([count for count, _ in split])}"
        for count, unit in split
        if count % tensor
    ]
    _raise_if([*problems, *_cut_problems(config.parallel, hf_config["num_hidden_layers"])])


def _cut_problems(parallel: ParallelSection, num_layers: int) -> Iterator[str]:
    try:
        pipeline_cut(parallel).chunks(num_layers, 0)
    except ValueError as error:
        yield str(error)


def _run_problems(config: Config) -> Iterator[str]:
    name, optimizer = config.run.name, config.optimizer
    if name in (".", "..") or "/" in name or "\\" in name:
        yield f"run.name: must be a plain folder name (got '{name}'), use run.folder for the place"
    if max(optimizer.betas) >= 1:
        yield f"optimizer.betas: both must be < 1 (got {list(optimizer.betas)})"
    if config.run.steps is not None:
        yield from _warmup_problems(config, config.run.steps)
    kind = config.algorithm.kind
    wanted = config.algorithm.data_formats
    if config.data.format not in wanted:
        choice = " or ".join(wanted)
        yield f"data.format: algorithm.kind {kind} needs {choice} (got {config.data.format})"


def _warmup_problems(config: Config, steps: int) -> Iterator[str]:
    warmup, updates = config.optimizer.warmup_steps, steps * config.algorithm.updates_per_step
    if warmup >= updates:
        yield (
            f"optimizer.warmup_steps = {warmup} leaves nothing of the run's {updates} optimizer "
            f"steps: use at most {updates - 1}"
        )


def _layout_problems(config: Config, world_size: int) -> Iterator[str]:
    """Processes, data-parallel size and what must divide by it."""
    parallel = config.parallel
    tensor, pipeline = parallel.tensor, parallel.pipeline
    model_parallel = tensor * pipeline
    if world_size % model_parallel:
        yield (
            f"{world_size} processes do not divide into replicas of parallel.tensor x "
            f"parallel.pipeline = {tensor} x {pipeline} = {model_parallel}: "
            f"start a multiple of {model_parallel} processes or change the sizes"
        )
        return
    yield from config.algorithm.layout_problems(config, world_size // model_parallel)


def _rollout_problems(config: Config) -> Iterator[str]:
    rollout, data = config.rollout, config.data
    if 0 < rollout.temperature < LEAST_TEMPERATURE:
        yield (
            f"rollout.temperature = {rollout.temperature:g} is too small to divide by: use 0 for "
            f"the likeliest token, or at least {LEAST_TEMPERATURE:g}"
        )
    if rollout.reference_samples_per_prompt >= rollout.samples_per_prompt:
        yield (
            f"rollout.reference_samples_per_prompt = {rollout.reference_samples_per_prompt} leaves "
            f"no answer to the policy: use less than rollout.samples_per_prompt = "
            f"{rollout.samples_per_prompt}"
        )
    if config.algorithm.compares_answers and rollout.samples_per_prompt < 2:
        yield (
            f"rollout.samples_per_prompt: {config.algorithm.kind} compares answers to one prompt, "
            f"use at least 2 (got {rollout.samples_per_prompt})"
        )
    longest = data.max_prompt_tokens + rollout.max_new_tokens
    if longest > data.max_row_tokens:
        yield (
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} is more than "
            f"data.max_row_tokens = {data.max_row_tokens}: raise it to {longest}"
        )


def _label_problems(config: Config) -> Iterator[str]:
    """What makes an answer chosen, where the mask or the loss reads it."""
    algorithm = config.algorithm
    assert isinstance(algorithm, PolicySection)
    is_masked = config.mask.kind == "adaptive"
    if algorithm.loss_reads_label or (algorithm.labels_answers and is_masked):
        yield from algorithm.label_problems(config)


def _group_problems(config: Config) -> Iterator[str]:
    mask, samples = config.mask, config.rollout.samples_per_prompt
    reads_group = mask.kind == "adaptive" and mask.threshold == "group"
    if reads_group and config.data.format == "prompts" and samples < 2:
        yield (
            "mask.threshold: group is the mean over the answers to a prompt, of which there is one "
            "only: use rollout.samples_per_prompt of at least 2, or threshold sequence"
        )


def _signal_problems(config: Config) -> Iterator[str]:
    signal, algorithm = config.mask.signal, config.algorithm
    is_read = config.mask.kind == "adaptive"
    if is_read and signal in CRITIC_SIGNALS and not algorithm.has_critic:
        yield (
            f"mask.signal: {signal} needs a critic, which {algorithm.kind} has not: "
            "use reward or implicit"
        )
    if is_read and signal == "implicit":
        yield from _implicit_problems(config)


def _implicit_problems(config: Config) -> Iterator[str]:
    """Policy and reference begin as one model: a mask that keeps nothing of zeros never will."""
    mask = config.mask
    baseline = mask.fixed_value if mask.threshold == "fixed" else 0.0
    delta = mask.delta if mask.delta_unit == "signal" else 0.0  # zeros have no deviation
    is_good = baseline < -delta
    is_bad = baseline > delta or (mask.delta == 0 and baseline == 0)
    start = "mask.signal: implicit is 0 at every token until the policy differs from the reference"
    if not config.algorithm.rejects_answers and not is_good:
        yield (
            f"{start}, and of chosen answers 0 is kept by a baseline below 0 only: use mask.kind: "
            "none, or mask.threshold: fixed with a mask.fixed_value below -mask.delta"
        )
    elif not (is_good or is_bad):
        yield (
            f"{start}, and with mask.delta = {mask.delta:g} 0 is neutral, so nothing would ever be "
            "learned: use mask.delta: 0, or mask.threshold: fixed with a mask.fixed_value further "
            "from 0 than that"
        )


def _choices(counts: list[int]) -> str:
    """Sizes that divide all the counts, as ``1, 3 or 9``."""
    return one_of([str(n) for n in range(1, min(counts) + 1) if all(c % n == 0 for c in counts)])


def _raise_if(problems: Iterator[str] | list[str]) -> None:
    if found := list(problems):
        raise UserError("; ".join(found))
