"""A whole run: check, start the processes, build, train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.algorithms.contract import Algorithm
from megatron_amrlhf.algorithms.dpo import Dpo
from megatron_amrlhf.algorithms.grpo import Grpo
from megatron_amrlhf.algorithms.kto import Kto
from megatron_amrlhf.algorithms.orm import Orm
from megatron_amrlhf.algorithms.ppo import Ppo
from megatron_amrlhf.algorithms.prm import Prm
from megatron_amrlhf.algorithms.rejection_sampling import RejectionSampling
from megatron_amrlhf.checkpoint.files import on_all_ranks, on_main_rank
from megatron_amrlhf.commands.agreement import agreed
from megatron_amrlhf.commands.loop import train
from megatron_amrlhf.commands.precision import decide, kept_dtypes
from megatron_amrlhf.commands.watch import watch
from megatron_amrlhf.config.checks import check_total_steps
from megatron_amrlhf.config.cut import pipeline_cut
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.chat import (
    chat_notes,
    check_system_prompt,
    end_token_ids,
    known_prompt,
)
from megatron_amrlhf.data.readers import ALONE, Readers
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.data.vocabulary import (
    check_rows,
    check_vocabulary,
    has_more_ids,
    usable_ids,
)
from megatron_amrlhf.engine.partitioned import check_deepspeed
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.reward_models import check_same_rows
from megatron_amrlhf.models.contents import contents_line
from megatron_amrlhf.models.expected import check_weights
from megatron_amrlhf.models.shape import check_shape
from megatron_amrlhf.models.source import resolve_model_folder
from megatron_amrlhf.parallel.mesh import (
    TIMEOUT_SECONDS,
    build_mesh,
    start_processes,
    stop_processes,
)
from megatron_amrlhf.planning.announce import describe_choices
from megatron_amrlhf.planning.weights import stage_spec
from megatron_amrlhf.report.console import RunConsole, terminal
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.run.stop_request import StopRequest

ALGORITHMS: dict[str, Callable[[Config, PreTrainedTokenizerBase, Readers], Algorithm]] = {
    "prm": Prm,
    "orm": Orm,
    "ppo": Ppo,
    "grpo": Grpo,
    "dpo": Dpo,
    "kto": Kto,
    "rejection_sampling": RejectionSampling,
}

TIMEOUT_AFTER_WATCHDOG_SECONDS = 600.0


@dataclass(frozen=True)
class Model:
    """What of ``model.path`` is right.

    Attributes:
        folder: a Hugging Face folder.
        vocab_size: rows of its embedding.
        tokenizer: the policy's, or that of the reward model that is trained.
        end_ids: tokens that end an answer.
    """

    folder: Path
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]


@dataclass(frozen=True)
class Prepared:
    """A run whose models and data are right.

    Attributes:
        model: of ``model.path``.
        algorithm: has its data; ``build`` adds its roles.
        usable: ``[V]`` bool, the model's ids that are a token.
    """

    model: Model
    algorithm: Algorithm
    usable: Tensor


def prepare(config: Config) -> Prepared:
    """All that is checked between the configuration and the run's folder, by one process alone.

    `amrlhf doctor` calls it, so what is refused at a start is an error there.

    Raises:
        UserError: the model, the data or the layout is wrong; nothing was written.
    """
    return check_data(config, check_model(config), ALONE)


def check_model(config: Config) -> Model:
    """The part of `prepare` that comes before the process groups.

    Raises:
        UserError: the model or the layout is wrong.
    """
    folder = resolve_model_folder(config.model.path, config.model.cache_folder)
    shape = check_shape(config, folder)
    tokenizer = load_tokenizer(folder)
    end_ids = end_token_ids(tokenizer, folder)
    check_vocabulary(tokenizer, end_ids, shape.vocab_size, folder)
    check_system_prompt(tokenizer, config.data.system_prompt, folder)
    return Model(folder, shape.vocab_size, tokenizer, end_ids)


def check_data(config: Config, model: Model, readers: Readers) -> Prepared:
    """The other part, which the ranks share. Entered by all ``readers``.

    Raises:
        UserError: the data or the reward models are wrong.
    """
    tokenizer, size = model.tokenizer, model.vocab_size
    readers = replace(readers, exact=has_more_ids(tokenizer, size))
    algorithm = ALGORITHMS[config.algorithm.kind](config, tokenizer, readers)  # checks the data
    usable = usable_ids(tokenizer, model.end_ids, size)
    rows = algorithm.highest_rows()
    check_rows(rows, tokenizer, size, model.folder)
    samples = config.data.format == "prompts"
    check_same_rows(algorithm.reward_models, tokenizer, rows, usable if samples else None)
    check_total_steps(config, algorithm.total_steps)
    trained = config.algorithm.roles(config)[0]
    check_weights(model.folder, trained.head_outputs)
    check_deepspeed(config)
    return Prepared(model, algorithm, usable)


def run(config: Config) -> bool:
    """Trains what ``algorithm.kind`` says and leaves ``runs/NAME/``. One call a process.

    Returns:
        Whether all steps are done; if not, the run was asked to stop and goes on when started
        again.

    Raises:
        UserError: the model, the data or the layout is wrong; nothing was written.
    """
    model = check_model(config)
    start_processes(_timeout_seconds(config))
    try:
        rank = dist.get_rank()
        console = RunConsole(rank, err=terminal() if rank == 0 else None)
        prepared = agreed(lambda readers: check_data(config, model, readers), console)
        algorithm = prepared.algorithm
        context = _context(config, prepared, console)
        with context.stop.catch_signals(), watch(context):
            algorithm.build(context)
            return train(algorithm, context, _banner(context, algorithm))
    finally:
        stop_processes()


def _context(config: Config, prepared: Prepared, console: RunConsole) -> Context:
    """Mesh, engine and the run's folder, now that all that can be wrong has been checked."""
    parallel = config.parallel
    cut, timeout = pipeline_cut(parallel), _timeout_seconds(config)
    mesh = build_mesh(parallel.tensor, cut, parallel.sequence, timeout)
    doing = "cannot compare the ranks' prompts"
    check_same_prompts(on_all_ranks(lambda: known_prompt(prepared.model.tokenizer), doing))
    doing, given = f"cannot use {config.run.path}", config
    kept = on_main_rank(lambda: kept_dtypes(given), doing, mesh.rank == 0)
    config, notes = decide(given, kept)
    doing = f"cannot make {config.run.path}"
    folder = on_all_ranks(lambda: RunFolder.create(config, mesh.rank), doing)[mesh.rank]
    limit = config.run.max_minutes
    context = Context(
        config=config,
        mesh=mesh,
        engine=Zero3Engine(config, mesh, console.tick),
        tokenizer=prepared.model.tokenizer,
        end_ids=tuple(prepared.model.end_ids),
        model_folder=prepared.model.folder,
        console=console,
        folder=folder,
        stop=StopRequest(folder.stop, limit * 60 if limit else None),
        usable=None if prepared.usable.all() else prepared.usable.to(mesh.device),
    )
    for note in notes:
        context.console.line(note)
    return context


def check_same_prompts(prompts: list[list[int]]) -> None:
    """Whether all ranks write the same prompt: a template's clock, or files, may differ.

    Args:
        prompts: what `known_prompt` is on each rank.

    Raises:
        UserError: names the first rank that departs from rank 0.
    """
    other = next((rank for rank, prompt in enumerate(prompts) if prompt != prompts[0]), None)
    if other is not None:
        raise UserError(
            f"rank {other} writes a prompt otherwise than rank 0: the time or time zone that the "
            "chat template puts in, the tokenizer's files or the version of transformers differ "
            "between their machines; make them equal"
        )


def _banner(context: Context, algorithm: Algorithm) -> str:
    """What runs, on what layout, in which attempt."""
    mesh, config = context.mesh, context.config
    line = (
        f"{config.algorithm.kind}: {algorithm.total_steps} steps, "
        f"TP {mesh.tp_size} x PP {mesh.pp_size} x DP {mesh.dp_size} on {mesh.device.type}, "
        f"{config.model.dtype}, roles {', '.join(context.engine.roles)}"
    )
    trained = [
        stage_spec(
            config,
            role.shape,
            mesh.pp_rank,
            mesh.dp_size,
            name,
            trainable=True,
            head_outputs=role.spec.head_outputs,
        )
        for name, role in context.engine.roles.items()
        if role.spec.trainable
    ]
    attempt = [f"attempt {context.folder.attempt}"] if context.folder.attempt > 1 else []
    changed = context.folder.changed
    changes = [f"changed since the last attempt: {'; '.join(changed)}"] if changed else []
    chat = chat_notes(context.tokenizer, context.model_folder, config.data.system_prompt)
    notes = [*(f"note: {note}" for note in chat), *_unused_ids(context), *_long_rows(context)]
    lines = [line, *attempt, *changes, *_contents(context), *notes]
    return "\n".join([*lines, *describe_choices(trained)])


def _contents(context: Context) -> list[str]:
    """A line for each model's folder: what is read of it, and what is not."""
    roles: dict[tuple, list[str]] = {}
    for name, role in context.engine.roles.items():
        roles.setdefault((role.spec.folder, role.tensor_names), []).append(name)
    return [
        f"{', '.join(names)}: {contents_line(folder, wanted)}"
        for (folder, wanted), names in roles.items()
    ]


def _unused_ids(context: Context) -> list[str]:
    """A line about the policy's ids that are no token, if it has any."""
    if context.usable is None or "actor" not in context.engine.roles:
        return []
    count, size = int((~context.usable).sum()), context.usable.numel()
    return [f"note: {count} of the model's {size} ids are no token: they have no probability"]


def _long_rows(context: Context) -> list[str]:
    """A line for each model whose positions the run's rows may leave; RoPE may be scaled."""
    longest = context.config.data.max_row_tokens
    return [
        f"note: data.max_row_tokens = {longest}, but the {name} was trained on rows of "
        f"{role.shape.max_positions} tokens at most (max_position_embeddings)"
        for name, role in context.engine.roles.items()
        if role.shape.max_positions < longest
    ]


def _timeout_seconds(config: Config) -> float:
    """Of the process groups: later than the watchdog, which can say more."""
    limit = config.engine.watchdog_seconds
    return limit + TIMEOUT_AFTER_WATCHDOG_SECONDS if limit else TIMEOUT_SECONDS
