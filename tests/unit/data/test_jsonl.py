"""Malformed data is refused with one line that names file and line."""

from __future__ import annotations

import pytest

from megatron_amrlhf.data.jsonl import fingerprint, read_jsonl, read_numbered_jsonl, write_jsonl
from megatron_amrlhf.errors import UserError


def test_what_was_written_is_read(tmp_path):
    records = [{"a": "one\u2028two", "b": [1]}, {"a": "\u6e2f", "b": []}]
    write_jsonl(tmp_path / "x.jsonl", records)
    assert read_jsonl(tmp_path / "x.jsonl", {"a": str, "b": list}) == records
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_blank_lines_and_a_byte_order_mark_do_not_count(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": 2}\n\n')
    assert read_numbered_jsonl(path, {"a": int}) == [(1, {"a": 1}), (3, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"a": 1', ":2: not valid JSON"),
        ('{"a": NaN}', ":2: not valid JSON (NaN"),
        ("[1]", ":2: expected a JSON object, found a list"),
        ('{"b": 1}', ":2: key 'a' is missing (keys here: 'b')"),
        ('{"a": "1"}', ":2: 'a' must be a number, found a string"),
        ('{"a": true}', ":2: 'a' must be a number, found true or false"),
        ('{"a": null}', ":2: 'a' must be a number, found null"),
        ("\udcff", ":2: not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, words):
    path = tmp_path / "x.jsonl"
    path.write_bytes(('{"a": 0}\n' + line + "\n").encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError) as info:
        read_jsonl(path, {"a": float})
    assert str(info.value).startswith(f"{path}{words}")
    assert "\n" not in str(info.value)


def test_a_check_function_says_what_is_wrong(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 3}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:1: 'a' must be even"):
        read_jsonl(path, {"a": lambda value: "must be even" if value % 2 else None})


def test_half_a_character_is_refused_and_a_whole_one_is_not(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "\\ud83d\\ude00"}\n')
    assert read_jsonl(path, {"a": str}) == [{"a": "\U0001f600"}]
    path.write_text('{"a": "x"}\n{"a": ["\\ud83d b"]}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2: \\ud83d is half a character"):
        read_jsonl(path, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1}, {"a": 2}]', [(1, 1), (1, 2)]),
        ('[\n{"a": 1},\n{"a": 2}\n]\n[\n{"a": 3}\n]\n', [(2, 1), (3, 2), (6, 3)]),
        ('[{"a": 1}][{"a": 2}]', [(1, 1), (1, 2)]),
        ('\ufeff\n[{"a": 1}]\n[]\n[{"a": 2}]', [(2, 1), (4, 2)]),
    ],
)
def test_lists_are_read_one_after_the_other(tmp_path, text, expected):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert read_numbered_jsonl(path, {"a": int}) == [(n, {"a": a}) for n, a in expected]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}]\n{"a": 2}', ":2: '{\"a\": 2}' stands behind the end of a list"),
        ('[{"a": 1}]]', ":1: ']' stands behind"),
        ('[{"a": 1}\n {"a": 2}]', ":1: not valid JSON (no comma or ]"),
        ('[{"a": 1},\n{"a": 2}', ":2: not valid JSON (no comma or ]"),
        ('[{"a": 1},', ":1: not valid JSON (Expecting value"),
        ('[{"a": 1},\n]', ":2: not valid JSON (Expecting value"),
        ('[{"a": 1},\n[{"a": 2}]]', ":2: expected a JSON object, found a list"),
        ('[{"a": 1},\n{"a": "\\ud83d b"}]', ":2: \\ud83d is half a character"),
        ('[{"a": 1},\n{"a": {"\\udc00": 1}}]', ":2: \\udc00 is half a character"),
        ('[{"a": 1},\n{"a": NaN}]', ":2: not valid JSON (NaN"),
        ("[]\n[]", ":1: the list is empty"),
        ('{"a": 1}\n{"a": 1, "b": {"a": 2, "a": 2}}', ":2: not valid JSON (key 'a' is given twice"),
        ('{"a": 1}\n{"a": 1e999}', ":2: not valid JSON (1e999 is too large"),
        ('{"a": 1} {"a": 2}', ":1: not valid JSON (Extra data at column 10)"),
        ('{"a": 1},\n{"a": 2},', ":1: not valid JSON (Extra data at column 9)"),
    ],
)
def test_nothing_of_a_list_or_line_is_dropped_in_silence(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_jsonl(path, {})
    assert str(caught.value).startswith(f"{path}{words}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match="x.jsonl:1: the file is empty"):
        read_jsonl(path, {})


def test_a_missing_file_or_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl", {})
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(tmp_path, {})
    with pytest.raises(UserError, match="cannot read"):
        fingerprint(tmp_path / "none.jsonl")


def test_a_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "data.jsonl", [{"a": 1}])
    assert read_jsonl("~/data.jsonl", {}) == [{"a": 1}]
    assert fingerprint("~/data.jsonl") == fingerprint(tmp_path / "data.jsonl")


def test_fingerprint_depends_on_each_byte(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 2_999_999 + b"y")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "b")
    assert len(fingerprint(tmp_path / "a")) == 64
