"""Dense rewards by every choice of the config against plain Python, one token after the other."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from types import SimpleNamespace

import pytest
import torch

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.experience.dense import DenseRewards, make_dense
from megatron_amrlhf.mask.threshold import RunningBaseline
from megatron_amrlhf.rewards.offline import OfflineScores
from megatron_amrlhf.rewards.steps import StepCutter
from megatron_amrlhf.types import RolloutBatch, ScoredBatch
from tests.helpers_models import tiny_tokenizer
from tests.unit.config.samples import make_config

TOKENIZER = tiny_tokenizer()
TOLERANCE = 1e-5  # float32 against Python's floats
UNREAD = 77.0  # stands where nothing may be read
OFFLINE = OfflineScores(baseline=0.35, mean=0.15, std=0.6)


@dataclass(frozen=True)
class Answer:
    """An answer of a token a character (and an end token, if it ended); each has its entries.

    ``steps`` are the numbers of each token's step by ``reward.step_boundary``, found by reading.
    """

    prompt: int
    text: str
    ended: bool
    rewards: list[float]
    values: list[float]
    logratios: list[float]
    steps: dict[str, list[int]]
    after: float = 0.0
    failed: bool = False


ANSWERS = [
    Answer(
        prompt=0,
        text="A.\nB",
        ended=True,
        rewards=[0.125, 1.5, -0.75, 0.25, 2.0],
        values=[0.5, -0.25, 0.75, 0.1, 0.3],
        logratios=[0.1, -0.4, 0.6, 0.05, -0.9],
        steps={"newline": [0, 0, 0, 1, 1], "sentence": [0, 0, 1, 1, 1]},
    ),
    Answer(
        prompt=0,
        text="Go. Up",
        ended=False,
        rewards=[1.0, 0.25, 0.125, -1.5, -0.5, 0.75],
        values=[0.2, 0.9, -0.6, 0.4, 0.0, -0.1],
        logratios=[-0.2, 0.3, 0.8, -0.7, 0.02, 0.4],
        steps={"newline": [0, 0, 0, 0, 0, 0], "sentence": [0, 0, 0, 1, 1, 1]},
        after=0.7,
    ),
    Answer(
        prompt=1,
        text="ab",
        ended=True,
        rewards=[UNREAD, -UNREAD, UNREAD],
        values=[UNREAD, UNREAD, -UNREAD],
        logratios=[-UNREAD, UNREAD, UNREAD],
        steps={"newline": [0, 0, 0], "sentence": [0, 0, 0]},
        failed=True,
    ),
    Answer(
        prompt=1,
        text="No\n\nYes",
        ended=True,
        rewards=[0.25, -0.25, -2.0, 0.5, 0.375, 1.25, 1.75, -1.0],
        values=[-0.3, 0.6, 0.15, -0.45, 0.8, 0.35, -0.2, 0.05],
        logratios=[0.5, 0.15, -0.35, -0.6, 0.25, 0.7, -0.1, 0.9],
        steps={"newline": [0, 0, 0, 0, 1, 1, 1, 1], "sentence": [0, 0, 1, 1, 1, 1, 1, 1]},
    ),
]
LATER = [replace(x, rewards=[1 - 0.5 * r for r in x.rewards]) for x in ANSWERS]
JUDGED = [place for place, answer in enumerate(ANSWERS) if not answer.failed]


def rectangle(rows: list[list[float]], fill: float = 0.0) -> torch.Tensor:
    width = max(len(answer.rewards) for answer in ANSWERS)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def batches(answers: list[Answer]) -> tuple[RolloutBatch, ScoredBatch]:
    ends = [[TOKENIZER.eos_token_id] if answer.ended else [] for answer in answers]
    heads = [[7] * (3 + 2 * answer.prompt) for answer in answers]
    rows = [
        torch.tensor(head + TOKENIZER.encode(answer.text, add_special_tokens=False) + end)
        for head, answer, end in zip(heads, answers, ends, strict=True)
    ]
    rollout = RolloutBatch(
        rows=tuple(rows),
        prompt_lengths=torch.tensor([len(head) for head in heads]),
        group_ids=torch.tensor([40 + answer.prompt for answer in answers]),
        sample_ids=torch.arange(len(answers)),
        from_reference=torch.zeros(len(answers), dtype=torch.bool),
        ended=torch.tensor([answer.ended for answer in answers]),
    )
    reference = rectangle([[-1.0 - 0.1 * t for t in range(len(x.rewards))] for x in answers])
    scored = ScoredBatch(
        token_rewards=rectangle([answer.rewards for answer in answers]),
        sequence_rewards=torch.tensor([torch.nan if x.failed else len(x.text) for x in answers]),
        logprobs=reference + rectangle([answer.logratios for answer in answers]),
        reference_logprobs=reference,
        values=rectangle([answer.values for answer in answers]),
        bootstrap_values=torch.tensor([answer.after for answer in answers]),
        response_mask=rollout.response_mask & torch.tensor([[not x.failed] for x in answers]),
    )
    return rollout, scored


def dense_of(
    config: Config, answers: list[Answer] = ANSWERS, running: RunningBaseline | None = None
) -> DenseRewards:
    context = SimpleNamespace(config=config, mesh=SimpleNamespace(dp_group=None))
    rollout, scored = batches(answers)
    cutter = StepCutter(TOKENIZER, config.reward.step_boundary)
    running = running or RunningBaseline(config.mask.running_decay)
    dense = make_dense(context, scored, rollout, running=running, cut_steps=cutter, offline=OFFLINE)
    assert torch.equal(dense.sequence_rewards[JUDGED], scored.sequence_rewards[JUDGED])
    return dense


@dataclass(frozen=True)
class Plain:
    """What is expected of one answer."""

    signal: list[float]
    baseline: float
    delta: float
    signs: list[int]
    messages: list[int]
    message_rewards: list[float]
    shaped: list[float]


def plain_dense(
    config: Config, answers: list[Answer], past: float | None = None
) -> list[Plain | None]:
    """What is expected of each answer, None for one that failed; ``past`` is b one step before."""
    judged = [answer for answer in answers if not answer.failed]
    raw = [reward for answer in judged for reward in answer.rewards]
    shift, scale = {
        "none": (0.0, 1.0),
        "batch": (fmean(raw), pstdev(raw)),
        "offline": (OFFLINE.mean, OFFLINE.std),
    }[config.reward.normalise]
    rewards = [[(r - shift) / scale for r in answer.rewards] for answer in answers]
    signals = []
    for answer, own in zip(answers, rewards, strict=True):
        units = list(range(len(own)))  # messages exist after the cut only
        if config.reward.granularity != "message":
            units = plain_units(config, answer)
        signals.append(plain_signal(config, answer, *plain_rewards(config, own, units)))
    told = [x for x, answer in zip(signals, answers, strict=True) if not answer.failed]
    deviation = pstdev(itertools.chain(*told))
    by_file = config.mask.threshold == "offline"
    delta = config.mask.delta
    if config.mask.delta_unit == "deviations":
        delta *= OFFLINE.std / scale if by_file else deviation
    mean, found = fmean(itertools.chain(*told)), []
    for answer, signal, own in zip(answers, signals, rewards, strict=True):
        if answer.failed:
            found.append(None)
            continue
        group = [
            x
            for other, row in zip(answers, signals, strict=True)
            if other.prompt == answer.prompt and not other.failed
            for x in row
        ]
        decay = config.mask.running_decay
        baseline = {
            "fixed": config.mask.fixed_value,
            "offline": (OFFLINE.baseline - shift) / scale,
            "running": mean if past is None else decay * past + (1 - decay) * mean,
            "batch": mean,
            "sequence": fmean(signal),
            "group": fmean(group),
        }[config.mask.threshold]
        signs = plain_signs(signal, baseline, delta, config.mask.neutral)
        messages = plain_runs(signs)
        is_message = config.reward.granularity == "message"
        units = messages if is_message else plain_units(config, answer)
        _, shaped = plain_rewards(config, own, units)
        shared = plain_shared(answer.rewards, messages, config.mask.message_reward)
        found.append(Plain(signal, baseline, delta, signs, messages, shared, shaped))
    return found


def plain_units(config: Config, answer: Answer) -> list[int]:
    return {
        "sequence": [0] * len(answer.rewards),
        "step": answer.steps[config.reward.step_boundary],
        "token": list(range(len(answer.rewards))),
    }[config.reward.granularity]


def plain_rewards(
    config: Config, rewards: list[float], units: list[int]
) -> tuple[list[float], list[float]]:
    """Each token's reward of its unit, and these where they are placed."""
    shared = plain_shared(rewards, units, config.mask.message_reward)
    if config.reward.placement == "spread":
        return shared, shared
    ends = [a != b for a, b in itertools.pairwise([*units, None])]
    return shared, [r if end else 0.0 for r, end in zip(shared, ends, strict=True)]


def plain_signal(
    config: Config, answer: Answer, rewards: list[float], placed: list[float]
) -> list[float]:
    algorithm, kind = config.algorithm, config.mask.signal
    if kind == "reward":
        return rewards
    if kind == "implicit":
        beta = 1.0 if algorithm.kind == "ppo" else algorithm.beta
        return [beta * x for x in answer.logratios]
    errors = [
        reward + algorithm.gamma * after - value
        for reward, value, after in zip(
            placed, answer.values, [*answer.values[1:], answer.after], strict=True
        )
    ]
    if kind == "td_error":
        return errors
    decay = algorithm.gamma * algorithm.gae_lambda
    return [sum(decay**k * e for k, e in enumerate(errors[t:])) for t in range(len(errors))]


def plain_signs(signal: list[float], baseline: float, delta: float, neutral: str) -> list[int]:
    signs: list[int] = []
    for x in signal:
        if x > baseline + delta:
            signs.append(1)
        elif x < baseline - delta or (delta == 0 and x == baseline):
            signs.append(-1)
        else:
            signs.append(signs[-1] if signs and neutral == "hold" else 0)
    return signs


def plain_runs(signs: list[int]) -> list[int]:
    numbers = [0]
    for before, sign in itertools.pairwise(signs):
        numbers.append(numbers[-1] + (sign != before))
    return numbers


def plain_shared(rewards: list[float], units: list[int], kind: str) -> list[float]:
    shared = []
    for unit in units:
        members = [r for r, other in zip(rewards, units, strict=True) if other == unit]
        shared.append(fmean(members) if kind == "mean" else members[-1])
    return shared


def assert_as_expected(dense: DenseRewards, expected: list[Plain | None]) -> None:
    for row, plain in enumerate(expected):
        if plain is None:
            assert not dense.signs[row].any() and not dense.shaped[row].any()
            assert not dense.message_rewards[row].any() and (dense.messages[row] == -1).all()
            continue
        length, close = len(plain.signal), {"rel": TOLERANCE, "abs": TOLERANCE}
        assert dense.signal[row, :length].tolist() == pytest.approx(plain.signal, **close)
        assert dense.baseline[row].item() == pytest.approx(plain.baseline, **close)
        assert dense.delta.item() == pytest.approx(plain.delta, **close)
        for name, rest in (("signs", 0), ("messages", -1), ("message_rewards", 0), ("shaped", 0)):
            found, wanted = getattr(dense, name)[row].tolist(), getattr(plain, name)
            assert found[:length] == pytest.approx(wanted, **close), name
            assert set(found[length:]) <= {rest}, name


PPO = {"gamma": 0.9, "gae_lambda": 0.8}
CASES: dict[str, dict[str, dict]] = {
    "td-error": {"algorithm": PPO, "mask": {"signal": "td_error"}},
    "advantage": {"algorithm": PPO, "mask": {"signal": "advantage"}},
    "implicit-ppo": {"mask": {"signal": "implicit"}},
    "implicit-dpo": {
        "algorithm": {"kind": "dpo", "beta": 0.3},
        "mask": {"signal": "implicit"},
    },
    "implicit-kto": {
        "algorithm": {"kind": "kto", "beta": 0.7},
        "mask": {"signal": "implicit"},
    },
}
for threshold in ("fixed", "running", "batch", "sequence", "group", "offline"):
    # 0.25 is a reward, so that with delta 0 the tie is bad
    for delta in (0.0, 0.4):
        mask = {"threshold": threshold, "fixed_value": 0.25, "delta": delta}
        CASES[f"{threshold}-delta-{delta}"] = {"reward": {"normalise": "none"}, "mask": mask}
for normalise, threshold in (("batch", "fixed"), ("offline", "batch"), ("offline", "offline")):
    mask = {"threshold": threshold, "delta": 0.3, "fixed_value": 0.1}
    CASES[f"normalise-{normalise}-{threshold}"] = {
        "reward": {"normalise": normalise},
        "mask": mask,
    }
for unit, neutral in itertools.product(("signal", "deviations"), ("drop", "hold")):
    # in signal units some rewards are exactly at a level: neutral
    mask = {"threshold": "fixed", "delta": 0.5, "fixed_value": 0.25}
    CASES[f"delta-in-{unit}-{neutral}"] = {
        "reward": {"normalise": "none"},
        "mask": {**mask, "delta_unit": unit, "neutral": neutral},
    }
for unit, place, kind in itertools.product(
    ("sequence", "newline", "sentence", "token", "message"), ("last", "spread"), ("mean", "last")
):
    boundary = unit if unit in ("newline", "sentence") else "newline"
    granularity = "step" if unit == boundary else unit
    reward = {"granularity": granularity, "step_boundary": boundary, "placement": place}
    mask = {"message_reward": kind, "delta": 0.4, "neutral": "drop"}
    CASES[f"{unit}-{place}-{kind}"] = {"reward": reward, "mask": mask}
    if kind == "mean":
        for signal in ("td_error", "advantage"):
            CASES[f"{unit}-{place}-{signal}"] = {
                "algorithm": PPO,
                "reward": reward,
                "mask": mask | {"signal": signal},
            }


@pytest.mark.parametrize("name", CASES)
def test_every_choice_is_what_plain_python_says(name):
    config = make_config(**CASES[name])
    expected = plain_dense(config, ANSWERS)
    assert_as_expected(dense_of(config), expected)
    assert len({sign for plain in expected if plain for sign in plain.signs}) > 1


def test_the_table_has_a_neutral_token_before_between_and_after_others():
    expected = plain_dense(make_config(**CASES["delta-in-signal-drop"]), ANSWERS)
    signs = [plain.signs for plain in expected if plain]
    assert any(row[0] == 0 for row in signs) and any(row[-1] == 0 for row in signs)
    assert any(0 in row[1:-1] for row in signs)
    held = plain_dense(make_config(**CASES["delta-in-signal-hold"]), ANSWERS)
    assert [plain.signs for plain in held if plain] != signs


def test_a_running_threshold_goes_on_from_its_state():
    sections = {"mask": {"threshold": "running", "running_decay": 0.6, "delta": 0.4}}
    config = make_config(**sections, reward={"normalise": "none"})
    running = RunningBaseline(config.mask.running_decay)
    first = plain_dense(config, ANSWERS)
    assert_as_expected(dense_of(config, ANSWERS, running), first)
    state = running.state_dict()
    second = plain_dense(config, LATER, past=first[0].baseline)
    assert_as_expected(dense_of(config, LATER, running), second)
    restored = RunningBaseline(config.mask.running_decay)
    restored.load_state_dict(state)
    assert_as_expected(dense_of(config, LATER, restored), second)
    fresh = dense_of(config, LATER)
    assert abs(fresh.baseline[0].item() - second[0].baseline) > 0.1
    assert any(
        fresh.signs[row, : len(plain.signs)].tolist() != plain.signs
        for row, plain in enumerate(second)
        if plain
    )
