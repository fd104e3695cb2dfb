"""Which layers lie where."""

from __future__ import annotations

import pytest

from megatron_amrlhf.config.cut import PipelineCut


@pytest.mark.parametrize(
    "cut",
    [
        PipelineCut(),
        PipelineCut(4),
        PipelineCut(2, virtual=3),
        PipelineCut(3, first_layers=2, last_layers=4),
        PipelineCut(2, first_layers=5),
        PipelineCut(2, last_layers=1),
        PipelineCut(2, first_layers=3, last_layers=9),
    ],
)
def test_every_layer_is_in_one_chunk_and_chunks_follow_each_other(cut):
    stages = [cut.chunks(12, stage) for stage in range(cut.stages)]
    order = [stages[s][v] for v in range(cut.virtual) for s in range(cut.stages)]
    assert [layer for chunk in order for layer in chunk.layers] == list(range(12))
    assert [chunk.has_embedding for chunk in order] == [True] + [False] * (len(order) - 1)
    assert [chunk.has_head for chunk in order] == [False] * (len(order) - 1) + [True]


def test_uneven_stages():
    sizes = [len(PipelineCut(4, 1, 1, 3).chunks(10, s)[0].layers) for s in range(4)]
    assert sizes == [1, 3, 3, 3]


@pytest.mark.parametrize(
    ("cut", "expected"),
    [
        (PipelineCut(5), "parallel.pipeline = 5 does not divide the model's 12 layers: use 1, 2"),
        (PipelineCut(2, virtual=4), "parallel.virtual_stages = 2 x 4 does not divide"),
        (PipelineCut(3, first_layers=1), "parallel.first_stage_layers = 1"),
        (PipelineCut(2, first_layers=4, last_layers=4), "parallel.last_stage_layers = 4"),
        (PipelineCut(2, first_layers=13), "parallel.first_stage_layers = 13"),
        (PipelineCut(2, first_layers=12), "parallel.first_stage_layers = 12"),
        (PipelineCut(4, first_layers=6, last_layers=6), "parallel.last_stage_layers = 6"),
    ],
)
def test_layers_that_do_not_divide_are_refused(cut, expected):
    with pytest.raises(ValueError, match="12 layers") as caught:
        cut.chunks(12, 0)
    assert expected in str(caught.value)


def test_one_layer_is_one_stage():
    with pytest.raises(ValueError, match="1 layers: use 1, or set"):
        PipelineCut(2).chunks(1, 0)
