"""What the mask made of an answer, as in figures 1, 3 and 6: on the terminal. HTML: masks_html.

Prompts, answers and tokens are untrusted text: nothing of them reaches a terminal or a page before
``printable``, and none of it is read as markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megatron_amrlhf.errors import UserError, printable
from megatron_amrlhf.report.samples import SampleRecord

PART_OF_A_CHARACTER = "\u00b7"
BORDER = "\u2502"
# Figure 1: orange for high-reward tokens, green for low-reward ones.
HIGH_RGB, LOW_RGB = (245, 130, 20), (40, 160, 80)
SIGNS = {1: "+", 0: "0", -1: "-"}
KEEPS = {"chosen": "+", "rejected": "-", "both": "+ and -"}
USES = {
    "chosen": "chosen",
    "rejected": "rejected",
    "both": "chosen in one pair, rejected in another",
    "none": "not learned from",
    "failed": "its reward failed",
    "left_out": "left out, as all that are cut",
}
MAX_EXCERPT_CHARACTERS = 60
TABLE_COLUMNS = 64  # a narrower terminal has no room for the table's text


@dataclass(frozen=True)
class TokenView:
    """One token as it is shown.

    Attributes:
        text: printable text; a newline stays one, a dot stands for a part of a character.
        reward: dense reward.
        signal: what the threshold cut.
        height: signal over the threshold in [-1, 1], scaled by the answer's largest; 0 for NaN.
        kept: whether the loss reads it.
        message: number of its message, or -1.
        sign: its message's sign, 0 outside messages.
    """

    text: str
    reward: float
    signal: float
    height: float
    kept: bool
    message: int
    sign: int


def select(records: Sequence[SampleRecord], step: int | None, limit: int) -> list[SampleRecord]:
    """The first ``limit`` answers of a step.

    Args:
        records: all samples of a file, at least one.
        step: which step; None: the newest.
        limit: at most so many.

    Raises:
        UserError: no answer of that step was logged.
    """
    steps = sorted({record.step for record in records})
    wanted = steps[-1] if step is None else step
    if wanted not in steps:
        raise UserError(f"--step {wanted}: no such step in the file, it has {_ranges(steps)}")
    return [record for record in records if record.step == wanted][:limit]


def token_views(record: SampleRecord) -> list[TokenView]:
    """All tokens of an answer as they are shown."""
    middle, largest = signal_scale(record)
    message_of = {
        place: number
        for number, message in enumerate(record.messages)
        for place in range(message.start, message.end)
    }
    views = []
    for place, text in enumerate(record.tokens):
        number = message_of.get(place, -1)
        value = record.signal[place]
        views.append(
            TokenView(
                text=printable(text) or PART_OF_A_CHARACTER,
                reward=record.token_rewards[place],
                signal=value,
                height=(value - middle) / largest if math.isfinite(value) else 0.0,
                kept=bool(record.mask[place]),
                message=number,
                sign=record.messages[number].sign if number >= 0 else 0,
            )
        )
    return views


def signal_scale(record: SampleRecord) -> tuple[float, float]:
    """The threshold (else the mean) of an answer's signal and the largest distance from it."""
    finite = [x for x in record.signal if math.isfinite(x)]
    middle = record.baseline
    if not math.isfinite(middle):
        middle = sum(finite) / max(len(finite), 1)
    return middle, max((abs(x - middle) for x in finite), default=0.0) or 1.0


def describe_threshold(record: SampleRecord) -> str:
    """The threshold and its neutral band in one line."""
    threshold, delta = record.baseline, record.delta
    if not math.isfinite(threshold):
        return "no threshold; colours are relative to the answer's mean"
    band = f"neutral from {threshold - delta:.4g} to {threshold + delta:.4g}"
    units = "" if record.signal == record.token_rewards else " (units of the cut signal)"
    return f"threshold b = {threshold:.4g}, delta = {delta:.4g}: {band}{units}"


def describe_answer(record: SampleRecord) -> str:
    """What an answer is, in one line."""
    tokens, kept = len(record.tokens), sum(record.mask)
    signs = {message.sign for message in record.messages}
    keeps = KEEPS.get(record.use)
    if keeps and kept == tokens and signs != {1 if record.chosen else -1}:
        keeps = "all"  # mask.kind: none
    what = USES[record.use] + (f" (keeps {keeps})" if keeps else "")
    parts = [
        f"step {record.step}",
        what,
        f"reward {record.sequence_reward:.4g}",
        f"{tokens} tokens, {len(record.messages)} messages, {kept} kept",
        "ended" if record.ended else "cut at the length limit",
    ]
    return ", ".join(parts + (["by the reference"] if record.from_reference else []))


def message_text(views: Sequence[TokenView], start: int, end: int) -> str:
    """A message's text on one line, shortened."""
    text = " ".join("".join(view.text for view in views[start:end]).split())
    short = text[: MAX_EXCERPT_CHARACTERS - 3] + "..."
    return text if len(text) <= MAX_EXCERPT_CHARACTERS else short


def rgb_of(height: float) -> tuple[int, int, int]:
    """Background of a token: white at the threshold, full colour at the answer's extreme."""
    full = HIGH_RGB if height > 0 else LOW_RGB
    share = min(abs(height), 1.0)
    red, green, blue = (round(255 + (channel - 255) * share) for channel in full)
    return red, green, blue


def print_records(console: Console, records: Sequence[SampleRecord]) -> None:
    """Prints answers with colours, message borders and a table of their messages."""
    console.print(_legend(), soft_wrap=True)
    for record in records:
        views = token_views(record)
        console.print(Rule(Text(describe_answer(record)), align="left"))
        console.print(Text(printable(record.prompt), style="italic"))
        console.print(Text(describe_threshold(record), style="dim"))
        console.print(Padding(_answer(views), (1, 0, 0, 2)))
        if console.width < TABLE_COLUMNS:
            for row in _message_rows(record, views):
                console.print(Text("  ".join(row)))
        else:
            console.print(_message_table(record, views))


def _answer(views: Sequence[TokenView]) -> Text:
    text = Text()
    for place, view in enumerate(views):
        if place and view.message != views[place - 1].message:
            text.append(BORDER, style="bold")
        colour = "rgb({},{},{})".format(*rgb_of(view.height))
        kept = "black bold underline" if view.kept else "rgb(90,90,90)"
        text.append(view.text, style=f"{kept} on {colour}")
    return text


def _message_table(record: SampleRecord, views: Sequence[TokenView]) -> Table:
    table = Table(box=SIMPLE, safe_box=True)
    for heading in ("message", "tokens", "sign", "reward", "kept"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("text")
    for *numbers, text in _message_rows(record, views):
        table.add_row(*numbers, Text(text))
    return table


def _message_rows(record: SampleRecord, views: Sequence[TokenView]) -> Iterator[tuple[str, ...]]:
    for number, message in enumerate(record.messages):
        kept = sum(record.mask[message.start : message.end])
        yield (
            str(number),
            f"{message.start}-{message.end - 1}",
            SIGNS.get(message.sign, "?"),
            f"{message.reward:.4g}",
            f"{kept}/{message.end - message.start}",
            message_text(views, message.start, message.end),
        )


def _legend() -> Text:
    text = Text("colour: ")
    text.append(" above the threshold ", style="black on rgb({},{},{})".format(*HIGH_RGB))
    text.append(" below it ", style="black on rgb({},{},{})".format(*LOW_RGB))
    text.append(f"   {BORDER} message border   ")
    text.append("kept by the mask", style="bold underline")
    return text


def _ranges(steps: Sequence[int]) -> str:
    shown = ", ".join(map(str, steps[:8]))
    return shown if len(steps) <= 8 else f"{shown}, ... {steps[-1]}"
