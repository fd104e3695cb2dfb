"""A reward that failed is no number: its answer is taken out and moves no statistic."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_amrlhf.config.schema import RolloutSection
from megatron_amrlhf.engine.integrity import NotFinite
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience import failures
from megatron_amrlhf.experience.maker import treat_truncated
from megatron_amrlhf.experience.rewarding import end_as_before
from megatron_amrlhf.experience.rewards import JUDGED, without_failures
from megatron_amrlhf.losses.grpo import group_advantages
from megatron_amrlhf.losses.reduce import global_count
from megatron_amrlhf.mask.adaptive import chosen_labels
from megatron_amrlhf.mask.statistics import whiten
from megatron_amrlhf.rewards.judge.outcomes import DOUBTS, FAILURES, REASONS
from megatron_amrlhf.types import RolloutBatch
from tests.unit.config.samples import make_config

NAN, INF = math.nan, math.inf
VALID = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()


def rewards(tokens, sequences, problem="", reasons=()):
    not_judged = torch.tensor([JUDGED] * 6)
    for row, reason in reasons:
        not_judged[row] = REASONS.index(reason)
    return without_failures(
        torch.tensor(tokens), torch.tensor(sequences), VALID, not_judged, problem
    )


TOKENS = [[1.0, 2, 3], [1, NAN, 0], [5, 0, 0], [1, 1, 0], [INF, 1, 1], [2, 0, 0]]
SEQUENCES = [2.0, NAN, 6.0, 1.0, 7.0, NAN]


def test_failed_answers_leave_the_valid_tokens():
    found = rewards(TOKENS, SEQUENCES)
    assert found.failed.tolist() == [False, True, False, False, True, True]
    assert torch.equal(found.valid, VALID & ~found.failed[:, None])
    assert found.sequences.isnan().equal(found.failed)
    assert found.sequences[~found.failed].tolist() == [2.0, 6.0, 1.0]
    assert found.tokens[found.failed].eq(0).all() and found.tokens[0].tolist() == [1.0, 2.0, 3.0]
    assert "not finite" in found.problem
    assert rewards(TOKENS, SEQUENCES, "no verdict").problem == "no verdict"


def test_every_reason_has_its_metric_and_doubts_are_no_faults():
    found = rewards(TOKENS, SEQUENCES, "", [(1, "form"), (5, "timeout"), (4, "form")])
    shares = {key: float(total / count) for key, (total, count) in found.reasons().items()}
    assert shares.keys() == {f"not_judged/{reason}" for reason in (*DOUBTS, *FAILURES)}
    assert shares.pop("not_judged/form") == 2 / 6 and shares.pop("not_judged/timeout") == 1 / 6
    assert set(shares.values()) == {0.0}
    assert found.doubted.tolist() == [False, True, False, False, True, False]
    assert torch.equal(found.where_finite().not_judged, found.not_judged)


def test_what_stands_outside_an_answer_is_not_read():
    tokens = [[1.0, 2, 3], [1, 2, NAN], [5, NAN, INF], [1, 1, 0], [1, 1, 1], [2, 0, 0]]
    found = rewards(tokens, [1.0] * 6)
    assert not found.failed.any() and found.problem == ""
    assert found.tokens.isfinite().all()


def test_an_end_token_has_the_score_of_the_token_before_it():
    rows = tuple(torch.arange(2 + length) for length in (3, 2, 1, 3))
    rollout = RolloutBatch(
        rows=rows,
        prompt_lengths=torch.full((4,), 2),
        group_ids=torch.arange(4),
        sample_ids=torch.arange(4),
        from_reference=torch.zeros(4, dtype=torch.bool),
        ended=torch.tensor([True, True, True, False]),
    )
    scores = torch.tensor([[1.0, 2, 3], [4, 5, 0], [6, 0, 0], [7, 8, 9]])
    expected = [[1.0, 2, 2], [4, 4, 0], [6, 0, 0], [7, 8, 9]]
    assert end_as_before(scores, rollout).tolist() == expected


def test_an_answer_whose_logprobs_are_not_finite_has_no_reward():
    found = rewards(TOKENS, SEQUENCES)
    logprobs, values = torch.zeros(6, 3, 2), torch.zeros(6, 4)
    logprobs[0, 1, 0], values[2, 3] = NAN, INF
    left = found.where_finite(actor=logprobs, reference=None, critic=values)
    assert left.failed.tolist() == [True, True, True, False, True, True]
    assert not left.valid[0].any() and left.sequences[3] == 1.0
    whole = rewards([[1.0, 2, 3]] * 6, [1.0] * 6)
    left = whole.where_finite(actor=torch.ones(6, 3), reference=logprobs)
    assert left.problem == "the log-probs of the reference are not finite"
    assert (left.broken, left.num_broken) == ("reference", 1)
    left = whole.where_finite(critic=values)
    assert (left.problem, left.broken) == ("the values of the critic are not finite", "critic")
    left = whole.where_finite(actor=values.new_zeros(6, 3))
    assert (left.problem, left.broken, left.num_broken) == ("", "", 0)


def truncated(kind, ended=(True, False, True, True, False, True)):
    """Rewards of six answers, the fourth of which failed, by ``rollout.truncated``."""
    tokens = [[1.0, 2, 3], [1, 2, 0], [5, 0, 0], [1, NAN, 0], [4, 1, 1], [2, 0, 0]]
    before = rewards(tokens, [2.0, 1.5, 5.0, 1.0, 2.0, 2.0])
    section = RolloutSection(truncated=kind, truncated_penalty=0.75)
    rollout = RolloutBatch(
        rows=tuple(torch.arange(2 + int(n)) for n in VALID.sum(1)),
        prompt_lengths=torch.full((6,), 2),
        group_ids=torch.arange(6) // 3,
        sample_ids=torch.arange(6),
        from_reference=torch.zeros(6, dtype=torch.bool),
        ended=torch.tensor(ended),
    )
    return before, treat_truncated(section, before, rollout)


def test_kept_truncated_answers_are_as_they_were():
    before, after = truncated("keep")
    assert after is before


def test_masked_truncated_answers_are_as_if_they_were_not_there():
    before, after = truncated("mask")
    left = torch.tensor([True, False, True, False, False, True])
    assert torch.equal(after.valid, VALID & left[:, None])
    assert torch.equal(after.sequences.isnan(), ~left)
    assert torch.equal(after.tokens[left], before.tokens[left]) and not after.tokens[~left].any()
    # So is every statistic: whitening, group means, advantages, the denominator.
    group, few = torch.arange(6) // 3, left.nonzero()[:, 0]
    assert torch.equal(
        whiten(after.tokens, after.valid)[few], whiten(before.tokens[few], VALID[few])
    )
    advantages, _ = group_advantages(after.sequences, group, True, after.valid.any(dim=1))
    alone, _ = group_advantages(before.sequences[few], group[few], True)
    assert torch.equal(advantages[few], alone) and not advantages[~left].any()
    labels = chosen_labels(after.sequences, "group", group, has_reward=after.valid.any(dim=1))
    assert torch.equal(labels[few], chosen_labels(before.sequences[few], "group", group[few]))
    assert global_count(after.valid) == VALID[few].sum()


def test_penalised_truncated_answers_have_less_reward_at_all_their_tokens():
    before, after = truncated("penalise")
    assert torch.equal(after.valid, before.valid)
    expected = [2.0, 0.75, 5.0, NAN, 1.25, 2.0]
    torch.testing.assert_close(after.sequences, torch.tensor(expected), equal_nan=True)
    fell = before.tokens - after.tokens
    assert torch.equal(fell, 0.75 * (VALID & torch.tensor([0, 1, 0, 0, 1, 0]).bool()[:, None]))


@pytest.mark.parametrize("kind", ["mask", "penalise"])
def test_where_every_answer_is_truncated(kind):
    _, after = truncated(kind, ended=[False] * 6)
    assert after.tokens.isfinite().all() and after.valid.any() == (kind == "penalise")
    assert whiten(after.tokens, after.valid).isfinite().all()


def stop(monkeypatch, rewards, step, weights, trained=True):
    """What ends a run with these rewards, or an empty text."""
    monkeypatch.setattr(failures, "gather_objects", lambda x, group: [x, x])  # two alike replicas
    monkeypatch.setattr(failures, "broadcast_object_from_last_stage", lambda x, mesh: x)
    monkeypatch.setattr(failures, "not_finite_weights", lambda role: weights)
    spec = SimpleNamespace(trainable=trained, folder="FOLDER")
    roles = {name: SimpleNamespace(spec=spec) for name in ("actor", "reference", "critic", "prm")}
    context = SimpleNamespace(
        mesh=SimpleNamespace(dp_group=None),
        config=make_config(reward={"max_failed_fraction": 0.25}),
        engine=SimpleNamespace(roles=roles),
        console=SimpleNamespace(line=print),
    )
    try:
        failures.stop_on_failures(context, rewards, step)
    except (UserError, NotFinite) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize(
    ("step", "weights", "trained", "expected"),
    [
        (
            1,
            "w",
            True,
            "UserError: step 1: the weights of the actor are not finite: w; look at FOL",
        ),
        (4, "w", True, "NotFinite: step 4: the weights of the actor are not finite: w; go on from"),
        (4, "", False, "UserError: step 4: the log-probs of the actor are not finite for 4 of 12 "),
    ],
)
def test_a_model_that_is_not_finite_ends_the_run_as_what_it_is(
    monkeypatch, step, weights, trained, expected
):
    logprobs = torch.zeros(6, 3)
    logprobs[:2] = NAN
    found = rewards([[1.0, 2, 3]] * 6, [1.0] * 6).where_finite(actor=logprobs)
    assert stop(monkeypatch, found, step, weights, trained).startswith(expected)


def test_rewards_that_failed_by_themselves_are_told_as_that(monkeypatch, capsys):
    logprobs = torch.zeros(6, 3)
    logprobs[0] = NAN  # one of six would not end the run
    found = rewards([[1.0, 2, 3]] * 6, [1.0, NAN, NAN, 1.0, NAN, 1.0], "no verdict")
    line = stop(monkeypatch, found.where_finite(critic=logprobs), 2, "")
    assert line.startswith("UserError: step 2: the reward of 8 of 12 answers failed, more than")
    assert line.endswith("no verdict")
    few = rewards([[1.0, 2, 3]] * 6, [1.0] * 6).where_finite(critic=logprobs)
    assert stop(monkeypatch, few, 2, "") == ""
    assert "the first: the values of the critic are not finite" in capsys.readouterr().out
