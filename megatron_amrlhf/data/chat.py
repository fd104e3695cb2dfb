"""Text to token ids: the chat template, the end tokens, and the positions of step ends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from jinja2.exceptions import TemplateError
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.reading import Unreadable, read_object

# Words, runs of blanks, digits, a line break, letters that many vocabularies lack.
PROBE = "Ann buys 3 x 4 = 12 apples.  Zo\u00eb\nStep 2: \u7b2c\u4e00"

# Texts after which another one goes on; a step's predecessor ends with the first.
BEFORE = ("\n", ".")

Message = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": str}``"""

End = Literal["whole", "after step", "within step"]
"""Where a solution ends: at its end, or it was cut off after or within its last step.

A solution that goes on after its last step has a separator there, as its other steps have: a PRM
would else learn that the last step of what annotators cut at the first mistake looks different.
"""


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local Hugging Face folder; never runs code from the folder.

    It may be a ``tokenizer.json`` or a SentencePiece ``tokenizer.model`` alone.

    Raises:
        UserError: no such folder, no tokenizer in it that transformers can load, or transformers
            would cut text otherwise than the SentencePiece model.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such model folder; give a folder with a tokenizer in it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        message = f"{folder}: cannot load a tokenizer ({reason}); copy the model's tokenizer files"
        raise UserError(message) from error
    if not tokenizer.encode(PROBE, add_special_tokens=False):  # what transformers makes of nothing
        raise UserError(
            f"{folder}: no tokenizer in it (tokenizer.json or tokenizer.model); copy the model's "
            "tokenizer files"
        )
    if not (Path(folder) / "tokenizer.json").is_file():
        _check_sentencepiece(tokenizer, Path(folder) / "tokenizer.model")
        return tokenizer
    return _as_in_its_file(tokenizer, Path(folder))


def _as_in_its_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, or transformers' general one where the model's class departs from the file.

    Some classes of transformers 5 (that of qwen2) take no more than the vocabulary from
    ``tokenizer.json`` and cut, or even lose, text by rules of their own.
    """
    expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if tokenizer.encode(PROBE, add_special_tokens=False) == (
        expected.encode(PROBE, add_special_tokens=False).ids
    ):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


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


def user_turn(text: str) -> tuple[Message, ...]:
    """A conversation of one question."""
    return ({"role": "user", "content": text},)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, system_prompt: str | None
) -> list[int]:
    """`encode_turns` of one question."""
    return encode_turns(tokenizer, user_turn(text), system_prompt)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], system_prompt: str | None
) -> list[int]:
    """Token ids of a conversation up to where the next answer starts.

    With a chat template: the system message (if any), the turns, and the header of the
    assistant's turn. Some templates put in a system message of their own where none is given.
    Without a template: the one question and a newline, the system prompt before it with an empty
    line, and the special tokens (BOS) that the tokenizer puts at the start.

    Raises:
        UserError: the template refuses the messages (some know no system role), or there are
            several turns and no template.
    """
    if not tokenizer.chat_template:
        if len(turns) > 1:
            advice = "use a model with a template or single questions"
            raise UserError(f"several turns need a chat template; {advice}")
        system = f"{system_prompt}\n\n" if system_prompt else ""
        return list(tokenizer.encode(f"{system}{turns[0]['content']}\n"))
    system_turn = [{"role": "system", "content": system_prompt}] if system_prompt else []
    try:
        ids = tokenizer.apply_chat_template(
            [*system_turn, *turns], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        advice = "set data.system_prompt to null" if system_prompt else "use another model"
        raise UserError(f"the chat template refuses the prompt ({error}); {advice}") from error
    return list(ids)


def end_token_ids(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS first, then those of generation_config.json.

    Raises:
        UserError: there is none, or generation_config.json is malformed.
    """
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    path = Path(folder) / "generation_config.json"
    if path.is_file():
        try:
            listed = read_object(path, strict=False).get("eos_token_id")
        except Unreadable as error:
            raise UserError(f"{path}: not a JSON object ({error}); restore the file") from None
        listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not all(type(token) is int and token >= 0 for token in listed):
            raise UserError(f"{path}: eos_token_id must be token ids; restore the file")
        ids += listed
    if not ids:
        raise UserError(f"{folder}: the tokenizer has no end token; set eos_token in its config")
    return list(dict.fromkeys(ids))


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], vocab_size: int, folder: str | Path
) -> None:
    """Checks that a model has an embedding for what its tokenizer puts into every row.

    Tokens of a text, of the template and the end tokens; a tokenizer may know more than these.

    Args:
        tokenizer: the model's.
        end_ids: from `end_token_ids`.
        vocab_size: of the model's ``config.json``.
        folder: named in the message.

    Raises:
        UserError: an id is too large.
    """
    ids = [*end_ids, *encode_prompt(tokenizer, PROBE, None), *tokenizer.encode(PROBE)]
    if (largest := max(ids)) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{folder}: token {token!r} has id {largest}, but the model's vocab_size is "
            f"{vocab_size}: use the model's own tokenizer files, and name its eos_token in "
            "tokenizer_config.json"
        )


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that stands after another one.

    Tokenizers of the SentencePiece kind put a space before the first word of what they are given,
    which the text does not have there. Where a tokenizer would join it with what stands before,
    the ids are those of the text alone.
    """
    for before in BEFORE:
        head = _ids_before(tokenizer, before)
        ids = tokenizer.encode(before + text, add_special_tokens=False)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return tokenizer.encode(text, add_special_tokens=False)


@lru_cache(maxsize=8)
def _ids_before(tokenizer: PreTrainedTokenizerBase, before: str) -> list[int]:
    """Kept, as data have millions of steps."""
    return tokenizer.encode(before, add_special_tokens=False)


def encode_solution(
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    steps: Sequence[str],
    separator: str = "\n",
    marker_id: int | None = None,
    end: End = "whole",
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt with a solution, and the position at which each step is judged.

    Each step is tokenized on its own (the later ones as `encode_continuation` does), with the
    separator after it, and the ids are put one after the other, so that a step's end is known by
    counting tokens; no separator is ever searched for in text or ids. A step is judged at its last
    token, separator included, or at its marker. The last step of a whole solution has no separator
    and is followed by the end-of-turn token (the tokenizer's EOS), which has no label.

    Args:
        tokenizer: any tokenizer with an EOS.
        prompt_ids: from `encode_prompt`.
        steps: texts; newlines at their ends are taken off where there is a separator.
        separator: text between steps; empty if the steps hold it themselves.
        marker_id: a token put after each step, before the separator, at which the step is judged
            (public PRMs have such a token); None: no marker.
        end: where the solution ends (see `End`).

    Returns:
        ``ids`` (prompt, steps, end of turn) and ``step_end_positions`` (indices into ``ids``, one
        a step, increasing).
    """
    assert tokenizer.eos_token_id is not None, "end_token_ids() refuses such tokenizers"
    ids = list(prompt_ids)
    step_end_positions = []
    for number, step in enumerate(steps, start=1):
        text = step.rstrip("\n") if separator else step
        between = separator if number < len(steps) or end == "after step" else ""
        if marker_id is None:
            text, between = text + between, ""
        if number == 1:  # after the prompt's last token, whose text is the template's
            piece = tokenizer.encode(text, add_special_tokens=False)
        else:
            piece = encode_continuation(tokenizer, text)
        assert piece, f"step {number} has no tokens: {step!r}"
        ids.extend(piece if marker_id is None else [*piece, marker_id])
        step_end_positions.append(len(ids) - 1)
        ids.extend(encode_continuation(tokenizer, between) if between else [])
    if end == "whole":
        ids.append(tokenizer.eos_token_id)
    assert len(step_end_positions) == len(steps)
    return ids, step_end_positions


def marker_token_id(
    tokenizer: PreTrainedTokenizerBase, marker: str | None, key: str = "data.step_marker"
) -> int | None:
    """The one token that a step marker is; None without one. ``key`` names it in messages.

    Raises:
        UserError: the tokenizer cuts it into several tokens, or does not know it.
    """
    if marker is None:
        return None
    ids = tokenizer.encode(marker, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UserError(
            f"{key}: {marker!r} is {len(ids)} tokens of this tokenizer, not one of its "
            "own: choose a text that it keeps as one token"
        )
    return ids[0]
