"""Heads of transformers' classifiers: what is written about them, and that all of it is read."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from megatron_amrlhf.models.heads import with_form
from megatron_amrlhf.models.loading import load_stage
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.mesh import build_mesh, start_processes, stop_processes
from tests.helpers_models import make_tiny_model


@pytest.mark.parametrize("bias", [[], [0.75]])
def test_a_sequence_classifiers_bias_is_read_from_its_config(tmp_path, bias):
    make_tiny_model(tmp_path, "qwen3", tied=True, layers=2)
    tensors = load_file(tmp_path / "model.safetensors") | {"score.weight": torch.randn(1, 48)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = with_form(read_hf_config(tmp_path), "sequence-classification", 1, bias)
    (tmp_path / "config.json").write_text(json.dumps(config))
    start_processes()
    try:
        mesh, shape = build_mesh(1, 1), read_shape(config)
        hf_config = AutoConfig.from_pretrained(tmp_path)
        model = StageModel(shape, hf_config, mesh, torch.float32, 1)
        load_stage(model, 1, ShardedWeights(tmp_path), mesh)
    finally:
        stop_processes()
    found = dict(model.named_parameters())
    assert found["chunks.0.output_layer.bias"].tolist() == (bias or [0.0])
    assert torch.equal(found["chunks.0.output_layer.weight"], tensors["score.weight"])


@pytest.mark.parametrize(
    ("form", "outputs", "bias", "architecture", "more"),
    [
        (None, None, [], "Qwen2ForCausalLM", {}),
        ("token-classification", 2, [], "Qwen2ForTokenClassification", {}),
        ("sequence-classification", 1, [0.0], "Qwen2ForSequenceClassification", {}),
        (
            "sequence-classification",
            1,
            [0.5],
            "Qwen2ForSequenceClassification",
            {"score_bias": [0.5]},
        ),
    ],
)
def test_a_config_names_the_class_that_reads_the_folder(form, outputs, bias, architecture, more):
    stale = {"score_bias": [9.0], "id2label": {"0": "x"}, "num_labels": 7}
    given = {"model_type": "qwen2", "architectures": ["Other"], "hidden_size": 8} | stale
    config = with_form(given, form, outputs, bias)
    assert config["architectures"] == [architecture] and config["hidden_size"] == 8
    assert {key: config[key] for key in ("score_bias", "num_labels") if key in config} == more
    assert len(config.get("id2label", {})) == (outputs or 0)


@pytest.mark.parametrize(
    ("pad", "ends", "kept"), [(2, 2, None), (2, [1, 2], None), (0, 2, 0), (None, 2, None)]
)
def test_an_end_token_that_also_pads_would_be_skipped(pad, ends, kept):
    given = {"model_type": "qwen2", "pad_token_id": pad, "eos_token_id": ends}
    assert with_form(given, "sequence-classification", 1)["pad_token_id"] == kept
    assert with_form(given, "token-classification", 1)["pad_token_id"] == pad
