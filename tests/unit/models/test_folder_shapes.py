"""Folders as public models have them: the logits of transformers, or one line that refuses them."""

import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.contents import contents_line
from megatron_amrlhf.models.expected import check_weights, expected_shapes
from megatron_amrlhf.models.families import config_object
from megatron_amrlhf.models.loading import load_stage
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config, resolve_model_folder
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.mesh import build_mesh, start_processes, stop_processes
from tests.helpers_models import make_tiny_model
from tests.unit.models.public_folders import REFUSED, SAME

TOLERANCE = 2e-5  # of logits around 10: sums of 100 products in float32, in another order
IDS = torch.arange(20)[None] * 5 % 131


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes a shape's folder; tiny models are saved once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder_of(shape, target):
        key = f"{shape.family} {shape.options}"
        if key not in made:
            made[key] = root / str(len(made))
            make_tiny_model(made[key], shape.family, layers=2, **shape.options)
        shutil.copytree(made[key], target)
        for change in shape.changes:
            change(target)
        return target

    return folder_of


@pytest.fixture(scope="module")
def mesh():
    """One for all: a process group keeps its threads."""
    start_processes()
    yield build_mesh(1, 1)
    stop_processes()


@torch.no_grad()
def our_logits(folder, mesh):
    hf_config = read_hf_config(folder)
    shape = read_shape(hf_config)
    model = StageModel(shape, config_object(hf_config), mesh, torch.float32)
    load_stage(model.eval(), None, ShardedWeights(folder), mesh)
    return model(0, IDS)[:, : shape.vocab_size]


@pytest.mark.parametrize("shape", SAME, ids=lambda shape: shape.name)
def test_a_folder_computes_what_it_computes_in_transformers(shape, make, mesh, tmp_path):
    folder = resolve_model_folder(str(make(shape, tmp_path / "model")), "/nowhere")
    check_weights(folder, None)
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        expected = reference(IDS).logits[0]
    assert expected.abs().max() > 1
    torch.testing.assert_close(our_logits(folder, mesh), expected, rtol=TOLERANCE, atol=TOLERANCE)
    line = contents_line(folder, expected_shapes(read_hf_config(folder), None))
    assert shape.left in line and "\n" not in line
    assert shape.left or line.endswith("; nothing is left unread")


@pytest.mark.parametrize("shape", REFUSED, ids=lambda shape: shape.name)
def test_a_folder_that_would_compute_something_else_is_refused(shape, make, tmp_path):
    with pytest.raises(UserError, match=shape.refused) as told:
        check_weights(resolve_model_folder(str(make(shape, tmp_path / "m")), "/nowhere"), None)
    assert "\n" not in str(told.value) and re.search(str(tmp_path / "m"), str(told.value))
