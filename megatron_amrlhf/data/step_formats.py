"""The formats of step-labelled solutions, one entry each, and which of them a file has.

``data.format`` names the format (``config/data_section.py``); ``auto`` takes it from the keys of
the file's first line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.helpsteer import read_sentences, read_whole_answer
from megatron_amrlhf.data.math_shepherd import read_math_shepherd
from megatron_amrlhf.data.prm800k import read_prm800k
from megatron_amrlhf.data.step_lists import LABEL_KEYS, detect_keys, read_step_list
from megatron_amrlhf.data.step_record import ATTRIBUTES, StepRecord
from megatron_amrlhf.errors import UserError

StepReader = Callable[[dict, str], list[StepRecord]]
"""(a line's object, ``path:line``) to its solutions."""


@dataclass(frozen=True)
class StepFormat:
    """A format of step-labelled solutions.

    Attributes:
        told_by: sets of keys of a file's first line, any of which tells the format.
        reader: makes the reader of a file's lines from the ``data`` section; ``steps``, whose keys
            differ between files, gets the first line and D too and may find that they do not fit.
        num_attributes: labels a step; None: as many as ``algorithm.num_attributes`` says.
    """

    told_by: tuple[tuple[str, ...], ...]
    reader: Callable[[DataSection, dict, int], StepReader | None]
    num_attributes: int | None = 1


def _step_lists(section: DataSection, first: dict, num_attributes: int) -> StepReader | None:
    keys = detect_keys(first, num_attributes)
    return keys and partial(read_step_list, keys=keys, num_attributes=num_attributes)


def _prm800k(section: DataSection, first: dict, num_attributes: int) -> StepReader:
    keeps, others = section.screening_rows == "keep", section.alternatives
    return partial(read_prm800k, keep_screening=keeps, alternatives=others)


# The first that fits is taken.
FORMATS: dict[str, StepFormat] = {
    "helpsteer": StepFormat(
        (("text", "label"), ("response", ATTRIBUTES[0])),
        lambda *_: read_whole_answer,
        len(ATTRIBUTES),
    ),
    "helpsteer_sentences": StepFormat(
        (("chosen_scores",),), lambda *_: read_sentences, len(ATTRIBUTES)
    ),
    "prm800k": StepFormat((("question", "label"),), _prm800k),
    "math_shepherd": StepFormat(
        (("input", "label"),),
        lambda section, *_: partial(read_math_shepherd, mark=section.input_mark),
    ),
    "steps": StepFormat((("steps",),), _step_lists, None),
}


def step_reader(
    path: str | Path, first: tuple[int, dict], section: DataSection, num_attributes: int
) -> StepReader:
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
    wanted = FORMATS[kind].num_attributes or num_attributes
    if wanted != num_attributes:
        raise UserError(
            f"{path}: {kind} rows have {wanted} label{'s' if wanted > 1 else ''} a step: set "
            f"algorithm.num_attributes to {wanted} (it is {num_attributes})"
        )
    reader = FORMATS[kind].reader(section, record, num_attributes)
    if reader is None:
        names = " or ".join(map(repr, LABEL_KEYS[num_attributes]))
        needed = f"num_attributes = {num_attributes} needs 'prompt', 'steps' and {names}"
        raise UserError(f"{path}:{number}: keys {found} are no known format; {needed}")
    return reader


def _detect(record: dict) -> str | None:
    """The format that the keys of a line tell; None: none."""
    for kind, known in FORMATS.items():
        if any(all(key in record for key in keys) for keys in known.told_by):
            return kind
    return None
