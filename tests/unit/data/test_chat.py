"""Prompts end where the answer starts; step ends are counted, never searched."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_amrlhf.data.chat import (
    chat_notes,
    encode_prompt,
    encode_solution,
    end_token_ids,
)
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.errors import UserError
from tests.helpers import make_tiny_tokenizer
from tests.helpers_models import make_tiny_model


def test_a_prompt_ends_with_the_header_of_the_assistants_turn(tokenizer):
    ids = encode_prompt(tokenizer, "3 x 4?", "Be brief.")
    assert type(ids) is list and all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n3 x 4?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "system" not in tokenizer.decode(encode_prompt(tokenizer, "3 x 4?", None))


def test_a_prompt_without_a_template_is_a_plain_line(tmp_path):
    plain = make_tiny_tokenizer(tmp_path, chat_template=None)
    assert plain.decode(encode_prompt(plain, "3 x 4?", None)) == "3 x 4?\n"
    assert plain.decode(encode_prompt(plain, "3 x 4?", "Be brief.")) == "Be brief.\n\n3 x 4?\n"


def test_a_saved_tokenizer_is_loaded_with_the_same_ids(tokenizer, tokenizer_folder):
    loaded = load_tokenizer(tokenizer_folder)
    assert len(loaded) == 321 and loaded.eos_token == "<|im_end|>"
    assert encode_prompt(loaded, "Ann", None) == encode_prompt(tokenizer, "Ann", None)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_tokenizer_is_the_one_of_its_file_whatever_the_models_class(tmp_path, family):
    """Of a qwen2 folder transformers takes the vocabulary alone and splits by Qwen's own rules."""
    make_tiny_model(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path)
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "a step\nanother  one\n"
    assert tokenizer.encode(text, add_special_tokens=False) == expected.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.chat_template and tokenizer.eos_token_id is not None


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("declared", [None, "Qwen2Tokenizer", "LlamaTokenizer"])
def test_a_file_of_another_kind_than_the_models_class_is_used(tmp_path, family, declared):
    """Of whole words transformers' class of qwen2 makes no tokens at all."""
    words = {token: number for number, token in enumerate("<unk> <|im_end|> Ann buys".split())}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    said = {"eos_token": "<|im_end|>"} | ({"tokenizer_class": declared} if declared else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("Ann buys", add_special_tokens=False) == [2, 3]
    assert tokenizer.eos_token_id == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer.json", "{", "tokenizer.json: cannot be used .EOF while parsing"),
        ("tokenizer.json", "[]", "tokenizer.json: cannot be used .invalid type"),
        ("tokenizer.json", '{"model": {"type": "Frob"}}', "tokenizer.json: cannot be used"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "no token for"),
        (
            "tokenizer.json",
            '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "u"}}',
            "tokenizer.json: cannot be used .WordLevel error: Missing",
        ),
        ("tokenizer_config.json", "[]", "cannot load a tokenizer"),
        ("tokenizer_config.json", '{"eos_token": 2}', "cannot load a tokenizer .Special token"),
        ("added_tokens.json", "[]", "cannot load a tokenizer"),
    ],
)
def test_a_file_that_holds_no_tokenizer_is_a_user_error(tmp_path, name, content, reason):
    make_tiny_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason) as info:
        load_tokenizer(tmp_path)
    assert "\n" not in str(info.value)


def test_of_two_templates_the_one_that_is_used_is_told(tmp_path):
    tokenizer = make_tiny_tokenizer(tmp_path)
    assert chat_notes(tokenizer, tmp_path, None) == []
    file = tmp_path / "tokenizer_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"chat_template": tokenizer.chat_template}))
    assert chat_notes(load_tokenizer(tmp_path), tmp_path, None) == []
    file.write_text(json.dumps(said | {"chat_template": "other"}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    (note,) = chat_notes(loaded, tmp_path, None)
    assert note.startswith("chat_template.jinja is used, and not the other chat template in")


def test_a_template_in_a_file_for_processors_is_used_where_there_is_no_other(tmp_path):
    tokenizer = make_tiny_tokenizer(tmp_path)
    file = tmp_path / "chat_template.json"
    file.write_text(json.dumps({"chat_template": "other"}))
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template
    (tmp_path / "chat_template.jinja").unlink()
    assert load_tokenizer(tmp_path).chat_template == "other"
    for broken in ("{", "[]"):
        file.write_text(broken)
        with pytest.raises(UserError, match="chat_template.json: not .*; restore the file"):
            load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="cannot load a tokenizer") as info:
        load_tokenizer(tmp_path)
    assert "\n" not in str(info.value)


def test_a_model_folder_without_tokenizer_files_is_a_user_error(tmp_path):
    """transformers makes a tokenizer without a vocabulary of its config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError, match="no tokenizer in it|cannot load a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("listed", "extra"), [(None, []), (0, [0]), ([0, 2, 1], [0, 1])])
def test_end_tokens_join_tokenizer_and_generation_config(tokenizer, tmp_path, listed, extra):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    assert tokenizer.eos_token_id == 2
    assert end_token_ids(tokenizer, tmp_path) == [2] + extra


def test_end_tokens_do_not_need_a_generation_config(tokenizer, tmp_path):
    assert end_token_ids(tokenizer, tmp_path) == [2]


@pytest.mark.parametrize("content", ["{", "[1]", '{"eos_token_id": "x"}', '{"eos_token_id": [-1]}'])
def test_a_broken_generation_config_is_a_user_error(tokenizer, tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match="restore the file"):
        end_token_ids(tokenizer, tmp_path)


def test_each_step_ends_at_its_position(tokenizer):
    # The steps hold newlines and the same text twice: a search for separators would miscount.
    steps = ["First\n\n3 x 4 = 12.", "Then\n", "Then", "\u7b54\u6848 12"]
    prompt_ids = encode_prompt(tokenizer, "3 x 4?", None)
    ids, positions = encode_solution(tokenizer, prompt_ids, steps)
    assert ids[: len(prompt_ids)] == prompt_ids
    starts = [len(prompt_ids)] + [position + 1 for position in positions[:-1]]
    texts = [
        tokenizer.decode(ids[start : position + 1])
        for start, position in zip(starts, positions, strict=True)
    ]
    assert texts == ["First\n\n3 x 4 = 12.\n", "Then\n", "Then\n", "\u7b54\u6848 12"]
    assert positions[-1] == len(ids) - 2 and ids[-1] == tokenizer.eos_token_id


def test_a_steps_ids_do_not_depend_on_its_neighbours(tokenizer):
    alone, _ = encode_solution(tokenizer, [], ["Ann buys 12", "x"])
    among, positions = encode_solution(tokenizer, [], ["So.", "Ann buys 12", "And so on"])
    length = len(alone) - 2
    assert among[positions[0] + 1 : positions[1] + 1] == alone[:length]
