"""Rollout, score and update of an actor and its reference, timed and counted in one layout.

``tools/benchmark_engine.py`` starts this module on every rank:
``python -m torch.distributed.run ... -m megatron_amrlhf.studies.engine_speed JOB.json``.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amrlhf.config.cut import pipeline_cut
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.microbatch import MicroBatch, OutputPlaces, response_outputs
from megatron_amrlhf.engine.role import DTYPES, RoleSpec
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.parallel import compat
from megatron_amrlhf.parallel.collectives import gather_objects
from megatron_amrlhf.parallel.mesh import Mesh, build_mesh, start_processes, stop_processes
from megatron_amrlhf.parallel.vocab import token_logprobs
from megatron_amrlhf.planning.bytes_moved import (
    BatchShape,
    batch_shape,
    rollout_bytes,
    score_bytes,
    update_bytes,
)
from megatron_amrlhf.planning.memory import rollout_memory, score_memory, update_memory
from megatron_amrlhf.planning.roles import RowLengths
from megatron_amrlhf.planning.volumes import Volumes
from megatron_amrlhf.planning.weights import StageSpec, held_bytes, stage_spec
from megatron_amrlhf.rollout.generator import EngineGenerator
from megatron_amrlhf.rollout.sampling import SamplingSettings
from megatron_amrlhf.studies.live_bytes import LiveBytes
from megatron_amrlhf.studies.traffic import TrafficCounter
from megatron_amrlhf.types import PromptBatch

PHASES = ("rollout", "score", "update")


@dataclass(frozen=True)
class Workload:
    """What one repetition does.

    Attributes:
        answers: over all replicas.
        prompt_tokens: of every prompt.
        new_tokens: of every answer; none ends earlier.
        repeats: timed repetitions, after a warm-up and one that is counted.
        counts: whether to count traffic and memory, or only to time.
    """

    answers: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    counts: bool


@dataclass(frozen=True)
class RankReport:
    """What a rank measured; dictionaries by phase.

    Attributes:
        stage: its pipeline rank.
        num_blocks: micro-batches of a score or an update.
        seconds: of each timed repetition.
        counted: sent bytes by ``KIND over AXIS`` (``receive``: got); empty if not counted.
        analytic: the same by ``planning/bytes_moved.py``.
        peak_bytes: of tensors, on a GPU the allocator's; empty if not counted.
        analytic_bytes: weights, gradients, masters and moments held by both roles.
        planned_bytes: these and activations, logits, keys and values, as ``amrlhf plan`` has them.
    """

    stage: int
    num_blocks: int
    seconds: dict[str, list[float]]
    counted: dict[str, dict[str, float]]
    analytic: dict[str, dict[str, float]]
    peak_bytes: dict[str, int]
    analytic_bytes: dict[str, int]
    planned_bytes: dict[str, int]


class Bench:
    """The engine with an actor and a reference, and the three phases.

    Args:
        config: layout, engine and optimizer; ``rollout``'s sampling and ``micro_batch_size``.
        folder: Hugging Face folder of both roles.
        work: what a repetition does; ``answers`` is a multiple of DP.
        mesh: the mesh.
    """

    def __init__(self, config: Config, folder: Path, work: Workload, mesh: Mesh):
        self.config, self.work, self.mesh = config, work, mesh
        self.engine = Zero3Engine(config, mesh)
        dtype, steps = DTYPES[config.dtype_of("actor")], work.repeats + 2
        self.engine.add_role(
            RoleSpec("actor", folder, dtype, None, True, config.optimizer.lr, steps)
        )
        self.engine.add_role(RoleSpec("reference", folder, dtype))
        self.shape = self.engine.roles["actor"].shape
        self._rows: tuple[Tensor, ...] = ()
        self._repetition = 0

    @property
    def phases(self) -> dict[str, Callable[[], None]]:
        """The phases in order; each is entered by every rank."""
        return {"rollout": self._rollout, "score": self._score, "update": self._update}

    def specs(self) -> tuple[StageSpec, StageSpec]:
        """Actor's and reference's stage on this rank."""
        place = (self.config, self.shape, self.mesh.pp_rank, self.mesh.dp_size)
        actor = stage_spec(*place, "actor", trainable=True)
        return actor, stage_spec(*place, "reference", trainable=False)

    def batch(self) -> BatchShape:
        """The micro-batches of a score or an update."""
        work, count = self.work, self.work.answers // self.mesh.dp_size
        return batch_shape([work.prompt_tokens] * count, [work.new_tokens] * count, self.specs()[0])

    def analytic(self) -> dict[str, Volumes]:
        """Bytes of each phase by ``planning/bytes_moved.py``."""
        (actor, reference), work, batch = self.specs(), self.work, self.batch()
        prompts = [work.prompt_tokens] * (work.answers // self.mesh.dp_size)
        size = self.config.rollout.micro_batch_size
        return {
            "rollout": rollout_bytes(actor, prompts, work.new_tokens, size),
            "score": score_bytes(actor, batch) + score_bytes(reference, batch),
            "update": update_bytes(actor, batch),
        }

    def analytic_memory(self) -> dict[str, int]:
        """Bytes held in each phase, activations and the KV cache apart."""
        actor, reference = self.specs()
        resting = held_bytes(actor).resting + held_bytes(reference).resting
        training = held_bytes(actor).training + held_bytes(reference).resting
        return {
            "rollout": resting + actor.window_bytes,
            "score": resting + max(actor.window_bytes, reference.window_bytes),
            "update": training,
        }

    def planned_memory(self) -> dict[str, int]:
        """Bytes held at the fullest moment of each phase."""
        specs, work, batch = list(self.specs()), self.work, self.batch()
        rows = {"actor": work.answers // self.mesh.dp_size}
        lengths, size = RowLengths(work.prompt_tokens, work.new_tokens), self.config.rollout
        memory = {
            "rollout": rollout_memory(specs, rows, lengths, size.micro_batch_size),
            "score": score_memory(specs, "actor", batch),
            "update": update_memory(specs, "actor", batch, compat.on_gpu()),
        }
        return {phase: of_phase.total for phase, of_phase in memory.items()}

    def _rollout(self) -> None:
        rollout, work = self.config.rollout, self.work
        settings = SamplingSettings(
            max_new_tokens=work.new_tokens,
            max_row_tokens=work.prompt_tokens + work.new_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            end_ids=(),
        )
        size, step = rollout.micro_batch_size, self._repetition
        self._repetition += 1
        generator = EngineGenerator(self.engine, settings, 0, size)
        self._rows = generator.generate(self._prompts(), step, samples=1).rows

    def _prompts(self) -> PromptBatch:
        count = self.work.answers // self.mesh.dp_size
        first = self.mesh.dp_rank * count
        random, size = torch.Generator().manual_seed(first), (count, self.work.prompt_tokens)
        tokens = torch.randint(0, self.shape.vocab_size, size, generator=random)
        places = torch.arange(first, first + count)
        return PromptBatch(tuple(tokens), places, ("",) * count, (None,) * count)

    def _places(self) -> OutputPlaces:
        lengths = torch.tensor([row.numel() for row in self._rows])
        prompts = torch.full_like(lengths, self.work.prompt_tokens)
        return response_outputs(lengths, prompts, "before")

    def _logprobs(self, logits: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(logits, targets, self.shape.vocab_size, self.mesh.tp_group)

    def _score(self) -> None:
        at = self._places()

        def collect(outputs: Tensor, micro_batch: MicroBatch) -> Tensor:
            return micro_batch.rectangle(outputs, at.width)

        for name in self.engine.roles:
            self.engine.score(name, self._rows, at, self._logprobs, collect)

    def _update(self) -> None:
        """One step on the mean negative log-prob; every algorithm's loss costs the same here."""
        total = self.work.answers * self.work.new_tokens

        def loss(outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, None]:
            return -outputs[: micro_batch.num_outputs].sum() * (self.mesh.dp_size / total), None

        ids = torch.arange(len(self._rows))
        self.engine.train_step("actor", self._rows, ids, self._places(), self._logprobs, loss=loss)


class Memory:
    """Peak bytes of a process' tensors: the allocator's on a GPU, else by ``LiveBytes``."""

    def __init__(self):
        self.live = LiveBytes()

    def following(self) -> AbstractContextManager:
        """Must be entered before the first tensor is made."""
        return nullcontext() if compat.on_gpu() else self.live

    def reset(self) -> None:
        """Starts a new peak."""
        if compat.on_gpu():
            torch.cuda.reset_peak_memory_stats()
        self.live.reset_peak()

    @property
    def peak(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated() if compat.on_gpu() else self.live.peak


def measure(config: Config, folder: Path, work: Workload, mesh: Mesh) -> RankReport:
    """Runs all repetitions. Entered by every rank."""
    memory, counted, peaks = Memory(), {}, {}
    seconds: dict[str, list[float]] = {name: [] for name in PHASES}
    with memory.following() if work.counts else nullcontext():
        bench = Bench(config, folder, work, mesh)
        for phase in bench.phases.values():
            phase()  # warm-up; Adam's moments are made here
        if work.counts:
            for name, phase in bench.phases.items():
                memory.reset()
                with TrafficCounter(mesh) as counter:
                    phase()
                counted[name], peaks[name] = counter.counts.sent, memory.peak
    for _ in range(work.repeats):
        for name, phase in bench.phases.items():
            dist.barrier()
            start = time.perf_counter()
            phase()
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)
    for role in bench.engine.roles.values():
        role.weights.close()
    return RankReport(
        stage=mesh.pp_rank,
        num_blocks=bench.batch().num_blocks,
        seconds=seconds,
        counted={name: _named(volumes) for name, volumes in counted.items()},
        analytic={name: _named(volumes) for name, volumes in bench.analytic().items()},
        peak_bytes=peaks,
        analytic_bytes=bench.analytic_memory(),
        planned_bytes=bench.planned_memory(),
    )


def _named(volumes: Volumes) -> dict[str, float]:
    return {f"{kind} over {axis}": value for (kind, axis), value in volumes.items() if value}


def main(job_path: str) -> None:
    """Does what the job file says; rank 0 writes the reports of all ranks where it says."""
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    config = Config.model_validate(job["config"])
    start_processes()
    try:
        parallel = config.parallel
        mesh = build_mesh(parallel.tensor, pipeline_cut(parallel), parallel.sequence)
        report = measure(config, Path(job["folder"]), Workload(**job["work"]), mesh)
        reports = gather_objects(asdict(report), dist.group.WORLD)
        if mesh.is_main:
            Path(job["out"]).write_text(json.dumps(reports), encoding="utf-8")
    finally:
        stop_processes()


if __name__ == "__main__":
    main(sys.argv[1])
