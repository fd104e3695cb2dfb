"""How a model's layers are cut into pipeline stages: the one place that decides it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_amrlhf.config.layout import ParallelSection


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers on one rank.

    Attributes:
        layers: indices of the layers in the whole model.
        has_embedding: it starts with the embedding (the model's first chunk).
        has_head: it ends with the final norm and the head (the model's last chunk).
    """

    layers: range
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True)
class PipelineCut:
    """The pipeline axis.

    Attributes:
        stages: pipeline-parallel size (PP).
        virtual: chunks a rank (interleaved 1F1B, https://arxiv.org/abs/2104.04473, section 2.2).
        first_layers, last_layers: layers of the first and last rank where the ranks are uneven;
            None: as many as the ranks between them.
    """

    stages: int = 1
    virtual: int = 1
    first_layers: int | None = None
    last_layers: int | None = None

    def chunks(self, num_layers: int, stage: int) -> tuple[Chunk, ...]:
        """The chunks of pipeline rank ``stage``, in order of their virtual index.

        Raises:
            ValueError: the layers do not divide so; the message says what would.
        """
        sizes = self._stage_sizes(num_layers)
        if self.virtual == 1:
            start = sum(sizes[:stage])
            ranges = [range(start, start + sizes[stage])]
        else:
            each = sizes[0] // self.virtual
            starts = [(index * self.stages + stage) * each for index in range(self.virtual)]
            ranges = [range(start, start + each) for start in starts]
        last = self.virtual - 1
        return tuple(
            Chunk(layers, stage == 0 and index == 0, stage == self.stages - 1 and index == last)
            for index, layers in enumerate(ranges)
        )

    def _stage_sizes(self, num_layers: int) -> list[int]:
        if self.virtual > 1:
            unit = self.stages * self.virtual
            if num_layers % unit:
                raise ValueError(
                    f"parallel.pipeline x parallel.virtual_stages = {self.stages} x "
                    f"{self.virtual} does not divide the model's {num_layers} layers"
                )
            return [num_layers // self.stages] * self.stages
        given = [self.first_layers, *[None] * (self.stages - 2), self.last_layers]
        given = given[: self.stages] if self.stages > 1 else [None]
        rest = num_layers - sum(size for size in given if size is not None)
        free = given.count(None)
        if rest < free or (free and rest % free) or (not free and rest):
            raise ValueError(self._why_not(num_layers))
        return [rest // free if size is None else size for size in given]

    def _why_not(self, num_layers: int) -> str:
        if self.first_layers is None and self.last_layers is None:
            *sizes, largest = [str(n) for n in range(1, num_layers + 1) if num_layers % n == 0]
            choice = f"{', '.join(sizes)} or {largest}" if sizes else largest
            return (
                f"parallel.pipeline = {self.stages} does not divide the model's {num_layers} "
                f"layers: use {choice}, or set parallel.first_stage_layers and .last_stage_layers"
            )
        return (
            f"the model's {num_layers} layers do not divide over parallel.pipeline = "
            f"{self.stages} with parallel.first_stage_layers = {self.first_layers} and "
            f"parallel.last_stage_layers = {self.last_layers}"
        )


def pipeline_cut(parallel: ParallelSection) -> PipelineCut:
    """The cut that a run's ``parallel`` section describes."""
    return PipelineCut(
        parallel.pipeline,
        parallel.virtual_stages,
        parallel.first_stage_layers,
        parallel.last_stage_layers,
    )
