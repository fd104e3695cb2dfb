"""Bytes that a rank moves in rollout, score and update, and the pipeline's bubble, by arithmetic.

The counterpart of ``studies/traffic.py``, which counts; ``tools/benchmark_engine.py`` shows both.
Single numbers (counts, norms, agreements on sizes) and pickled objects (rows that even replicas
out, too) are left out. Nothing here needs processes or a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_amrlhf.config.layout import EngineSection
from megatron_amrlhf.engine.packing import block_positions, even_blocks, pack_rows
from megatron_amrlhf.models.mapping import EMBEDDING
from megatron_amrlhf.planning.volumes import (
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    RECEIVE,
    REDUCE_SCATTER,
    SEND,
    Volumes,
    sent_bytes,
)
from megatron_amrlhf.planning.weights import FLOAT32_BYTES, StageSpec

TOKEN_BYTES = 8  # int64
# All-reduces over the tensor group for an output: peak and sum of its softmax and, for a log-prob,
# the target's logit or, for the entropy, the mean logit.
REDUCTIONS_AN_OUTPUT = 3
# A layer recomputed whole stops before its last product, whose inputs are all that is needed.
LAST_PRODUCT = "linear_fc2.weight"


@dataclass(frozen=True)
class BatchShape:
    """Micro-batches of a replica in one score or update.

    Attributes:
        num_positions: of every micro-batch, padding included.
        num_outputs: of each micro-batch, 1 or more.
    """

    num_positions: int
    num_outputs: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        """How many micro-batches there are."""
        return len(self.num_outputs)


def batch_shape(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    spec: StageSpec,
    at_least: int = 1,
    together: int = 1,
) -> BatchShape:
    """The micro-batches that ``pack_micro_batches`` makes of a replica's rows.

    Args:
        prompt_lengths: tokens of each row's prompt.
        response_lengths: tokens of each row's response; each has one output.
        spec: any stage.
        at_least: micro-batches of the replica that has the most (update).
        together: this many consecutive rows stay in one micro-batch.
    """
    section: EngineSection = spec.engine
    lengths = [p + r for p, r in zip(prompt_lengths, response_lengths, strict=True)]
    tokens = section.micro_batch_tokens
    packed = pack_rows(lengths, together, None if tokens else section.micro_batch_size, tokens)
    multiple = spec.cut.stages if spec.cut.virtual > 1 else 1
    packed = even_blocks(lengths, together, packed, at_least, multiple)
    outputs = (sum(response_lengths[i] for i in block) for block in packed)
    positions = block_positions(lengths, packed, spec.tensor if spec.sequence else 1)
    return BatchShape(positions, tuple(max(count, 1) for count in outputs))


def score_bytes(spec: StageSpec, batch: BatchShape, reductions: int = 1) -> Volumes:
    """Bytes that a rank sends (``receive``: gets) in forward passes within one gather window.

    Args:
        spec: the stage.
        batch: the replica's micro-batches.
        reductions: what is read of each output of a language model: 1 for the log-prob, 2 for
            the entropy too.
    """
    volumes = _gathers(spec, 1)
    volumes += _forward_passes(spec, batch.num_positions * batch.num_blocks)
    if spec.has_head and spec.head_outputs is None:
        volumes += _reductions(spec, reductions * sum(batch.num_outputs))
    return volumes


def rollout_bytes(
    spec: StageSpec,
    prompt_lengths: Sequence[int],
    new_tokens: int,
    micro_batch_size: int,
    samples: int = 1,
) -> Volumes:
    """Bytes that a rank sends while a model decodes answers of ``new_tokens`` tokens each.

    Where answers end earlier it is less.

    Args:
        spec: the stage.
        prompt_lengths: tokens of the prompt of each answer of this replica.
        new_tokens: tokens of each answer.
        micro_batch_size: rows a decoding micro-batch.
        samples: so many answers after each other have a prompt in common.
    """
    parts, positions, first = decoding_blocks(prompt_lengths, micro_batch_size), 0, 0
    for part in parts:
        after = first + len(part)
        prompts = (
            -(-after // samples) - first // samples
        )  # a micro-batch may cut a prompt's answers
        # Prompts of a micro-batch are padded to its longest, then a token a row at a time.
        positions += prompts * part[-1] + len(part) * (new_tokens - 1)
        first = after
    volumes = _gathers(spec, 1) + _forward_passes(spec, positions)
    sampled = len(prompt_lengths) * new_tokens
    if spec.has_head:
        logits = sampled * spec.shape.padded_vocab(spec.tensor) * spec.weight_bytes
        volumes += _one(ALL_GATHER, "tensor", logits, spec.tensor)
        volumes += _one(BROADCAST, "tensor", sampled * TOKEN_BYTES, spec.tensor)
    return volumes + _one(BROADCAST, "pipeline", sampled * TOKEN_BYTES, spec.cut.stages)


def decoding_blocks(prompt_lengths: Sequence[int], micro_batch_size: int) -> list[list[int]]:
    """Prompt lengths of the rows of each decoding micro-batch, ascending, as decoding cuts them."""
    ordered = sorted(prompt_lengths)
    starts = range(0, len(ordered), micro_batch_size)
    return [ordered[start : start + micro_batch_size] for start in starts]


def update_bytes(spec: StageSpec, batch: BatchShape) -> Volumes:
    """Bytes that a rank sends (``receive``: gets) in one optimizer step.

    Args:
        spec: the stage.
        batch: the replica's micro-batches; every replica has as many.
    """
    volumes = gather_bytes(spec, batch.num_blocks) + reduce_bytes(spec, batch.num_blocks)
    volumes += _tensor_parallel_update(spec, batch) + _pipeline_update(spec, batch)
    rows = spec.data if spec.role.zero_stage == 0 else 1

    def copies(names: Sequence[str]) -> int:
        elements = sum(-(-spec.sizes[name] // spec.data) for name in names)
        return rows * elements * FLOAT32_BYTES

    volumes += _one(ALL_REDUCE, "tensor", copies(spec.summed_norms), spec.tensor)
    if spec.tied is not None:
        volumes += _one(ALL_REDUCE, "pipeline", copies([spec.tied]), 2)
    return volumes


def gather_bytes(spec: StageSpec, num_blocks: int) -> Volumes:
    """Weights that data-parallel ranks give each other in an update of so many micro-batches."""
    if spec.role.zero_stage == 1:  # new weights, after the optimizer
        whole = spec.num_partitioned * spec.data * spec.weight_bytes
        return _one(ALL_GATHER, "data", whole, spec.data)
    if spec.gathers_once:
        return _gathers(spec, 1)
    volumes = _gathers(spec, 2 * num_blocks)  # in the forward and again in the backward
    if spec.role.zero_stage == 3 and spec.has_embedding and spec.cut.stages > 1:
        # DeepSpeed sees no end of the embedding's backward, for tokens have no gradient: it stays
        # whole for the next micro-batch.
        kept = next(size for name, size in spec.sizes.items() if name.endswith(EMBEDDING))
        kept = -(-kept // spec.data) * spec.data * spec.weight_bytes
        volumes -= _one(ALL_GATHER, "data", (num_blocks - 1) * kept, spec.data)
    if spec.role.zero_stage == 3 and spec.engine.recompute == "full":
        again = spec.data * sum(
            -(-size // spec.data) * spec.weight_bytes
            for name, size in spec.sizes.items()
            if ".layers." in name and not name.endswith(LAST_PRODUCT)
        )
        volumes += _one(ALL_GATHER, "data", num_blocks * again, spec.data)
    return volumes


def reduce_bytes(spec: StageSpec, num_blocks: int) -> Volumes:
    """Float32 gradients over data-parallel ranks in an update of so many micro-batches."""
    times = 1 if spec.engine.reduce == "step" else num_blocks
    whole = spec.num_partitioned * spec.data * FLOAT32_BYTES
    kind = ALL_REDUCE if spec.role.zero_stage == 0 else REDUCE_SCATTER
    return _one(kind, "data", times * whole, spec.data)


def bubble_fraction(stages: int, num_blocks: int, virtual: int = 1) -> float:
    """Share of an update's time in which a pipeline rank has nothing to do.

    1F1B with equal stages, https://arxiv.org/abs/2104.04473, section 2.2; as a share of the whole
    time, not of the time at work.
    """
    return (stages - 1) / (virtual * num_blocks + stages - 1)


def _one(kind: str, axis: str, whole_bytes: float, num_ranks: int) -> Volumes:
    sent = sent_bytes(kind, whole_bytes, num_ranks) if num_ranks > 1 else 0
    return Volumes({(kind, axis): sent} if sent else {})


def _gathers(spec: StageSpec, times: int) -> Volumes:
    if spec.role.stage < 3:
        return Volumes()
    return _one(ALL_GATHER, "data", times * spec.window_bytes, spec.data)


def _activation_bytes(spec: StageSpec, positions: int) -> int:
    return positions * spec.shape.hidden_size * spec.weight_bytes


def _reductions(spec: StageSpec, outputs: int) -> Volumes:
    whole = REDUCTIONS_AN_OUTPUT * outputs * FLOAT32_BYTES
    return _one(ALL_REDUCE, "tensor", whole, spec.tensor)


def _forward_passes(spec: StageSpec, positions: int) -> Volumes:
    """Activations of forward passes without gradient, without sequence parallelism."""
    whole = _activation_bytes(spec, positions)
    times = 2 * spec.num_layers + spec.has_embedding
    volumes = _one(ALL_REDUCE, "tensor", times * whole, spec.tensor)
    return volumes + _sends(spec, whole, spec.has_head, spec.has_embedding)


def _sends(spec: StageSpec, whole: float, no_send: bool, no_receive: bool) -> Volumes:
    """Activations (or their gradients) between chunks, one way."""
    if spec.cut.stages == 1:
        return Volumes()
    sent, received = spec.cut.virtual - no_send, spec.cut.virtual - no_receive
    pairs = {(SEND, "pipeline"): sent * whole, (RECEIVE, "pipeline"): received * whole}
    return Volumes({key: value for key, value in pairs.items() if value})


def _pipeline_update(spec: StageSpec, batch: BatchShape) -> Volumes:
    whole = _activation_bytes(spec, batch.num_positions * batch.num_blocks) / (
        spec.tensor if spec.sequence else 1
    )
    forward = _sends(spec, whole, spec.has_head, spec.has_embedding)
    return forward + _sends(spec, whole, spec.has_embedding, spec.has_head)


def _tensor_parallel_update(spec: StageSpec, batch: BatchShape) -> Volumes:
    """What megatron-core's layers, the embedding, the head and the softmax exchange.

    A layer recomputed whole repeats its forward up to its last product, whose sum over the ranks
    nothing in the backward needs.
    """
    whole = _activation_bytes(spec, batch.num_positions * batch.num_blocks)
    layers, again = spec.num_layers, int(spec.engine.recompute == "full")
    if spec.sequence:
        gathers = layers * (6 + 2 * again) + spec.has_embedding + spec.has_head
        scatters = layers * (4 + again) + spec.has_embedding
        volumes = _one(ALL_GATHER, "tensor", gathers * whole, spec.tensor)
        volumes += _one(REDUCE_SCATTER, "tensor", scatters * whole, spec.tensor)
    else:
        times = layers * (4 + again) + spec.has_embedding
        volumes = _one(ALL_REDUCE, "tensor", times * whole, spec.tensor)
    if not spec.has_head or spec.head_outputs is not None:
        return volumes
    outputs = _activation_bytes(spec, sum(batch.num_outputs))  # the head's input gradient
    limit = spec.engine.logit_positions
    recomputed = sum(count for count in batch.num_outputs if count > limit)
    volumes += _one(ALL_REDUCE, "tensor", outputs, spec.tensor)
    return volumes + _reductions(spec, sum(batch.num_outputs) + recomputed)
