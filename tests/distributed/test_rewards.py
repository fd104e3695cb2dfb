"""Rewards of answers on real engines: several models, other tokenizers, failures, scored files."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

from megatron_amrlhf.cli import main
from megatron_amrlhf.commands import score as score_file
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.data.chat import encode_prompt
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience.reward_models import RewardModel, load_reward_models
from megatron_amrlhf.experience.rewarding import Rewarder, model_rewards
from megatron_amrlhf.models.source import ShardedWeights
from megatron_amrlhf.parallel.mesh import build_mesh
from megatron_amrlhf.report.files import read_jsonl
from megatron_amrlhf.rewards.judge.outcomes import FAILURES, REASONS
from megatron_amrlhf.types import PromptBatch, RolloutBatch
from tests.distributed.contexts import make_context
from tests.distributed.processes import run_on
from tests.distributed.runs import make_models, read_metrics, run_config, write_config, write_lines
from tests.helpers import make_tiny_tokenizer
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

TOLERANCE = 2e-4
CLOCK = ("time", "throughput/", "memory/")
WEIGHTS = {"prm_weight": 0.5, "orm_weight": 2.0, "verifiable_weight": 3.0}
QUESTION, TEXTS = "How many?", ("I say 3.\nSo 12.", "12", "It is 13.")
ANSWERS = [
    {"prompt": "What is 1 plus 2?", "steps": ["1+2=3", "So 3."], "problem_id": 1, "correct": True},
    {"prompt": "What is 1 plus 2?", "steps": ["1+2=4"], "finished": False, "problem_id": 1},
    {"problem": "And 3 plus 4?", "steps": ["It is 7.", "Yes", "7"], "problem_id": 2},
    {"prompt": "Hm?", "steps": ["no"], "truncated": True, "problem_id": 2},
    {"prompt": "Who?", "steps": ["Ann."], "problem_id": 3},
]


def add_head(folder: Path, outputs: int, seed: int, kind: str) -> None:
    """A random reward head, and in config.json what it is."""
    generator = torch.Generator().manual_seed(seed)
    weights = load_tensors(folder / "model.safetensors")
    hidden = weights["model.norm.weight"].shape[0]
    weights["head.weight"] = torch.randn(outputs, hidden, generator=generator) * 0.3
    weights["head.bias"] = torch.randn(outputs, generator=generator)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"reward_kind": kind}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, its PRM, an ORM, and a PRM with byte-level BPE tokens."""
    folder = tmp_path_factory.mktemp("rewards")
    make_models(folder, "llama")  # transformers keeps the tests' tokenizer as it is
    make_tiny_model(folder / "orm", "llama", True, seed=4)
    add_head(folder / "orm", 1, 5, "outcome")
    make_tiny_model(folder / "other", "llama", False, seed=6, vocab_size=320)
    make_tiny_tokenizer(folder / "other", vocab_size=320)
    add_head(folder / "other", 1, 7, "process")
    return folder


def config_of(folder: Path, kind: str = "grpo", **sections) -> Path:
    paths = {"path": str(folder / "prm"), "orm_path": str(folder / "orm")}
    sections.setdefault("reward_model", paths)
    sections.setdefault("reward", WEIGHTS)
    return write_config(folder, kind, **sections)


def rollout_of(tokenizer) -> tuple[RolloutBatch, PromptBatch]:
    head = encode_prompt(tokenizer, QUESTION, None)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    rows = [torch.tensor([*head, *answer, tokenizer.eos_token_id]) for answer in ids]
    rollout = RolloutBatch(
        rows=tuple(rows),
        prompt_lengths=torch.full((3,), len(head)),
        group_ids=torch.full((3,), 4),
        sample_ids=torch.arange(3),
        from_reference=torch.zeros(3, dtype=torch.bool),
        ended=torch.ones(3, dtype=torch.bool),
    )
    prompts = PromptBatch((torch.tensor(head),), torch.tensor([4]), (QUESTION,), ("12",))
    return rollout, prompts


def score_here(path: str) -> dict:
    """Every way to score the same answers, on this rank."""
    config = load_config(path)
    mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline)
    tokenizer = load_tokenizer(config.model.path)
    context = replace(make_context(config, mesh), tokenizer=tokenizer)
    models = load_reward_models(config, tokenizer)
    for model in models:
        context.role(model.role, model.folder, model.num_attributes)
    rollout, prompts = rollout_of(tokenizer)
    found = {}
    for model in models:
        found[model.role] = model_rewards(context, model, rollout, prompts)
        again = RewardModel(model.role, model.folder, model.num_attributes, tokenizer)
        found[f"{model.role} by text"] = model_rewards(context, again, rollout, prompts)
    rewarder = Rewarder(context, models)
    rewards = rewarder.score(rollout, prompts)
    if rewards is None:
        return {}
    found["verdicts"] = rewarder.verdicts(rollout, prompts).rewards
    unasked = rewarder.verdicts(rollout, replace(prompts, answers=(None,)))
    found["unasked"], found["reasons"] = unasked.rewards, unasked.not_judged
    rewarder.verifier.close()
    return found | {"sum": rewards.tokens, "sequences": rewards.sequences, "valid": rewards.valid}


def test_the_sum_has_every_reward_with_its_weight_on_every_layout(folder):
    path = config_of(folder)
    (one,) = run_on(1, score_here, str(path))
    valid, expected = one["valid"], torch.tensor([1.0, 1.0, 0.0])
    assert torch.equal(one["verdicts"], expected) and one["unasked"].isnan().all()
    assert {REASONS[place] for place in one["reasons"].tolist()} == {"no_reference"}
    assert torch.equal(one["prm by text"], one["prm"])
    assert torch.equal(one["orm by text"], one["orm"])
    assert one["orm"].std() > 0 and one["prm"].std() > 0
    whole = 2.0 * one["orm"][:, 0] + 3.0 * expected
    assert torch.allclose(one["sum"], torch.where(valid, 0.5 * one["prm"] + whole[:, None], 0.0))
    means = torch.stack([row[ok].mean() for row, ok in zip(one["prm"], valid, strict=True)])
    assert torch.allclose(one["sequences"], 0.5 * means + whole)
    path = config_of(folder, parallel={"tensor": 2, "pipeline": 2})
    first, *others = [ranks for ranks in run_on(4, score_here, str(path)) if ranks]
    assert len(others) == 1
    for found in (first, *others):
        for key in one:
            assert torch.allclose(
                found[key], one[key], rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True
            ), key


def hf_scores(folder: Path, rows) -> list[torch.Tensor]:
    """Head outputs at every position, by transformers."""
    from transformers import AutoModel  # noqa: PLC0415 - slow to import, needed here only

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    weights = ShardedWeights(folder)
    head, bias = weights.get("head.weight"), weights.get("head.bias")
    with torch.no_grad():
        hidden = [model(input_ids=row[None]).last_hidden_state[0] for row in rows]
    return [(h @ head.T + bias)[:, 0] for h in hidden]


def test_a_prm_with_other_tokens_scores_its_own_row_of_the_same_text(folder):
    path = config_of(folder, reward_model={"path": str(folder / "other")}, reward={})
    (found,) = run_on(1, score_here, str(path))
    own, policy = load_tokenizer(folder / "other"), load_tokenizer(folder / "policy")
    head = encode_prompt(own, QUESTION, None)
    for place, text in enumerate(TEXTS):
        encoded = own(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, ends = encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
        row = torch.tensor([*head, *ids, own.eos_token_id])
        (scores,) = hf_scores(folder / "other", [row])
        response = scores[len(head) :].tolist()
        # The policy has one token a character: each reads the token that holds the character.
        reads = [next(i for i, end in enumerate(ends) if end > c) for c in range(len(text))]
        expected = [response[i] for i in [*reads, reads[-1]]]  # the end token as the one before
        assert len(policy.encode(text, add_special_tokens=False)) == len(text)
        mine = found["prm"][place, : len(text) + 1].tolist()
        assert mine == pytest.approx(expected, rel=1e-3, abs=1e-3)


def numbers(folder: Path) -> list[dict]:
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if not k.startswith(CLOCK)} for line in lines]


def test_a_run_on_all_rewards_is_invariant_to_layout(folder):
    paths = {"path": str(folder / "other"), "orm_path": str(folder / "orm")}
    reward = WEIGHTS | {"outcome": "min"}
    found = {}
    for name, world, layout in (("one", 1, (1, 1)), ("four", 4, (1, 2))):
        path = config_of(folder, reward_model=paths, reward=reward)
        overrides = [f"run.name=all-{name}", "run.steps=1", f"parallel.pipeline={layout[1]}"]
        run_on(world, run_config, str(path), overrides)
        (found[name],) = numbers(folder / "runs" / f"all-{name}")
    assert found["one"].keys() == found["four"].keys()
    reasons = {k: v for k, v in found["one"].items() if k.startswith("not_judged/")}
    assert found["one"]["reward/failed_fraction"] == pytest.approx(sum(reasons.values()))
    assert reasons.keys() == {f"not_judged/{reason}" for reason in REASONS}
    assert all(reasons[f"not_judged/{reason}"] == 0 for reason in FAILURES)
    for key, value in found["one"].items():
        assert found["four"][key] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), key


def with_bad_answers(folder: Path, count: int, **reward) -> Path:
    """Four prompts a step, of which the reference answers of ``count`` cannot be read."""
    path = config_of(folder, reward=WEIGHTS | reward, run={"name": f"bad-{count}", "steps": 1})
    lines = [{"prompt": f"Say {n}", "answer": "?" if n < count else 1000 + n} for n in range(4)]
    config = json.loads(path.read_text())
    config["data"] |= {"train": str(write_lines(folder / f"bad-{count}.jsonl", lines))}
    config["data"] |= {"heldout": None}
    config["run"]["log_samples"] = 100
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("kind", ["grpo", "ppo", "dpo, pairs: all_pairs"])
def test_an_answer_whose_reward_failed_is_not_learned_from(folder, kind):
    path = with_bad_answers(folder, 1, max_failed_fraction=0.25)
    run = folder / "runs" / f"bad-{kind[:4]}"
    run_on(1, run_config, str(path), [f"algorithm={{kind: {kind}}}", f"run.name={run.name}"])
    (line,) = read_metrics(run)
    assert line["reward/failed_fraction"] == line["not_judged/bad_reference"] == 0.25
    assert line["engine/skipped_steps"] == 0
    samples = read_jsonl(run / "samples.jsonl")
    failed = [sum(sample["mask"]) for sample in samples if sample["prompt"] == "Say 0"]
    others = [sum(sample["mask"]) for sample in samples if sample["prompt"] != "Say 0"]
    assert failed == [0, 0, 0] and sum(others) > 0
    assert {sample["use"] for sample in samples if sample["prompt"] == "Say 0"} == {"failed"}


def call_main(*arguments: str) -> tuple[int, str]:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main(list(arguments))
    return code, stderr.getvalue()


def error_of(world: int, *arguments: str) -> str:
    """The one line that rank 0 leaves."""
    code, stderr = run_on(world, call_main, *arguments)[0]
    lines = [line for line in stderr.splitlines() if line.startswith("error")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


def test_too_many_failures_stop_the_run_on_every_rank(folder):
    path = with_bad_answers(folder, 2, max_failed_fraction=0.4)
    layout = ["parallel.pipeline=2", "run.name=stopped"]
    line = error_of(2, "train", str(path), "--set", *layout)
    assert "step 1: the reward of 6 of 12 answers failed, more than" in line
    assert "nothing to compare with in '?'" in line


def test_a_prompt_without_a_reference_answer_is_named(folder):
    path = config_of(folder)
    lines = write_lines(folder / "no.jsonl", [{"prompt": "a", "answer": 1}, {"prompt": "b"}])
    line = error_of(1, "train", str(path), "--set", f"data.train={lines}")
    assert "no.jsonl:2: 'answer' is missing" in line


def score_on(folder: Path, world: int, name: str, *overrides: str, answers="answers.jsonl") -> Path:
    path, out = config_of(folder), folder / name
    arguments = ["score", str(path), "--answers", str(folder / answers), "--out", str(out)]
    results = run_on(world, call_main, *arguments, "--part", "2", "--set", *overrides)
    assert all(code == 0 for code, _ in results), results
    return out


@pytest.fixture(scope="module")
def scored(folder):
    write_lines(folder / "answers.jsonl", ANSWERS)
    return score_on(folder, 1, "scored", "run.seed=0")


def test_scores_of_a_file_are_those_of_transformers(folder, scored):
    tokenizer = load_tokenizer(folder / "policy")
    tensors = load_file(scored / "scores.safetensors")
    offsets = tensors["offsets"]
    expected = []
    for answer in ANSWERS:
        head = encode_prompt(tokenizer, answer.get("prompt") or answer["problem"], None)
        text = "\n".join(answer["steps"]) + "\n" * (answer.get("finished") is False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        is_whole = not answer.get("truncated") and answer.get("finished", True)
        row = torch.tensor(head + ids + [tokenizer.eos_token_id] * is_whole)
        both = [hf_scores(folder / "prm", [row])[0], second_head(folder / "prm", row)]
        scores = torch.stack(both).mean(dim=0)[len(head) :].numpy()
        if is_whole:
            scores[-1] = scores[-2]  # an end token has the score of the token before it
        expected.append(scores)
    assert np.diff(offsets).tolist() == [len(row) for row in expected]
    assert tensors["scores"] == pytest.approx(np.concatenate(expected), rel=1e-3, abs=1e-3)
    statistics = json.loads((scored / "statistics.json").read_text())
    assert statistics["mean"] == pytest.approx(tensors["scores"].mean(), rel=1e-5)
    assert statistics["count"] == offsets[-1] and statistics["num_answers"] == 5
    lines = [json.loads(line) for line in (scored / "answers.jsonl").read_text().splitlines()]
    assert [len(line["step_scores"]) for line in lines] == [2, 1, 3, 1, 1]
    assert lines[0]["correct"] is True and [line["problem_id"] for line in lines] == [1, 1, 2, 2, 3]
    last = 1 / (1 + np.exp(-expected[0][-2]))  # the token before the end token
    assert lines[0]["step_scores"][1] == pytest.approx(last, abs=1e-3)
    assert lines[0]["orm"] == pytest.approx(tensors["orm"][0])


def second_head(folder: Path, row: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModel  # noqa: PLC0415 - slow to import, needed here only

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    weights = ShardedWeights(folder)
    with torch.no_grad():
        hidden = model(input_ids=row[None]).last_hidden_state[0]
    return hidden @ weights.get("head.weight")[1] + weights.get("head.bias")[1]


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(4, 1, 2), (4, 2, 2), (2, 1, 1)])
def test_scores_do_not_depend_on_the_layout(folder, scored, world, tensor, pipeline):
    name = f"scored-{world}{tensor}{pipeline}"
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    other = load_file(score_on(folder, world, name, *layout) / "scores.safetensors")
    for key, values in load_file(scored / "scores.safetensors").items():
        assert other[key] == pytest.approx(values, rel=TOLERANCE, abs=TOLERANCE), key


def test_scoring_goes_on_where_it_was_stopped(folder, scored, monkeypatch):
    before = load_file(scored / "scores.safetensors")
    parts = sorted((scored / "parts").glob("*.safetensors"))
    assert len(parts) == 3
    stamp = parts[0].stat().st_mtime_ns
    parts[1].write_bytes(b"cut")
    (scored / "scores.safetensors").unlink()
    score_on(folder, 1, "scored", "run.seed=0")
    assert parts[0].stat().st_mtime_ns == stamp
    after = load_file(scored / "scores.safetensors")
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_folder_with_other_scores_is_refused(folder, scored):
    path = config_of(folder)
    write_lines(folder / "others.jsonl", ANSWERS[:2])
    tokenizer = load_tokenizer(folder / "policy")
    with pytest.raises(UserError, match="holds scores with other data, rows: choose another"):
        score_file.prepare(load_config(path), tokenizer, folder / "others.jsonl", scored, 2)
    other = load_config(path, [f"reward_model.path={folder / 'other'}"])
    with pytest.raises(UserError, match="holds scores with other models: choose another"):
        score_file.prepare(other, tokenizer, folder / "answers.jsonl", scored, 2)


def offline_run(folder: Path, scored: Path, name: str, **sections) -> Path:
    mask = {"threshold": "offline", "offline_file": str(scored / "statistics.json")}
    reward = {"normalise": "none"} | sections.pop("reward", {})
    mask |= sections.pop("mask", {})
    paths = {"path": str(folder / "prm")}
    run = {"name": name, "steps": 1}
    return config_of(folder, mask=mask, reward=reward, reward_model=paths, run=run, **sections)


def test_the_threshold_of_a_run_is_the_files(folder, scored):
    scores = load_file(scored / "scores.safetensors")["scores"].astype(np.float64)
    level = {"offline_statistic": "quantile", "offline_quantile": 0.3, "delta": 0.5}
    path = offline_run(folder, scored, "offline", mask=level)
    run_on(1, run_config, str(path), [])
    for sample in read_jsonl(folder / "runs" / "offline" / "samples.jsonl"):
        assert sample["baseline"] == pytest.approx(np.quantile(scores, 0.3), abs=1e-4)
        assert sample["delta"] == pytest.approx(0.5 * scores.std(), abs=1e-4)
        assert sample["signal"] == pytest.approx(sample["token_rewards"], abs=1e-4)


def test_whitening_by_the_file_is_eq_11(folder, scored):
    scores = load_file(scored / "scores.safetensors")["scores"].astype(np.float64)
    path = offline_run(
        folder,
        scored,
        "whitened",
        reward={"normalise": "offline"},
        mask={"offline_statistic": "median", "delta": 0.5},
    )
    run_on(1, run_config, str(path), [])
    median = (np.median(scores) - scores.mean()) / scores.std()
    for sample in read_jsonl(folder / "runs" / "whitened" / "samples.jsonl"):
        expected = (np.array(sample["token_rewards"]) - scores.mean()) / scores.std()
        assert sample["signal"] == pytest.approx(expected, abs=1e-3)
        assert sample["baseline"] == pytest.approx(median, abs=1e-4) and sample["delta"] == 0.5


def test_a_run_does_not_resume_on_other_statistics(folder, scored):
    other = shutil.copytree(scored, folder / "rescored")
    path = offline_run(folder, other, "rescored")
    run_on(1, run_config, str(path), [])
    file = other / "statistics.json"
    found = json.loads(file.read_text())
    more = ["run.steps=2", "mask.offline_statistic=median"]  # a key of the configuration may change
    file.write_text(json.dumps(found | {"mean": found["mean"] + 1}))
    with pytest.raises(AssertionError, match="rescored/statistics.json is not what the checkpoint"):
        run_on(1, run_config, str(path), more)
    run_on(1, run_config, str(path), [*more, "checkpoint.accept_changed_data=true"])
    baselines = [
        sample["baseline"] for sample in read_jsonl(folder / "runs/rescored/samples.jsonl")
    ]
    expected = {round(found["mean"], 4), round(found["median"], 4)}
    assert {round(x, 4) for x in baselines} == expected


def test_a_file_of_another_prm_is_refused_before_anything_starts(folder, scored):
    path = offline_run(folder, scored, "refused")
    line = error_of(1, "train", str(path), "--set", f"reward_model.path={folder / 'other'}")
    assert "scores of another PRM" in line and not (folder / "runs" / "refused").exists()
