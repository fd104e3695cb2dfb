"""An export says with which token its answers end."""

import json

import pytest

from megatron_amrlhf.checkpoint.export import write_end_tokens
from tests.unit.data.chat_templates import SHAPES, chat_tokenizer

NAME = "generation_config.json"
CHATML = SHAPES["chatml"].template


@pytest.mark.parametrize(
    ("eos", "listed", "expected"),
    [
        ("<|im_end|>", None, None),
        ("<|im_end|>", {"eos_token_id": 5, "top_p": 0.5}, {"eos_token_id": 5, "top_p": 0.5}),
        ("<|endoftext|>", None, {"eos_token_id": [4, 5]}),
        ("<|endoftext|>", {"eos_token_id": [5, 4]}, {"eos_token_id": [5, 4]}),
        ("<|endoftext|>", {"eos_token_id": 5, "k": 1}, {"eos_token_id": [4, 5], "k": 1}),
    ],
)
def test_an_export_lists_the_token_that_its_answers_end_with(tmp_path, eos, listed, expected):
    source, export = tmp_path / "source", tmp_path / "export"
    source.mkdir()
    export.mkdir()
    tokenizer = chat_tokenizer(CHATML, eos)
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]) == [4, 5]
    if listed is not None:
        (source / NAME).write_text(json.dumps(listed))
    write_end_tokens(source, export, tokenizer)
    found = export / NAME
    assert (json.loads(found.read_text()) if found.exists() else None) == expected
