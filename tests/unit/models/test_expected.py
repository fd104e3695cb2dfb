"""What a folder of weights lacks is told from its headers, before anything is read."""

import json

import pytest
from safetensors.torch import load_file, save_file

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.expected import check_weights
from tests.helpers_models import make_tiny_model


@pytest.fixture
def folder(tmp_path):
    make_tiny_model(tmp_path / "tiny", "qwen2")
    return tmp_path / "tiny"


def change(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def with_tensors(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_complete_folder_passes(folder):
    check_weights(folder, None)
    check_weights(folder, 1)
    with_tensors(folder, lambda weights: weights.pop("lm_head.weight"))
    check_weights(folder, 1)  # a linear head stands in its place
    with pytest.raises(UserError, match="no tensor 'lm_head.weight'"):
        check_weights(folder, None)
    change(folder, tie_word_embeddings=True)
    check_weights(folder, None)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("factor", [0.5, 2])
def test_sizes_of_another_model_are_named(folder, key, factor):
    config = json.loads((folder / "config.json").read_text())
    change(folder, **{key: int(config[key] * factor)})
    with pytest.raises(UserError, match=r"has shape \(.*config\.json and this run need \(") as told:
        check_weights(folder, None)
    assert "\n" not in str(told.value)


def test_a_config_that_transformers_refuses_is_one_line(folder):
    change(folder, pad_token_id=10**6)
    with pytest.raises(UserError, match="tiny: config.json: transformers refuses it") as told:
        check_weights(folder, None)
    assert "\n" not in str(told.value)


def test_a_head_must_have_the_outputs_that_are_asked_for(folder):
    weights = load_file(folder / "model.safetensors")
    norm = weights["model.norm.weight"]

    def add_head(weights):
        weights["score.weight"] = norm.repeat(5, 1)
        weights["score.bias"] = norm[:5].clone()

    with_tensors(folder, add_head)
    check_weights(folder, 5)
    with pytest.raises(UserError, match="head.weight has shape"):
        check_weights(folder, 1)
