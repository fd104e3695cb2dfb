"""A reward model with the policy's tokenizer has an embedding for all that it may be given."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from megatron_amrlhf.data.vocabulary import usable_ids
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience.reward_models import RewardModel, check_same_rows
from tests.helpers_models import make_tiny_model, tiny_tokenizer

ROWS = [torch.tensor([5, 9, 99]), torch.tensor([7])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a model with 131 ids."""
    folder = tmp_path_factory.mktemp("prm")
    make_tiny_model(folder, layers=1, vocab_size=131)
    return folder


@pytest.fixture
def tokenizer():
    """131 tokens, and two added ones."""
    tokenizer = copy.deepcopy(tiny_tokenizer(131))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<a>", "<b>"]})
    return tokenizer


def test_what_the_policy_may_sample_has_to_be_there(folder, tokenizer):
    models = [RewardModel("prm", folder, 1, None)]
    check_same_rows(models, tokenizer, ROWS, usable_ids(tokenizer, [2], 131))
    check_same_rows(models, tokenizer, ROWS, None)
    with pytest.raises(UserError, match=f"{folder}: token '<b>' has id 132, .* can sample it"):
        check_same_rows(models, tokenizer, ROWS, usable_ids(tokenizer, [2], 140))
    other = [RewardModel("prm", folder, 1, tokenizer)]  # it gets rows of its own tokenizer
    check_same_rows(other, tokenizer, ROWS, usable_ids(tokenizer, [2], 140))


def test_what_the_data_have_has_to_be_there(folder, tokenizer):
    models = [RewardModel("prm", folder, 1, None)]
    with pytest.raises(UserError, match="token '<a>' has id 131, .* out of the data's row"):
        check_same_rows(models, tokenizer, [*ROWS, torch.tensor([4, 131, 5])], None)


def test_the_engine_takes_no_id_beyond_the_embedding():
    """Several tensor ranks would give it a vector of zeros."""
    engine = SimpleNamespace(roles={"prm": SimpleNamespace(shape=SimpleNamespace(vocab_size=100))})
    Zero3Engine._assert_embedded(engine, "prm", (*ROWS, torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(AssertionError, match="prm: token id 100 of a row, vocab_size is 100"):
        Zero3Engine._assert_embedded(engine, "prm", (*ROWS, torch.tensor([100, 3])))
