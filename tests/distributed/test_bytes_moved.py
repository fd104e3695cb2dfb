"""What planning/bytes_moved.py and planning/weights.py say, against what a rank does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.parallel.mesh import build_mesh
from megatron_amrlhf.studies.engine_speed import RankReport, Workload, measure
from tests.distributed.contexts import make_config
from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

TOLERANCE = 0.02  # of a phase's bytes
SMALLEST_SHARE = 0.01  # of a phase's bytes, for a kind of operation to be judged by itself
LARGEST_RATIO = 0.6  # of the memory at DP 2 to that at DP 1
MODEL = {
    "vocab_size": 259,  # not divisible by TP
    "hidden": 128,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 16,
    "intermediate": 336,
    "layers": 4,
}
WORK = Workload(answers=12, prompt_tokens=9, new_tokens=6, repeats=0, counts=True)
LAYOUTS = {  # (TP, PP, DP, sequence parallel, tied)
    "tp1-pp2-dp2": (1, 2, 2, False, True),
    "tp2-pp1-dp2": (2, 1, 2, False, False),
    "tp2-pp1-dp2-sp": (2, 1, 2, True, False),
}
SHARING = {
    "zero3": {},
    "zero3-microbatch-gather": {"gather": "microbatch"},
    "zero3-microbatch-reduce": {"reduce": "microbatch"},
    "zero3-microbatch-both": {"gather": "microbatch", "reduce": "microbatch"},
    "zero3-recompute": {"gather": "microbatch", "recompute": "full", "logit_positions": 8},
    "zero1": {"zero_stage": 1},
    "zero0": {"zero_stage": 0, "reduce": "microbatch"},
}


def measure_all(folder: str, layout: tuple, work: Workload, names: list[str]) -> dict:
    """Reports of this rank by the name of how weights are shared."""
    tensor, pipeline, _, sequence, _ = layout
    mesh = build_mesh(tensor, PipelineCut(pipeline), sequence)
    parallel = {"tensor": tensor, "pipeline": pipeline, "sequence": sequence}
    reports = {}
    for name in names:
        engine = {"micro_batch_size": 2, **SHARING[name]}
        config: Config = make_config(
            folder,
            mesh,
            {"kind": "ppo"},
            parallel=parallel,
            engine=engine,
            rollout={"micro_batch_size": 4},
        )
        reports[name] = measure(config, Path(folder), work, mesh)
    return reports


@pytest.fixture(scope="module", params=LAYOUTS, ids=list(LAYOUTS))
def reports(request, tmp_path_factory) -> list[dict[str, RankReport]]:
    layout = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder, tied=layout[4], **MODEL)
    world = layout[0] * layout[1] * layout[2]
    return run_on(world, measure_all, str(folder), layout, WORK, list(SHARING))


@pytest.mark.parametrize("sharing", SHARING)
def test_counted_bytes_are_the_analytic_ones(reports, sharing):
    for rank, report in enumerate(each[sharing] for each in reports):
        for phase, counted in report.counted.items():
            analytic = report.analytic[phase]
            whole = sum(analytic.values())
            assert abs(sum(counted.values()) - whole) <= TOLERANCE * whole, (rank, phase)
            for key in counted.keys() | analytic.keys():
                pair = counted.get(key, 0.0), analytic.get(key, 0.0)
                if max(pair) > SMALLEST_SHARE * whole:
                    assert pair[0] == pytest.approx(pair[1], rel=TOLERANCE), (rank, phase, key)


def test_two_replicas_hold_little_more_than_half(tmp_path):
    """Few tokens, so that parameters, gradients and the optimizer dominate."""
    make_tiny_model(tmp_path, **{**MODEL, "hidden": 256, "intermediate": 700, "layers": 8})
    work = replace(WORK, answers=2, prompt_tokens=3, new_tokens=2)
    sharing = "zero3-microbatch-both"
    found = {}
    for data in (1, 2):
        layout = (1, 1, data, False, False)
        ranks = run_on(data, measure_all, str(tmp_path), layout, work, [sharing])
        found[data] = [rank[sharing] for rank in ranks]
        for report in found[data]:
            # Beside what is held: the update's copies of the gradients, activations.
            held = report.analytic_bytes["update"]
            assert held < report.peak_bytes["update"] < 1.5 * held
    one = found[1][0].peak_bytes["update"]
    assert all(two.peak_bytes["update"] < LARGEST_RATIO * one for two in found[2])
    assert all(two.peak_bytes["update"] > 0.4 * one for two in found[2])
