"""The page of ``amrlhf show-masks --html``: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from megatron_amrlhf.errors import printable
from megatron_amrlhf.report.masks import (
    HIGH_RGB,
    LOW_RGB,
    SIGNS,
    TokenView,
    describe_answer,
    describe_threshold,
    message_text,
    rgb_of,
    signal_scale,
    token_views,
)
from megatron_amrlhf.report.samples import SampleRecord

BAR_PIXELS, CHART_PIXELS, STRIP_PIXELS = 7, 120, 8
# Were some text to slip through the escaping, a browser still runs and loads nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """\
body { font: 15px/1.7 system-ui, "Noto Sans", "Noto Sans CJK SC", "Noto Color Emoji", sans-serif;
       margin: 2em auto; max-width: 62em; padding: 0 1em; color: #222; background: #fff; }
.prompt, .answer { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { background: #f3f3f3; padding: .5em .8em; border-left: 4px solid #999; }
.answer { padding: .5em 0; color: #777; }
.message { border-left: 2px solid #000; padding-left: 1px; margin-left: 1px; }
.kept { color: #000; font-weight: 600; text-decoration: underline; }
.threshold { color: #555; font-size: 85%; }
.chart { overflow-x: auto; }
.legend span { padding: 0 .4em; margin-right: .8em; }
table { border-collapse: collapse; font-size: 85%; }
th, td { padding: .1em .7em; text-align: right; border-bottom: 1px solid #ddd; }
td:last-child, th:last-child { text-align: left; overflow-wrap: anywhere; }
"""


def page(records: Sequence[SampleRecord], title: str) -> str:
    """A whole HTML document.

    Args:
        records: the answers to show.
        title: heading; as all other text it is escaped.
    """
    heading = escape(printable(title))
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        f"<title>{heading}</title>\n<style>\n{STYLE}</style></head><body>\n<h1>{heading}</h1>\n"
    )
    return head + _legend() + "".join(map(_article, records)) + "</body></html>\n"


def _legend() -> str:
    return (
        '<p class="legend">'
        f'<span style="background:{_css(HIGH_RGB)}">above the threshold</span>'
        f'<span style="background:{_css(LOW_RGB)}">below it</span>'
        '<span class="message">message border</span><span class="kept">kept by the mask</span>'
        "Point at a token for its numbers. Chart: the cut signal of each token, the threshold and "
        "its neutral band, message borders, and in black below what the mask keeps.</p>\n"
    )


def _article(record: SampleRecord) -> str:
    views = token_views(record)
    return (
        f"<article><h2>{escape(describe_answer(record))}</h2>\n"
        f'<div class="prompt">{escape(printable(record.prompt))}</div>\n'
        f'<div class="answer">{_answer(views)}</div>\n'
        f'<div class="threshold">{escape(describe_threshold(record))}</div>\n'
        f'<div class="chart">{_chart(record, views)}</div>\n{_table(record, views)}</article>\n'
    )


def _answer(views: Sequence[TokenView]) -> str:
    parts, current = [], None
    for place, view in enumerate(views):
        if view.message != current:
            parts.append(("</span>" if place else "") + '<span class="message">')
            current = view.message
        numbers = (
            f"token {place}: reward {view.reward:.4g}, signal {view.signal:.4g}, message "
            f"{view.message} ({SIGNS.get(view.sign, '?')}), {'kept' if view.kept else 'masked'}"
        )
        kind = ' class="kept"' if view.kept else ""
        colour = _css(rgb_of(view.height))
        text = escape(view.text.replace("\n", "\u21b5\n"))
        title = escape(numbers)
        parts.append(f'<span{kind} style="background:{colour}" title="{title}">{text}</span>')
    return "".join(parts) + ("</span>" if views else "")


def _chart(record: SampleRecord, views: Sequence[TokenView]) -> str:
    """Bars from the threshold to each token's signal; numbers only, no text of the answer."""
    width = max(len(views), 1) * BAR_PIXELS
    half = CHART_PIXELS / 2
    shapes = []
    if math.isfinite(record.baseline):
        band = min(record.delta / signal_scale(record)[1], 1.0) * half
        shapes.append(_rectangle(0, half - band, width, 2 * band, "#dde"))
    for place, view in enumerate(views):
        x, size = place * BAR_PIXELS, abs(view.height) * half
        top = half - size if view.height > 0 else half
        colour = HIGH_RGB if view.height > 0 else LOW_RGB
        shapes.append(_rectangle(x + 1, top, BAR_PIXELS - 2, size, _css(colour)))
        if place and view.message != views[place - 1].message:
            shapes.append(_rectangle(x - 0.5, 0, 1, CHART_PIXELS, "#000"))
        if view.kept:
            shapes.append(_rectangle(x, CHART_PIXELS + 2, BAR_PIXELS, STRIP_PIXELS - 2, "#000"))
    shapes.append(_rectangle(0, half - 0.5, width, 1, "#66c"))
    height = CHART_PIXELS + STRIP_PIXELS
    return f'<svg width="{width}" height="{height}" role="img">{"".join(shapes)}</svg>'


def _table(record: SampleRecord, views: Sequence[TokenView]) -> str:
    names = ("message", "tokens", "sign", "reward", "kept", "text")
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for number, message in enumerate(record.messages):
        kept = sum(record.mask[message.start : message.end])
        cells = (
            str(number),
            f"{message.start}-{message.end - 1}",
            SIGNS.get(message.sign, "?"),
            f"{message.reward:.4g}",
            f"{kept}/{message.end - message.start}",
            message_text(views, message.start, message.end),
        )
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>\n"


def _rectangle(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:.1f}" width="{width:g}" height="{height:.1f}" fill="{fill}"></rect>'
    )


def _css(rgb: tuple[int, int, int]) -> str:
    return "rgb({},{},{})".format(*rgb)
