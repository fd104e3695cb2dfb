"""What is wrong on one rank is named on every rank: non-finite numbers, changed weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_amrlhf.engine.integrity import (
    WeightsDiffer,
    check_copies,
    check_frozen,
    frozen_checksums,
)
from megatron_amrlhf.engine.microbatch import response_outputs
from megatron_amrlhf.engine.zero3 import NonFiniteGradients
from megatron_amrlhf.parallel.mesh import build_mesh
from megatron_amrlhf.parallel.vocab import token_logprobs
from tests.distributed.contexts import make_config, make_context, random_rollout, shard_rollout
from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

VOCAB_SIZE, MAX_SKIPPED = 131, 2
LENGTHS = [(3, 4), (5, 2), (2, 6), (4, 4), (3, 3), (2, 2)]
STAGES = (0, 1, 3)


def build(folder: str, tensor: int, pipeline: int, zero_stage: int):
    mesh = build_mesh(tensor, pipeline)
    engine = {
        "zero_stage": zero_stage,
        "max_skipped_steps": MAX_SKIPPED,
        "micro_batch_size": 2,
        "reduce": "microbatch",
    }
    context = make_context(make_config(folder, mesh, {"kind": "ppo"}, engine=engine), mesh)
    context.role("actor", Path(folder), learning_rate=1e-3, total_steps=10)
    context.role("reference", Path(folder))
    return context, mesh


def step(
    context, mesh, spoil: tuple[int, ...] = (), gradient_only: bool = False, role: str = "actor"
):
    """One optimizer step; the loss (or its gradient alone) of these samples is NaN."""
    rollout = shard_rollout(random_rollout(LENGTHS, VOCAB_SIZE, seed=3), mesh)
    lengths = torch.tensor([row.numel() for row in rollout.rows])
    plan = response_outputs(lengths, rollout.prompt_lengths, "before")

    def read(logits, targets):
        return token_logprobs(logits, targets, VOCAB_SIZE, mesh.tp_group)

    def loss(output, block):
        value = -output[: block.num_outputs].sum()
        ids = rollout.sample_ids[block.row_index].tolist()
        if set(ids) & set(spoil):
            value = value + (output * 0).sum().sqrt() if gradient_only else value * float("nan")
        return value, None

    args = (rollout.rows, rollout.sample_ids, plan, read)
    return context.engine.train_step(role, *args, loss=loss)


def weights_of(context) -> dict[str, torch.Tensor]:
    with context.engine.roles["actor"].window() as stage:
        return {name: x.detach().clone() for name, x in stage.named_parameters()}


def skip_and_go_on(folder: str, tensor: int, pipeline: int) -> list[str]:
    """A good step after a skipped one is the step that it would have been without it."""
    found = []
    for zero_stage in STAGES:
        context, mesh = build(folder, tensor, pipeline, zero_stage)
        other, _ = build(folder, tensor, pipeline, zero_stage)
        before = weights_of(context)
        result = step(context, mesh, spoil=(4,))
        found.append(result.skipped)
        after = weights_of(context)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert context.engine.skipped_steps == 1
        assert step(context, mesh).skipped is None
        assert step(other, mesh).skipped is None
        ours, theirs = weights_of(context), weights_of(other)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert any(not torch.equal(ours[name], before[name]) for name in ours)
    return found


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 2, 2), (2, 1, 2)])
def test_a_nan_of_one_rank_is_skipped_and_named_everywhere(folder, tensor, pipeline, data):
    ranks = run_on(tensor * pipeline * data, skip_and_go_on, folder, tensor, pipeline)
    assert all(rank == ranks[0] for rank in ranks)
    # The micro-batch of sample 4 on the second replica; the first replica has no part in it.
    for text in ranks[0]:
        assert text.startswith("actor: rank ") and "loss of samples" in text
        assert "4" in text.split("loss of samples")[1].split(";")[0]
        named = {int(part.split()[1].rstrip(":")) for part in text[7:].split("; ")}
        last_of_second = {1: {3}, 2: {2, 3}}[tensor]  # ranks count tp, then dp, then pp
        assert named == last_of_second, text


def gradient_alone(folder: str) -> str:
    context, mesh = build(folder, 1, 1, 3)
    return step(context, mesh, spoil=(1,), gradient_only=True).skipped


def test_a_gradient_that_is_not_finite_names_its_parameters(folder):
    text = run_on(1, gradient_alone, folder)[0]
    assert "gradient of chunks.0." in text and "more" in text and "loss" not in text


def too_many(folder: str) -> str:
    context, mesh = build(folder, 1, 1, 3)
    step(context, mesh, spoil=(1,))
    step(context, mesh)  # a good step in between: not in a row
    step(context, mesh, spoil=(1,))
    with pytest.raises(NonFiniteGradients) as caught:
        step(context, mesh, spoil=(0,))
    return str(caught.value)


def test_too_many_in_a_row_stop_the_run(folder):
    for text in run_on(2, too_many, folder):
        assert f"{MAX_SKIPPED} optimizer steps in a row" in text and "loss of samples 0" in text


def one_role_alone(folder: str) -> str:
    context, mesh = build(folder, 1, 1, 1)
    context.role("critic", Path(folder), learning_rate=1e-3, total_steps=10)
    step(context, mesh, spoil=(1,))
    step(context, mesh, role="critic")  # which is well does not help the actor
    with pytest.raises(NonFiniteGradients) as caught:
        step(context, mesh, spoil=(1,))
    return str(caught.value)


def test_a_role_that_never_learns_stops_the_run_though_another_one_does(folder):
    (text,) = run_on(1, one_role_alone, folder)
    assert text.startswith(f"actor: loss or gradient is not finite in {MAX_SKIPPED} optimizer")


def changed_weights(folder: str) -> tuple[str, str, str | None]:
    context, mesh = build(folder, 2, 2, 3)
    roles = context.engine.roles
    before = frozen_checksums(roles)
    assert check_copies(roles, mesh) is None
    step(context, mesh)
    assert check_copies(roles, mesh) is None
    check_frozen(roles, before)
    if mesh.rank == 1:
        next(roles["reference"].weights.module.parameters()).ds_tensor.data[0] += 1
    with pytest.raises(WeightsDiffer) as frozen:
        check_frozen(roles, before)
    norm = "chunks.0.decoder.layers.0.input_layernorm.weight"
    if mesh.rank == 3:  # second tensor rank of the last stage
        dict(roles["actor"].weights.module.named_parameters())[norm].ds_tensor.data[1] += 1
    drifted = check_copies(roles, mesh)
    if mesh.rank == 0:
        tied = roles["actor"].tied
        dict(roles["actor"].weights.module.named_parameters())[tied].ds_tensor.data[2] += 1
    with pytest.raises(WeightsDiffer) as untied:
        check_copies(roles, mesh)
    return str(frozen.value), str(untied.value), drifted


def test_changed_weights_are_named_on_every_rank(folder):
    for frozen, untied, drifted in run_on(4, changed_weights, folder):
        assert frozen == "a frozen role changed: reference (ranks 1)"
        assert untied.endswith("first and last stage: actor (ranks 0, 2)")
        assert drifted.endswith("tensor group: actor (ranks 2, 3)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(folder, "llama", tied=True, vocab_size=VOCAB_SIZE, weight_std=0.1)
    return str(folder)
