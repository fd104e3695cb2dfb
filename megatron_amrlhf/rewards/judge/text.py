"""One spelling of what answers write in many: Unicode signs, LaTeX spacing, wrappers, markdown."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789"
)
_SUPERSCRIPT_RUN = re.compile(r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_VULGAR = re.compile(r"(\d?)([\u00bc-\u00be\u2150-\u215e])")
_SIGNS = {
    "\u2212": "-",
    "\u2013": "-",
    "\u2014": " - ",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u00f7": "/",
    "\u2044": "/",
    "\u2236": ":",
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u00b1": r"\pm ",
    "\u2248": r"\approx ",
    "\u222a": r"\cup ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u00b0": r"^\circ ",
    "\u3002": ". ",
    "\u3001": ", ",
    "\u2019": "'",
}
_ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|(\w+))")
_MARKDOWN = re.compile(r"(?<![\w)])(?:\*\*|__)|(?:\*\*|__)(?![\w(])|`")
# Of text that is no answer but dressing. A command ends before the next letter.
_DROPPED = re.compile(
    r"\\(?:left|right|bigl|bigr|Bigl|Bigr|big|Big|displaystyle|textstyle|limits|,|!|;|:|>)"
    r"(?![A-Za-z])|\\(?=\s)|(?<!\\)~"
)
_SPACES = re.compile(r"\\(?:quad|qquad|hspace\{[^{}]*\})(?![A-Za-z])")
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|mbox|hbox|boxed|fbox|"
    r"operatorname|bm|boldsymbol|underline)\s*\{"
)
_SHORT_FRACTION = re.compile(r"\\frac\s*(\d)\s*(\d)(?!\d)|\\frac\s*(\d)\s*\{([^{}]*)\}")
_HALF_SHORT_FRACTION = re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\w)")
_SHORT_ROOT = re.compile(r"\\sqrt\s*(\d|[A-Za-z](?![A-Za-z]))")
_PLAIN_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)")
_PLAIN_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|inf|oo)(?![A-Za-z])", re.IGNORECASE)
_PLAIN_PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
_RENAMED = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\leq": r"\le",
    r"\geq": r"\ge",
    r"\neq": r"\ne",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\varnothing": r"\emptyset",
    r"\degree": r"^\circ",
    r"\lt": "<",
    r"\gt": ">",
    r"\langle": "(",
    r"\rangle": ")",
}
_RENAME = re.compile("|".join(rf"{re.escape(name)}(?![A-Za-z])" for name in _RENAMED))
_MATH = re.compile(r"(?<!\\)\$\$?(?=\S)([^$]*?)(?<=\S)(?<!\\)\$\$?(?!\d)")


def plain_signs(text: str) -> str:
    """``text`` with Unicode mathematics and punctuation in ASCII and LaTeX.

    What has no such spelling stays as it is.
    """
    text = _SUPERSCRIPT_RUN.sub(lambda run: f"^{{{run[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _VULGAR.sub(_vulgar, text)
    text = _ROOT.sub(lambda root: rf"\sqrt{{{root[1] or root[2]}}}", text)
    for sign, spelled in _SIGNS.items():
        text = text.replace(sign, spelled)
    return unicodedata.normalize("NFKC", text)


def _vulgar(found: re.Match) -> str:
    fraction = unicodedata.normalize("NFKC", found[2]).replace("\u2044", "/")
    return f"{found[1]} {fraction}" if found[1] else fraction


def without_markdown(text: str) -> str:
    """``text`` without bold marks and backticks; the power sign ``**`` stays."""
    return _MARKDOWN.sub("", text)


def without_delimiters(text: str) -> str:
    """``text`` without the marks around formulas; a dollar sign that is left is money."""
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]", " ", text.replace(r"\$", "\0"))
    return _MATH.sub(r"\1", text).replace("\0", "$")


def one_spelling(text: str) -> str:
    """``text`` without delimiters, spacing commands, wrappers and markdown; its lines stay.

    A dollar sign that is left is money, braces that are left are LaTeX groups and ``\\{ \\}`` sets.
    """
    text = without_delimiters(plain_signs(text)).replace("{,}", ",").replace(r"\%", "%")
    text = _RENAME.sub(lambda name: _RENAMED[name[0]], text)
    text = _SPACES.sub(" ", text.replace("\\\\", "\1"))
    # A thin space between digits groups them, as a plain one does.
    text = re.sub(r"(?<=\d)\\[,;:!> ]?\s*(?=\d{3})", " ", text)
    text = _DROPPED.sub(" ", text).replace("\1", "\\\\")
    text = _PLAIN_PI.sub(r"\\pi ", _PLAIN_ROOT.sub(r"\\sqrt{\1}", _unwrapped(text)))
    text = _PLAIN_INFINITY.sub(r"\\infty ", text)
    text = _SHORT_FRACTION.sub(lambda f: rf"\frac{{{f[1] or f[3]}}}{{{f[2] or f[4]}}}", text)
    text = _HALF_SHORT_FRACTION.sub(r"\1{\2}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    return re.sub(r"[^\S\n]+", " ", without_markdown(text))


def tidy(text: str) -> str:
    """An answer's text in one spelling, on one line, without a final stop and outer braces."""
    text = re.sub(r"\s+", " ", one_spelling(text)).strip()
    # A mark behind a number may be a factorial's.
    text = re.sub(r"(?<!\\)(?:[.,;:?\s]|(?<=[A-Za-z])!)+$", "", text)
    while (inner := whole_group(text)) is not None:
        text = inner.strip()
    return text


def whole_group(text: str) -> str | None:
    """What is in the braces around all of ``text``; None where there are none."""
    if text.startswith("{") and closing(text, 0) == len(text) - 1:
        return text[1:-1]
    return None


def closing(text: str, start: int) -> int:
    """Where the brace that opens at ``start`` closes; -1 if it does not."""
    depth, place = 0, start
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return place
        place += 1
    return -1


def _unwrapped(text: str) -> str:
    """Without ``\\text{...}`` and its like around words, whose content stays."""
    while found := _WRAPPERS.search(text):
        end = closing(text, found.end() - 1)
        if end < 0:
            return text
        text = f"{text[: found.start()]} {text[found.end() : end]} {text[end + 1 :]}"
    return text


def same_spelling(text: str) -> str:
    """``text`` without what never matters between equal answers: some spaces and braces.

    A space stays between letters, digits, commas and points: ``1 2`` is not ``12``.
    """
    text = re.sub(r"(?<=[\^_])\{(\w)\}(?!\w)", r"\1", text)
    text = re.sub(r"\s*\\(?:cdot|times)(?![A-Za-z])\s*", "*", text)
    return re.sub(r"(?<![\w.,])\s+|\s+(?![\w.,])", "", text)
