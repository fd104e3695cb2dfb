"""Step-labelled solutions for the PRM: public formats to rows with labels at step ends.

``data.format`` names the format; ``auto`` takes it from the keys of the file's first line:

=======================  ==============================  ================================
format                   told by                         read by
=======================  ==============================  ================================
``steps``                ``steps``                       `step_lists` (PRM800K-like, ...)
``prm800k``              ``question, label`` (objects)   `prm800k`
``math_shepherd``        ``input, label`` (texts)        `math_shepherd`
``helpsteer``            ``response``, or ``text``       `helpsteer.read_whole_answer`
``helpsteer_sentences``  ``chosen_scores``               `helpsteer.read_sentences`
=======================  ==============================  ================================

In each a row's ``system`` and ``history`` are read too (`turns.conversation`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.schema import DataSection
from megatron_amrlhf.data.chat import encode_solution, marker_token_id
from megatron_amrlhf.data.checking import load_rows
from megatron_amrlhf.data.helpsteer import read_sentences, read_whole_answer
from megatron_amrlhf.data.jsonl import first_record
from megatron_amrlhf.data.lazy_rows import Rows, id_row
from megatron_amrlhf.data.limits import check_row, encode_limited
from megatron_amrlhf.data.math_shepherd import read_math_shepherd
from megatron_amrlhf.data.prm800k import read_prm800k
from megatron_amrlhf.data.readers import ALONE, Readers
from megatron_amrlhf.data.rows import RowLeftOut, Selection
from megatron_amrlhf.data.step_lists import LABEL_KEYS, detect_keys, read_step_list
from megatron_amrlhf.data.step_record import ATTRIBUTES, StepRecord
from megatron_amrlhf.data.turns import conversation
from megatron_amrlhf.errors import UserError

Reader = Callable[[dict, str], list[StepRecord]]
MARKS = {
    "helpsteer_sentences": ("chosen_scores",),
    "prm800k": ("question", "label"),
    "math_shepherd": ("input", "label"),
    "helpsteer": ("response", ATTRIBUTES[0]),
    "steps": ("steps",),
}
"""Keys of the first line that tell a format; the first that fits."""
NUM_ATTRIBUTES = {
    "prm800k": 1,
    "math_shepherd": 1,
    "helpsteer": len(ATTRIBUTES),
    "helpsteer_sentences": len(ATTRIBUTES),
}


@dataclass(frozen=True)
class PrmExample:
    """One solution with a label for each judged step.

    Attributes:
        row: token ids of prompt, steps and end-of-turn token, 1-D int64 on CPU.
        prompt_length: tokens of the prompt.
        label_positions: ``[S]`` int64, index in ``row`` where each judged step is read.
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

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """All token ids."""
        return (self.row,)


def load_prm_examples(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    num_attributes: int,
    readers: Readers = ALONE,
) -> tuple[Rows[PrmExample], Selection]:
    """Checks a file of step-labelled solutions (formats: see the module), as `load_rows` does.

    Args:
        path: JSONL file.
        tokenizer: the PRM's, with an EOS.
        section: format, limits, system prompt, separators, what to do with wrong rows.
        num_attributes: D, 1 or 5.
        readers: who checks it.

    Raises:
        UserError: `read_jsonl`'s errors, keys of no known format, wrong counts or ranges, rows or
            prompts over the limits; with ``path:line:``.
    """
    marker_id = marker_token_id(tokenizer, section.step_marker)
    solutions = step_reader(path, first_record(path), section, num_attributes)

    def read(record: dict, where: str, tokenizer: PreTrainedTokenizerBase) -> list[PrmExample]:
        found = solutions(record, where)
        return [
            _encode(x, record, tokenizer, section, marker_id=marker_id, where=where) for x in found
        ]

    return load_rows(path, read, tokenizer, section, readers=readers)


def step_reader(
    path: str | Path, first: tuple[int, dict], section: DataSection, num_attributes: int
) -> Reader:
    """What makes step records of a file's lines.

    Args:
        path: the file, for messages.
        first: its first line's number and object.
        section: format and its options.
        num_attributes: D, 1 or 5.

    Raises:
        UserError: keys of no known format, or a format with another number of attributes.
    """
    assert num_attributes in LABEL_KEYS, num_attributes
    number, record = first
    kind = _detect(record) if section.format == "auto" else section.format
    found = ", ".join(map(repr, record)) or "none"
    if kind is None:
        raise UserError(
            f"{path}:{number}: keys {found} are no known format of step labels; see data.format"
        )
    wanted = NUM_ATTRIBUTES.get(kind, num_attributes)
    if wanted != num_attributes:
        raise UserError(
            f"{path}: {kind} rows have {wanted} label{'s' if wanted > 1 else ''} a step: set "
            f"algorithm.num_attributes to {wanted} (it is {num_attributes})"
        )
    if kind == "steps":
        keys = detect_keys(record, num_attributes)
        if keys is None:
            names = " or ".join(map(repr, LABEL_KEYS[num_attributes]))
            needed = f"num_attributes = {num_attributes} needs 'prompt', 'steps' and {names}"
            raise UserError(f"{path}:{number}: keys {found} are no known format; {needed}")
        return partial(read_step_list, keys=keys, num_attributes=num_attributes)
    readers: dict[str, Callable[[dict, str], list[StepRecord]]] = {
        "prm800k": partial(
            read_prm800k,
            keep_screening=section.screening_rows == "keep",
            alternatives=section.alternatives,
        ),
        "math_shepherd": partial(read_math_shepherd, mark=section.input_mark),
        "helpsteer": read_whole_answer,
        "helpsteer_sentences": read_sentences,
    }
    return readers[kind]


def _detect(record: dict) -> str | None:
    if isinstance(record.get("text"), str) and "label" in record:
        return "helpsteer"
    return next((kind for kind, keys in MARKS.items() if all(key in record for key in keys)), None)


def _encode(
    solution: StepRecord,
    record: dict,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    *,
    marker_id: int | None,
    where: str,
) -> PrmExample:
    """Token ids with the labels of the judged steps."""
    judged = [place for place, label in enumerate(solution.labels) if label is not None]
    if not judged:
        raise RowLeftOut("rows without a label")
    turns = conversation(record, solution.turns, section, where)
    prompt_ids = encode_limited(turns, tokenizer, section, where)
    separator = "" if solution.joined else section.step_separator
    ids, positions = encode_solution(
        tokenizer,
        prompt_ids,
        solution.steps,
        separator=separator,
        marker_id=marker_id,
        end=solution.end,
    )
    check_row(len(ids), section, where)
    return PrmExample(
        row=id_row(ids),
        prompt_length=len(prompt_ids),
        label_positions=torch.tensor([positions[place] for place in judged]),
        labels=torch.tensor([solution.labels[place] for place in judged], dtype=torch.float32),
    )
