"""A tokenizer that is a SentencePiece file alone, trained here."""

import json
from itertools import pairwise

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import AutoTokenizer

from megatron_amrlhf.data.chat import chat_notes, encode_prompt, encode_solution
from megatron_amrlhf.data.tokenizer import PROBE, load_tokenizer
from megatron_amrlhf.errors import UserError
from tests.helpers import CHATML_TEMPLATE, SENTENCES


@pytest.fixture
def folder(tmp_path):
    """As Llama 2 and Mistral come: BPE with byte fallback, digits apart, blanks kept."""
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    for name in ("text.txt", "tokenizer.vocab"):
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_a_sentencepiece_file_alone_gives_its_own_ids_and_the_chat_template(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("Ben drives 12 km.", "two  blanks", "line\nline", "Zo\u00eb \u7b2c\u4e00"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == model.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.chat_template == CHATML_TEMPLATE
    assert "assistant" in tokenizer.decode(encode_prompt(tokenizer, "2 + 3?", None))
    # What an export saves beside the weights is the same tokenizer.
    tokenizer.save_pretrained(tmp_path / "export")
    again = AutoTokenizer.from_pretrained(tmp_path / "export")
    text = "Ann buys 3 apples.\n\u7b2c"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == CHATML_TEMPLATE


def test_the_blank_before_a_given_answer_is_in_its_first_token(folder):
    """So a template that writes it, as Llama 2's and Mistral's do, writes what rows hold."""
    turns = "{% if m.role == 'user' %}[ {{ m.content }} ]{% else %} {{ m.content + eos_token }}"
    loop = "{% for m in messages %}" + turns + "{% endif %}{% endfor %}"
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + loop)
    tokenizer = load_tokenizer(folder)
    assert chat_notes(tokenizer, folder, None) == []
    prompt = encode_prompt(tokenizer, "Hi", None)
    ids, _ = encode_solution(tokenizer, prompt, ["Ann buys."])
    text = "<s>[ Hi ] Ann buys.</s>"
    assert ids == tokenizer.encode(text, add_special_tokens=False)


def test_an_end_of_turn_that_is_no_token_is_told(folder):
    (note,) = chat_notes(load_tokenizer(folder), folder, None)
    assert "ends turns with '<|im_end|>\\n', which is no token of this tokenizer" in note


STEPS = ["Ann buys 3 apples.", "Ben drives 12 km.", "\u7b2c\u4e00"]


def test_steps_are_tokenized_as_within_the_whole_answer(folder):
    """The mark before a text's first word is at the beginning of an answer alone."""
    tokenizer = load_tokenizer(folder)
    ids, ends = encode_solution(tokenizer, [], STEPS)
    assert ids[:-1] == tokenizer.encode("\n".join(STEPS), add_special_tokens=False)
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert [ids[end] for end in ends[:-1]] == [newline, newline]
    sentences, _ = encode_solution(tokenizer, [], ["Ann buys.", " Ben drives."], separator="")
    assert sentences[:-1] == tokenizer.encode("Ann buys. Ben drives.", add_special_tokens=False)


def test_a_separator_behind_a_marker_is_one_token(folder):
    tokenizer = load_tokenizer(folder)
    marker = tokenizer.unk_token_id
    ids, ends = encode_solution(tokenizer, [], STEPS, marker_id=marker)
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    assert [ids[end] for end in ends] == [marker] * 3
    assert [ids[end + 1] for end in ends] == [newline, newline, tokenizer.eos_token_id]
    texts = [tokenizer.decode(ids[end + 2 : last]) for end, last in pairwise(ends)]
    assert texts == STEPS[1:]


def set_class(folder, name):
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": name}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value}))


def test_a_wrong_tokenizer_class_is_refused(folder):
    set_class(folder, "T5Tokenizer")
    with pytest.raises(UserError, match=r"tokenizer\.model: .* otherwise than SentencePiece"):
        load_tokenizer(folder)


def test_a_missing_tokenizer_class_is_guessed_right_or_refused(folder):
    """Which of them depends on the version of transformers."""
    set_class(folder, None)
    try:
        found = load_tokenizer(folder).encode(PROBE, add_special_tokens=False)
    except UserError as error:
        assert "otherwise than SentencePiece" in str(error)
    else:
        model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        assert found == model.encode(PROBE)
