"""Ids without an embedding are refused before a run, ids without a token are not usable."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_amrlhf.data.chat import encode_prompt
from megatron_amrlhf.data.tokenizer import PROBE
from megatron_amrlhf.data.vocabulary import (
    check_rows,
    check_vocabulary,
    check_whole_vocabulary,
    usable_ids,
)
from megatron_amrlhf.errors import UserError
from tests.helpers_models import tiny_tokenizer

END = [2]


@pytest.fixture
def padded(tokenizer):
    """With a padding token that no template and no ordinary text has."""
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    return padded, padded.convert_tokens_to_ids("[PAD]")


def test_a_vocabulary_larger_than_the_embedding_is_refused_whatever_the_text(tokenizer):
    largest = max(tokenizer.get_vocab().values())
    check_vocabulary(tokenizer, END, largest + 1, "here")
    assert max(tokenizer.encode(PROBE)) < largest  # the probe alone would not find it
    with pytest.raises(UserError, match=f"here: token .* has id {largest}, but the model's"):
        check_vocabulary(tokenizer, END, largest, "here")


def test_what_template_and_end_tokens_are_is_looked_at_too(padded):
    tokenizer, pad_id = padded
    with pytest.raises(UserError, match=f"id {pad_id + 5}, but"):
        check_vocabulary(tokenizer, [2, pad_id + 5], pad_id, "here")
    tokenizer = copy.deepcopy(tokenizer)  # a template is read once
    tokenizer.chat_template = "{% for m in messages %}[PAD]{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"token '\[PAD\]' has id"):
        check_vocabulary(tokenizer, END, pad_id, "here")


def test_an_added_token_beyond_the_embedding_is_found_in_the_data(padded):
    tokenizer, pad_id = padded
    check_vocabulary(tokenizer, END, pad_id, "here")
    texts = ("How many?", "How [PAD] many?")
    plain, wrong = (torch.tensor(encode_prompt(tokenizer, text, None)) for text in texts)
    check_rows([plain], tokenizer, pad_id, "here")
    check_rows([plain, wrong], tokenizer, pad_id + 1, "here")
    with pytest.raises(UserError, match=r"token '\[PAD\]' has id .* row '.*How.*'\.\.\."):
        check_rows([plain, wrong], tokenizer, pad_id, "here")
    with pytest.raises(UserError, match=r"token '\[PAD\]' has id .*added_tokens"):
        check_whole_vocabulary(tokenizer, pad_id, "here")
    check_whole_vocabulary(tokenizer, pad_id + 1, "here")


def test_ids_without_a_token_are_not_usable():
    tokenizer = tiny_tokenizer(131)
    assert usable_ids(tokenizer, END, 131).all()
    usable = usable_ids(tokenizer, [2, 140], 150)
    assert usable.nonzero()[:, 0].tolist() == [*range(131), 140]
    assert usable_ids(tokenizer, END, 100).shape == (100,)
