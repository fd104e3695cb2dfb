"""Rules of the parallel axes and of the engine."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_amrlhf.config.layout import ParallelSection, RolesSection
from megatron_amrlhf.config.schema import Config


def axis_problems(parallel: ParallelSection) -> Iterator[str]:
    """Axes that do not go together, each with its fix."""
    tensor, pipeline = parallel.tensor, parallel.pipeline
    if parallel.context > 1:
        yield (
            f"parallel.context = {parallel.context}: context parallelism is not supported (our "
            "attention keeps whole rows on a rank): use parallel.tensor with parallel.sequence, "
            "or engine.recompute"
        )
    if parallel.sequence and tensor == 1:
        yield "parallel.sequence: splits positions over the tensor axis, use parallel.tensor >= 2"
    if parallel.virtual_stages > 1 and pipeline == 1:
        yield "parallel.virtual_stages: interleaves pipeline stages, use parallel.pipeline >= 2"
    uneven = parallel.first_stage_layers or parallel.last_stage_layers
    if uneven and (pipeline == 1 or parallel.virtual_stages > 1):
        yield (
            "parallel.first_stage_layers, parallel.last_stage_layers: need parallel.pipeline >= 2 "
            "and parallel.virtual_stages 1"
        )


def engine_problems(config: Config) -> Iterator[str]:
    """What a role's ZeRO stage has not, and micro-batches that rows do not fit in."""
    engine = config.engine
    for name in RolesSection.model_fields:
        section = engine.of_role(name)
        for key in ("offload_parameters", "offload_optimizer"):
            device = getattr(section, key)
            if device != "none" and section.stage < 3:
                yield (
                    f"engine.roles.{name}.{key}: {device} needs zero_stage 3, this role has "
                    f"{section.zero_stage}"
                )
            if device == "nvme" and engine.nvme_folder is None:
                yield f"engine.roles.{name}.{key}: nvme needs a folder, engine.nvme_folder"
    tokens, longest = engine.micro_batch_tokens, config.data.max_row_tokens
    together = config.algorithm.rows_together
    if tokens is not None and tokens < longest * together:
        unit = "a pair of rows" if together > 1 else "a row"
        yield (
            f"engine.micro_batch_tokens = {tokens} does not hold {unit} of data.max_row_tokens = "
            f"{longest}: use at least {longest * together}"
        )
    kind, size = config.algorithm.kind, config.engine.micro_batch_size
    if size % together:
        yield (
            f"engine.micro_batch_size: {kind} keeps pairs together, use an even number (got {size})"
        )
