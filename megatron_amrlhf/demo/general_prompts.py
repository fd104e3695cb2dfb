"""The project's own general prompts, English and Chinese, shipped with the package."""

from __future__ import annotations

from importlib import resources
from typing import Literal

from megatron_amrlhf.data.jsonl import read_jsonl

HELDOUT_SHARE = 5
"""Each fifth prompt belongs to the held-out split."""


def general_prompts(split: Literal["train", "heldout"] | None = None) -> list[str]:
    """The prompts of a split, or all (None); in the file's order, no two equal."""
    file = resources.files("megatron_amrlhf.demo").joinpath("general_prompts.jsonl")
    with resources.as_file(file) as path:
        records = read_jsonl(path, {"prompt": str, "language": str})
    prompts = [record["prompt"] for record in records]
    if split is None:
        return prompts
    wanted = split == "heldout"
    is_heldout = [index % HELDOUT_SHARE == HELDOUT_SHARE - 1 for index in range(len(prompts))]
    return [text for text, held in zip(prompts, is_heldout, strict=True) if held == wanted]
