"""Arguments of commands and tools: what is taken, and one line for what is not."""

import pytest

from megatron_amrlhf.arguments import (
    Parser,
    above_zero,
    at_least_one,
    at_least_zero,
    not_negative,
)
from megatron_amrlhf.errors import UserError


def read(kind, text):
    parser = Parser(prog="tool")
    parser.add_argument("--value", type=kind)
    return parser.parse_args([f"--value={text}"]).value


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (at_least_one, "1", 1),
        (at_least_zero, "0", 0),
        (above_zero, ".5", 0.5),
        (not_negative, "0", 0),
    ],
)
def test_the_least_value_is_taken(kind, text, value):
    assert read(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "texts", "words"),
    [
        (at_least_one, ("0", "-1", "1.5", "x", ""), "a whole number of at least 1"),
        (at_least_zero, ("-1", "0.5", "x"), "a whole number of at least 0"),
        (above_zero, ("0", "-1", "inf", "nan", "x"), "a number above 0"),
        (not_negative, ("-0.1", "inf", "nan", "x"), "a number of at least 0"),
    ],
)
def test_another_is_a_users_error_that_names_the_option(kind, texts, words):
    for text in texts:
        with pytest.raises(UserError) as caught:
            read(kind, text)
        message = f"argument --value: must be {words}, found {text!r} (see tool --help)"
        assert str(caught.value) == message
