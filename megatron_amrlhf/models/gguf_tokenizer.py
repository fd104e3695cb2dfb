"""The tokenizer in a GGUF file: how text is split is known by name, or it is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
from tokenizers import Regex, normalizers, pre_tokenizers
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.gguf_config import gguf_field

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2 = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By tokenizer.ggml.pre; a word of the vocabulary is one token there whatever the merges give.
WHOLE_WORDS = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "tekken": TEKKEN}
COMPOSED = {"qwen2": QWEN2, "deepseek-r1-qwen": QWEN2}  # text is brought to NFC before
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def gguf_tokenizer(reader: gguf.GGUFReader, file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with the split of ``tokenizer.ggml.pre`` given to it here.

    transformers' reader knows some of the names and splits others as GPT-2 does, without a word.

    Raises:
        UserError: its kind, or its way to split text, is not known.
    """
    kind = gguf_field(reader, "tokenizer.ggml.model")
    if kind not in (BYTE_LEVEL, SENTENCEPIECE):
        raise UserError(
            f"{file}: tokenizer.ggml.model {kind!r} is not known here ({BYTE_LEVEL}, "
            f"{SENTENCEPIECE}): use the model's Hugging Face folder"
        )
    pre = gguf_field(reader, "tokenizer.ggml.pre")
    split = _split_of(pre)
    if kind == BYTE_LEVEL and split is None:
        known = ", ".join(sorted([*WHOLE_WORDS, *COMPOSED, "smollm", "gpt-2"]))
        raise UserError(
            f"{file}: tokenizer.ggml.pre {pre!r} is not known here ({known}): how its text is "
            "split is not in the file, use the model's Hugging Face folder"
        )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if kind == BYTE_LEVEL:
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = split
        backend.model.ignore_merges = pre in WHOLE_WORDS
        backend.normalizer = normalizers.NFC() if pre in COMPOSED else None
    return tokenizer


def _split_of(pre: str | None) -> PreTokenizer | None:
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([digits, rest])
    regex = (WHOLE_WORDS | COMPOSED).get(pre or "")
    if regex is None:
        return None
    words = pre_tokenizers.Split(Regex(regex), "isolated")
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([words, rest])


def end_ids(reader: gguf.GGUFReader, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end a turn: the file's (of text, turn and message), the tokenizer's, ChatML's."""
    ends = {gguf_field(reader, f"tokenizer.ggml.{key}") for key in END_KEYS}
    ends.add(tokenizer.eos_token_id)
    if "<|im_end|>" in (tokenizer.chat_template or ""):
        ends.add(tokenizer.get_vocab().get("<|im_end|>"))
    return sorted(end for end in ends if end is not None)
