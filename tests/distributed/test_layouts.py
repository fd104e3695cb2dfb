"""The engine at every layout against plain torch on Hugging Face's model in float64.

Loss, norm, every gradient and the weights at three clipped steps. In CI a set that covers all
pairs of choices; the product of all is run by ``python -m tests.distributed.full_layouts``.
"""

from __future__ import annotations

import pytest

from tests.distributed.layouts import FIRST_MASKED, MODELS, ROWS_A_STEP, covering
from tests.distributed.parity_world import World, assert_close

pytestmark = pytest.mark.distributed

CHOICES = covering()


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    layouts = {choice.layout_name: choice.layout for choice in CHOICES}

    def cases(layout: str):
        found = [choice.case for choice in CHOICES if choice.layout_name == layout]
        return sorted(set(found), key=lambda case: (str(case.cut), case.name))

    folder = tmp_path_factory.mktemp("layouts")
    return World(folder, MODELS, ROWS_A_STEP, FIRST_MASKED, layouts, cases)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: f"{c.layout_name}/{c.case.name}")
def test_every_layout_gives_the_reference(world, choice):
    assert_close(world.differences(choice.layout_name, choice.case))
