"""Step-labelled solutions for the PRM: rows of token ids with labels at step ends.

What a row says is read by its format (`step_formats`); beside it ``system`` and ``history`` are
read in each of them (`turns.conversation`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.chat import encode_solution, marker_token_id
from megatron_amrlhf.data.checking import load_rows
from megatron_amrlhf.data.jsonl import first_record
from megatron_amrlhf.data.lazy_rows import Rows, id_row
from megatron_amrlhf.data.limits import check_row, encode_limited
from megatron_amrlhf.data.readers import ALONE, Readers
from megatron_amrlhf.data.rows import RowLeftOut, Selection
from megatron_amrlhf.data.step_formats import step_reader
from megatron_amrlhf.data.step_record import StepRecord
from megatron_amrlhf.data.turns import conversation


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
