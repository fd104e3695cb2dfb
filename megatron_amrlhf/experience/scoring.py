"""Forward passes that say something about each response token, on the last stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_amrlhf.engine.microbatch import (
    MicroBatch,
    OutputPlaces,
    Outputs,
    response_outputs,
)
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.models.layers import LogitsFunction
from megatron_amrlhf.parallel.vocab import entropy, token_logprobs
from megatron_amrlhf.rewards.kinds import OUTCOME, reward_kind
from megatron_amrlhf.types import RolloutBatch


def as_they_are(outputs: Tensor, micro_batch: MicroBatch) -> Tensor:
    """The outputs."""
    return outputs


@dataclass(frozen=True)
class Reader:
    """How values are made of what a model says.

    Attributes:
        logits: reads a language model's logits inside its last stage, some positions at a time;
            None for a linear head.
        outputs: makes ``[n, ...]`` values of the ``[n, ...]`` outputs of a micro-batch.
    """

    logits: LogitsFunction | None = None
    outputs: Callable[[Tensor, MicroBatch], Tensor] = as_they_are


def score_tokens(
    context: Context,
    role: str,
    rollout: RolloutBatch,
    where: Outputs,
    read: Reader,
) -> Tensor | None:
    """``[B, R, ...]`` float32 values of the response tokens on last stages, None on others.

    Args:
        context: the run.
        role: which model.
        rollout: the answers.
        where: outputs are read ``before`` each token (log-prob, value) or ``at`` it (reward).
        read: makes values of the last stage's outputs.
    """
    lengths = rollout.prompt_lengths + rollout.response_lengths
    at = response_outputs(lengths, rollout.prompt_lengths, where)
    return score_outputs(context, role, rollout, at, read)


def score_states(context: Context, rollout: RolloutBatch) -> Tensor | None:
    """``[B, R + 1]`` float32 critic values on last stages, None on others.

    Column j < n, of an answer of n tokens, is the state before its token j, column n the state
    after its last token.
    """
    lengths = rollout.prompt_lengths + rollout.response_lengths
    # As if one more token followed: "before" it is the state after the last one.
    at = response_outputs(lengths + 1, rollout.prompt_lengths, "before")
    return score_outputs(context, "critic", rollout, at, read_value())


def score_outputs(
    context: Context,
    role: str,
    rollout: RolloutBatch,
    at: OutputPlaces,
    read: Reader,
) -> Tensor | None:
    """``[B, at.width, ...]`` float32 values where ``at`` says on last stages, else None."""

    def collect(outputs: Tensor, micro_batch: MicroBatch) -> Tensor:
        # A step's records are float32 (types.py).
        return micro_batch.rectangle(read.outputs(outputs, micro_batch).float(), at.width)

    return context.engine.score(role, rollout.rows, at, read.logits, collect)


def read_logprobs(context: Context, temperature: float) -> Reader:
    """Log-prob of each token under the softmax at ``temperature``, over ids that are tokens."""
    mesh, vocab_size, usable = context.mesh, context.vocab_size, context.usable

    def read(logits: Tensor, targets: Tensor) -> Tensor:
        return token_logprobs(
            logits, targets, vocab_size, mesh.tp_group, temperature=temperature, usable=usable
        )

    return Reader(logits=read)


def read_logprobs_and_entropy(context: Context, temperature: float) -> Reader:
    """``[n, 2]``: log-prob of each token, and entropy of the softmax at temperature 1."""
    mesh, vocab_size, usable = context.mesh, context.vocab_size, context.usable
    logprobs = read_logprobs(context, temperature).logits
    assert logprobs is not None, "it reads logits"

    def read(logits: Tensor, targets: Tensor) -> Tensor:
        spread = entropy(logits, vocab_size, mesh.tp_group, usable)
        return torch.stack((logprobs(logits, targets), spread), dim=-1)

    return Reader(logits=read)


def read_value() -> Reader:
    """The value head's output."""
    return Reader(outputs=lambda outputs, micro_batch: outputs[:, 0].float())


def read_reward(context: Context, role: str) -> Reader:
    """The scalar reward by a reward model: the PRM's attributes weighted, or their mean.

    The reward of an outcome model stands at an answer's last token; all tokens of the answer get
    it, so that it is the answer's reward whatever the granularity.
    """
    weights = context.config.reward_model.attribute_weights if role == "prm" else None
    is_outcome = reward_kind(context.engine.roles[role].hf_config.to_dict()) == OUTCOME

    def read(outputs: Tensor, micro_batch: MicroBatch) -> Tensor:
        if weights is None:
            rewards = outputs.float().mean(dim=-1)
        else:
            rewards = outputs.float() @ torch.tensor(weights, device=outputs.device)
        return rewards[last_output_of_row(micro_batch.output_rows)] if is_outcome else rewards

    return Reader(outputs=read)


def last_output_of_row(rows: Tensor) -> Tensor:
    """``[n]``: for each output the index of its row's last one; ``rows`` ascend."""
    return torch.searchsorted(rows, rows, right=True) - 1
