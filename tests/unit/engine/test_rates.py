"""The learning rate: that of transformers over a whole run, a closed form where a run changes."""

import math
from itertools import pairwise

import pytest
import torch
from transformers import get_scheduler

from megatron_amrlhf.config.schema import OptimizerSection
from megatron_amrlhf.engine.rates import Schedule

PEAK = 1e-3
NAMES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
FALLING = ("linear", "cosine")


def optimizer():
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)


def schedule(kind, steps, at_once=1, warmup=0):
    section = OptimizerSection(schedule=kind, warmup_steps=warmup)
    return Schedule(optimizer(), section, steps * at_once, at_once)


def rates(schedule, count):
    """The rates of the next ``count`` optimizer steps, which are taken."""
    found = []
    for _ in range(count):
        found.append(schedule.rate)
        schedule._optimizer.step()
        schedule.scheduler.step()
    return found


def resumed(kind, before, after, done, warmup=0):
    """(rates until a checkpoint, rates after it, note) of a run changed after ``done`` steps."""
    first, second = (schedule(kind, *length, warmup=warmup) for length in (before, after))
    early = rates(first, done * before[1])
    note = second.restore(first.state(), done)
    return early, rates(second, (after[0] - done) * after[1]), note


def curve(kind, progress):
    share = 1 - progress if kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return PEAK * share


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_a_whole_run_has_the_rates_of_transformers_to_the_last_bit(kind, warmup):
    theirs = optimizer()
    scheduler, expected = get_scheduler(NAMES[kind], theirs, warmup, 17), []
    for _ in range(17):
        expected.append(theirs.param_groups[0]["lr"])
        theirs.step()
        scheduler.step()
    assert rates(schedule(kind, 17, warmup=warmup), 17) == expected
    early, late, note = resumed(kind, (17, 1), (17, 1), done=9, warmup=warmup)
    assert early + late == expected and note is None


@pytest.mark.parametrize("kind", FALLING)
@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (3, 2)])
def test_another_number_of_minibatches_goes_by_the_steps_of_the_run(kind, before, after):
    """Fewer: the counter was behind the new end, and cosine rose again, linear was 0."""
    steps, done = 20, 12
    early, late, note = resumed(kind, (steps, before), (steps, after), done)
    expected = [curve(kind, k / (steps * before)) for k in range(done * before)]
    expected += [curve(kind, (done + k / after) / steps) for k in range((steps - done) * after)]
    assert early + late == pytest.approx(expected, rel=1e-9)
    assert f"to 0 over the {(steps - done) * after} that are left" in note and kind in note


@pytest.mark.parametrize("kind", FALLING)
@pytest.mark.parametrize("after", [(15, 2), (40, 2), (40, 1), (11, 7)])
@pytest.mark.parametrize("warmup", [0, 5])
def test_another_number_of_steps_spreads_what_is_left_of_the_decay(kind, after, warmup):
    before, done = (20, 2), 10
    early, late, _ = resumed(kind, before, after, done, warmup)
    behind = (20 - warmup) / (40 - warmup)
    expected = [curve(kind, behind + (1 - behind) * k / len(late)) for k in range(len(late))]
    assert late == pytest.approx(expected, rel=1e-9) and late[0] <= early[-1]
    assert all(a >= b for a, b in pairwise(early[warmup:] + late)) and late[-1] > 0


def test_twice_changed_and_put_back():
    first, second, third = schedule("cosine", 20, 4), schedule("cosine", 20), schedule("cosine", 9)
    found = rates(first, 5 * 4)
    second.restore(first.state(), 5)
    found += rates(second, 3)
    again = schedule("cosine", 20)
    assert again.restore(second.state(), 8) is None  # nothing new
    third.restore(second.state(), 8)
    assert rates(again, 12) == pytest.approx([curve("cosine", k / 20) for k in range(8, 20)])
    assert rates(third, 1) == pytest.approx([curve("cosine", 8 / 20)])
    assert all(a > b for a, b in pairwise(found))


@pytest.mark.parametrize("kind", FALLING)
def test_a_run_whose_decay_was_complete_goes_on_as_one_of_the_new_length(kind):
    _, late, note = resumed(kind, (10, 2), (40, 2), done=10)
    expected = [curve(kind, k / 80) for k in range(20, 80)]
    assert late == pytest.approx(expected, rel=1e-9) and "of the peak" in note


@pytest.mark.parametrize("after", [(20, 1), (20, 4), (40, 2)])
def test_a_warm_up_goes_on_by_the_optimizer_steps_that_were_taken(after):
    early, late, _ = resumed("linear", (20, 2), after, done=3, warmup=9)
    assert early + late[:3] == pytest.approx([PEAK * k / 9 for k in range(9)])
    rest = len(late) - 3
    assert late[3:] == pytest.approx([PEAK * (rest - k) / rest for k in range(rest)])


def test_the_constant_rate_is_constant_and_says_nothing():
    early, late, note = resumed("constant", (20, 4), (30, 1), done=10)
    assert set(early + late) == {PEAK} and note is None


@pytest.mark.parametrize("kind", FALLING)
def test_optimizer_steps_that_were_left_out_do_not_hold_the_rate_up(kind):
    """Steps without pairs: the decay was not at its end when the run was."""
    whole, some, found = schedule(kind, 10, 3), schedule(kind, 10, 3), []
    every = rates(whole, 30)
    for step in range(1, 11):
        found += rates(some, step % 4)[:1]
        some.reach(step)
    assert found == [every[3 * step - 3] for step in range(1, 11) if step % 4]
    assert some.rate == whole.rate == pytest.approx(0, abs=1e-12)
    again = schedule(kind, 20, 2)
    again.restore(whole.state() | {"last_epoch": 12, "step_count": 13}, 4)
    again.reach(5)
    assert again.rate == pytest.approx(curve(kind, 0.4 + 0.6 * 2 / 32))


@pytest.mark.parametrize("kind", FALLING)
def test_an_older_checkpoint_tells_only_how_many_optimizer_steps_were_done(kind):
    old = schedule(kind, 20, 4)
    rates(old, 40)
    state = {key: old.state()[key] for key in ("last_epoch", "step_count", "lr")}
    same, fewer = schedule(kind, 20, 4), schedule(kind, 20, 1)
    assert same.restore(state, 10) is None and "over the 10 that are left" in fewer.restore(
        state, 10
    )
    assert same.rate == old.rate and fewer.rate == pytest.approx(curve(kind, 0.5))
