"""The tokenizer of a model folder, which is the one that its files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_amrlhf.errors import UserError

# Words, runs of blanks, digits, a line break, letters that many vocabularies lack.
PROBE = "Ann buys 3 x 4 = 12 apples.  Zo\u00eb\nStep 2: \u7b2c\u4e00"


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local Hugging Face folder; never runs code from the folder.

    It may be a ``tokenizer.json`` or a SentencePiece ``tokenizer.model`` alone. A template in
    ``chat_template.json``, which transformers reads for processors alone, is taken where there is
    no other.

    Raises:
        UserError: no such folder, no tokenizer in it that transformers can load, or transformers
            would cut text otherwise than the SentencePiece model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; give a folder with a tokenizer in it")
    is_fast = (folder / "tokenizer.json").is_file()
    tokenizer = _as_in_its_file(folder) if is_fast else _from_other_files(folder)
    if not tokenizer.chat_template and (file := folder / "chat_template.json").is_file():
        tokenizer.chat_template = _object_of(file).get("chat_template")
    return tokenizer


def unread_template(folder: Path) -> str:
    """Says which of two different templates is used, where a folder has two."""
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not file.is_file() or not config.is_file():
        return ""
    other = _object_of(config).get("chat_template")
    if other is None or other == file.read_text(encoding="utf-8"):
        return ""
    return f"{file.name} is used, and not the other chat template in {config.name}"


def _object_of(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); restore the file") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: not a JSON object; restore the file")
    return found


def _from_other_files(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer = _load(AutoTokenizer, folder)
    if not tokenizer.encode(PROBE, add_special_tokens=False):  # what transformers makes of nothing
        raise UserError(
            f"{folder}: no tokenizer in it (tokenizer.json or tokenizer.model); copy the model's "
            "tokenizer files"
        )
    _check_sentencepiece(tokenizer, folder / "tokenizer.model")
    return tokenizer


def _load(loader: Any, folder: Path) -> PreTrainedTokenizerBase:
    try:
        return loader.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library raises nothing narrower for a malformed file
        reason = str(error).strip().split("\n")[0]
        message = f"{folder}: cannot load a tokenizer ({reason}); copy the model's tokenizer files"
        raise UserError(message) from error


def _as_in_its_file(folder: Path) -> PreTrainedTokenizerBase:
    """Transformers' tokenizer, its general one where the model's class departs from the file.

    Some classes of transformers 5 (that of qwen2) take no more than the vocabulary from
    ``tokenizer.json`` and cut, or even lose, text by rules of their own; they fail at a file of
    another kind.
    """
    file = folder / "tokenizer.json"
    try:
        expected = Tokenizer.from_file(str(file)).encode(PROBE, add_special_tokens=False).ids
    except Exception as error:  # the library raises nothing narrower
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{file}: cannot be used ({reason}); copy the model's tokenizer files"
        ) from error
    if not expected:
        raise UserError(f"{file}: it has no token for {PROBE!r}; copy the model's tokenizer files")
    try:
        tokenizer = _load(AutoTokenizer, folder)
    except UserError:
        tokenizer = None
    if tokenizer is not None and tokenizer.encode(PROBE, add_special_tokens=False) == expected:
        return tokenizer
    return _load(PreTrainedTokenizerFast, folder)


def _check_sentencepiece(tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Compares transformers' translation of a SentencePiece model with the model itself.

    The translation trusts ``tokenizer_class``, and with a wrong one cuts text otherwise in silence.
    """
    if not file.is_file():
        return
    try:
        model = SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        return  # another format of that name, such as tiktoken's
    if tokenizer.encode(PROBE, add_special_tokens=False) != model.encode(PROBE):
        raise UserError(
            f"{file}: as a {type(tokenizer).__name__} it cuts text otherwise than SentencePiece "
            "does: set the right tokenizer_class in tokenizer_config.json (LlamaTokenizer for a "
            "byte-fallback BPE), or add the model's tokenizer.json"
        )
