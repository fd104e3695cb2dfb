"""Offline DPO and rejection sampling on a file of pairs: its scores, a PRM, or no rewards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.scored_pairs import load_scored_pairs
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.report.files import read_jsonl
from tests.distributed.runs import (
    assert_same_numbers,
    numbers,
    pair_lines,
    start,
    write_config,
    write_lines,
)
from tests.helpers import make_tiny_tokenizer
from tests.helpers_models import make_tiny_model
from tests.reference import add_head

pytestmark = pytest.mark.distributed

LAYOUT = (2, 2, 2)  # TP, PP, DP
PAIRS_PER_STEP = 4
VOCAB_SIZE, HIDDEN = 320, 48
# float32 on both sides, sums of some 20 log-probs
TOLERANCE = 1e-3
RUNS = {  # kind, where rewards come from, mask
    "dpo-scores": ("dpo", "file", "adaptive"),
    "sampling-scores": ("rejection_sampling", "file", "adaptive"),
    "dpo-model": ("dpo", "model", "adaptive"),
    "dpo-plain": ("dpo", "none", "none"),
}


def scored_lines() -> list[dict]:
    """Two sentences each; the first of a chosen answer is good, that of a rejected one bad."""
    return [
        {
            "prompt": f"What is {a} plus {b}?",
            "chosen": f"It is {a + b}. Right",
            "rejected": f"I say {a}! So there",
            "chosen_scores": [[4, 1]] * 5,
            "rejected_scores": [0, 3],
        }
        for a in (1, 2, 3)
        for b in (4, 5, 30)
    ]


class World:
    """A run of each kind on one process."""

    def __init__(self, folder: Path):
        self.folder = folder
        for model, seed in (("policy", 1), ("prm", 2)):
            make_tiny_model(folder / model, "qwen2", True, seed, vocab_size=VOCAB_SIZE)
            make_tiny_tokenizer(folder / model, VOCAB_SIZE)
        add_head(folder / "prm", HIDDEN, outputs=2, seed=3)
        self.data = {
            "file": write_lines(folder / "scored.jsonl", scored_lines()),
            "model": write_lines(folder / "plain.jsonl", pair_lines()),
        }
        self.data["none"] = self.data["model"]
        self.runs = {name: self.start(name, 1, 1, 1) for name in RUNS}

    def start(self, name: str, tp: int, pp: int, dp: int) -> Path:
        kind, rewards, mask = RUNS[name]
        data = str(self.data[rewards])
        config = write_config(
            self.folder,
            kind,
            run={"name": name, "log_samples": 100},
            data={"format": "pairs", "train": data, "heldout": data},
            rollout={"prompts_per_step": PAIRS_PER_STEP},
            mask={"kind": mask},
            reward={"normalise": "none"},
        )
        settings = json.loads(config.read_text())
        if rewards != "model":
            settings["reward_model"] = {}
        config.write_text(json.dumps(settings))
        return start(self.folder, config, tp, pp, dp)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("offline"))


@pytest.mark.parametrize("name", RUNS)
def test_run_is_invariant_to_layout(world, name):
    assert_same_numbers(world.runs[name], world.start(name, *LAYOUT))
    if name.startswith("dpo"):  # in the first step policy and reference agree
        assert numbers(world.runs[name])[0]["dpo/accuracy"] == 0.5


def test_metrics(world):
    for name, (kind, rewards, mask) in RUNS.items():
        lines = numbers(world.runs[name])
        assert len(lines) == 2
        assert {"loss/policy", "eval/pair_margin", "eval/chosen_nll"} <= lines[-1].keys()
        online = {"kl/ref_nats", "eval/reward_mean", "selection/per_prompt"}
        assert not any(online & line.keys() for line in lines)
        assert all(("reward/mean" in line) == (rewards != "none") for line in lines)
        assert all((line["mask/kept_fraction"] == 1) == (mask == "none") for line in lines)
        if kind == "dpo":
            assert math.isclose(lines[0]["loss/policy"], math.log(2), abs_tol=1e-6)
            assert lines[1]["loss/policy"] < math.log(2)


def test_scores_cut_the_answers_where_the_file_says(world):
    for name in ("dpo-scores", "sampling-scores"):
        samples = read_jsonl(world.runs[name] / "samples.jsonl")
        both = name == "dpo-scores"
        assert len(samples) == 2 * PAIRS_PER_STEP * 2
        uses = ["chosen", "rejected" if both else "none"] * (len(samples) // 2)
        assert [sample["use"] for sample in samples] == uses
        for sample in samples:
            is_chosen = sample["chosen"]
            assert sample["prompt"].startswith("What is ") and "<" not in sample["prompt"]
            assert sample["prompt"] in sample["rendered"] != sample["prompt"]
            scores, second = ([1.0, 0.25], "Right") if is_chosen else ([0.0, 0.75], "So there")
            border = sample["answer"].index(second) - 1  # its white space belongs to it
            place, expected = 0, []
            for token in sample["tokens"]:
                expected.append(place >= border)
                place += len(token)
            assert True in expected and False in expected
            assert sample["token_rewards"] == [scores[is_second] for is_second in expected]
            learns = sample["use"] != "none"
            assert sample["mask"] == [int(learns and not is_second) for is_second in expected]


def test_a_prm_scores_pairs_without_scores(world):
    samples = read_jsonl(world.runs["dpo-model"] / "samples.jsonl")
    assert all(len(set(sample["token_rewards"])) > 1 for sample in samples)


def test_an_orm_adds_to_the_files_scores(world):
    """The scores stand for a PRM's: each reward has its weight in the sum."""
    make_tiny_model(world.folder / "orm", "qwen2", True, 4, vocab_size=VOCAB_SIZE)
    make_tiny_tokenizer(world.folder / "orm", VOCAB_SIZE)
    add_head(world.folder / "orm", HIDDEN, outputs=1, seed=5)
    config = json.loads((world.folder / "dpo-scores.yaml").read_text())
    config["run"]["name"] = "dpo-scores-orm"
    config["reward_model"] = {"orm_path": str(world.folder / "orm")}
    config["reward"] |= {"prm_weight": 0.5, "orm_weight": 2.0}
    path = world.folder / "dpo-scores-orm.yaml"
    path.write_text(json.dumps(config))
    samples = read_jsonl(start(world.folder, path, 1, 1, 1) / "samples.jsonl")
    alone = read_jsonl(world.runs["dpo-scores"] / "samples.jsonl")
    assert len(samples) == len(alone)
    wholes = []
    for sample, scores in zip(samples, alone, strict=True):
        pairs = zip(sample["token_rewards"], scores["token_rewards"], strict=True)
        found = [reward - 0.5 * score for reward, score in pairs]
        assert found == pytest.approx([found[0]] * len(found), abs=TOLERANCE)
        wholes.append(found[0])
    assert len({round(x, 2) for x in wholes}) > 2


@pytest.mark.parametrize("name", ["dpo-plain", "dpo-scores"])
def test_held_out_margin_equals_hugging_faces(world, name):
    """Of the exported policy against the reference, summed over each whole answer."""
    line = numbers(world.runs[name])[-1]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (world.runs[name] / "export", world.folder / "policy")
    )
    section = DataSection(train="unused", max_prompt_tokens=100, max_row_tokens=160)
    path = world.data[RUNS[name][1]]
    tokenizer = load_tokenizer(world.folder / "policy")
    margins = []
    pairs, _ = load_scored_pairs(
        path, tokenizer, section, attribute_weights=None, needs_scores=False
    )
    for scored in pairs[:PAIRS_PER_STEP]:
        pair, sums = scored.pair, []
        for row in (pair.chosen, pair.rejected):
            for model in (policy, reference):
                with torch.no_grad():
                    logprobs = model(row[None]).logits[0, :-1].log_softmax(dim=-1)
                picked = logprobs.gather(1, row[1:, None])[pair.prompt_length - 1 :]
                sums.append(float(picked.sum()))
        margins.append(sums[0] - sums[1] - (sums[2] - sums[3]))
    mean = sum(margins) / len(margins)
    assert mean > 0
    assert math.isclose(line["eval/pair_margin"], mean, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
