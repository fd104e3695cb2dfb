"""What stands for a tokenizer while rows are checked, which would cut one text after the other.

A row is refused if it has too many tokens. Few tokenizers can make more tokens of a text than it
has bytes, so most rows are known to fit by their bytes alone. The others' texts are cut many at
once. Both do all else as the tokenizer that they stand for, so one code makes rows and checks them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

CUTTERS = frozenset(
    "ByteLevel Split Digits Punctuation Whitespace WhitespaceSplit BertPreTokenizer "
    "UnicodeScripts CharDelimiterSplit".split()
)
"""Steps before the model that only cut a text; `ByteLevel` may be told to put a space before it."""


class NeedsIds(Exception):
    """A row cannot be checked by its texts' bytes."""


class StandIn:
    """What it does not do itself the tokenizer does that it stands for."""

    def __init__(self, original: PreTrainedTokenizerBase):
        self.original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)


class ByteCounter(StandIn):
    """Makes a token, id 0, of each byte of a text, and notes the texts in ``asked``."""

    def __init__(self, original: PreTrainedTokenizerBase):
        super().__init__(original)
        self.num_special = original.num_special_tokens_to_add()
        self.asked: list[tuple[str, bool]] = []
        own, template = type(original).apply_chat_template, original.chat_template
        self._render = None
        if own is PreTrainedTokenizerBase.apply_chat_template and isinstance(template, str):
            known = original.special_tokens_map
            self._render = partial(render_jinja_template, chat_template=template, **known)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """As many ids as the tokenizer can give at most, if it is one that `is_bounded`."""
        self.asked.append((text, add_special_tokens))
        return [0] * (len(text.encode()) + (self.num_special if add_special_tokens else 0))

    def apply_chat_template(self, messages: list, *, tokenize: bool, **options: Any) -> str:
        """The tokenizer's text, made in half the time: template and tokens are looked up once."""
        assert not tokenize
        if self._render is None:
            return self.original.apply_chat_template(messages, tokenize=False, **options)
        return self._render([messages], **options)[0][0]


class BatchCutter(StandIn):
    """Gives the tokenizer's own ids; texts that it was told before have been cut together."""

    def __init__(self, original: PreTrainedTokenizerBase):
        super().__init__(original)
        self._ids: dict[tuple[str, bool], list[int]] = {}

    def prepare(self, asked: Iterable[tuple[str, bool]]) -> None:
        """Cuts texts, each with or without special tokens, and forgets those before."""
        self._ids, asked = {}, list(dict.fromkeys(asked))
        for special in (False, True):
            texts = [text for text, is_special in asked if is_special is special]
            if texts:
                encoded = self.original(
                    texts, add_special_tokens=special, return_attention_mask=False
                )
                keys = ((text, special) for text in texts)
                self._ids |= zip(keys, encoded["input_ids"], strict=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The tokenizer's ids of a text."""
        found = self._ids.get((text, add_special_tokens))
        if found is None:
            found = self.original.encode(text, add_special_tokens=add_special_tokens)
        return list(found)


def itself(tokenizer: PreTrainedTokenizerBase | StandIn) -> PreTrainedTokenizerBase:
    """The tokenizer, whatever stands for it."""
    return tokenizer.original if isinstance(tokenizer, StandIn) else tokenizer


def reads_ids(tokenizer: PreTrainedTokenizerBase | StandIn) -> PreTrainedTokenizerBase:
    """As `itself`, for who reads the ids that it gave.

    Raises:
        NeedsIds: they are none.
    """
    if isinstance(tokenizer, ByteCounter):
        raise NeedsIds
    return itself(tokenizer)


def is_bounded(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether each token stands for at least a byte of the text, as the tokenizer is built.

    That is so where nothing is put in or written otherwise before the model, whatever that is:
    no normalizer, and only `CUTTERS`. Others may still be bounded, but it is not known.
    """
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.normalizer is not None:
        return False
    first = tokenizer.backend_tokenizer.pre_tokenizer
    steps = [] if first is None else [json.loads(first.__getstate__())]
    while steps and steps[0]["type"] == "Sequence":
        steps = [*steps[0]["pretokenizers"], *steps[1:]]
    return all(
        step["type"] in CUTTERS and not step.get("add_prefix_space", False) for step in steps
    )
