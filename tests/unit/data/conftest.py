"""Fixtures of the data tests."""

import pytest

from tests.helpers import make_tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tiny_tokenizer(folder, vocab_size=321)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder):
    return make_tiny_tokenizer(tokenizer_folder, vocab_size=321)
