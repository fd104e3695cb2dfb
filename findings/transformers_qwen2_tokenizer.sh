#!/usr/bin/env bash
# transformers 5.24.0: for a model of type qwen2, AutoTokenizer takes vocabulary and merges from
# tokenizer.json and replaces the rest of the file (normalizer, pre-tokenizer, decoder) by Qwen2's.
#
#   A folder whose tokenizer.json cuts digits in threes is read with single digits; one whose file
#   is of the SentencePiece kind (blanks are U+2581, unknown characters are bytes) loses every blank
#   and every such character, and gives another text back. A tokenizer_class of
#   PreTrainedTokenizerFast in tokenizer_config.json changes nothing. The same folder with type
#   llama is read as its file says, and so it is by PreTrainedTokenizerFast itself. Nothing is said.
#
# Expected: tokenizer.json is the whole tokenizer, as for other model types, or a warning.
#
# Seen: python 3.11, transformers 5.24.0, tokenizers 0.23.3:
#   threes: the file: ['the', '\u0120', 'y', 'e', 'a', 'r', '\u0120', '202', '4']
#   threes: qwen2:    ['the', '\u0120', 'y', 'e', 'a', 'r', '\u0120', '2', '0', '2', '4'],
#     decoded 'the year 2024'
#   sentencepiece: the file: ['\u2581the\u2581', '<0x79>', 'e', 'a', '<0x72>', '\u2581202', '4']
#   sentencepiece: qwen2:    ['t', 'h', 'e', 'e', 'a', '2', '0', '2', '4'], decoded 'theea2024'
#   both as their file by type llama and by PreTrainedTokenizerFast: True
# Exits with 0 while this is so, with 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"${PYTHON:-python3}" -m venv venv
venv/bin/pip install --quiet transformers==5.24.0 tokenizers==0.23.3
venv/bin/python - <<'PYTHON' 2>stderr || { cat stderr >&2; exit 1; }
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

TEXT = "the year 2024"
LEARNED = ["the sum of 12 and 34", "2024 and the 202"] * 9


def digits_in_threes():
    made = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(show_progress=False, initial_alphabet=alphabet)
    made.train_from_iterator(LEARNED, trainer)
    return made


def sentencepiece():
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(show_progress=False, special_tokens=special)
    made.train_from_iterator(LEARNED, trainer)
    return made


def folder(kind, tokenizer, model_type):
    path = Path(f"{kind}-{model_type}")
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    named = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    return path


def read(loader, path):
    tokenizer = loader.from_pretrained(str(path))
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    return ids, tokenizer.convert_ids_to_tokens(ids), tokenizer.decode(ids)


as_seen = True
for kind, tokenizer, kept in (
    ("threes", digits_in_threes(), TEXT),
    ("sentencepiece", sentencepiece(), "theea2024"),
):
    in_file = tokenizer.encode(TEXT, add_special_tokens=False)
    print(f"{kind}: the file: {ascii(in_file.tokens)}")
    qwen2 = folder(kind, tokenizer, "qwen2")
    ids, tokens, text = read(AutoTokenizer, qwen2)
    print(f"{kind}: qwen2:    {ascii(tokens)}, decoded {text!r}")
    as_seen &= ids != in_file.ids and text == kept
    for loader, path in (
        (AutoTokenizer, folder(kind, tokenizer, "llama")),
        (PreTrainedTokenizerFast, qwen2),
    ):
        ids, _, text = read(loader, path)
        as_seen &= ids == in_file.ids and text == TEXT
print(f"both as their file by type llama and by PreTrainedTokenizerFast: {as_seen}")
sys.exit(not as_seen)
PYTHON
