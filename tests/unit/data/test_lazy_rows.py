"""Rows are checked once, at the start and by all ranks together, and made when asked for."""

from __future__ import annotations

import json
import threading
import tracemalloc
from dataclasses import fields

import pytest
import torch
from tokenizers import normalizers, pre_tokenizers

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.chat import encode_prompt
from megatron_amrlhf.data.jsonl import read_numbered_jsonl
from megatron_amrlhf.data.pairs import load_pairs
from megatron_amrlhf.data.prm_data import load_prm_examples
from megatron_amrlhf.data.prompts import load_prompts
from megatron_amrlhf.data.readers import Readers
from megatron_amrlhf.data.rows import select_rows
from megatron_amrlhf.data.scored_pairs import load_scored_pairs
from megatron_amrlhf.data.stand_in import BatchCutter, ByteCounter, is_bounded
from megatron_amrlhf.errors import UserError
from tests.helpers import CHATML_TEMPLATE, SENTENCES, make_tiny_tokenizer
from tests.helpers_models import tiny_tokenizer
from tests.patience import PATIENCE_SECONDS
from tests.unit.data.test_row_keys import ROWS

COUNTS = [1, 2, 3, 7]
SECTION = DataSection(train="unused", format="prompts")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions(count):
    return [{"prompt": f"How many are {n} and {n}?", "answer": 2 * n} for n in range(count)]


def together(count, load, exact=False):
    """What each of ``count`` ranks gets of ``load(readers)``: its result, or its mistake's text."""
    parts, results, barrier = [None] * count, [None] * count, threading.Barrier(count)

    def work(rank):
        def gather(part):
            parts[rank] = part
            barrier.wait(PATIENCE_SECONDS)
            found = list(parts)
            barrier.wait(PATIENCE_SECONDS)
            return found

        try:
            results[rank] = load(Readers(rank, count, gather, exact=exact))
        except UserError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE_SECONDS)
    return results


def load_all(path, read, tokenizer, section, readers, accept=None):
    """As `load_rows`, of every row at once and by its own tokens."""

    def items(record, where):
        return read(record, where, tokenizer)

    return select_rows(path, read_numbered_jsonl(path, {}), items, section)


def loader(kind, path, tokenizer, section):
    """Of a file of rows like ``ROWS[kind]``."""
    if kind == "prompts":
        return lambda readers: load_prompts(path, tokenizer, section, readers)
    if kind in ("pairs", "conversations"):
        return lambda readers: load_pairs(path, tokenizer, section, readers)
    if kind == "scored":
        return lambda readers: load_scored_pairs(
            path, tokenizer, section, attribute_weights=None, needs_scores=False, readers=readers
        )
    section = section.model_copy(update={"format": "auto", "input_mark": "@"})
    count = 5 if kind.startswith("helpsteer") else 1
    return lambda readers: load_prm_examples(path, tokenizer, section, count, readers)


def flat(item):
    """An item as something that can be compared."""
    if isinstance(item, torch.Tensor):
        return item.tolist()
    if hasattr(item, "__dataclass_fields__"):
        return [flat(getattr(item, field.name)) for field in fields(item)]
    return [flat(x) for x in item] if isinstance(item, tuple) else item


class Calls:
    """What the tokenizer is asked for, one by one and many at once."""

    def __init__(self, tokenizer, monkeypatch):
        self.single, self.batches = [], []
        encode, call = tokenizer.encode, type(tokenizer).__call__

        def count_encode(text, **options):
            self.single.append(text)
            return encode(text, **options)

        def count_call(own, texts, *arguments, **options):
            self.batches += [texts] if isinstance(texts, list) else []
            return call(own, texts, *arguments, **options)

        monkeypatch.setattr(tokenizer, "encode", count_encode)
        monkeypatch.setattr(type(tokenizer), "__call__", count_call)


def test_a_row_is_cut_when_it_is_asked_for(tmp_path, tokenizer, monkeypatch):
    encode_prompt(tokenizer, "x", None)  # the template has been looked at
    calls = Calls(tokenizer, monkeypatch)
    rows, _ = load_prompts(write(tmp_path / "x.jsonl", questions(50)), tokenizer, SECTION)
    assert len(rows) == 50 and calls.single == calls.batches == []
    row = rows[7].row
    assert len(calls.single) == 1 and "7 and 7?" in calls.single[0] and calls.batches == []
    assert rows[7].row is row and rows[-43].row is row and len(calls.single) == 1
    assert rows[7].answer == "14" and rows[7].where.endswith("x.jsonl:8")
    assert rows[49].text == "How many are 49 and 49?" and len(calls.single) == 2
    assert [item.answer for item in rows[6:9]] == ["12", "14", "16"] and len(calls.single) == 4
    with pytest.raises(IndexError):
        rows[50]


def test_what_bytes_do_not_tell_is_cut_many_at_once(tmp_path, tokenizer, monkeypatch):
    """Its tokens are as many as may be, its bytes are more."""
    lines = questions(50) + [{"prompt": SENTENCES[0] * 4}] * 3 + [{"prompt": SENTENCES[2]}]
    path = write(tmp_path / "x.jsonl", lines)
    sizes = [len(encode_prompt(tokenizer, line["prompt"], None)) for line in lines]
    longest, tight = max(sizes), {"max_prompt_tokens": max(sizes)}
    assert len(SENTENCES[0]) * 4 > longest
    calls = Calls(tokenizer, monkeypatch)
    load_prompts(path, tokenizer, SECTION.model_copy(update=tight))
    assert [len(batch) for batch in calls.batches] == [1] and calls.single == []  # equal texts
    section = SECTION.model_copy(update={"max_prompt_tokens": longest - 1})
    with pytest.raises(UserError, match=f":51: the prompt has {longest} tokens, over data.max_"):
        load_prompts(path, tokenizer, section)


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "answers"])
def test_the_parts_of_several_ranks_are_the_file(tmp_path, tokenizer, kind, monkeypatch):
    lines = [ROWS[kind] | {"n": n, "system": "Be brief." * (n % 3)} for n in range(40)]
    load = loader(kind, write(tmp_path / "x.jsonl", lines), tokenizer, SECTION)
    with monkeypatch.context() as patched:
        for module in ("prompts", "pairs", "scored_pairs", "prm_data"):
            patched.setattr(f"megatron_amrlhf.data.{module}.load_rows", load_all)
        whole, selection = load(Readers())
    items = [flat(item) for item in whole]
    assert len(items) >= 40 and selection.num_rows == 40 and selection.unread["n"] == 40
    for count in COUNTS:
        for rows, found in together(count, load):
            assert [flat(item) for item in rows] == items and found == selection


LAST = {
    '{"prompt": "a"': "not valid JSON",
    '{"promt": "a"}': "key 'prompt' is missing",
    '{"prompt": "a", "tools": [1]}': "'tools' is not read",
    json.dumps({"prompt": "word " * 600}): "over data.max_prompt_tokens",
    '{"prompt": "a\udcff"}': "not UTF-8",
    "[1]": "expected a JSON object",
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("last", LAST)
def test_a_mistake_in_the_last_row_is_told_by_all(tmp_path, tokenizer, last, count):
    path = write(tmp_path / "x.jsonl", questions(30))
    text = "\n".join(["", path.read_text().replace("How", "Wie").replace("\n", "\r\n"), last])
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    messages = together(count, loader("prompts", path, tokenizer, SECTION))
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"{path}:33: ") and LAST[last] in messages[0]


@pytest.mark.parametrize("count", COUNTS)
def test_of_several_mistakes_the_first_is_told_or_all_are_counted(tmp_path, tokenizer, count):
    lines = questions(30)
    for place in (4, 17, 29):
        lines[place] = {"prompt": " "}
    path = write(tmp_path / "x.jsonl", lines)
    messages = together(count, loader("prompts", path, tokenizer, SECTION))
    assert all(message.startswith(f"{path}:5: 'prompt' must") for message in messages)
    section = SECTION.model_copy(update={"on_wrong_row": "skip"})
    for rows, selection in together(count, loader("prompts", path, tokenizer, section)):
        assert selection.left_out == {"wrong": 3} and selection.num_rows == 30
        assert selection.first_wrong.startswith(f"{path}:5:")
        assert [int(item.answer) // 2 for item in rows] == [
            n for n in range(30) if n not in (4, 17, 29)
        ]
    write(path, [{"prompt": " "}] * 9)
    (message, *others) = together(count, loader("prompts", path, tokenizer, section))
    assert "no row is left to use" in message and set(others) <= {message}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("text", ["", "\n \n\n", "[]", "\ufeff[]\n[]"])
def test_a_file_without_rows_is_refused_by_all(tmp_path, tokenizer, text, count):
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    what = "list" if "[" in text else "file"
    messages = together(count, loader("prompts", path, tokenizer, SECTION))
    assert all(message.startswith(f"{path}:1: the {what} is empty") for message in messages)


@pytest.mark.parametrize("count", COUNTS)
def test_lists_marks_and_wide_characters_are_found_again(tmp_path, tokenizer, count):
    path, texts = tmp_path / "x.json", ["\u6e2f one?", "two \U0001f600?", "three\u2028?"] * 4
    objects = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    whole = ["[\n" + ",\n\u3000".replace("\u3000", "  ").join(objects[:5]) + "]", "[", "]"]
    whole[1] += ", ".join(objects[5:])
    for content in ("\n".join(whole), "\r\n\r\n\u3000".join(objects), "\n".join(objects) + "\n"):
        for mark in ("", "\ufeff"):
            path.write_text(mark + content, newline="")
            for rows, _ in together(count, loader("prompts", path, tokenizer, SECTION)):
                assert [item.text for item in rows] == texts


def test_what_is_held_of_a_row_is_where_it_stands(tmp_path, tokenizer):
    peaks = []
    for count in (4_000, 24_000):
        path = write(tmp_path / f"{count}.jsonl", questions(count))
        tracemalloc.start()
        rows, _ = load_prompts(path, tokenizer, SECTION)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(rows) == count
    assert peaks[1] - peaks[0] < 150 * 20_000  # bytes; a row that was made has over 1000


def test_a_line_that_changes_is_refused_and_others_may(tmp_path, tokenizer):
    path = write(tmp_path / "x.jsonl", questions(9))
    rows, _ = load_prompts(path, tokenizer, SECTION)
    with path.open("a") as file:
        file.write('{"prompt": "One more?"}\n')
    assert len(rows) == 9 and rows[8].answer == "16"
    path.write_text(path.read_text().replace("4 and 4", "4 and 5"))
    assert rows[3].answer == "6"
    with pytest.raises(UserError, match=r"x\.jsonl:5: the line has changed since the run began"):
        rows[4]
    path.rename(tmp_path / "old")
    write(path, questions(2))
    assert rows[7].answer == "14"


def test_files_of_other_sizes_are_refused(tmp_path, tokenizer):
    paths = [write(tmp_path / "a", questions(8)), write(tmp_path / "b", questions(9))]
    for message in together(
        2, lambda readers: load_prompts(paths[readers.rank], tokenizer, SECTION, readers)
    ):
        assert "not the same size on all ranks" in message


@pytest.mark.parametrize("count", COUNTS)
def test_the_highest_rows_have_the_first_of_each_size(tmp_path, tokenizer, count):
    lines = [{"prompt": text} for text in (*SENTENCES[::-1], "a", "b", *SENTENCES)]
    path = write(tmp_path / "x.jsonl", lines)
    load = loader("prompts", path, tokenizer, SECTION)
    for rows, _ in together(count, load, exact=True):
        made = [item.row for item in rows]
        contents = rows.contents
        assert contents.num_rows == len(made)
        assert contents.num_tokens == sum(row.numel() for row in made)
        assert len(contents.highest) < len(made)
        for size in range(max(int(row.max()) for row in made) + 1):
            first = next(row for row in made if row.max() >= size)
            among = next(row for row in contents.highest if row.max() >= size)
            assert torch.equal(first, among)


TEXTS = [*SENTENCES, " ", "\n\n", "\u6e2f\U0001f600", "<|im_end|><|im_start|>", "a" * 50, "\ufdfa"]


def test_a_bounded_tokenizer_makes_no_more_tokens_than_bytes(tokenizer):
    for each in (tokenizer, tiny_tokenizer()):
        assert is_bounded(each)
        counter, cutter = ByteCounter(each), BatchCutter(each)
        cutter.prepare([(text, special) for text in TEXTS for special in (False, True)])
        for text in TEXTS:
            for special in (False, True):
                ids = each.encode(text, add_special_tokens=special)
                assert len(ids) <= len(counter.encode(text, special))
                assert cutter.encode(text, special) == ids
        assert cutter.encode("new") == each.encode("new")


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, "{{ eos_token }}" + CHATML_TEMPLATE])
def test_a_prompt_is_written_as_the_tokenizer_does(tmp_path, template):
    tokenizer = make_tiny_tokenizer(tmp_path / "t", chat_template=template)
    counter, turns = ByteCounter(tokenizer), [{"role": "user", "content": "Is  it?\n"}]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}, turns[0]]
    for messages, generate in ((turns[:1], True), (turns[:1], False)):
        options = {"add_generation_prompt": generate, "tokenize": False}
        written = tokenizer.apply_chat_template(messages, **options)
        assert counter.apply_chat_template(messages, **options) == written
    with pytest.raises(Exception, match="concatenate") as own:
        tokenizer.apply_chat_template(turns, **options)
    with pytest.raises(type(own.value), match="concatenate"):
        counter.apply_chat_template(turns, **options)


def test_a_tokenizer_that_writes_texts_otherwise_is_not_bounded(tmp_path):
    tokenizer = make_tiny_tokenizer(tmp_path / "t")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.NFKC()
    assert len(tokenizer.encode("\ufdfa")) > len("\ufdfa".encode()) and not is_bounded(tokenizer)
    backend.normalizer = None
    assert is_bounded(tokenizer)
    cut = pre_tokenizers.Digits()
    for last in (pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Metaspace()):
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.Sequence([last])])
        assert not is_bounded(tokenizer)


def test_a_row_that_only_a_normalizer_makes_long_is_refused(tmp_path):
    tokenizer = make_tiny_tokenizer(tmp_path / "t", chat_template=None)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    path = write(tmp_path / "x.jsonl", [{"prompt": "a"}, {"prompt": "\ufdfa" * 8}])
    section = SECTION.model_copy(update={"max_prompt_tokens": 100})
    assert len("\ufdfa".encode()) * 8 < 100
    with pytest.raises(UserError, match=r"x\.jsonl:2: the prompt has"):
        load_prompts(path, tokenizer, section)
