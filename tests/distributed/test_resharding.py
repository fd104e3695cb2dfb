"""A checkpoint taken at one layout goes on at any other: same states, same next step."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_amrlhf.checkpoint.loading import load_checkpoint
from megatron_amrlhf.checkpoint.parts import RoleParts, SavedLayout
from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.config.schema import OptimizerSection
from megatron_amrlhf.engine.weights import MASTER, MOMENTS
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.shards import MergedShards
from megatron_amrlhf.models.source import read_hf_config
from megatron_amrlhf.parallel.mesh import build_mesh
from tests.distributed.processes import run_on
from tests.distributed.small_run import VOCAB, build_engine, save_checkpoint, take_steps
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
BETA = OptimizerSection().betas[0]
HEADS = {"actor": None, "critic": 1}
# TP, stages, virtual stages, first and last stage's layers, DP
SOURCE = (2, PipelineCut(2), 2)
TARGETS = [
    (1, PipelineCut(1), 1),
    (1, PipelineCut(4), 1),
    (4, PipelineCut(1), 1),
    (1, PipelineCut(1), 4),
    (2, PipelineCut(2, virtual=2), 1),
    (1, PipelineCut(2, first_layers=3, last_layers=1), 2),
]


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden": 44, "heads": 8, "kv_heads": 4, "head_dim": 6, "intermediate": 84}
    make_tiny_model(folder, tied=request.param == "tied", vocab_size=VOCAB, layers=4, **sizes)
    return str(folder)


def next_step(engine) -> list[tuple[float, float]]:
    """Global loss and gradient norm of each role's next step (of the last stage)."""
    found = []
    for _, _, extras, norm, _ in take_steps(engine, range(2, 3)):
        loss = torch.tensor(sum(extras or []) if engine.mesh.is_last_stage else 0.0)
        dist.all_reduce(loss, group=engine.mesh.dp_group)
        found.append((loss.item() / engine.mesh.dp_size, norm))
    return found


def start(folder: str, root: str, tensor: int, cut: PipelineCut) -> list:
    """Two steps, a checkpoint, the third step and another checkpoint."""
    engine = build_engine(folder, build_mesh(tensor, cut), "float32")
    take_steps(engine, range(2))
    save_checkpoint(engine, Path(root) / "at-2", 2, {}, keep=1)
    found = next_step(engine)
    save_checkpoint(engine, Path(root) / "at-3", 3, {}, keep=1)
    return found


def go_on(folder: str, source: str, root: str, tensor: int, cut: PipelineCut, zero: int) -> list:
    """Loads, saves at once, takes the third step, saves again."""
    engine = build_engine(folder, build_mesh(tensor, cut), "float32", zero_stage=zero)
    load_checkpoint(engine, Path(source))
    save_checkpoint(engine, Path(root) / "at-2", 2, {}, keep=1)
    found = next_step(engine)
    save_checkpoint(engine, Path(root) / "at-3", 3, {}, keep=1)
    return found


def states(model: str, folder: Path, layout: tuple) -> dict[str, torch.Tensor]:
    """Masters and moments of both roles by Hugging Face name."""
    tensor, cut, data = layout
    saved = SavedLayout(tensor, cut.stages, data, cut.virtual, cut.first_layers, cut.last_layers)
    shape, found = read_shape(read_hf_config(model)), {}
    for (role, outputs), kind in product(HEADS.items(), (MASTER, *MOMENTS)):
        parts = RoleParts(folder, role, saved, shape, outputs)
        read = partial(parts.shard, kind=kind)
        weights = MergedShards(folder, shape, cut, tensor=tensor, head_outputs=outputs, shard=read)
        for name in weights.names():
            found[f"{role}.{name}.{kind}"] = weights.get(name)
    return found


def world_of(layout: tuple) -> int:
    tensor, cut, data = layout
    return tensor * cut.stages * data


def assert_near(found: list, wanted: list) -> None:
    for steps, expected in zip(found, wanted, strict=True):
        assert steps == pytest.approx(expected, rel=TOLERANCE)


def assert_same_gradients(before: dict, after: dict, found: dict) -> None:
    """The step's clipped gradients, from Adam's first moments, of which those before are equal."""
    moments = [name for name in before if name.endswith(".exp_avg")]
    assert moments
    for name in moments:
        gradient = (after[name] - BETA * before[name]) / (1 - BETA)
        off = (found[name] - after[name]).abs().max() / (1 - BETA)
        assert off <= TOLERANCE * gradient.abs().max(), name


def last_of(results: list) -> list:
    """What the last rank, one of a last stage, has returned."""
    return results[-1]


def test_every_layout_goes_on_alike_and_back(model, tmp_path):
    first = last_of(run_on(8, start, model, str(tmp_path / "source"), *SOURCE[:2]))
    at_2, at_3 = (tmp_path / "source" / x for x in ("at-2/step-2", "at-3/step-3"))
    wanted, wanted_after = states(model, at_2, SOURCE), states(model, at_3, SOURCE)
    assert any(not torch.equal(wanted[name], wanted_after[name]) for name in wanted)
    for number, target in enumerate(TARGETS):
        root, zero = tmp_path / str(number), (3, 0, 1)[number % 3]
        arguments = (model, str(at_2), str(root), *target[:2], zero)
        assert_near(last_of(run_on(world_of(target), go_on, *arguments)), first)
        same = states(model, root / "at-2" / "step-2", target)
        assert same.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(same[name], wanted[name])] == []
        assert_same_gradients(wanted, wanted_after, states(model, root / "at-3" / "step-3", target))
    # From the last of these back to where it came from.
    back = tmp_path / "back"
    arguments = (model, str(root / "at-2" / "step-2"), str(back), *SOURCE[:2], 3)
    assert_near(last_of(run_on(8, go_on, *arguments)), first)
    for at, expected in (("at-2/step-2", wanted), ("at-3/step-3", wanted_after)):
        found = states(model, back / at, SOURCE)
        assert [x for x in expected if not torch.equal(found[x], expected[x])] == []


def refuse(folder: str, source: str) -> str:
    engine = build_engine(folder, build_mesh(1, 1), "float32")
    with pytest.raises(UserError) as caught:
        load_checkpoint(engine, Path(source))
    return str(caught.value)


@pytest.mark.parametrize(
    "other", [{"hidden": 40}, {"layers": 3}, {"vocab_size": 133}, {"intermediate": 82}]
)
def test_another_models_checkpoint_is_refused(tmp_path, other):
    sizes = {"hidden": 44, "layers": 4, "vocab_size": VOCAB, "intermediate": 84}
    make_tiny_model(tmp_path / "saved", tied=True, **sizes)
    make_tiny_model(tmp_path / "other", tied=True, **sizes | other)
    run_on(2, start, str(tmp_path / "saved"), str(tmp_path / "source"), 2, PipelineCut(1))
    source = tmp_path / "source" / "at-2" / "step-2"
    (message,) = run_on(1, refuse, str(tmp_path / "other"), str(source))
    assert "another model" in message and str(source) in message
