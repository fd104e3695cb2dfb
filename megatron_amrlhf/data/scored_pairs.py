"""Preference pairs with a dense reward of their own, for offline DPO and rejection sampling.

A file of pairs (``data/pairs.py``) whose objects may have ``chosen_scores`` and
``rejected_scores`` (paper, app. A.2): a score in 0..4 for each sentence of the answer, as
``[dimension][sentence]`` with HelpSteer's five dimensions (helpfulness, correctness, coherence,
complexity, verbosity) or as one list ``[sentence]``. What a sentence is: ``data/sentences.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.checking import load_rows
from megatron_amrlhf.data.jsonl import first_record
from megatron_amrlhf.data.keys import number
from megatron_amrlhf.data.lazy_rows import Rows
from megatron_amrlhf.data.pairs import EncodedPair, encode_pair
from megatron_amrlhf.data.readers import ALONE, Readers
from megatron_amrlhf.data.rows import Selection
from megatron_amrlhf.data.sentences import token_sentences
from megatron_amrlhf.data.stand_in import reads_ids
from megatron_amrlhf.data.step_record import MAX_SCORE
from megatron_amrlhf.errors import UserError

NUM_DIMENSIONS = (1, 5)
SCORE_KEYS = ("chosen_scores", "rejected_scores")


@dataclass(frozen=True)
class ScoredPair:
    """A pair and what its file says about the tokens of its answers.

    Attributes:
        pair: prompt and answers.
        rewards: reward of each token of the chosen and of the rejected answer, in [0, 1], 1-D
            float32 on CPU, as long as the answer with its end token; None without scores.
    """

    pair: EncodedPair
    rewards: tuple[Tensor, Tensor] | None

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """All token ids."""
        return self.pair.rows


def load_scored_pairs(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    *,
    attribute_weights: Sequence[float] | None,
    needs_scores: bool,
    readers: Readers = ALONE,
) -> tuple[Rows[ScoredPair], Selection]:
    """Checks a file of pairs, all of them with scores or none, as `load_rows` does.

    Each token gets the score of its sentence divided by 4, the weighted sum (or the mean) over the
    dimensions; the end token gets the last sentence's.

    Args:
        path: JSONL file or JSON list.
        tokenizer: the policy's.
        section: limits and system prompt.
        attribute_weights: weight of each dimension; None: their mean.
        needs_scores: refuse pairs without scores.
        readers: who checks it.

    Raises:
        UserError: ``load_pairs``'s errors; scores that are missing in some pairs, are not numbers
            in 0..4, or are not one for each sentence; with ``path:line:``.
    """
    has_first = _has_scores(first_record(path)[1])

    def read(record: dict, where: str, tokenizer: PreTrainedTokenizerBase) -> list[ScoredPair]:
        pair = encode_pair(record, tokenizer, section, where)
        has_scores = _has_scores(record)
        if needs_scores and not has_scores:
            raise UserError(
                f"{where}: no 'chosen_scores' and 'rejected_scores': add them, or give a PRM in "
                "reward_model.path, or set mask.kind to none"
            )
        if has_scores != (needs_scores or has_first):
            raise UserError(
                f"{where}: {'has' if has_scores else 'lacks'} scores, unlike the pairs before it: "
                "give all pairs scores or none"
            )
        rewards = None
        if has_scores:
            answers = (pair.chosen[pair.prompt_length :], pair.rejected[pair.prompt_length :])
            chosen, rejected = (
                _token_rewards(
                    record, key, answer, tokenizer=tokenizer, weights=attribute_weights, where=where
                )
                for key, answer in zip(SCORE_KEYS, answers, strict=True)
            )
            rewards = (chosen, rejected)
        return [ScoredPair(pair, rewards)]

    return load_rows(path, read, tokenizer, section, readers=readers)


def _has_scores(record: dict) -> bool:
    return any(key in record for key in SCORE_KEYS)


def _token_rewards(
    record: dict,
    key: str,
    answer: Tensor,
    *,
    tokenizer: PreTrainedTokenizerBase,
    weights: Sequence[float] | None,
    where: str,
) -> Tensor:
    """``[n]`` reward of each token of an answer."""
    scores = _read_scores(record, key, where)
    numbers, num_sentences = token_sentences(reads_ids(tokenizer), answer.tolist())
    if scores.shape[1] != num_sentences:
        raise UserError(
            f"{where}: '{key}' has {scores.shape[1]} scores, but the answer has {num_sentences} "
            "sentences (as reward.step_boundary: sentence cuts them); give one score a sentence"
        )
    if weights is not None and len(weights) != scores.shape[0]:
        raise UserError(
            f"{where}: '{key}' has {scores.shape[0]} dimensions, but "
            f"reward_model.attribute_weights has {len(weights)} weights"
        )
    scaled = scores / MAX_SCORE
    rewards = scaled.mean(dim=0) if weights is None else torch.tensor(weights) @ scaled
    return rewards[torch.tensor(numbers)]


def _read_scores(record: dict, key: str, where: str) -> Tensor:
    """``[D, S]`` float32 scores as they stand in the file."""
    value = record.get(key)
    if value == []:
        raise UserError(f"{where}: '{key}' has no scores; give one score a sentence")
    if isinstance(value, list) and value and not isinstance(value[0], list):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(row, list) and row for row in value):
        raise UserError(
            f"{where}: '{key}' must be a list of scores, one a sentence, or one such list a "
            "dimension; correct this line"
        )
    if len(value) not in NUM_DIMENSIONS or len({len(row) for row in value}) != 1:
        lengths = ", ".join(str(len(row)) for row in value)
        raise UserError(
            f"{where}: '{key}' has lists of {lengths} scores; give 1 or 5 lists (dimensions) of "
            "one length"
        )
    return torch.tensor([[number(x, 0, MAX_SCORE, key, where) for x in row] for row in value])
