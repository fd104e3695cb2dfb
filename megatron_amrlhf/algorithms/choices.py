"""Which answers are learned from: pairs for DPO, selected answers for rejection sampling.

Rewards are ``[G, N]``, N answers to each of G prompts; answer n of prompt g is row g N + n. One
that is NaN has failed: its answer is never picked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.mask.statistics import is_above


def is_flat(rewards: Tensor) -> Tensor:
    """``[G]`` bool: the rewards of a prompt's answers are all equal (up to rounding), or failed."""
    # A failed answer is neither the least nor the most.
    least, most = rewards.nan_to_num(nan=torch.inf), rewards.nan_to_num(nan=-torch.inf)
    return ~is_above(most.amax(dim=1), least.amin(dim=1))


def best_and_worst(rewards: Tensor) -> Tensor:
    """``[P, 2]`` rows of the best and the worst answer to each prompt whose rewards differ.

    Of equal rewards the first is the best, and the last the worst.
    """
    num_answers = rewards.shape[1]
    first_G = torch.arange(rewards.shape[0], device=rewards.device) * num_answers
    best_G = first_G + rewards.nan_to_num(nan=-torch.inf).argmax(dim=1)
    # Turned round, since argmin takes the first of equal ones.
    last_first = rewards.nan_to_num(nan=torch.inf).flip(1)
    worst_G = first_G + num_answers - 1 - last_first.argmin(dim=1)
    return torch.stack([best_G, worst_G], dim=1)[~is_flat(rewards)]


def pairs_above(rewards: Tensor, margin: float) -> Tensor:
    """``[P, 2]`` rows of all pairs of answers to a prompt whose rewards differ by more.

    Args:
        rewards: ``[G, N]``.
        margin: at least 0, reward units; 0 gives all pairs that are not tied (up to rounding).

    Returns:
        Chosen and rejected row of each pair, by prompt; P may be 0.
    """
    chosen_GN1, rejected_G1N = rewards[:, :, None], rewards[:, None, :]
    # [G, N, N]; a comparison with a NaN is False, so a failed answer is in no pair.
    is_pair = (chosen_GN1 - rejected_G1N > margin) & is_above(chosen_GN1, rejected_G1N)
    prompt_P, chosen_P, rejected_P = is_pair.nonzero(as_tuple=True)
    return torch.stack([chosen_P, rejected_P], dim=1) + (prompt_P * rewards.shape[1])[:, None]


def top_rows(scores: Tensor, counts: Tensor) -> Tensor:
    """``[S]`` rows of the ``counts`` answers to each prompt with the highest scores.

    Args:
        scores: ``[G, N]``; of equal ones the first comes first.
        counts: ``[G]`` int64 in [0, N]; where fewer have not failed, these.

    Returns:
        Row numbers, by prompt, then from the highest score on.
    """
    num_prompts, num_answers = scores.shape
    counts = counts.minimum((~scores.isnan()).sum(dim=1))
    # Failed answers come last, behind the counts.
    scores = scores.nan_to_num(nan=-torch.inf)
    order_GN = scores.argsort(dim=1, descending=True, stable=True)
    first_G = torch.arange(num_prompts, device=scores.device) * num_answers
    is_taken_GN = torch.arange(num_answers, device=scores.device) < counts[:, None]
    return (order_GN + first_G[:, None])[is_taken_GN]
