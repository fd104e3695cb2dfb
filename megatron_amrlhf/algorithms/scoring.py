"""Forward passes that say something about each response token, on the last stage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.context import Context
from megatron_amrlhf.engine.microbatch import (
    MicroBatch,
    OutputPlan,
    Outputs,
    response_outputs,
)
from megatron_amrlhf.engine.zero3 import nothing
from megatron_amrlhf.parallel.vocab import entropy, token_logprobs
from megatron_amrlhf.rewards.kinds import OUTCOME, reward_kind
from megatron_amrlhf.types import RolloutBatch

# ([n, ...] outputs, micro-batch) -> [n, ...] values
ReadFunction = Callable[[Tensor, MicroBatch], Tensor]


def score_tokens(
    context: Context,
    role: str,
    rollout: RolloutBatch,
    where: Outputs,
    read: ReadFunction,
    on_block: Callable[[], None] = nothing,
) -> Tensor | None:
    """``[B, R, ...]`` float32 values of the response tokens on last stages, None on others.

    Args:
        context: the run.
        role: which model.
        rollout: the answers.
        where: outputs are read ``before`` each token (log-prob, value) or ``at`` it (reward).
        read: makes values of the last stage's outputs.
        on_block: called after each micro-batch.
    """
    lengths = rollout.prompt_lengths + rollout.response_lengths
    plan = response_outputs(lengths, rollout.prompt_lengths, where)
    return score_outputs(context, role, rollout, plan, read, on_block)


def score_states(
    context: Context, rollout: RolloutBatch, on_block: Callable[[], None] = nothing
) -> Tensor | None:
    """``[B, R + 1]`` float32 critic values on last stages, None on others.

    Column j < n, of an answer of n tokens, is the state before its token j, column n the state
    after its last token.
    """
    lengths = rollout.prompt_lengths + rollout.response_lengths
    plan = response_outputs(lengths + 1, rollout.prompt_lengths, "before")
    return score_outputs(context, "critic", rollout, plan, read_value, on_block)


def score_outputs(
    context: Context,
    role: str,
    rollout: RolloutBatch,
    plan: OutputPlan,
    read: ReadFunction,
    on_block: Callable[[], None],
) -> Tensor | None:
    """``[B, plan.width, ...]`` float32 values where ``plan`` says on last stages, else None."""
    pieces = context.engine.score(
        role,
        rollout.rows,
        plan,
        lambda outputs, block: block.rectangle(read(outputs, block), plan.width),
        on_block,
    )
    if not context.mesh.is_last_stage:
        return None
    return torch.cat(pieces)[: len(rollout.rows)].float()


def read_logprobs(context: Context, temperature: float) -> ReadFunction:
    """Log-prob of each token under the softmax at ``temperature``."""
    mesh, vocab_size = context.mesh, context.vocab_size

    def read(outputs: Tensor, block: MicroBatch) -> Tensor:
        return token_logprobs(outputs, block.targets, vocab_size, mesh.tp_group, temperature)

    return read


def read_logprobs_and_entropy(context: Context, temperature: float) -> ReadFunction:
    """``[n, 2]``: log-prob of each token, and entropy of the softmax it was drawn from."""
    logprobs, mesh, vocab_size = (
        read_logprobs(context, temperature),
        context.mesh,
        context.vocab_size,
    )

    def read(outputs: Tensor, block: MicroBatch) -> Tensor:
        both = (logprobs(outputs, block), entropy(outputs, vocab_size, mesh.tp_group))
        return torch.stack(both, dim=-1)

    return read


def read_value(outputs: Tensor, block: MicroBatch) -> Tensor:
    """The value head's output."""
    return outputs[:, 0].float()


def read_reward(context: Context) -> ReadFunction:
    """The scalar reward by role ``prm``: attributes weighted, or their mean.

    The reward of an outcome model stands at an answer's last token; all tokens of the answer get
    it, so that it is the answer's reward whatever the granularity.
    """
    weights = context.config.reward_model.attribute_weights
    is_outcome = reward_kind(context.engine.roles["prm"].hf_config.to_dict()) == OUTCOME

    def read(outputs: Tensor, block: MicroBatch) -> Tensor:
        if weights is None:
            rewards = outputs.float().mean(dim=-1)
        else:
            rewards = outputs.float() @ torch.tensor(weights, device=outputs.device)
        return rewards[last_output_of_row(block.output_rows)] if is_outcome else rewards

    return read


def last_output_of_row(rows: Tensor) -> Tensor:
    """``[n]``: for each output the index of its row's last one; ``rows`` ascend."""
    return torch.searchsorted(rows, rows, right=True) - 1
