"""Sentence ends in English and Chinese, and the sentence of each token and piece of a character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizer

from megatron_amrlhf.data.sentences import split_sentences, token_sentences
from megatron_amrlhf.data.token_text import token_starts
from megatron_amrlhf.errors import UserError
from tests.helpers import make_tiny_tokenizer

EMOJI, FULL_STOP, QUESTION = "\U0001f600", "\u3002", "\uff1f"
CHINESE = "\u6211\u4eec\u8d70" + FULL_STOP + "\u4f60\u597d\u5417" + QUESTION + "\u597d"
# The first answers of the paper's appendix A.2, which have 12 and 5 scores a dimension.
PAPER_CHOSEN = """The teacher inquired about the soccer tournament and wants to know if the school \
is well-prepared. The coach assures them that they are well prepared for the tournament. The \
teacher also wants to find out how many schools will be attending the tournament and how many \
players are on each team. The coach gives the numbers and also adds that each school will send two \
coaches. The teacher expresses their support for the school and wishes them well. The total \
number of people in the tournament will be:

- Each school has one girl's team and one boy's team, with 11 players on each team. 2*11 = 22.

- Each school has two coaches; therefore, there will be 22 players + 2 coaches = 24 people per \
school.

- There are five schools in the tournament; therefore, 24*5 = 120.

- All the schools will have sent 120 people. This total includes both the players and coaches \
from all five schools."""
PAPER_REJECTED = """In the tournament, there are a total of 5 schools, each with two teams (boys \
and girls) and 11 players per team. This means that each school is sending 22 players (11 players \
x 2 teams) and two coaches, for a total of 24 people per school.

Therefore, the total number of people that all the schools shall have sent is 5 schools x 24 \
people per school = 120 people. This includes all the players and coaches from each school. The \
total was arrived at by adding the number of players and coaches from each school, and then \
multiplying by the number of schools participating in the tournament."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [""]),
        (" \n ", [""]),
        ("No end", ["No end"]),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Pi is 3.14 or so. Yes...\n\nNo?! ok", ["Pi is 3.14 or so.", "Yes...", "No?!", "ok"]),
        ('He said "go." Then (he left.) Home', ['He said "go."', "Then (he left.)", "Home"]),
        (
            "The U.S. army read J.R.R. Tolkien, No. 5 of all. No. I did. So did I.",
            [
                "The U.S. army read J.R.R. Tolkien, No. 5 of all.",
                "No.",
                "I did.",
                "So did I.",
            ],
        ),
        (
            "Dr. Who met J. Smith, e.g. at 5 p.m. today",
            ["Dr. Who met J. Smith, e.g. at 5 p.m.", "today"],
        ),
        ("No. Not 'Mr.' Smith", ["No.", "Not 'Mr.'", "Smith"]),
        ("So am I. Good", ["So am I.", "Good"]),
        ("1. First\n- Second. 3. third\n\n", ["1. First", "- Second.", "3. third"]),
        (CHINESE, [CHINESE[:4], CHINESE[4:8], CHINESE[8:]]),
        (f"\u300c\u597d{FULL_STOP}\u300d\u8d70", [f"\u300c\u597d{FULL_STOP}\u300d", "\u8d70"]),
        ("a.b! c", ["a.b!", "c"]),
    ],
)
def test_sentences_by_hand(text, expected):
    pieces = split_sentences(text)
    assert [piece.strip() for piece in pieces] == expected and "".join(pieces) == text
    # white space leads to the sentence after it
    assert all(piece == piece.rstrip() for piece in pieces[:-1])


def test_the_papers_answers_have_as_many_sentences_as_scores():
    assert len(split_sentences(PAPER_CHOSEN)) == 12
    assert len(split_sentences(PAPER_REJECTED)) == 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level: a Chinese character is three tokens, an emoji four."""
    return make_tiny_tokenizer(tmp_path_factory.mktemp("bytes"))


@given(text=st.text(alphabet="ab .!?\n3" + CHINESE + EMOJI, max_size=40))
def test_tokens_start_where_the_text_before_them_ends(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    found, starts = token_starts(tokenizer, [*ids, tokenizer.eos_token_id])
    assert found == text and starts[-1] == len(text)
    for count, start in enumerate(starts[:-1]):
        complete = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        assert start == len(complete)


def test_sentence_of_each_token_by_hand(tokenizer):
    text = f"Go. \n\n{EMOJI} 3.5! {CHINESE[:5]}"
    ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    numbers, count = token_sentences(tokenizer, ids)
    assert count == 4
    # each byte of the emoji, and each of a Chinese character, is in the character's sentence
    _, starts = token_starts(tokenizer, ids)
    place = {text.index(part): number for number, part in enumerate(("Go", EMOJI, CHINESE[0]))}
    place[text.index(CHINESE[4])] = 3
    for start, number in place.items():
        assert {n for s, n in zip(starts, numbers, strict=True) if s == start} == {number}
    assert numbers == sorted(numbers) and numbers[0] == 0 and numbers[-1] == 3


def test_a_token_with_several_ends_is_in_the_sentence_it_starts_in(tmp_path):
    tokenizer = make_tiny_tokenizer(tmp_path)
    tokenizer.add_tokens(["a. Be. c", " \n\n"])
    ids = tokenizer.convert_tokens_to_ids(["a. Be. c", " \n\n", "d"])
    assert token_sentences(tokenizer, ids) == ([0, 2, 3], 4)


def test_broken_characters_and_blank_answers(tokenizer):
    ids = tokenizer.encode("Hi. " + EMOJI, add_special_tokens=False)[:-1]
    assert token_sentences(tokenizer, ids)[0][-1] == 0
    assert token_sentences(tokenizer, [tokenizer.eos_token_id]) == ([0], 0)
    assert token_sentences(tokenizer, []) == ([], 0)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(UserError, match="tokenizer.json"):
        token_starts(object.__new__(PreTrainedTokenizer), [1])
