"""Scores a file of answers by a PRM on all ranks: threshold ``offline`` and best-of-n read it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.checkpoint.files import on_all_ranks, on_main_rank, write_text
from megatron_amrlhf.commands.precision import decide
from megatron_amrlhf.commands.score_job import (
    ANSWERS_NAME,
    KEY_NAME,
    PARTS,
    Job,
    check_key,
    finish,
    kept_dtypes,
    parts_done,
    save_part,
)
from megatron_amrlhf.config.cut import pipeline_cut
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.answers import GivenAnswer, load_answers
from megatron_amrlhf.data.chat import chat_notes, check_system_prompt, end_token_ids
from megatron_amrlhf.data.order import PADDING, fingerprint, shard
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.reward_models import (
    check_same_rows,
    load_reward_models,
)
from megatron_amrlhf.experience.rewarding import model_rewards
from megatron_amrlhf.files import expanded
from megatron_amrlhf.models.source import resolve_model_folder
from megatron_amrlhf.parallel.collectives import gather_objects
from megatron_amrlhf.parallel.mesh import build_mesh, start_processes, stop_processes
from megatron_amrlhf.report.console import RunConsole
from megatron_amrlhf.rewards.marking import AnswerSteps
from megatron_amrlhf.rewards.offline import SCORES_NAME, STATISTICS_NAME
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.types import PromptBatch, RolloutBatch


def run(config: Config, path: str, folder: str, part_size: int) -> None:
    """Scores the answers in ``path`` into ``folder``. One call a process.

    Raises:
        UserError: anything is wrong with data, models, layout or folder.
    """
    model_folder = resolve_model_folder(config.model.path, config.model.cache_folder)
    tokenizer = load_tokenizer(model_folder)
    end_ids = end_token_ids(tokenizer, model_folder)
    check_system_prompt(tokenizer, config.data.system_prompt, model_folder)
    job = prepare(config, tokenizer, path, folder, part_size)
    start_processes()
    try:
        parallel = config.parallel
        mesh = build_mesh(parallel.tensor, pipeline_cut(parallel), parallel.sequence)
        kept = on_main_rank(lambda: kept_dtypes(job), f"--out {folder}", mesh.is_main)
        config, notes = decide(config, kept)
        job = replace(job, config=config, key=job.key | {"dtype": config.dtype_of("prm")})
        console = RunConsole(mesh.rank)
        context = Context(
            config=config,
            mesh=mesh,
            engine=Zero3Engine(config, mesh, console.tick),
            tokenizer=tokenizer,
            end_ids=tuple(end_ids),
            model_folder=model_folder,
            console=console,
            folder=RunFolder(job.folder, 0, False),
        )
        for note in notes:
            context.console.line(note)
        score_answers(context, job)
    finally:
        stop_processes()


def prepare(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    path: str,
    folder: str,
    part_size: int,
) -> Job:
    """Reads and checks everything; no process group is needed.

    Raises:
        UserError: data, reward model or layout are wrong, or ``folder`` has other scores.
    """
    answers, selection = load_answers(path, tokenizer, config.data)
    models = load_reward_models(config, tokenizer)
    if not any(model.role == "prm" for model in models):
        key = "reward.prm_weight" if config.reward_model.path else "reward_model.path"
        raise UserError(
            f"{key}: tokens are scored by the PRM: give its folder (runs/NAME/export) in "
            "reward_model.path, and a weight above 0"
        )
    check_same_rows(models, tokenizer, [answer.row for answer in answers], None)
    weights = config.reward_model.attribute_weights
    identity = {
        "data": fingerprint(path),
        "models": {model.role: model.fingerprint for model in models},
        "attribute_weights": None if weights is None else list(weights),
        "rows": hashlib.sha256(b"".join(x.row.numpy().tobytes() for x in answers)).hexdigest(),
        "part_size": part_size,
        "dtype": config.dtype_of("prm"),
    }
    target = expanded(folder)
    check_key(target / KEY_NAME, {name: x for name, x in identity.items() if x != "auto"})
    return Job(config, answers, selection, models, target, part_size, identity)


def score_answers(context: Context, job: Job) -> None:
    """Scores the parts that are not there yet and writes the results. Entered by every rank.

    Raises:
        UserError: the folder cannot be written, or a score is not finite.
    """
    doing, writer = f"cannot write {job.folder}", context.mesh.is_writer
    on_all_ranks(lambda: (job.folder / PARTS).mkdir(parents=True, exist_ok=True), doing)
    for model in job.models:
        context.role(model.role, model.folder, model.num_attributes)
    system_prompt = job.config.data.system_prompt
    for note in chat_notes(context.tokenizer, context.model_folder, system_prompt):
        context.console.line(f"note: {note}")
    context.log_selections([job.selection])
    done = on_main_rank(lambda: parts_done(job), doing, context.mesh.is_main)
    if done:
        context.console.line(f"{job.folder}: {len(done)} of {job.num_parts} parts are there")
    missing = [number for number in range(job.num_parts) if number not in done]

    def begin() -> None:
        if context.mesh.is_main:
            write_text(job.folder / KEY_NAME, json.dumps(job.key, indent=1) + "\n")

    on_all_ranks(begin, doing)
    total = sum(len(job.part(number)) for number in missing)
    with context.console.track("score", total * len(job.models)):
        for number in missing:
            tensors = _score_part(context, job, number)
            on_all_ranks(partial(save_part, job, number, tensors if writer else None), doing)
    on_main_rank(lambda: finish(job), doing, context.mesh.is_main)
    for name in (SCORES_NAME, STATISTICS_NAME, ANSWERS_NAME):
        if (job.folder / name).is_file():
            context.console.line(f"{job.folder / name}")
    if without := job.num_without_steps:
        context.console.line(
            f"no {ANSWERS_NAME}: {without} of {len(job.answers)} answers are not given in 'steps', "
            "so their steps have no scores"
        )


def _score_part(context: Context, job: Job, number: int) -> dict[str, Tensor] | None:
    """Token scores of a part's answers in order, on the writer; None elsewhere."""
    mesh, rows = context.mesh, list(job.part(number))
    mine = shard(rows, mesh.dp_rank, mesh.dp_size)
    count = sum(i != PADDING for i in mine)
    scored = [rows[0] if i == PADDING else i for i in mine]  # no rank is left without a row
    answers = [job.answers[i] for i in scored]
    rollout, prompts = _as_rollout(answers, scored)
    steps = [_given_steps(answer) for answer in answers]
    found = {
        model.role: model_rewards(context, model, rollout, prompts, steps=steps)
        for model in job.models
    }
    if not mesh.is_last_stage:
        return None
    lengths = rollout.response_lengths.tolist()
    local = {
        role: [row[:length].cpu() for row, length in zip(scores, lengths, strict=True)][:count]
        for role, scores in found.items()
        if scores is not None
    }
    everyone = gather_objects(local, mesh.dp_group)  # shares are consecutive, in rank order
    if not mesh.is_writer:
        return None
    merged = {role: [row for part in everyone for row in part[role]] for role in found}
    tensors = {"scores": torch.cat(merged["prm"])}
    tensors["counts"] = torch.tensor([row.numel() for row in merged["prm"]])
    if "orm" in merged:
        tensors["orm"] = torch.stack([row[-1] for row in merged["orm"]])
    return tensors


def _given_steps(answer: GivenAnswer) -> AnswerSteps | None:
    """The steps of an answer that is given in steps."""
    if not answer.steps:
        return None
    num_tokens = answer.row.numel() - answer.prompt_length
    return AnswerSteps.given(answer.steps, answer.step_ends, num_tokens)


def _as_rollout(answers: list[GivenAnswer], numbers: list[int]) -> tuple[RolloutBatch, PromptBatch]:
    """Given answers in the records that scoring reads; each is the only one to its prompt."""
    places = torch.arange(len(answers))
    lengths = torch.tensor([answer.prompt_length for answer in answers], dtype=torch.int64)
    rollout = RolloutBatch(
        rows=tuple(answer.row for answer in answers),
        prompt_lengths=lengths,
        group_ids=places,
        sample_ids=torch.tensor(numbers, dtype=torch.int64),
        from_reference=torch.zeros(len(answers), dtype=torch.bool),
        ended=torch.tensor([answer.ended for answer in answers], dtype=torch.bool),
    )
    prompts = PromptBatch(
        rows=tuple(answer.row[: answer.prompt_length] for answer in answers),
        group_ids=places,
        texts=tuple(answer.prompt for answer in answers),
        answers=(None,) * len(answers),
        earlier=tuple(answer.turns[:-1] for answer in answers),
    )
    return rollout, prompts
