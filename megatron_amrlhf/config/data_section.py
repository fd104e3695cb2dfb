"""The ``data`` section: files, their formats and the limits of their rows."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from megatron_amrlhf.config.section import Name, Section, Tokens

StepFormat = Literal[
    "steps",
    "auto",
    "prm800k",
    "math_shepherd",
    "helpsteer",
    "helpsteer_sentences",
]
"""Formats of step-labelled solutions; ``data/step_formats.py`` has the reader of each."""
STEP_FORMATS: tuple[str, ...] = get_args(StepFormat)


class DataSection(Section):
    train: Name = Field(
        description="JSONL file: step-labelled problems (prm), pairs (orm, offline dpo and "
        "rejection_sampling) or prompts (others)"
    )
    heldout: Name | None = Field(None, description="JSONL file of the same kind for evaluation")
    format: Literal[StepFormat, "pairs", "prompts"] = Field(
        "prompts",
        description="steps: {prompt, steps, labels}; prm800k, math_shepherd, helpsteer (whole "
        "answers) and helpsteer_sentences: as published; pairs: {prompt, chosen, rejected}; "
        "prompts: {prompt}; auto: by the first line, for prm",
    )
    on_wrong_row: Literal["stop", "skip"] = Field(
        "stop",
        description="a row that is wrong or too long: stop with its file and line, or leave it "
        "out, counted and logged; a line that is no JSON object stops the start anyway",
    )
    ignored_keys: tuple[Name, ...] = Field(
        (),
        strict=False,
        description="keys of rows that are not to be read, such as system or history, or that "
        "could change what a row means (tools, images, context, weight) and are refused unless "
        "they stand here",
    )
    screening_rows: Literal["drop", "keep"] = Field(
        "drop", description="quality-control and initial-screening rows of prm800k; counted"
    )
    alternatives: bool = Field(
        True, description="prm800k: also learn from completions that were not chosen"
    )
    input_mark: str = Field(
        "\u043a\u0438",
        description="math_shepherd: what follows each step in the file",
        min_length=1,
    )
    step_separator: str = Field(
        "\n", description="text that a PRM is trained with between steps; empty: nothing"
    )
    step_marker: str | None = Field(
        None,
        description="token that a PRM is trained with after each step, at which it is judged, such "
        "as <extra_0>; null: a step is judged at its own last token",
    )
    system_prompt: str | None = Field(None, description="system message put before each prompt")
    max_prompt_tokens: Tokens = Field(512, description="longer prompts are refused")
    max_row_tokens: Tokens = Field(4096, description="longer prompt + response rows are refused")

    @property
    def skips_wrong_rows(self) -> bool:
        """Whether a wrong row is left out, counted, instead of stopping the start."""
        return self.on_wrong_row == "skip"
