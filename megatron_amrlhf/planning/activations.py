"""Bytes of activations, logits and keys and values on a rank, by arithmetic alone.

The counterpart of ``weights.py``, which tells what a model's weights and optimizer take. Elements
are what autograd keeps, and what a forward without gradient has at its fullest moment, of torch's
RMSNorm, SwiGLU and attention as ``models/layers.py`` puts them together (``LiveBytes`` counts them;
``tests/distributed/test_plan.py`` compares). Fused kernels on a GPU keep less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_amrlhf.models.mapping import EMBEDDING
from megatron_amrlhf.parallel.vocab import CHUNK_POSITIONS
from megatron_amrlhf.planning.bytes_moved import BatchShape, decoding_blocks
from megatron_amrlhf.planning.weights import FLOAT32_BYTES, StageSpec

# Float32 copies of a chunk's logits that exist together, in a log-prob and in its backward.
LOGPROB_COPIES, GRADIENT_COPIES = 3, 2
# Float32 copies of the logits that sampling makes, its int64 indices as two.
SAMPLING_COPIES = 8


@dataclass(frozen=True)
class Transient:
    """Bytes of a moment in a phase, beside what ``weights.HeldBytes`` tells.

    Attributes:
        cache: keys and values while decoding.
        activations: of layers.
        logits: and copies of them.
        gradients: of single parameters, before they are added to the sum.
    """

    cache: int = 0
    activations: int = 0
    logits: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.cache + self.activations + self.logits + self.gradients


def rollout_transient(
    spec: StageSpec, prompt_lengths: Sequence[int], new_tokens: int, micro_batch_size: int
) -> Transient:
    """The fullest moment of decoding: the last prompts go in, or all answers are at their ends.

    Args:
        spec: the stage.
        prompt_lengths: tokens of the prompt of each answer of this replica.
        new_tokens: tokens of each answer.
        micro_batch_size: rows a decoding micro-batch.
    """
    parts = decoding_blocks(prompt_lengths, micro_batch_size)
    places = [len(part) * (part[-1] + new_tokens) for part in parts]
    cache = sum(places) * 2 * _keys(spec) * spec.num_layers * spec.weight_bytes
    prefill = forward_bytes(spec, max(len(part) * part[-1] for part in parts))
    sampling = max(map(len, parts)) * spec.shape.padded_vocab(1) * FLOAT32_BYTES * SAMPLING_COPIES
    moments = [Transient(cache=cache, activations=prefill)]
    if spec.has_head:
        moments.append(Transient(cache=cache, logits=sampling))
    return max(moments, key=lambda moment: moment.total)


def score_transient(spec: StageSpec, batch: BatchShape) -> Transient:
    """The fullest moment of forward passes without gradient: in a layer or in the head."""
    outside = batch.num_positions * (spec.shape.hidden_size + _rotary(spec)) * spec.weight_bytes
    layer = forward_bytes(spec, batch.num_positions) + outside
    outputs = max(batch.num_outputs)
    hidden = outputs * spec.shape.hidden_size * spec.weight_bytes
    logits = _logit_bytes(spec, outputs, 1, LOGPROB_COPIES)
    moments = [Transient(activations=layer), Transient(activations=outside + hidden, logits=logits)]
    return max(moments, key=lambda moment: moment.total)


def update_transient(spec: StageSpec, batch: BatchShape) -> Transient:
    """The fullest moment of 1F1B: the backward of the head, of a layer or of the embedding."""
    shape, positions, recompute = spec.shape, batch.num_positions, spec.engine.recompute
    hidden = _hidden(spec, positions)
    layers = len(spec.cut.chunks(shape.num_layers, spec.stage)[0].layers)
    rotary = positions * _rotary(spec) * spec.weight_bytes
    kept = hidden if recompute == "full" else layer_bytes(spec, positions, recompute)
    chunk = layers * kept + rotary
    saved = chunks_in_flight(spec, batch.num_blocks) * chunk
    again = layer_bytes(spec, positions, "none") if recompute == "full" else 0
    backward = hidden + 2 * positions * _inner(spec) * spec.weight_bytes
    largest = max(size for name, size in spec.sizes.items() if ".layers." in name)
    moments = [Transient(activations=saved + again + backward, gradients=_gradient(spec, largest))]
    if spec.has_head:
        outputs = max(batch.num_outputs)
        read = outputs * shape.hidden_size * spec.weight_bytes + saved
        read += round(_sequence(spec, positions) * _norm_bytes(spec))
        size = sum(x for name, x in spec.sizes.items() if "output_layer." in name)
        size = size or spec.sizes[_embedding(spec)]
        chunked = 1 + (outputs > spec.engine.logit_positions)  # a sum and what is added to it
        moments += [
            Transient(activations=read, logits=_logit_bytes(spec, outputs, 2, GRADIENT_COPIES)),
            Transient(
                activations=read,
                logits=_logit_bytes(spec, outputs, 2, 0),
                gradients=chunked * _gradient(spec, size),
            ),
        ]
    if spec.has_embedding:
        rest = saved - chunk + hidden
        gradient = _gradient(spec, spec.sizes[_embedding(spec)])
        moments.append(Transient(activations=rest, gradients=gradient))
    return max(moments, key=lambda moment: moment.total)


def chunks_in_flight(spec: StageSpec, num_blocks: int) -> int:
    """Forward passes of chunks whose backward is still to come, at most, in 1F1B.

    https://arxiv.org/abs/2104.04473, sections 2.2 and 2.3.
    """
    stages, virtual = spec.cut.stages, spec.cut.virtual
    if virtual == 1:
        return min(stages - spec.stage, num_blocks)
    warm_up = 2 * (stages - spec.stage - 1) + (virtual - 1) * stages
    return min(warm_up + 1, virtual * num_blocks)


def layer_bytes(spec: StageSpec, positions: int, recompute: str) -> int:
    """What autograd keeps of a layer, ``recompute`` none or selective."""
    shape, b = spec.shape, spec.weight_bytes
    queries, keys = _queries(spec), _keys(spec)
    if recompute == "selective":
        attention = (2 * queries + 2 * keys) * b
    else:
        attention = (4 * queries + 3 * keys) * b
        attention += shape.num_heads // spec.tensor * FLOAT32_BYTES  # log-sum-exp of the softmax
    if shape.qk_norm:
        attention += 2 * (queries + keys) * b
    split = 5 * _inner(spec) * b + attention
    return round(positions * split + _sequence(spec, positions) * 2 * _norm_bytes(spec))


def forward_bytes(spec: StageSpec, positions: int) -> int:
    """A layer's forward without gradient, at its fullest: inside SwiGLU."""
    hidden = 4 * spec.shape.hidden_size
    return positions * (hidden + 5 * _inner(spec)) * spec.weight_bytes


def _logit_bytes(spec: StageSpec, outputs: int, kept: int, copies: int) -> int:
    """Logits of a language model's head, ``kept`` times, and float32 copies of a part of them."""
    if spec.head_outputs is not None or not spec.has_head:
        return 0
    outputs = min(outputs, spec.engine.logit_positions)
    columns = spec.shape.padded_vocab(spec.tensor) // spec.tensor
    part = min(outputs, CHUNK_POSITIONS)
    return columns * (kept * outputs * spec.weight_bytes + copies * part * FLOAT32_BYTES)


def _gradient(spec: StageSpec, elements: int) -> int:
    """A parameter's gradient; a float32 copy goes over the ranks where each is reduced."""
    copied = spec.engine.reduce == "microbatch" and spec.data > 1 and spec.trainable
    return elements * (spec.weight_bytes + copied * FLOAT32_BYTES)


def _embedding(spec: StageSpec) -> str:
    return next(name for name in spec.sizes if name.endswith(EMBEDDING))


def _norm_bytes(spec: StageSpec) -> int:
    """What a norm keeps of a position: its input, the same divided by its root, what it gives.

    From bfloat16 some of it is in float32.
    """
    a_value = 12 if spec.weight_bytes == FLOAT32_BYTES else 10
    return a_value * spec.shape.hidden_size + FLOAT32_BYTES


def _inner(spec: StageSpec) -> int:
    return spec.shape.ffn_size // spec.tensor


def _queries(spec: StageSpec) -> int:
    return spec.shape.num_heads * spec.shape.head_dim // spec.tensor


def _keys(spec: StageSpec) -> int:
    return spec.shape.num_kv_heads * spec.shape.head_dim // spec.tensor


def _rotary(spec: StageSpec) -> int:
    return 2 * spec.shape.head_dim


def _sequence(spec: StageSpec, positions: int) -> float:
    return positions / spec.tensor if spec.sequence else positions


def _hidden(spec: StageSpec, positions: int) -> int:
    return round(_sequence(spec, positions) * spec.shape.hidden_size * spec.weight_bytes)
