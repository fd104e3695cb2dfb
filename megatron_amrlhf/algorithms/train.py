"""A whole run: check, build, step, save, export."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.algorithms.context import Context
from megatron_amrlhf.algorithms.dpo import Dpo
from megatron_amrlhf.algorithms.grpo import Grpo
from megatron_amrlhf.algorithms.kto import Kto
from megatron_amrlhf.algorithms.orm import Orm
from megatron_amrlhf.algorithms.ppo import Ppo
from megatron_amrlhf.algorithms.prm import Prm
from megatron_amrlhf.algorithms.rejection_sampling import RejectionSampling
from megatron_amrlhf.algorithms.watch import watch
from megatron_amrlhf.checkpoint.export import export_role
from megatron_amrlhf.checkpoint.store import find_latest, load_checkpoint, save_checkpoint
from megatron_amrlhf.config.checks import check_model
from megatron_amrlhf.config.cut import pipeline_cut
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.chat import end_token_ids, load_tokenizer
from megatron_amrlhf.engine.announce import describe_choices
from megatron_amrlhf.engine.footprint import stage_spec
from megatron_amrlhf.engine.integrity import check_copies, check_frozen, frozen_checksums
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.source import read_hf_config, resolve_model_folder
from megatron_amrlhf.parallel import compat
from megatron_amrlhf.parallel.collectives import max_over
from megatron_amrlhf.parallel.mesh import (
    TIMEOUT_SECONDS,
    build_mesh,
    start_processes,
    stop_processes,
)
from megatron_amrlhf.report.console import RunConsole
from megatron_amrlhf.report.files import truncate_jsonl
from megatron_amrlhf.report.metrics import MetricsWriter
from megatron_amrlhf.report.plots import plot_run
from megatron_amrlhf.report.run_folder import RunFolder

ALGORITHMS = {
    "prm": Prm,
    "orm": Orm,
    "ppo": Ppo,
    "grpo": Grpo,
    "dpo": Dpo,
    "kto": Kto,
    "rejection_sampling": RejectionSampling,
}

TIMEOUT_AFTER_WATCHDOG_SECONDS = 600.0


def run(config: Config) -> None:
    """Trains what ``algorithm.kind`` says and leaves ``runs/NAME/``. One call a process.

    Raises:
        UserError: the model, the data or the layout is wrong; nothing was written.
    """
    model_folder = resolve_model_folder(config.model.path, config.model.cache_folder)
    hf_config = read_hf_config(model_folder)
    check_model(config, hf_config)
    read_shape(hf_config)
    tokenizer = load_tokenizer(model_folder)
    algorithm = ALGORITHMS[config.algorithm.kind](config, tokenizer)  # reads and checks the data
    start_processes(_timeout_seconds(config))
    try:
        context = _context(config, model_folder, tokenizer)
        with watch(context):
            algorithm.build(context)
            _train(algorithm, context)
    finally:
        stop_processes()


def _context(config: Config, model_folder: Path, tokenizer: PreTrainedTokenizerBase) -> Context:
    """Mesh, engine and the run's folder, now that all that can be wrong has been checked."""
    parallel = config.parallel
    cut, timeout = pipeline_cut(parallel), _timeout_seconds(config)
    mesh = build_mesh(parallel.tensor, cut, parallel.sequence, timeout)
    folder = RunFolder.create(config, mesh.rank)
    dist.barrier()
    return Context(
        config=config,
        mesh=mesh,
        engine=Zero3Engine(config, mesh),
        tokenizer=tokenizer,
        end_ids=tuple(end_token_ids(tokenizer, model_folder)),
        model_folder=model_folder,
        console=RunConsole(mesh.rank),
        folder=folder,
    )


def _train(algorithm, context: Context) -> None:
    """The loop over steps, from the newest checkpoint on."""
    config, console, folder = context.config, context.console, context.folder
    roles = context.engine.roles
    frozen = frozen_checksums(roles)
    _check_copies(context)
    first = _resume(algorithm, context) + 1
    total = algorithm.total_steps
    writer = MetricsWriter(folder)
    writer.truncate_after(first - 1)
    console.line(_banner(context, algorithm))
    before = algorithm.evaluate() if algorithm.evaluates_at_start else {}
    if before:
        console.step_table(first - 1, total, before)
    after, saved = before, first - 1
    for step in range(first, total + 1):
        console.progress.enter("step", step)
        metrics = algorithm.step(step)
        if step == first:
            _check_copies(context)
        every = config.evaluation.every
        if step == total or (every and step % every == 0):
            after = algorithm.evaluate()
            metrics |= after
        metrics["memory/peak_gib"] = _peak_gib(context)
        writer.write(step, metrics)
        console.step_table(step, total, metrics)
        folder.status("running", step, f"{step} of {total} steps")
        if config.checkpoint.every and step % config.checkpoint.every == 0:
            _save(algorithm, context, step)
            saved = step
    writer.close()
    check_frozen(roles, frozen)
    if saved < total:
        _save(algorithm, context, total)
    if config.checkpoint.export:
        console.progress.enter("export")
        export_role(context.engine, algorithm.trained_role, folder.export, context.tokenizer)
    console.progress.enter("finish")
    if context.mesh.is_main:
        plot_run(folder.path)
    folder.status("finished", total, "all steps done")
    console.final_summary(folder, before, after)


def _resume(algorithm, context: Context) -> int:
    """Steps that the newest complete checkpoint has behind it; 0 for a fresh run."""
    folder, latest = context.folder, None
    if context.config.checkpoint.resume:
        latest = find_latest(folder.checkpoints)
    step = 0
    if latest is not None:
        context.console.progress.enter("load")
        state = load_checkpoint(context.engine, latest)
        algorithm.load_state_dict(state["algorithm"])
        step = state["step"]
        context.console.line(f"resumed from {latest} (step {step})")
    if context.mesh.is_main:
        truncate_jsonl(folder.samples, step)
    dist.barrier()
    return step


def _save(algorithm, context: Context, step: int) -> None:
    context.console.progress.enter("save")
    _check_copies(context)
    state = {"step": step, "algorithm": algorithm.state_dict()}
    keep = context.config.checkpoint.keep
    save_checkpoint(context.engine, context.folder.checkpoints, step, state, keep)


def _check_copies(context: Context) -> None:
    if warning := check_copies(context.engine.roles, context.mesh):
        context.console.line(f"warning: {warning}")


def _peak_gib(context: Context) -> float:
    """The largest peak memory of a process, GiB."""
    mib = int(compat.peak_memory_gib() * 1024)
    return max_over(mib, dist.group.WORLD, context.mesh.device) / 1024


def _banner(context: Context, algorithm) -> str:
    mesh, config = context.mesh, context.config
    line = (
        f"{config.algorithm.kind}: {algorithm.total_steps} steps, "
        f"TP {mesh.tp_size} x PP {mesh.pp_size} x DP {mesh.dp_size} on {mesh.device.type}, "
        f"{config.model.dtype}, roles {', '.join(context.engine.roles)}"
    )
    trained = [
        stage_spec(
            config, role.shape, mesh.pp_rank, mesh.dp_size, name, True, role.spec.head_outputs
        )
        for name, role in context.engine.roles.items()
        if role.spec.trainable
    ]
    return "\n".join([line, *describe_choices(trained)])


def _timeout_seconds(config: Config) -> float:
    """Of the process groups: later than the watchdog, which can say more."""
    limit = config.engine.watchdog_seconds
    return limit + TIMEOUT_AFTER_WATCHDOG_SECONDS if limit else TIMEOUT_SECONDS
