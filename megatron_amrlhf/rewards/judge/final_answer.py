"""Where an answer's text says its final answer, and whether it stands by it.

In this order: the last ``\\boxed{...}``, the last ``#### ...``, the last "the answer is ...", and
without any of them the last number or the last sentence's end. Reasoning blocks are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_amrlhf.rewards.judge.kinds import Words, read
from megatron_amrlhf.rewards.judge.quantities import (
    CHANGING,
    NUMBER,
    NUMBER_WORDS,
    Number,
    number_of,
    read_number,
    read_unit,
)
from megatron_amrlhf.rewards.judge.text import (
    closing,
    one_spelling,
    plain_signs,
    tidy,
    without_markdown,
)

_BLOCK = "think|thinking|thought|thoughts|reasoning|scratchpad|reflection"
_REASONING = re.compile(rf"<(?P<tag>{_BLOCK})>.*?</(?P=tag)>", re.DOTALL | re.IGNORECASE)
_BLOCK_END = re.compile(rf"</(?:{_BLOCK})>|\[/THINK\]|<\|end_of_thought\|>", re.IGNORECASE)
_BLOCK_START = re.compile(rf"<(?:{_BLOCK})>|\[THINK\]|<\|begin_of_thought\|>", re.IGNORECASE)
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN = re.compile(
    r"(?:[\s,;.$&]|\\\\|\\[,;\]\[()]|\band\b|\bor\b|[A-Za-z]\s*=|\\text\{\s*(?:and|or)\s*\})*"
)
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S.*)$", re.MULTILINE)
_HASHED_NUMBER = re.compile(r"[-+]?\s?\$?\s?[-+]?[\d,./]*\d\s?%?(?:\s\w+)?\.?")
_HEADING = r"^#+[ \t]*(?:Final )?Answer:?[ \t]*\n\s*"
_STATED = re.compile(
    _HEADING + r"|\b(?:answers?|ans)\b(?:\s+(?:to|of|for)\s[^.\n:=]{1,80}?)?\s*"
    r"(?:(?:is|are|was|were|will be|would be|should be|must be|equals?)\b\s*(?:that\b)?\s*:?|[:=])"
    r"\s*|\u7b54\u6848(?:\u662f|\u4e3a|:)\s*",
    re.IGNORECASE | re.MULTILINE,
)
_CONCLUDED = re.compile(r"\b(?:is|are|was|were|be|equals?|gives?|get|=)\s+(?=\S)|(?<=[A-Za-z]):\s+")
_PHRASE = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}")
_MATHS = re.compile(r"\$\$?([^$]+?)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_SMALL = (
    r"(?:\s+(?:the|an?|answer|it|is|be|equal|to|that|value|of|final|really|exactly|just|[$\\(:]+))*"
)
_HEDGED = re.compile(
    r"(?:\b(?:not|never|cannot|maybe|perhaps|possibly|probably|either|neither|nor|unlikely|guess|"
    r"wrong|incorrect|unless|rather than|instead of|(?:might|may|could|can)(?:\s+also)?\s+be)\b|"
    rf"n't\b){_SMALL}[\s$\\(:,*]*$",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"^[^\w?]*(?:(?:is|was|are|would be|seems|looks)\s+)?(?:not|wrong|incorrect|isn't|false)\b|"
    r"\b(?:wait|oops|(?:that|this|it)(?:'s| is| was) (?:wrong|incorrect|not)|"
    r"not (?:right|correct|sure)|mistake|on second thought|scratch that|or (?:maybe|perhaps)|"
    r"(?:maybe|perhaps|possibly) (?:it|the answer)|alternatively|i (?:do not|don't) know)\b|"
    r"^[\s$)\]]*\?",
    re.IGNORECASE,
)
_RETHOUGHT = re.compile(
    r"\b(?:wait|wrong|incorrect|mistake|actually|correction|oops|sorry|hmm|let me)\b", re.IGNORECASE
)
# Two numbers with nothing but this between them are parts of one thing.
_JOINED = re.compile(
    r"\s*(?:,|;|/|\+|-|\*|:|\^|&|[xX]|or|and|to|plus|minus|times|\\times|\\cdot|\\\\)"
    r"(?:\s*(?:or|and))?[\s$({]*"
)
# What stands around a number that is not the answer itself: powers, names, bounds, commands, dates.
_PART_OF = re.compile(
    r"[\w^/:*_{}\\.<>#]$|"
    r"\\(?!(?:approx|quad|qquad|implies|Rightarrow|to|rightarrow)\b)[A-Za-z]+\s*$|"
    r"[<>]=?\s+$|\b(?:than|least|most|between|over|under|below|above|step|problem|question|example|"
    r"exercise|chapter|lesson|page|part|case|equation|up to|jan\w*|feb\w*|march|april|may|june|"
    r"july|aug\w*|sept?\w*|oct\w*|nov\w*|dec\w*)\s+$",
    re.IGNORECASE,
)
_GOES_ON = re.compile(r"[\w^/:*_!({]|\s*(?:[-+*/^=]|\\times|\\cdot|\\pi|\\sqrt|\\frac)")
# x = 5 says what 5 is, and 2x = 5 that it is something else; "kg = 5" is a line of units.
_NAMED = re.compile(
    r"(?<![\w/%$\\^}.)])(?!(?:kg|cm|mm|km|ft|in|lb|oz|ml|hr)\b)"
    r"(?:[\d.]*[A-Za-z](?:\^\{?\w\}?)?){1,2}\s*=\s*$"
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
SPAM = 3  # different answers in a row, without a second thought between them: none counts
MAX_ANSWERS = 5  # different ones in all
MAX_STATEMENTS = 20  # the last ones, which are read
MAX_WHOLE = 200  # characters of a text that may be nothing but an answer, or of a hedge before one


@dataclass(frozen=True)
class Statement:
    """One place where a text says an answer.

    Attributes:
        text: what it says, as written.
        start: where the statement begins in the text.
        end: where it ends.
    """

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Final:
    """What a text says in the end.

    Attributes:
        statement: the one that counts.
        others: what the text says after it, or beside it in the same sentence: it has to agree.
        doubt: why this may not be meant as the answer; empty if it is.
        is_stated: it is in a box, behind hashes, or named the answer.
    """

    statement: Statement
    others: tuple[Statement, ...]
    doubt: str
    is_stated: bool


def final_of(text: str, kind: type) -> Final | None:
    """What ``text`` says in the end; None if it says no answer.

    Args:
        text: the whole answer of a policy.
        kind: the reference answer's. If it is a number, the last number counts where nothing is
            stated as the answer; else what the last sentence ends with.
    """
    text = re.sub(r"[^\S\n]+", " ", without_markdown(_spoken(plain_signs(text))))
    text = re.sub(r"\n\s*\n", "\n\n", text)
    found = _boxed(text), _hashed(text), _stated(text)
    for place, statements in enumerate(found):
        if statements:
            chosen = statements[-1]
            later = [s for k in found[place + 1 :] for s in k[-SPAM:] if s.start >= chosen.end]
            beside = [s for s in statements[-SPAM:-1] if _is_one_sentence(text, s, chosen)]
            end = max(s.end for s in (chosen, *later))
            doubt = _doubt(text, chosen.start, end) or _spam(text, statements)
            return Final(chosen, (*beside, *later), doubt, True)
    if kind is Number:
        return _last_number(text)
    conclusion = _conclusion(text, kind)
    if conclusion is None:
        return None
    doubt = _doubt(text, conclusion.start, conclusion.end)
    return Final(conclusion, (), doubt, False)


def _spoken(text: str) -> str:
    """Without reasoning: what follows its end, and nothing of a block that is not closed."""
    text = _REASONING.sub(" ", text)
    if ends := list(_BLOCK_END.finditer(text)):
        text = text[ends[-1].end() :]
    if start := _BLOCK_START.search(text):
        text = text[: start.start()]
    return text


def _boxed(text: str) -> list[Statement]:
    """Boxes in order; those with nothing but commas, "and" or "or" between them are one list."""
    found: list[Statement] = []
    place = 0
    while box := _BOX.search(text, place):
        end = closing(text, box.end() - 1)
        if end < 0:
            return [*found[-MAX_STATEMENTS:], Statement("", box.start(), len(text))]  # cut off
        one = Statement(text[box.end() : end], box.start(), end + 1)
        if found and _BETWEEN.fullmatch(text, found[-1].end, one.start):
            one = Statement(f"{found[-1].text}, {one.text}", found[-1].start, one.end)
            found.pop()
        found.append(one)
        place = end + 1
    return found[-MAX_STATEMENTS:]


def _hashed(text: str) -> list[Statement]:
    last = len(text.rstrip())
    return [
        Statement(line[1].strip(), line.start(), line.end())
        for line in _HASHES.finditer(text)
        if line.end() >= last or _HASHED_NUMBER.fullmatch(line[1].strip())
    ]


def _stated(text: str) -> list[Statement]:
    found = []
    for start in list(_STATED.finditer(text))[-MAX_STATEMENTS:]:
        end = _sentence_end(text, start.end())
        if content := text[start.end() : end].strip():
            found.append(Statement(content, start.start(), end))
    return found


def _sentence_end(text: str, start: int) -> int:
    """Where the sentence that goes on at ``start`` ends, formulas and braces being part of it."""
    place = start
    while end := _SENTENCE_END.search(text, place):
        inner = text[start : end.start()]
        is_open = (
            inner.count("{") > inner.count("}")
            or len(re.findall(r"\\begin\b", inner)) > len(re.findall(r"\\end\b", inner))
            or (inner.lstrip().startswith("$$") and inner.count("$$") % 2)
            or inner.count(r"\[") > inner.count(r"\]")
        )
        if not is_open:
            return end.start()
        place = end.end()
    return len(text)


def _sentence_start(text: str, place: int) -> int:
    ends = [end.end() for end in _SENTENCE_END.finditer(text, 0, place)]
    return ends[-1] if ends else 0


def _is_one_sentence(text: str, one: Statement, other: Statement) -> bool:
    return _sentence_end(text, one.end) >= other.start


def _last_number(text: str) -> Final | None:
    """The last number, with the percent sign or unit behind it."""
    text = one_spelling(text)
    numbers = [n for n in NUMBER.finditer(text) if number_of(n) is not None]
    if not numbers:
        return None
    found = numbers[-1]
    rest = text[found.end() : _sentence_end(text, found.end())]
    tail = next((t for t in _tails(rest) if read_number(tidy(found[0] + t)) is not None), "")
    before = text[: found.start()]
    named = _NAMED.search(before)
    start = named.start() if named else found.start()
    chosen = Statement(text[start : found.end() + len(tail)], start, found.end() + len(tail))
    doubt = _doubt(text, chosen.start, chosen.end)
    digits = re.search(r"[^-+\s]", found[0])
    assert digits, "a number is more than its sign"
    unsigned = found.start() + digits.start()
    between = text[numbers[-2].end() : unsigned] if len(numbers) > 1 else "none"
    if _PART_OF.search(before) or _GOES_ON.match(rest[len(tail) :]):
        doubt = "it is a part of something else"
    elif _JOINED.fullmatch(between):
        doubt = "it is one of several numbers"
    elif not tail and rest.split() and not read_unit(rest.split()[0].strip(".,;:)$\\")):
        doubt = doubt or _changed(rest)
    return Final(chosen, (), doubt, False)


def _tails(rest: str) -> Iterator[str]:
    """What may belong to the number before it: the rest of the sentence, a clause, a word."""
    yield rest
    yield re.split(r"[,;:(]| because | since | so | which | and | if | when | for | in ", rest)[0]
    yield re.findall(r"^\s*\S*", rest)[0]


def _changed(rest: str) -> str:
    words = set(re.findall(r"[a-z']+", " ".join(rest.lower().split()[:3])))
    return "what follows may change it" if words & (CHANGING | NUMBER_WORDS) else ""


def _conclusion(text: str, kind: type) -> Statement | None:
    """The end of the last sentence: behind its last "is", its last formula, or all of it.

    A short text that is all of the reference answer's kind is the answer itself.
    """
    text = text.rstrip()
    is_bare = len(text) <= MAX_WHOLE and not _PHRASE.search(re.sub(r"\\[A-Za-z]+", " ", text))
    if is_bare and kind is not Words and type(read(tidy(text))) is kind:
        return Statement(text, 0, len(text))
    end = len(text)
    start = _sentence_start(text, max(end - 1, 0))
    is_open = text[start:].count(r"\end{") > text[start:].count(r"\begin{")
    if is_open or len(re.findall(r"(?<!\\)\$", text[start:])) % 2:
        start = 0
    sentence = text[start:]
    if not sentence.strip():
        return None
    maths = list(_MATHS.finditer(sentence))
    if maths and not sentence[maths[-1].end() :].strip(" .\n"):
        found = maths[-1]
        return Statement(found[1] or found[2] or found[3], start + found.start(), end)
    if concluded := list(_CONCLUDED.finditer(sentence)):
        return Statement(sentence[concluded[-1].end() :], start + concluded[-1].start(), end)
    return Statement(sentence.strip(), start, end)


def _doubt(text: str, start: int, end: int) -> str:
    """Why a statement may not be meant: a hedge before it, a question, taken back behind it."""
    first = max(_sentence_start(text, start), start - MAX_WHOLE)
    if _HEDGED.search(text[first:start]):
        return "it is denied or only guessed"
    if _TAKEN_BACK.search(text[end:]):
        return "it is taken back or put in question"
    return ""


def _spam(text: str, statements: list[Statement]) -> str:
    """Several different answers one after the other, without a second thought between them."""
    spelled = [re.sub(r"\s", "", statement.text) for statement in statements]
    run = {spelled[-1]}
    for place in range(len(statements) - 2, -1, -1):
        if _RETHOUGHT.search(text[statements[place].end : statements[place + 1].start]):
            break
        run.add(spelled[place])
    count = max(len(run) if len(run) >= SPAM else 0, len(set(spelled)))
    return f"{count} different answers" if count > MAX_ANSWERS or len(run) >= SPAM else ""


def given_answer(reference: str) -> str:
    """The answer in a reference, which may be a whole solution with ``####`` or a box."""
    if hashed := _HASHES.findall(reference):
        return hashed[-1].strip()
    boxes = _boxed(reference)
    return boxes[-1].text if boxes else reference.strip()
