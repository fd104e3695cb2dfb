"""Step-labelled solutions for the PRM: JSONL formats to rows with labels at step ends.

Formats, told apart by the keys of a file's first line (all lines of a file must share them):

=================================  =====================  ====================================
keys                               num_attributes         label of a step
=================================  =====================  ====================================
``prompt, steps, labels``          1                      0, 1, false, true, or a float in [0, 1]
``problem, steps, ratings``        1 (PRM800K)            -1, 0 or 1, mapped to (r + 1) / 2
``prompt, steps, labels``          5                      [5 numbers in 0..4], divided by 4
``prompt, steps, scores``          5 (HelpSteer, A.2)     as above, but [dimension][sentence]
=================================  =====================  ====================================
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.schema import DataSection
from megatron_amrlhf.data.chat import encode_solution
from megatron_amrlhf.data.jsonl import Requirement, read_numbered_jsonl
from megatron_amrlhf.data.prompts import check_text, encode_limited_prompt
from megatron_amrlhf.errors import UserError

MAX_SCORE = 4
"""HelpSteer's highest score; scores are divided by it."""


@dataclass(frozen=True)
class PrmExample:
    """One solution with a label for each step.

    Attributes:
        row: token ids of prompt, steps and end-of-turn token, 1-D int64 on CPU.
        prompt_length: tokens of the prompt.
        label_positions: ``[S]`` int64, index in ``row`` of each step's last token.
        labels: ``[S, D]`` float32 in [0, 1].
    """

    row: Tensor
    prompt_length: int
    label_positions: Tensor
    labels: Tensor

    def __post_init__(self):
        assert self.labels.ndim == 2 and self.labels.shape[0] == self.label_positions.numel() > 0
        assert self.prompt_length <= int(self.label_positions[0])
        assert int(self.label_positions[-1]) < self.row.numel()


def load_prm_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    data_section: DataSection,
    num_attributes: int,
) -> list[PrmExample]:
    """Read and encode a file of step-labelled solutions (formats: see the module).

    Args:
        path: JSONL file.
        tokenizer: the PRM's, with an EOS.
        data_section: limits and system prompt.
        num_attributes: D, 1 or 5.

    Raises:
        UserError: `read_jsonl`'s errors, keys of no known format, wrong counts or ranges, rows or
            prompts over the limits; with ``path:line:``.
    """
    prompt_key, label_key = _detect_keys(path, num_attributes)
    required: dict[str, Requirement] = {prompt_key: check_text, "steps": _check_steps}
    required[label_key] = list
    examples = []
    for number, record in read_numbered_jsonl(path, required):
        where = f"{path}:{number}"
        labels = _read_labels(record[label_key], label_key, num_attributes, where)
        if len(labels) != len(record["steps"]):
            counts = f"{len(record['steps'])} steps but {len(labels)} in '{label_key}'"
            raise UserError(f"{where}: {counts}; give one label a step")
        prompt_ids = encode_limited_prompt(record[prompt_key], tokenizer, data_section, where)
        ids, positions = encode_solution(tokenizer, prompt_ids, record["steps"])
        if len(ids) > data_section.max_row_tokens:
            limit = f"data.max_row_tokens = {data_section.max_row_tokens}"
            advice = "raise the limit or drop this line"
            raise UserError(f"{where}: the row has {len(ids)} tokens, over {limit}; {advice}")
        example = PrmExample(
            row=torch.tensor(ids, dtype=torch.int64),
            prompt_length=len(prompt_ids),
            label_positions=torch.tensor(positions, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.float32),
        )
        examples.append(example)
    return examples


def _detect_keys(path: str | Path, num_attributes: int) -> tuple[str, str]:
    """(prompt key, label key) of a file, from its first line."""
    assert num_attributes in (1, 5), num_attributes
    number, first = read_numbered_jsonl(path, {})[0]
    label_keys = ("labels", "ratings") if num_attributes == 1 else ("labels", "scores")
    for prompt_key in ("prompt", "problem"):
        for label_key in label_keys:
            if prompt_key in first and "steps" in first and label_key in first:
                return prompt_key, label_key
    found = ", ".join(map(repr, first)) or "none"
    known = f"'prompt', 'steps' and '{label_keys[0]}' or '{label_keys[1]}'"
    needed = f"num_attributes = {num_attributes} needs {known}"
    raise UserError(f"{path}:{number}: keys {found} are no known format; {needed}")


def _read_labels(value: list, label_key: str, num_attributes: int, where: str) -> list[list[float]]:
    """Labels in [0, 1] as [step][attribute]."""
    if num_attributes == 1:
        low, high = (-1, 1) if label_key == "ratings" else (0, 1)
        numbers = [_number(item, low, high, label_key, where) for item in value]
        if label_key == "labels":
            return [[number] for number in numbers]
        if any(number % 1 for number in numbers):
            raise UserError(f"{where}: 'ratings' must be -1, 0 or 1; correct this line")
        return [[(number + 1) / 2] for number in numbers]
    if not all(isinstance(item, list) for item in value):
        raise UserError(f"{where}: '{label_key}' must be lists of scores; correct this line")
    table = [[_number(item, 0, MAX_SCORE, label_key, where) for item in row] for row in value]
    if label_key == "scores":
        if len(table) != num_attributes or len({len(row) for row in table}) != 1:
            shape = f"{num_attributes} lists (one a dimension) of one length (one score a step)"
            raise UserError(f"{where}: 'scores' must be {shape}; correct this line")
        table = [list(column) for column in zip(*table, strict=True)]
    if not all(len(row) == num_attributes for row in table):
        raise UserError(f"{where}: '{label_key}' must have {num_attributes} scores a step")
    return [[number / MAX_SCORE for number in row] for row in table]


def _number(item: Any, low: int, high: int, label_key: str, where: str) -> float:
    types = (bool, int, float) if (low, high) == (0, 1) else (int, float)
    if type(item) not in types or not low <= item <= high:
        shown = repr(item)[:40]
        message = f"{where}: '{label_key}' has {shown}, must be numbers from {low} to {high}"
        raise UserError(f"{message}; correct this line")
    return float(item)


def _check_steps(value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "must be a list with at least one step"
    if any(check_text(step) for step in value):
        return "must be a list of strings that are not blank"
    return None
