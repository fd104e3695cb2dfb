"""What is read back is sound, or one line says what is wrong with it."""

import os

import pytest

from megatron_amrlhf.reading import (
    Record,
    Unreadable,
    checked,
    parse_json,
    read_bytes,
    read_object,
    read_record,
)

DEEP = 100_000


class Pair(Record):
    count: int
    share: float


def test_sound_json_is_what_json_makes_of_it():
    assert parse_json(b'{"a": [1, 2.5, null, true, "\\u4f60"]}') == {
        "a": [1, 2.5, None, True, "\u4f60"]
    }
    assert parse_json('{"a": 1, "a": NaN}', strict=False)["a"] != 0  # as others' files may


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\0" * 64, "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"a": 1', "not valid JSON"),
        (b'{"a": "\xff"}', "bytes that are no UTF-8"),
        ("[" * DEEP, "nested too deeply"),
        ('{"a":' * DEEP, "nested too deeply"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "-Infinity is no JSON number"),
        ('{"a": 1e999}', "1e999 is out of range"),
        ('{"a": 1' + "0" * 30 + "}", "an integer of 31 digits is out of range"),
        ('{"a": 1' + "0" * 9999 + "}", "an integer of 10000 digits is out of range"),
        ('{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
    ],
)
def test_damaged_json_is_told_in_words(text, words):
    with pytest.raises(Unreadable, match=words):
        parse_json(text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"count": 1}, "share: "),
        ({"count": True, "share": 0.5}, "count: "),
        ({"count": "1", "share": 0.5}, "count: "),
        ({"count": 1.0, "share": 0.5}, "count: "),
        ({"count": 1, "share": float("nan")}, "share: "),
        ([1], "valid dictionary"),
        (None, "valid dictionary"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(content, words):
    with pytest.raises(Unreadable, match=words):
        checked(Pair, content)
    assert checked(Pair, {"count": 1, "share": 2, "more": 3}).share == 2.0


def test_nothing_but_a_regular_file_is_read_or_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    for name, words in (
        ("", "is a folder"),
        ("pipe", "is no regular file"),
        ("device", "is no regular file"),
        ("loop", "cannot be read"),
    ):
        with pytest.raises(Unreadable, match=words):
            read_bytes(tmp_path / name)
    (tmp_path / "large").write_bytes(b"12345")
    with pytest.raises(Unreadable, match="too large"):
        read_bytes(tmp_path / "large", most=4)
    for name in ("none", "large/inside"):
        with pytest.raises(FileNotFoundError):
            read_bytes(tmp_path / name)


def test_a_record_is_read_from_its_file(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"count": 3, "share": 0.5}')
    assert read_record(file, Pair) == Pair(count=3, share=0.5)
    file.write_text("[1]")
    with pytest.raises(Unreadable, match="must hold a JSON object"):
        read_object(file)
