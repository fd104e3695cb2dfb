"""Parameters, bytes held, bytes moved and the bubble of small cases worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.config.layout import EngineSection
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.planning.announce import describe_choices
from megatron_amrlhf.planning.bytes_moved import (
    BatchShape,
    batch_shape,
    bubble_fraction,
    rollout_bytes,
    score_bytes,
    update_bytes,
)
from megatron_amrlhf.planning.volumes import (
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    RECEIVE,
    REDUCE_SCATTER,
    SEND,
    sent_bytes,
)
from megatron_amrlhf.planning.weights import HeldBytes, StageSpec, held_bytes

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 6,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
}
SHAPE = read_shape(Qwen2Config(**SIZES).to_dict())
# A layer: two norms of 8, qkv 16 x 8 and 16, output 8 x 8, gate and up 12 x 8, down 8 x 6.
LAYER, EMBEDDING, NORM = 16 + 128 + 16 + 64 + 96 + 48, 11 * 8, 8
FIRST = EMBEDDING + 2 * LAYER  # elements of the first of two stages: 824
TENSOR, PIPELINE, DATA = "tensor", "pipeline", "data"


def spec_of(stage: int = 0, pipeline: int = 2, tensor: int = 1, data: int = 1, **engine):
    section = EngineSection(micro_batch_size=2, **engine)
    return StageSpec(
        name="actor",
        shape=SHAPE,
        cut=PipelineCut(pipeline),
        stage=stage,
        tensor=tensor,
        data=data,
        sequence=False,
        weight_bytes=4,
        head_outputs=None,
        trainable=True,
        role=section.of_role("actor"),
        engine=section,
    )


BATCH = BatchShape(num_positions=9, num_outputs=(4, 3))
ACTIVATIONS = 9 * 2 * 8 * 4  # bytes of both micro-batches: 576


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Qwen2ForCausalLM, Qwen2Config),
        (LlamaForCausalLM, LlamaConfig),
        (MistralForCausalLM, MistralConfig),
        (Qwen3ForCausalLM, Qwen3Config),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_stages_have_the_parameters_of_the_hugging_face_model(model, config, tied):
    config = config(**SIZES | {"tie_word_embeddings": tied})
    shape = read_shape(config.to_dict())
    stages = [replace(spec_of(stage), shape=shape).num_parameters for stage in (0, 1)]
    copies = EMBEDDING if tied else 0  # the last stage has one of its own
    assert sum(stages) - copies == model(config).num_parameters()
    alone = replace(spec_of(pipeline=1), shape=shape)
    assert alone.num_parameters == model(config).num_parameters()


def test_elements_of_a_stage():
    assert spec_of(0).num_parameters == FIRST == 824
    assert spec_of(1).num_parameters == 2 * LAYER + NORM + EMBEDDING
    # Half of all but the norms; the vocabulary is padded to 12.
    assert spec_of(0, tensor=2).num_parameters == 6 * 8 + 2 * (16 + (LAYER - 16) // 2)
    head = replace(spec_of(1), head_outputs=5)
    assert head.num_parameters == 2 * LAYER + NORM + 5 * 8 + 5
    # What is looked up is not multiplied with, unless it is the head too.
    assert spec_of(0).num_multiplied == 2 * LAYER
    assert spec_of(1).num_multiplied == 2 * LAYER + NORM + EMBEDDING
    untied, alone = replace(SHAPE, tied=False), spec_of(pipeline=1)
    for shape, outputs, expected in (
        (replace(SHAPE, tied=True), None, EMBEDDING),
        (untied, None, EMBEDDING),
        (untied, 5, 5 * 8 + 5),
        (replace(SHAPE, tied=True), 5, 5 * 8 + 5),
    ):
        spec = replace(alone, shape=shape, head_outputs=outputs)
        assert spec.num_multiplied == 4 * LAYER + NORM + expected
    # Over 3 replicas each parameter is rounded up: 88, 8, 128, 16, 64, 96 and 48.
    assert spec_of(0, data=3).num_partitioned == 30 + 2 * (3 + 3 + 43 + 6 + 22 + 32 + 16)


def test_bytes_held_with_whole_and_with_partitioned_gradients():
    half = FIRST // 2 * 4
    step = HeldBytes(
        weights=half,
        masters=half,
        moments=2 * half,
        gradients=2 * half,
        gathered=2 * half,
    )
    assert held_bytes(spec_of(data=2)) == step
    lean = held_bytes(spec_of(data=2, gather="microbatch", reduce="microbatch"))
    assert lean == replace(step, gradients=half, gathered=128 * 4)  # the largest: qkv
    assert lean.training == 5 * half + 512
    frozen = held_bytes(replace(spec_of(data=2), trainable=False))
    assert (frozen.resting, frozen.training) == (half, half)
    alone = held_bytes(spec_of(data=1))  # nothing to gather
    assert (alone.gathered, alone.weights) == (0, FIRST * 4)
    half_precision = held_bytes(replace(spec_of(data=2), weight_bytes=2))
    assert (half_precision.weights, half_precision.masters) == (half // 2, half)


def test_bytes_held_at_stages_0_and_1():
    all_of_it = FIRST * 4
    zero1 = held_bytes(spec_of(data=2, zero_stage=1, reduce="microbatch"))
    assert zero1 == HeldBytes(all_of_it, all_of_it // 2, all_of_it, all_of_it // 2, 0)
    zero0 = held_bytes(spec_of(data=2, zero_stage=0, reduce="microbatch"))
    assert zero0 == HeldBytes(all_of_it, all_of_it, 2 * all_of_it, all_of_it, 0)


@pytest.mark.parametrize(
    ("engine", "gathered", "scattered", "reduced"),
    [  # in halves of the stage's bytes, what a rank of two sends of it; two micro-batches
        ({}, 1, 1, 0),
        ({"reduce": "microbatch"}, 1, 2, 0),
        ({"zero_stage": 1}, 1, 1, 0),
        ({"zero_stage": 1, "reduce": "microbatch"}, 1, 2, 0),
        ({"zero_stage": 0}, 0, 0, 2),
        ({"zero_stage": 0, "reduce": "microbatch"}, 0, 0, 4),
    ],
)
def test_weights_and_gradients_moved_in_an_update(engine, gathered, scattered, reduced):
    volumes, half = update_bytes(spec_of(data=2, **engine), BATCH), FIRST * 4 / 2
    assert volumes[ALL_GATHER, DATA] == gathered * half
    assert volumes[REDUCE_SCATTER, DATA] == scattered * half
    assert volumes[ALL_REDUCE, DATA] == reduced * half


def test_weights_moved_in_every_micro_batch():
    half, spec = 4 / 2, spec_of(1, data=2, gather="microbatch")
    assert update_bytes(spec, BATCH)[ALL_GATHER, DATA] == 4 * spec.num_parameters * half
    # On the first of several stages the embedding stays whole between micro-batches.
    first = update_bytes(replace(spec, stage=0), BATCH)
    assert first[ALL_GATHER, DATA] == (4 * FIRST - EMBEDDING) * half


def test_a_recomputed_layer_is_gathered_a_third_time_but_for_its_last_product():
    spec = spec_of(data=2, gather="microbatch", recompute="full")
    plain = update_bytes(spec_of(data=2, gather="microbatch"), BATCH)[ALL_GATHER, DATA]
    again = 2 * 2 * (LAYER - 48) * 4 / 2
    assert update_bytes(spec, BATCH)[ALL_GATHER, DATA] == plain + again


def test_activations_between_stages():
    for stage in (0, 1):
        volumes = update_bytes(spec_of(stage), BATCH)
        assert volumes == {(SEND, PIPELINE): ACTIVATIONS, (RECEIVE, PIPELINE): ACTIVATIONS}
    # Two chunks a rank: there, back and there again, and the gradients the other way.
    interleaved = replace(spec_of(0), cut=PipelineCut(2, virtual=2))
    volumes = update_bytes(interleaved, BATCH)
    assert volumes == {(SEND, PIPELINE): 3 * ACTIVATIONS, (RECEIVE, PIPELINE): 3 * ACTIVATIONS}
    assert score_bytes(interleaved, BATCH)[SEND, PIPELINE] == 2 * ACTIVATIONS
    assert score_bytes(interleaved, BATCH)[RECEIVE, PIPELINE] == ACTIVATIONS


def test_tensor_parallel_update():
    # At two ranks an all-reduce sends as many bytes as the tensor has. Two in the forward and two
    # in the backward of a layer, one of the embedding.
    first = update_bytes(spec_of(0, tensor=2), BATCH)
    assert first[ALL_REDUCE, TENSOR] == (2 * 4 + 1) * ACTIVATIONS
    head, softmax = 7 * 8 * 4, 3 * 7 * 4
    last = update_bytes(spec_of(1, tensor=2), BATCH)
    assert last[ALL_REDUCE, TENSOR] == 2 * 4 * ACTIVATIONS + head + softmax
    # Logits of the micro-batch with 4 outputs, not of that with 3, are computed twice.
    chunked = update_bytes(spec_of(1, tensor=2, logit_positions=3), BATCH)
    assert chunked[ALL_REDUCE, TENSOR] == last[ALL_REDUCE, TENSOR] + 3 * 4 * 4
    full = update_bytes(spec_of(0, tensor=2, recompute="full"), BATCH)
    assert full[ALL_REDUCE, TENSOR] == (2 * 5 + 1) * ACTIVATIONS


def test_sequence_parallel_update():
    batch = BatchShape(num_positions=10, num_outputs=(4, 3))
    whole = 10 * 2 * 8 * 4
    spec = replace(spec_of(0, tensor=2), sequence=True)
    volumes = update_bytes(spec, batch)
    assert volumes[ALL_GATHER, TENSOR] == (2 * 6 + 1) * whole / 2
    assert volumes[REDUCE_SCATTER, TENSOR] == (2 * 4 + 1) * whole / 2
    assert volumes[ALL_REDUCE, TENSOR] == 4 * 8 * 4  # gradients of four norms
    assert volumes[SEND, PIPELINE] == whole / 2


def test_norms_of_queries_and_keys_are_summed_over_the_tensor_ranks_always():
    normed = read_shape(Qwen3Config(**SIZES).to_dict())
    for sequence, plain in ((False, 0), (True, 4 * 8)):  # four other norms in two layers
        spec = replace(spec_of(0, tensor=2), shape=normed, sequence=sequence)
        with_norms = update_bytes(spec, BATCH)[ALL_REDUCE, TENSOR]
        without = update_bytes(replace(spec, shape=replace(normed, qk_norm=False)), BATCH)
        # two layers with two norms of two units each
        assert with_norms - without.get((ALL_REDUCE, TENSOR), 0) == 2 * 2 * 2 * 4
        assert len(spec.summed_norms) == 4 + plain // 8


def test_gradients_of_both_copies_of_a_tied_embedding_are_summed():
    tied = replace(SHAPE, tied=True)
    for engine, share in (({}, 2), ({"zero_stage": 0}, 1)):
        for stage in (0, 1):
            spec = replace(spec_of(stage, data=2, **engine), shape=tied)
            assert update_bytes(spec, BATCH)[ALL_REDUCE, PIPELINE] == EMBEDDING // share * 4


def test_score_and_rollout():
    scored = score_bytes(spec_of(1, tensor=2, data=2), BATCH, reductions=2)
    elements = spec_of(1, tensor=2).num_parameters
    assert scored == {
        (ALL_GATHER, DATA): elements * 4 / 2,
        (ALL_REDUCE, TENSOR): 2 * 2 * ACTIVATIONS + 2 * 3 * 7 * 4,
        (RECEIVE, PIPELINE): ACTIVATIONS,
    }
    # Sorted by length the micro-batches are (3, 4) and (6): 2 x (4 + 4) + 1 x (6 + 4) positions.
    decoded = rollout_bytes(spec_of(1, tensor=2), [6, 3, 4], new_tokens=5, micro_batch_size=2)
    activations = 26 * 8 * 4
    assert decoded == {
        (ALL_REDUCE, TENSOR): 2 * 2 * activations,
        (RECEIVE, PIPELINE): activations,
        (ALL_GATHER, TENSOR): 15 * 12 * 4 / 2,
        (BROADCAST, TENSOR): 15 * 8 / 2,
        (BROADCAST, PIPELINE): 15 * 8 / 2,
    }


def test_micro_batches_of_rows():
    # Rows of 5, 4 and 7 tokens: the longest alone.
    assert batch_shape([3, 3, 3], [2, 1, 4], spec_of()) == BatchShape(9, (4, 3))
    more = batch_shape([3, 3, 3], [2, 1, 4], spec_of(), at_least=4)
    assert more == BatchShape(7, (4, 2, 1, 1))  # one without rows has an output too
    interleaved = replace(spec_of(), cut=PipelineCut(2, virtual=2))
    assert batch_shape([3], [2], interleaved).num_blocks == 2
    sequence = replace(spec_of(tensor=2), sequence=True)
    assert batch_shape([3, 3, 3], [2, 1, 4], sequence).num_positions == 10


@pytest.mark.parametrize(
    ("kind", "sent"),
    [(ALL_GATHER, 75), (REDUCE_SCATTER, 75), (ALL_REDUCE, 150), (BROADCAST, 75), (SEND, 100)],
)
def test_ring_volumes(kind, sent):
    assert sent_bytes(kind, 100, 4) == sent


def test_bubble():
    assert bubble_fraction(1, 5) == 0
    assert bubble_fraction(4, 12) == pytest.approx(3 / 15)
    assert bubble_fraction(4, 12, virtual=2) == pytest.approx(3 / 27)


def test_the_start_up_lines_state_what_each_choice_moves_and_holds():
    actor = spec_of(data=2, reduce="microbatch")
    critic = replace(actor, weight_bytes=2)
    weights, gradients = describe_choices([actor, critic])
    # 1648 + 824 bytes moved, 3296 held. Twice as much moved in each micro-batch; qkv held.
    assert weights == (
        "weights:   engine.gather: step moves 2.41 KiB a step and holds 3.22 KiB; "
        "microbatch moves 4.83 KiB a micro-batch and holds 512 B"
    )
    assert gradients == (
        "gradients: engine.reduce: microbatch moves 3.22 KiB a micro-batch and holds 1.61 KiB; "
        "step moves 3.22 KiB a step and holds 3.22 KiB"
    )
    replicated = spec_of(data=2, zero_stage=0)
    assert len(describe_choices([replicated])) == 1
    (alone,) = describe_choices([spec_of(data=1)])
    assert alone.startswith("one replica: ") and alone.endswith("gradients hold 3.22 KiB")
    assert describe_choices([]) == []
