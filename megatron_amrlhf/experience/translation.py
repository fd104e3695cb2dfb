"""Answers in a reward model's own rows (other tokens, step markers), and its scores back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.data.chat import encode_turns, turn_end_id
from megatron_amrlhf.data.token_text import decode, token_ends
from megatron_amrlhf.data.turns import split_system
from megatron_amrlhf.rewards.marking import AnswerSteps, StepMarker, mark_answer, newline_steps
from megatron_amrlhf.rewards.retokenise import align, encode_with_ends
from megatron_amrlhf.types import PromptBatch, RolloutBatch


@dataclass(frozen=True)
class Translation:
    """Answers in a reward model's rows.

    Attributes:
        rollout: the same answers, rows of the reward model.
        index: for each answer, 1-D int64: of each policy token the number of the response token
            in ``rollout`` that is read for it.
    """

    rollout: RolloutBatch
    index: tuple[Tensor, ...]


def translate(
    rollout: RolloutBatch,
    prompts: PromptBatch,
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
    *,
    system_prompt: str | None,
    marker: StepMarker | None = None,
    steps: Sequence[AnswerSteps | None] | None = None,
) -> Translation:
    """Cuts prompts and answers anew. The same on every rank of a replica.

    The prompt goes through the other tokenizer's chat template, or stays as it is where the
    tokenizer is the policy's; an end token becomes what the other's turns end with. With a marker
    each step is cut anew on its own, also by the policy's tokenizer, as in the PRM's training, and
    all tokens of a step read its marker.

    Args:
        rollout: answers in the policy's tokens.
        prompts: their prompts.
        tokenizer: the policy's.
        other: the reward model's.
        system_prompt: of the run, or None; for prompts without one of their own.
        marker: at which the reward model judges steps; None: it is read at every token.
        steps: of each answer, where they are known; None: newlines end them. For a marker.
    """
    first = int(prompts.group_ids[0]) if len(prompts.texts) else 0
    is_own = other is tokenizer
    talks = () if is_own else prompts.conversations
    heads = [encode_turns(other, *split_system(turns, system_prompt)) for turns in talks]
    rows, lengths, index = [], [], []
    for row, length, group, ended, known in zip(
        rollout.rows,
        rollout.prompt_lengths.tolist(),
        rollout.group_ids.tolist(),
        rollout.ended.tolist(),
        steps or [None] * len(rollout.rows),
        strict=True,
    ):
        # The ids of a replica's prompts are consecutive.
        head = row[:length].tolist() if is_own else heads[group - first]
        answer = row[length:].tolist()
        if marker is None:
            ids, places = _answer(answer, ended, tokenizer, other)
        else:
            known = known or newline_steps(tokenizer, answer, ended)
            ids, places = mark_answer(known, ended, other, marker)
        rows.append(torch.tensor(head + ids, dtype=torch.int64))
        lengths.append(len(head))
        index.append(torch.tensor(places, dtype=torch.int64))
    prompt_lengths = torch.tensor(lengths, dtype=torch.int64)
    there = replace(rollout, rows=tuple(rows), prompt_lengths=prompt_lengths)
    return Translation(there, tuple(index))


def _answer(
    ids: list[int],
    ended: bool,
    tokenizer: PreTrainedTokenizerBase,
    other: PreTrainedTokenizerBase,
) -> tuple[list[int], list[int]]:
    """The answer's ids there, and for each id here the place there that it reads."""
    end_id = turn_end_id(other)
    assert end_id is not None, "checked at the start"
    end = [end_id] if ended else []
    text_ids = ids[:-1] if ended else ids
    there, there_ends = encode_with_ends(other, decode(tokenizer, text_ids))
    if not there:  # no text at all: everything is read at the end token
        return [end_id], [0] * len(ids)
    places = align(token_ends(tokenizer, text_ids), there_ends)
    # The end token reads the end token, which is in no text.
    return there + end, places + [len(there)] * len(end)


def read_back(scores: Tensor, texts: Translation, rollout: RolloutBatch) -> Tensor:
    """``[B, R']`` scores of the translated answers to ``[B, R]`` at the policy's tokens."""
    # 0 behind an answer, which is dropped below.
    places = torch.zeros(rollout.response_mask.shape, dtype=torch.int64)
    for row, index in enumerate(texts.index):
        places[row, : index.numel()] = index
    found = scores.gather(1, places.to(scores.device))
    return torch.where(rollout.response_mask.to(scores.device), found, 0.0)
