"""One reward of a whole answer from a PRM's step scores: PRM_O and PRM_P of figure 2.

The one place for them: training reads it for `reward.outcome`, best-of-n for its table.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIGHT_STEP = 0.5  # a step with this probability or more counts as right
OUTCOMES = ("last", "min", "mean", "product", "prefix")


def aggregate_steps(scores_BS: Tensor, present_BS: Tensor, kind: str) -> Tensor:
    """``[B]`` float64: one number an answer.

    ``last``, ``min``, ``mean`` and ``product`` over an answer's steps are PRM_O. ``prefix`` is
    PRM_P as read here: the share of the steps before the first one judged wrong. Process
    supervision judges each step on its own, and as in PRM800K nothing after the first wrong step
    counts; answers without a wrong step tie.

    Args:
        scores_BS: ``[B, S]`` probability that each step is right; not read where not present.
        present_BS: ``[B, S]`` bool, anywhere in a row.
        kind: one of `OUTCOMES`.

    Returns:
        The aggregates; 0 for an answer without steps.

    Raises:
        ValueError: unknown kind.
    """
    scores, counts_B = scores_BS.double(), present_BS.sum(dim=1)
    if kind == "last":
        places = torch.arange(scores.shape[1], device=scores.device)
        last_B = torch.where(present_BS, places, -1).amax(dim=1)
        found = scores.gather(1, last_B.clamp(min=0)[:, None])[:, 0]
    elif kind == "min":
        found = torch.where(present_BS, scores, torch.inf).amin(dim=1)
    elif kind == "mean":
        # Sorted first, so that the same scores in another order give the same sum.
        total = torch.where(present_BS, scores, 0.0).sort(dim=1).values.sum(dim=1)
        found = total / counts_B.clamp(min=1)
    elif kind == "product":
        found = torch.where(present_BS, scores, 1.0).sort(dim=1).values.prod(dim=1)
    elif kind == "prefix":
        is_wrong = present_BS & (scores < RIGHT_STEP)
        before = present_BS & (is_wrong.long().cumsum(dim=1) == 0)
        found = before.sum(dim=1).double() / counts_B.clamp(min=1)
    else:
        raise ValueError(f"unknown outcome {kind!r}")
    return torch.where(counts_B > 0, found, 0.0)


def step_ends(steps_BR: Tensor, valid_BR: Tensor, ended_B: Tensor, blank_BR: Tensor) -> Tensor:
    """``[B, R]`` bool: the tokens at which a PRM has learned to judge a step.

    These are the last token of each step and the answer's last token before its end token (which
    belongs to no step); the end token only of an answer that is nothing else. White space alone is
    no step where the answer has others.

    Args:
        steps_BR: ``[B, R]`` int64 number of the step that each token is in; blanks may be apart.
        valid_BR: ``[B, R]`` bool, response tokens, left-aligned.
        ended_B: ``[B]`` bool, the last token is an end token.
        blank_BR: ``[B, R]`` bool, the token is white space.
    """
    lengths_B = valid_BR.sum(dim=1)
    text_B = torch.where(ended_B & (lengths_B > 1), lengths_B - 1, lengths_B)
    last_B1 = text_B[:, None] - 1
    places = torch.arange(valid_BR.shape[1], device=valid_BR.device)
    ends = places == last_B1
    ends[:, :-1] |= (steps_BR[:, :-1] != steps_BR[:, 1:]) & (places[:-1] < last_B1)
    is_text = valid_BR & ~blank_BR & (places <= last_B1)
    written = (
        torch.zeros_like(steps_BR).scatter_add(1, steps_BR, is_text.long()).gather(1, steps_BR)
    )
    with_text = ends & (written > 0)
    return torch.where(with_text.any(dim=1, keepdim=True), with_text, ends)


def step_probabilities(outputs: Tensor, kind: str) -> Tensor:
    """The probability that a step is right, from what a PRM's head gives; float64, any shape.

    Args:
        outputs: of the head.
        kind: ``logit`` (trained with bce), or ``score`` (with mse): a linear output that was
            trained on [0, 1] but may lie outside.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ("logit", "score"):
        raise ValueError(f"unknown output {kind!r}")
    return outputs.double().sigmoid() if kind == "logit" else outputs.double().clamp(0.0, 1.0)
