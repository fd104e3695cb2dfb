"""tools/convert_checkpoint.py: bitwise ways there and back, and what it refuses."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from megatron_amrlhf.conversion import convert
from megatron_amrlhf.models.source import ShardedWeights
from tests.helpers import load_tool
from tests.helpers_models import CHATML, END_TOKEN_ID, make_tiny_model

tool = load_tool("convert_checkpoint")

FAMILIES = {
    "llama": {"family": "llama"},
    "llama3-rope": {
        "family": "llama",
        "rope": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "head_dim": 10},
}
SIZES = {"vocab_size": 131, "layers": 5, "max_positions": 256}  # odd vocabulary and depth
LAYOUTS = {
    "tp1-pp1": ["--layer-spec", "local", "--vocab-multiple", "1"],
    "tp2-pp1-release": ["--tensor", "2", "--iteration", "0"],
    "tp1-pp5": ["--pipeline", "5"],
    "tp2-pp2-uneven": ["--tensor", "2", "--pipeline", "2", "--first-stage-layers", "2"],
    "tp2-pp5": ["--tensor", "2", "--pipeline", "5"],
}
HEAD_OUTPUTS = 3


def run(*arguments) -> int:
    return tool.main([str(x) for x in arguments])


def refusal(capsys, *arguments) -> str:
    """The one line of a refused conversion."""
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def assert_same(before: Path, after: Path, with_config: bool = True) -> None:
    """The same tensors bit for bit, the same tokenizer, template and generation settings."""
    old, new = ShardedWeights(before), ShardedWeights(after)
    assert new.names() == old.names()
    for name in old.names():
        assert new.get(name).dtype == old.get(name).dtype
        assert torch.equal(new.get(name), old.get(name)), name
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (before, after)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[1].chat_template == CHATML
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (before / name).read_bytes() == (after / name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (before, after)]
    assert configs[0] == configs[1] or not with_config


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[tuple[str, bool], Path]:
    root, found = tmp_path_factory.mktemp("models"), {}
    for name, kind in FAMILIES.items():
        for tied in (False, True):
            found[name, tied] = root / f"{name}-{tied}"
            make_tiny_model(found[name, tied], tied=tied, **kind, **SIZES)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hf_to_megatron_to_hf_is_bitwise(models, tmp_path, family, tied, layout):
    source = models[family, tied]
    assert run(source, tmp_path / "mid", "--to", "megatron", *LAYOUTS[layout]) == 0
    assert run(tmp_path / "mid", tmp_path / "back", "--to", "hf", "--shard-size", "20KB") == 0
    assert_same(source, tmp_path / "back")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 3
    assert not list(tmp_path.glob(".*"))  # nothing temporary is left


def test_several_chunks_a_rank_and_bfloat16_and_vocabulary_padding(models, tmp_path):
    source = tmp_path / "bf16"
    make_tiny_model(source, "qwen3", layers=4, head_dim=10, vocab_size=131)
    bf16, mid, back = tmp_path / "16", tmp_path / "mid", tmp_path / "back"
    assert run(source, bf16, "--to", "hf", "--dtype", "bfloat16") == 0
    layout = ["--pipeline", "2", "--virtual-stages", "2", "--tensor", "2"]
    assert run(bf16, mid, "--to", "megatron", *layout) == 0
    rank = torch.load(mid / "iter_0000001/mp_rank_01_000/model_optim_rng.pt", weights_only=False)
    assert set(rank) == {"args", "checkpoint_version", "iteration", "model0", "model1"}
    assert rank["args"].padded_vocab_size == 256 and rank["args"].num_query_groups == 2
    embedding = rank["model0"]["embedding.word_embeddings.weight"]
    assert embedding.shape == (128, 48) and embedding.dtype == torch.bfloat16
    assert embedding.untyped_storage().nbytes() == embedding.nbytes  # not a view of the whole
    assert not embedding[3:].any()  # 131 - 128 rows are not padding
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in rank["model1"]
    assert run(mid, back, "--to", "hf") == 0
    assert_same(bf16, back)


@pytest.mark.parametrize("family", ["qwen3", "llama3-rope"])
def test_torch_dist_both_ways_is_bitwise(models, tmp_path, family):
    source = models[family, True]
    assert run(source, tmp_path / "mid", "--to", "torch_dist", "--tensor", "2") == 0
    assert run(tmp_path / "mid", tmp_path / "back", "--to", "hf") == 0
    assert_same(source, tmp_path / "back")


def add_head(source: Path, folder: Path) -> Path:
    """The model with a linear head in a file of its own, as exports once were."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    random = torch.Generator().manual_seed(5)
    head = {
        "head.weight": torch.randn(HEAD_OUTPUTS, 48, generator=random),
        "head.bias": torch.randn(HEAD_OUTPUTS, generator=random),
    }
    save_file(head, folder / "head.safetensors")
    places = dict.fromkeys(weights, "model.safetensors") | dict.fromkeys(head, "head.safetensors")
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_travels_and_opens_as_token_classification(models, tmp_path, family):
    source = add_head(models[family, False], tmp_path / "prm")
    mid, classifier, back = tmp_path / "mid", tmp_path / "classifier", tmp_path / "back"
    assert run(source, mid, "--to", "megatron", "--tensor", "2", "--pipeline", "5") == 0
    assert set(load_file(mid / "head.safetensors")) == {"head.weight", "head.bias"}
    assert run(mid, classifier, "--to", "hf") == 0
    model, told = AutoModelForTokenClassification.from_pretrained(
        classifier, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert type(model).__name__.endswith("ForTokenClassification")
    assert model.config.architectures == [type(model).__name__]
    head = load_file(source / "head.safetensors")
    with torch.no_grad():
        tokens = torch.arange(20)[None]
        hidden = model.model(tokens).last_hidden_state
        wanted = hidden @ head["head.weight"].T + head["head.bias"]
        torch.testing.assert_close(model.eval()(tokens).logits, wanted, rtol=0, atol=1e-4)
    assert run(classifier, back, "--to", "hf") == 0
    assert_same(classifier, back)
    assert_same(source, back, with_config=False)


@pytest.mark.parametrize("bias", [0.0, 0.75])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_outcome_model_opens_as_sequence_classification(models, tmp_path, family, bias):
    source, mid, classifier = tmp_path / "orm", tmp_path / "mid", tmp_path / "classifier"
    add_head(models[family, True], source)
    head = {name: x[:1] for name, x in load_file(source / "head.safetensors").items()}
    head["head.bias"] = torch.tensor([bias])
    save_file(head, source / "head.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"reward_kind": "outcome"}
    (source / "config.json").write_text(json.dumps(config))
    assert run(source, classifier, "--to", "hf", "--verify") == 0
    assert run(classifier, mid, "--to", "megatron") == 0
    model, told = AutoModelForSequenceClassification.from_pretrained(
        classifier, output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.architectures == [type(model).__name__]
    with torch.no_grad():
        tokens = torch.arange(20)[None].fmod(19)  # the end token, which also pads, is the last
        tokens[0, -1] = END_TOKEN_ID
        hidden = model.model(tokens).last_hidden_state[0, -1]
        wanted = hidden @ head["head.weight"][0]
        torch.testing.assert_close(model.eval()(tokens).logits[0, 0], wanted, rtol=0, atol=1e-4)
    assert run(mid, tmp_path / "back", "--to", "hf") == 0
    assert_same(classifier, tmp_path / "back")
    assert load_file(mid / "head.safetensors")["head.bias"].item() == bias
    assert json.loads((classifier / "config.json").read_text()).get("score_bias") == (
        [bias] if bias else None
    )


def test_a_language_model_is_no_token_classifier(models, tmp_path, capsys):
    line = refusal(
        capsys, models["qwen2", True], tmp_path / "x", "--to", "hf", "--as", "token-classification"
    )
    assert "no linear head" in line and not (tmp_path / "x").exists()


@pytest.mark.parametrize("family", ["llama3-rope", "qwen3"])
def test_verify_compares_logits_of_both_ways(models, tmp_path, capsys, family):
    source = models[family, True]
    layout = ["--tensor", "2", "--pipeline", "5"]
    assert run(source, tmp_path / "mid", "--to", "megatron", "--verify", *layout) == 0
    assert run(tmp_path / "mid", tmp_path / "back", "--to", "hf", "--verify") == 0
    told = capsys.readouterr().out
    assert told.count("float32: largest difference") == told.count("bfloat16: largest") == 2
    assert told.count("passed") == 4 and told.count("(tolerance 1e-04)") == 2


def test_verify_keeps_a_wrong_conversion_from_its_name(models, tmp_path, capsys, monkeypatch):
    def swapped(*arguments, folder, **named):
        convert_right(*arguments, folder=folder, **named)
        weights = load_file(folder / "model.safetensors")
        names = [f"model.layers.3.self_attn.{x}_norm.weight" for x in "qk"]
        weights |= {names[0]: weights[names[1]], names[1]: weights[names[0]]}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    convert_right = convert.write_hf
    monkeypatch.setattr(convert, "write_hf", swapped)
    line = refusal(capsys, models["qwen3", False], tmp_path / "x", "--to", "hf", "--verify")
    assert "logits are others" in line and "FAILED" in line
    assert list(tmp_path.iterdir()) == []


class Touches:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def plant(folder: Path, file: str, trace: Path) -> Path:
    """Puts the payload in a file of a checkpoint."""
    path = folder / file
    if path.suffix == ".pt":
        content = torch.load(path, weights_only=False)
        torch.save(content | {"args": argparse.Namespace(x=Touches(trace))}, path)
    else:
        path.write_bytes(pickle.dumps(Touches(trace)))
    return path


@pytest.mark.parametrize(
    ("form", "file"),
    [
        ("megatron", "iter_0000001/mp_rank_01_002/model_optim_rng.pt"),
        ("torch_dist", "iter_0000001/.metadata"),
        ("torch_dist", "iter_0000001/common.pt"),
    ],
)
def test_a_pickle_payload_is_never_unpickled(models, tmp_path, capsys, form, file):
    layout = ["--tensor", "2", "--pipeline", "5"] if form == "megatron" else []
    assert run(models["qwen2", False], tmp_path / "mid", "--to", form, *layout) == 0
    trace = tmp_path / "trace"
    path = plant(tmp_path / "mid", file, trace)
    line = refusal(capsys, tmp_path / "mid", tmp_path / "back", "--to", "hf")
    assert str(path) in line and "never loaded" in line
    assert not trace.exists() and not (tmp_path / "back").exists()
    if path.suffix == ".pt":  # else the test could not fail
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trace.exists()


def test_a_pickle_payload_beside_deepspeeds_states_is_never_unpickled(models, tmp_path, capsys):
    source, trace = tmp_path / "ds", tmp_path / "trace"
    shutil.copytree(models["qwen2", True], source)
    (source / "latest").write_text("step1")
    (source / "step1").mkdir()
    for name in (
        "zero_pp_rank_0_mp_rank_00_model_states",
        "zero_pp_rank_0_mp_rank_00_optim_states",
    ):
        torch.save({}, source / "step1" / f"{name}.pt")
    extra = source / "step1" / "a_model_states.pt"
    extra.write_bytes(pickle.dumps(Touches(trace)))
    line = refusal(capsys, source, tmp_path / "back", "--to", "hf")
    assert str(extra) in line and "never loaded" in line and not trace.exists()


def test_bad_input_is_told_before_any_work(models, tmp_path, capsys):
    source, x = models["qwen2", True], tmp_path / "x"
    assert "--tensor 4 does not divide the model's 6 attention heads" in refusal(
        capsys, source, x, "--to", "megatron", "--tensor", "4"
    )
    megatron = (source, x, "--to", "megatron")
    assert (
        "--pipeline = 2 does not divide the model's 5 layers: use 1 or 5, or set "
        "--first-stage-layers and --last-stage-layers"
    ) in refusal(capsys, *megatron, "--pipeline", "2")
    assert "--pipeline = 2 with --first-stage-layers = 6" in refusal(
        capsys, *megatron, "--pipeline", "2", "--first-stage-layers", "6"
    )
    assert "no size such as" in refusal(capsys, source, x, "--to", "hf", "--shard-size", "5")
    assert "is no Hugging Face folder" in refusal(capsys, tmp_path, x, "--to", "hf")
    assert "holds what is converted" in refusal(capsys, source, source, "--to", "hf", "--overwrite")
    x.mkdir()
    (x / "mine").touch()
    assert "exists" in refusal(capsys, source, x, "--to", "hf")
    (x / "config.json").touch()  # as a model's folder has, but not one of this tool
    assert "was not made by" in refusal(capsys, source, x, "--to", "hf", "--overwrite")
    assert sorted(path.name for path in x.iterdir()) == ["config.json", "mine"]


def test_only_a_conversion_as_it_was_written_is_overwritten(models, tmp_path, capsys):
    source, x = models["qwen2", True], tmp_path / "x"
    again = (source, x, "--to", "hf", "--overwrite")
    assert run(source, x, "--to", "hf") == run(*again) == 0
    assert_same(source, x)
    (x / "notes.txt").write_text("mine")
    assert "added or changed since (notes.txt)" in refusal(capsys, *again)
    (x / "notes.txt").rename(tmp_path / "notes.txt")
    config = (x / "config.json").read_text()
    (x / "config.json").write_text(config.replace("{", "{ ", 1))
    assert "added or changed since (config.json)" in refusal(capsys, *again)
    assert (x / "config.json").read_text() != config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("megatron --pipeline 2 --first-stage-layers -1", "--first-stage-layers: must be"),
        ("megatron --pipeline 2 --first-stage-layers 0", "--first-stage-layers: must be"),
        ("torch_dist --pipeline 2 --last-stage-layers 0", "--last-stage-layers: must be"),
        ("megatron --first-stage-layers 2", "need --pipeline of 2 or more"),
        ("megatron --tensor 0", "--tensor: must be"),
        ("hf --tensor 4", "--tensor: is not for --to hf"),
        ("hf --layer-spec local", "--layer-spec: is not for --to hf"),
        ("torch_dist --shard-size 1GB", "--shard-size: is not for --to torch_dist"),
        ("megatron --as token-classification", "--as: is not for --to megatron"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(models, tmp_path, capsys, arguments, message):
    source, x = models["qwen2", True], tmp_path / "x"
    assert message in refusal(capsys, source, x, "--to", *arguments.split())
    assert not x.exists()


@pytest.mark.parametrize(
    ("source", "more", "line"),
    [
        ("no.gguf", [], "SOURCE: no such file: no.gguf"),
        ("file", [], "SOURCE: 'file' is no Hugging Face folder"),
        ("/no/such", [], "SOURCE: '/no/such' is no Hugging Face folder"),
        ("pip:no-such-package", [], "SOURCE: package 'no-such-package' is not installed"),
        ("mid", ["--model", "no.gguf"], "--model: no such file: no.gguf"),
        ("mid", ["--model", "pip:no-such-package"], "--model: package 'no-such-package'"),
    ],
)
def test_what_is_not_there_is_told_by_the_tools_own_argument(
    tmp_path, capsys, monkeypatch, source, more, line
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "mid" / "mp_rank_00").mkdir(parents=True)
    assert refusal(capsys, source, "x", "--to", "hf", *more).startswith(f"error: {line}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_neox", "architectures": ["GPTNeoX"]}, r"'gpt_neox' (GPTNeoX)"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "warp"}}, "rope type 'warp'"),
        ({"num_hidden_layers": 6}, "lacks 9 tensors"),
        ({"num_hidden_layers": 4}, "has unknown 9 tensors"),
        ({"intermediate_size": 96}, "has shape (80, 48)"),
    ],
)
def test_another_model_is_refused_by_name(models, tmp_path, capsys, change, message):
    source = tmp_path / "changed"
    shutil.copytree(models["llama", True], source)
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    assert message in refusal(capsys, source, tmp_path / "x", "--to", "megatron")
    assert not (tmp_path / "x").exists()


def test_damaged_and_missing_files_are_named(models, tmp_path, capsys):
    mid, x = tmp_path / "mid", tmp_path / "x"
    assert run(models["qwen2", True], mid, "--to", "megatron", "--tensor", "2") == 0
    file = mid / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert str(file) in refusal(capsys, mid, x, "--to", "hf")
    file.unlink()
    assert str(file) in refusal(capsys, mid, x, "--to", "hf")
    shutil.rmtree(file.parent)
    (mid / "iter_0000001" / "mp_rank_02").mkdir()
    assert "lacks tensor rank 1 of stage 0" in refusal(capsys, mid, x, "--to", "hf")
    assert not x.exists()


def test_a_link_as_target_stays_and_its_folder_is_replaced(models, tmp_path):
    assert run(models["llama", True], tmp_path / "disk" / "old", "--to", "hf") == 0
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "old")
    for _ in range(2):
        command = (models["llama", True], tmp_path / "out", "--to", "hf", "--overwrite")
        assert run(*command) == 0
        assert (tmp_path / "out").is_symlink() and (tmp_path / "out" / "config.json").is_file()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["old"]


def test_computed_frequencies_of_old_llama_folders_are_left_out(models, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(models["llama", False], old)
    tensors = load_file(old / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, old / "model.safetensors", metadata={"format": "pt"})
    assert run(old, tmp_path / "new", "--to", "hf") == 0
    assert_same(models["llama", False], tmp_path / "new")


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        (["hf", "--verify"], {"type": "linear", "factor": 2.0}),
        (["hf"], {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}),
        (["hf"], FAMILIES["llama3-rope"]["rope"]),
        (["hf"], None),
        (["megatron"], {"type": "linear", "factor": 2.0}),
    ],
    ids=["linear", "yarn", "llama3", "none", "megatron"],
)
def test_a_config_of_the_old_kind_is_written_as_it_was_read(models, tmp_path, options, scaling):
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(models["llama", True], old)
    config = json.loads((old / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 5e5, "rope_scaling": scaling}
    (old / "config.json").write_text(json.dumps(config))
    assert run(old, new, "--to", *options) == 0
    assert json.loads((new / "config.json").read_text()) == config


def test_a_dry_run_tells_what_is_then_written(models, tmp_path, capsys):
    arguments = (models["qwen3", False], tmp_path / "x", "--to", "megatron", "--tensor", "2")
    capsys.readouterr()
    assert run(*arguments, "--dry-run") == 0
    told = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments) == 0
    for rank in ("mp_rank_00", "mp_rank_01"):
        content = torch.load(
            tmp_path / "x" / "iter_0000001" / rank / "model_optim_rng.pt", weights_only=False
        )
        nbytes = sum(tensor.nbytes for tensor in content["model"].values())
        line = next(line for line in told.splitlines() if line.endswith(rank))
        assert line.split()[:3] == [f"{nbytes:,d}", "bytes", str(len(content["model"]))]
