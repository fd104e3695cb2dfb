"""samples.jsonl tells how every answer was cut: whitening, threshold and mask again from it."""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_amrlhf.algorithms.dpo import Dpo
from megatron_amrlhf.algorithms.grpo import Grpo
from megatron_amrlhf.algorithms.rejection_sampling import RejectionSampling
from megatron_amrlhf.experience.dense import make_dense
from megatron_amrlhf.experience.maker import Experience, ExperienceMaker, treat_truncated
from megatron_amrlhf.experience.rewards import JUDGED, without_failures
from megatron_amrlhf.experience.sample_log import log_samples
from megatron_amrlhf.losses.reduce import finish_metrics
from megatron_amrlhf.mask.threshold import RunningBaseline
from megatron_amrlhf.report.samples import SampleRecord, load_samples
from megatron_amrlhf.types import MaskedBatch, PromptBatch, RolloutBatch, ScoredBatch
from tests.helpers_models import tiny_tokenizer
from tests.unit.config.samples import PPO, make_config

TOKENIZER = tiny_tokenizer()
ALGORITHMS = {"dpo": Dpo, "rejection_sampling": RejectionSampling, "grpo": Grpo}
PROMPTS, ANSWERS, DELTA, FAILED = 3, 4, 0.3, 5
TEXTS = tuple(f"Say {n}" for n in range(PROMPTS))
TOLERANCE = 1e-6  # of float32 numbers


def rollout_and_rewards():
    """Answers of different lengths; one failed, three were cut off."""
    random = torch.Generator().manual_seed(3)
    count = PROMPTS * ANSWERS
    heads = [torch.tensor(TOKENIZER.encode(text)) for text in TEXTS for _ in range(ANSWERS)]
    lengths = torch.randint(3, 12, (count,), generator=random).tolist()
    answers = [torch.randint(5, 90, (n,), generator=random) for n in lengths]
    rollout = RolloutBatch(
        rows=tuple(torch.cat(parts) for parts in zip(heads, answers, strict=True)),
        prompt_lengths=torch.tensor([len(head) for head in heads]),
        group_ids=torch.arange(count) // ANSWERS,
        sample_ids=torch.arange(count),
        from_reference=torch.zeros(count, dtype=torch.bool),
        ended=torch.arange(count) % 4 != 2,
    )
    tokens = torch.randn(count, max(lengths), generator=random) * 2 + 1
    tokens[FAILED, 1] = torch.nan
    tokens = torch.where(rollout.response_mask, tokens, 0.0)
    whole = tokens.sum(1) / rollout.response_mask.sum(1)
    judged = torch.full((count,), JUDGED)
    return rollout, without_failures(tokens, whole, rollout.response_mask, judged, "")


def step_of(tmp_path, kind: str, log: int = 100, **sections: dict):
    """One step's front half: its log, its metrics, and mask, labels and rows learned from."""
    sections.setdefault("mask", {}).update(delta=DELTA)
    sections.setdefault("algorithm", {}).update(kind=kind)
    config = make_config(PPO, run={"log_samples": log}, **sections)
    mesh = SimpleNamespace(is_writer=True, dp_group=None, device="cpu")
    folder = SimpleNamespace(samples=tmp_path / "samples.jsonl")
    context = SimpleNamespace(config=config, mesh=mesh, tokenizer=TOKENIZER, folder=folder)
    rollout, rewards = rollout_and_rewards()
    rewards = treat_truncated(config.rollout, rewards, rollout)
    zeros = torch.zeros_like(rewards.tokens)
    scored = ScoredBatch(
        rewards.tokens, rewards.sequences, zeros, zeros, zeros, zeros[:, 0], rewards.valid
    )
    running = RunningBaseline(decay=0.9)
    experience = Experience(
        rollout,
        scored,
        make_dense(context, scored, rollout, running=running, cut_steps=None, offline=None),
    )
    maker, algorithm = object.__new__(ExperienceMaker), object.__new__(ALGORITHMS[kind])
    maker.context = algorithm.context = context
    algorithm.section, algorithm.is_offline = config.algorithm, False
    rows, labels = algorithm.choose(experience, 1)
    picked, metrics = maker.mask(experience, rows, labels)
    mask = picked.mask
    answers = rollout.select(rows)
    width = answers.response_mask.shape[1]
    batch = MaskedBatch(answers, mask[:, :width], labels, picked.has_reward)
    heads = tuple(torch.tensor(TOKENIZER.encode(text)) for text in TEXTS)
    prompts = PromptBatch(heads, torch.arange(PROMPTS), TEXTS, (None,) * PROMPTS)
    log_samples(context, 1, prompts=prompts, experience=experience, rows=rows, batch=batch)
    return load_samples(folder.samples), finish_metrics(metrics), (mask, labels, rows)


def cut_again(records: list[SampleRecord], normalise: str, threshold: str) -> list[list[int]]:
    """The mask of each answer, by the paper's equations from the records' raw rewards alone."""
    there = [record for record in records if record.has_rewards]
    raw = np.concatenate([record.token_rewards for record in there])
    mean, deviation = (raw.mean(), raw.std()) if normalise == "batch" else (0.0, 1.0)
    signals = {id(x): (np.array(x.token_rewards) - mean) / deviation for x in there}
    every = np.concatenate(list(signals.values()))
    masks = []
    for record in records:
        if not record.has_rewards or record.use == "none":
            masks.append([0] * len(record.tokens))
            continue
        mine = {
            "batch": every,
            "sequence": signals[id(record)],
            "group": np.concatenate([signals[id(x)] for x in there if x.group == record.group]),
        }[threshold]
        baseline, delta = mine.mean(), DELTA * every.std()
        assert record.signal == pytest.approx(signals[id(record)], rel=TOLERANCE, abs=TOLERANCE)
        assert record.baseline == pytest.approx(baseline, rel=TOLERANCE, abs=TOLERANCE)
        assert record.delta == pytest.approx(delta, rel=TOLERANCE)
        sign, bits = 0, []
        for x in signals[id(record)]:  # the Schmitt trigger, mask.neutral: hold
            sign = 1 if x > baseline + delta else -1 if x < baseline - delta else sign
            wanted = {"chosen": (1,), "rejected": (-1,), "both": (1, -1)}[record.use]
            bits.append(int(sign in wanted))
        masks.append(bits)
    return masks


CASES = [
    ("dpo", {"pairs": "best_worst"}, "batch", "batch", "keep"),
    ("dpo", {"pairs": "all_pairs"}, "batch", "sequence", "mask"),
    ("dpo", {"pairs": "all_pairs"}, "none", "group", "penalise"),
    ("rejection_sampling", {"select": "top_k", "k": 2}, "batch", "batch", "mask"),
    ("rejection_sampling", {}, "none", "batch", "keep"),
    ("grpo", {}, "batch", "group", "mask"),
]


@pytest.mark.parametrize(("kind", "algorithm", "normalise", "threshold", "truncated"), CASES)
def test_the_log_alone_gives_the_mask_again(
    tmp_path, kind, algorithm, normalise, threshold, truncated
):
    records, _, (mask, labels, rows) = step_of(
        tmp_path,
        kind,
        algorithm=algorithm,
        reward={"normalise": normalise},
        mask={"threshold": threshold},
        rollout={"truncated": truncated},
    )
    assert [record.sample for record in records] == list(range(PROMPTS * ANSWERS))
    found = [record.mask for record in records]
    assert found == cut_again(records, normalise, threshold) and sum(map(sum, found)) > 0
    for place, (row, label) in enumerate(zip(rows.tolist(), labels.tolist(), strict=True)):
        record = records[row]
        if record.has_rewards:
            assert record.use in ("both", "chosen" if label else "rejected")
            kept = mask[place, : len(record.tokens)].int().tolist()
            assert kept == record.mask or record.use == "both"
        else:
            assert not mask[place].any()


def test_every_answer_is_logged_with_what_became_of_it(tmp_path):
    options = {"algorithm": {"pairs": "all_pairs"}, "rollout": {"truncated": "mask"}}
    records, _, (_, labels, rows) = step_of(tmp_path, "dpo", **options)
    chosen, rejected = (set(rows[labels == x].tolist()) for x in (True, False))
    for record in records:
        expected = "chosen" if record.sample in chosen else "rejected"
        if record.sample in chosen & rejected:
            expected = "both"
        if record.sample == FAILED:
            expected = "failed"
        elif not record.ended:
            expected = "left_out"
        assert record.use == expected


def test_answers_that_are_not_picked_are_logged_too(tmp_path):
    uses = [record.use for record in step_of(tmp_path, "dpo")[0]]
    assert uses.count("chosen") == uses.count("rejected") == PROMPTS
    assert uses.count("none") == PROMPTS * (ANSWERS - 2) - 1 and uses.count("failed") == 1


def test_prompts_are_logged_as_text_and_as_the_model_reads_them(tmp_path):
    records, *_ = step_of(tmp_path, "dpo")
    for text, answers in groupby(records, lambda record: record.prompt):
        answers = list(answers)
        assert len(answers) == ANSWERS and text == TEXTS[answers[0].group]
        assert answers[0].rendered == TOKENIZER.decode(TOKENIZER.encode(text))


@pytest.mark.parametrize("count", [0, 5])
def test_as_many_as_asked_for_are_logged(tmp_path, count):
    if count:
        assert len(step_of(tmp_path, "rejection_sampling", log=count)[0]) == count
        return
    with pytest.raises(Exception, match="no samples in it yet"):
        step_of(tmp_path, "rejection_sampling", log=count)


@pytest.mark.parametrize("kind", ALGORITHMS)
@pytest.mark.parametrize("truncated", ["keep", "mask"])
def test_metrics_of_the_mask_are_of_the_answers_that_are_learned_from(tmp_path, kind, truncated):
    options = {"algorithm": {"pairs": "all_pairs"} if kind == "dpo" else {}}
    records, metrics, (mask, _, rows) = step_of(
        tmp_path, kind, rollout={"truncated": truncated}, **options
    )
    learned = [records[row] for row in rows.tolist() if records[row].has_rewards]
    messages = [x for record in learned for x in record.messages if x.sign]
    tokens = sum(x.end - x.start for x in messages)
    count = sum(len(record.tokens) for record in learned)
    empty = sum(not any(mask[i]) for i, row in enumerate(rows) if records[row].has_rewards)
    assert metrics["mask/num_messages"] == pytest.approx(len(messages) / len(learned))
    assert metrics["mask/mean_message_tokens"] == pytest.approx(tokens / len(messages))
    assert metrics["mask/kept_fraction"] == pytest.approx(int(mask.sum()) / count)
    assert metrics["mask/empty_answers"] == pytest.approx(empty / len(learned))
