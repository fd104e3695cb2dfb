"""Answers from policy and reference together, on TP x PP stages with a KV cache.

Micro-batches of both models take turns in the pipeline: while the last stage samples for one, the
stages before work on the next. Data-parallel ranks decode independently of each other: the
weights are gathered once, so no collective crosses replicas before the windows close.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.parallel.vocab import gather_logits
from megatron_amrlhf.rollout.block import DecodeBlock
from megatron_amrlhf.rollout.sampling import SamplingSettings, next_tokens, uniforms
from megatron_amrlhf.types import PromptBatch, RolloutBatch


class DecodingStopped(Exception):
    """Decoding was left early, on every rank of the replica.

    Attributes:
        why: what ``wants_stop`` said, not 0.
    """

    def __init__(self, why: int):
        super().__init__(f"decoding was stopped ({why})")
        self.why = why


class Generator(Protocol):
    """Samples answers to prompts: the door for an engine of another kind."""

    def generate(
        self, prompts: PromptBatch, step: int, samples: int, reference_samples: int = 0
    ) -> RolloutBatch:
        """Samples answers to this replica's prompts. Entered by every rank.

        Args:
            prompts: equal on all ranks of a replica.
            step: the rollout step; with the run's seed and a sample's id it fixes an answer.
            samples: answers a prompt.
            reference_samples: how many of them, the last ones, the reference gives.

        Returns:
            The answers in order of prompt and sample, equal on all ranks of the replica.

        Raises:
            DecodingStopped: it was left early, on all ranks of this replica. Other replicas may
                have their answers.
        """


@dataclass(frozen=True)
class EngineGenerator:
    """The models that are trained answer themselves, on the stages that they are trained on.

    Attributes:
        engine: holds the roles ``actor`` and, for its samples, ``reference``.
        settings: sampling settings.
        seed: the run's seed.
        micro_batch_size: rows a decoding micro-batch.
        wants_stop: not 0 to leave before the answers are complete; asked a token and block, by the
            ranks of the last stage, of which the first tensor rank's answer counts.
    """

    engine: Zero3Engine
    settings: SamplingSettings
    seed: int
    micro_batch_size: int
    wants_stop: Callable[[], int] = lambda: 0

    def generate(
        self, prompts: PromptBatch, step: int, samples: int, reference_samples: int = 0
    ) -> RolloutBatch:
        """Decodes policy's and reference's answers together, see `Generator`."""
        repeated = [row for row in prompts.rows for _ in range(samples)]
        within = torch.arange(samples).repeat(len(prompts.rows))
        groups = prompts.group_ids.repeat_interleave(samples)
        # Of the step, not of this replica: an answer's randomness goes by it on every layout.
        sample_ids = groups * samples + within
        from_reference = within >= samples - reference_samples
        random = uniforms(self.seed, step, sample_ids, self.settings.max_new_tokens)
        mesh = self.engine.mesh
        with ExitStack() as windows:
            blocks: list[DecodeBlock] = []
            for name, mine in (("actor", ~from_reference), ("reference", from_reference)):
                if name == "reference" and not reference_samples:
                    continue
                module = windows.enter_context(self.engine.roles[name].window())
                places = mine.nonzero()[:, 0].tolist()
                # Prompts of like lengths together: a block is as wide as its longest.
                places.sort(key=lambda place: repeated[place].numel())
                for start in range(0, len(places), self.micro_batch_size):
                    part = places[start : start + self.micro_batch_size]
                    block = DecodeBlock(
                        module,
                        part,
                        [repeated[place] for place in part],
                        uniform=random[part],
                        settings=self.settings,
                        device=mesh.device,
                    )
                    blocks.append(block)
            decode(blocks, mesh, self.settings, self.engine.tick, self.wants_stop)
        return _collect(blocks, repeated, groups, sample_ids, from_reference)


@torch.no_grad()
def decode(
    blocks: list[DecodeBlock],
    mesh: Mesh,
    settings: SamplingSettings,
    tick: Callable[[int], None],
    wants_stop: Callable[[], int],
) -> None:
    """Decodes all blocks to their ends; each round every live block goes through the pipeline.

    Raises:
        DecodingStopped: the rank that samples said so together with a block's tokens. Every rank
            of the replica finishes the round in which it reads that, so no transfer is left over.
    """
    sent: list[dist.Work] = []
    awaited: dict[int, tuple[Tensor, dist.Work | None]] = {}
    live = list(enumerate(blocks))
    why = 0
    while live and not why:
        for chunk in range(mesh.cut.virtual):
            for index, block in live:
                # The wait is here, a round later: until then the other blocks went on.
                if index in awaited:
                    tokens, work = awaited.pop(index)
                    if work is not None:
                        work.wait()
                    tick(block.accept(tokens[:-1]))
                    why = why or int(tokens[-1])
                if block.done:
                    continue
                output = _chunk_forward(block, chunk, mesh, sent)
                if chunk == mesh.cut.virtual - 1:
                    awaited[index] = _exchange_tokens(block, output, mesh, settings, wants_stop)
        live = [(index, block) for index, block in live if not block.done]
    # Before the windows close: no transfer may be left when other collectives begin.
    for work in [*sent, *(work for _, work in awaited.values() if work is not None)]:
        work.wait()
    if why:
        raise DecodingStopped(why)


def _chunk_forward(block: DecodeBlock, chunk: int, mesh: Mesh, sent: list[dist.Work]) -> Tensor:
    """Receives activations, runs a chunk, and sends on without waiting."""
    hidden, first, last = None, chunk == 0, chunk == mesh.cut.virtual - 1
    if not (mesh.is_first_stage and first):
        dtype = block.module.config.params_dtype
        hidden = torch.empty(block.hidden_shape, dtype=dtype, device=mesh.device)
        before = (mesh.pp_rank - 1) % mesh.pp_size
        # From the last stage to the first on another group: with two stages NCCL would put both
        # directions into one queue, where each side's send may wait for its own receive.
        group = mesh.token_group if mesh.is_first_stage else mesh.pp_group
        dist.recv(hidden, group=group, group_src=before)
    output = block.forward(chunk, hidden)
    if not (mesh.is_last_stage and last):
        while sent and sent[0].is_completed():
            sent.pop(0)
        after = (mesh.pp_rank + 1) % mesh.pp_size
        group = mesh.token_group if mesh.is_last_stage else mesh.pp_group
        work = dist.isend(output.contiguous(), group=group, group_dst=after)
        assert work is not None, "this rank is in the group"
        sent.append(work)
    return output


def _exchange_tokens(
    block: DecodeBlock,
    output: Tensor,
    mesh: Mesh,
    settings: SamplingSettings,
    wants_stop: Callable[[], int],
) -> tuple[Tensor, dist.Work | None]:
    """Samples on the last stage; every stage gets ``[b + 1]`` int64, maybe not yet arrived.

    These are the tokens and, as the last element, why decoding stops, or 0.
    """
    if mesh.is_last_stage:
        logits = gather_logits(output, block.module.shape.vocab_size, mesh.tp_group)
        tokens = next_tokens(logits, block.draw().to(mesh.device), settings)
        tokens = torch.cat([tokens, tokens.new_tensor([int(wants_stop())])])
        if mesh.tp_size > 1:
            # Logits are equal on the tensor ranks; whether to stop need not be seen by all at once.
            dist.broadcast(tokens, group=mesh.tp_group, group_src=0)
    else:
        tokens = torch.empty(block.num_rows + 1, dtype=torch.int64, device=mesh.device)
    if mesh.pp_size == 1:
        return tokens, None
    work = dist.broadcast(tokens, group=mesh.token_group, group_src=mesh.pp_size - 1, async_op=True)
    return tokens, work


def _collect(
    blocks: list[DecodeBlock],
    prompts: list[Tensor],
    groups: Tensor,
    sample_ids: Tensor,
    from_reference: Tensor,
) -> RolloutBatch:
    answers = {place: answer for block in blocks for place, answer in block.answers.items()}
    ended = {place for block in blocks for place in block.ended}
    rows = tuple(
        torch.cat([prompt, torch.tensor(answers[place], dtype=torch.int64)])
        for place, prompt in enumerate(prompts)
    )
    return RolloutBatch(
        rows=rows,
        prompt_lengths=torch.tensor([p.numel() for p in prompts], dtype=torch.int64),
        group_ids=groups,
        sample_ids=sample_ids,
        from_reference=from_reference,
        ended=torch.tensor([place in ended for place in range(len(prompts))]),
    )
