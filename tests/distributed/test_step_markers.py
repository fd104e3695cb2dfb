"""A PRM that judges steps at a marker token: scored on engines, exported, used, given a file."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

from megatron_amrlhf.cli import main
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.data.chat import encode_prompt
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.experience.reward_models import load_reward_models
from megatron_amrlhf.experience.rewarding import model_rewards
from megatron_amrlhf.models.source import ShardedWeights
from megatron_amrlhf.parallel.mesh import build_mesh
from megatron_amrlhf.report.files import read_jsonl
from megatron_amrlhf.types import PromptBatch, RolloutBatch
from tests.distributed.contexts import make_context
from tests.distributed.processes import run_on
from tests.distributed.runs import make_models, run_config, write_config, write_lines
from tests.helpers import make_tiny_tokenizer
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-3  # to transformers
MARKER, OTHER_MARKER = "\u4e05", "<|endoftext|>"  # one token of each tokenizer
QUESTION = "How many?"
ANSWERS = (
    (("I say 3.", "So 12."), "I say 3.\nSo 12.", True),
    (("12",), "12", True),
    (("It is", "13", "Y"), "It is\n\n13\nY", False),
    (("Hm.",), "Hm.\n", False),
)
GIVEN = [
    {"prompt": "What is 1 plus 2?", "steps": ["1+2=3", "So 3."]},
    {"prompt": "What is 1 plus 2?", "steps": ["1+2=4"], "finished": False},
    {"prompt": "And 3 plus 4?", "steps": ["It is 7.", "Yes", "7"]},
    {"prompt": "Hm?", "steps": ["no", "n"], "truncated": True},
]


def say(folder: Path, **keys) -> None:
    """Puts keys into a model's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy, and PRMs with a marker: of its tokens, of others, and one that says nothing."""
    folder = tmp_path_factory.mktemp("markers")
    make_models(folder, "llama")
    say(folder / "prm", step_marker=MARKER, step_separator="\n")
    make_tiny_model(folder / "other", "llama", False, seed=6, vocab_size=320)
    make_tiny_tokenizer(folder / "other", vocab_size=320)
    file = folder / "other" / "model.safetensors"
    weights, generator = load_tensors(file), torch.Generator().manual_seed(7)
    size = weights["model.norm.weight"].shape[0]
    weights["head.weight"] = torch.randn(1, size, generator=generator) * 0.3
    weights["head.bias"] = torch.randn(1, generator=generator)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def config_of(folder: Path, prm: str = "prm", kind: str = "grpo", **keys) -> Path:
    return write_config(folder, kind, reward_model={"path": str(folder / prm)} | keys)


def rollout_of(tokenizer) -> tuple[RolloutBatch, PromptBatch]:
    head, count = encode_prompt(tokenizer, QUESTION, None), len(ANSWERS)
    rows = []
    for _, text, ended in ANSWERS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        rows.append(torch.tensor([*head, *ids, *[tokenizer.eos_token_id] * ended]))
    rollout = RolloutBatch(
        rows=tuple(rows),
        prompt_lengths=torch.full((count,), len(head)),
        group_ids=torch.full((count,), 4),
        sample_ids=torch.arange(count),
        from_reference=torch.zeros(count, dtype=torch.bool),
        ended=torch.tensor([ended for *_, ended in ANSWERS]),
    )
    prompts = PromptBatch((torch.tensor(head),), torch.tensor([4]), (QUESTION,), ("12",))
    return rollout, prompts


def score_here(path: str) -> torch.Tensor | None:
    config = load_config(path)
    mesh = build_mesh(config.parallel.tensor, config.parallel.pipeline)
    tokenizer = load_tokenizer(config.model.path)
    context = replace(make_context(config, mesh), tokenizer=tokenizer)
    (model,) = load_reward_models(config, tokenizer)
    context.role(model.role, model.folder, model.num_attributes)
    return model_rewards(context, model, *rollout_of(tokenizer))


def step_scores(folder: Path, marker: str, separator: str, prompt: str, steps) -> list[float]:
    """What transformers gives at the markers of a row that is put together by hand."""
    from transformers import AutoModel  # noqa: PLC0415 - slow to import, needed here only

    tokenizer = load_tokenizer(folder)
    row, places = encode_prompt(tokenizer, prompt, None), []
    for number, step in enumerate(steps):
        parts = [separator] * (number > 0) + [step, marker]
        row += [i for x in parts if x for i in tokenizer.encode(x, add_special_tokens=False)]
        places.append(len(row) - 1)
    weights = ShardedWeights(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = model(input_ids=torch.tensor([row])).last_hidden_state[0, places]
        outputs = hidden @ weights.get("head.weight").T + weights.get("head.bias")
    return outputs.mean(dim=1).tolist()


def numbers_of(steps, text: str, ended: bool) -> list[int]:
    """Of each character, and of an end token, the step."""
    numbers, place = [], 0
    for number, step in enumerate(steps):
        end = text.index(step, place) + len(step)
        while end < len(text) and text[end] == "\n":
            end += 1
        numbers += [number] * (end - place)
        place = end
    return numbers + [len(steps) - 1] * ended


@pytest.mark.parametrize(
    ("prm", "marker", "separator", "keys"),
    [
        ("prm", MARKER, "\n", {}),
        ("prm", "\u4e06", "", {"step_marker": "\u4e06", "step_separator": ""}),
        ("other", OTHER_MARKER, "\n", {"step_marker": OTHER_MARKER}),
    ],
)
def test_every_token_has_what_transformers_gives_at_its_steps_marker(
    folder, prm, marker, separator, keys
):
    path = config_of(folder, prm, **keys)
    (one,) = run_on(1, score_here, str(path))
    for row, (steps, text, ended) in enumerate(ANSWERS):
        scores = step_scores(folder / prm, marker, separator, QUESTION, steps)
        expected = [scores[number] for number in numbers_of(steps, text, ended)]
        found = one[row, : len(expected)].tolist()
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
        assert (one[row, len(expected) :] == 0).all()
    layout = {"tensor": 2, "pipeline": 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"parallel": layout}))
    found = [scores for scores in run_on(4, score_here, str(path)) if scores is not None]
    assert len(found) == 2
    for scores in found:
        assert torch.allclose(scores, one, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def exported(folder):
    """The export of a PRM that was trained with a marker."""
    data = {"step_marker": MARKER, "step_separator": "\n\n"}
    run_on(1, run_config, str(write_config(folder, "prm", data=data)), [])
    return folder / "runs" / "prm" / "export"


def test_the_export_says_what_its_numbers_mean(exported):
    found = json.loads((exported / "config.json").read_text())
    assert found["reward_kind"] == "process" and found["reward_output"] == "logit"
    assert found["step_marker"] == MARKER and found["step_separator"] == "\n\n"


def test_a_run_reads_an_exported_prm_at_its_markers(folder, exported):
    path = write_config(folder, "ppo", reward_model={"path": str(exported)})
    prompts = [{"prompt": "Say\nyes", "answer": "1"}] * 4
    data = f"data.train={write_lines(folder / 'say.jsonl', prompts)}"
    run_on(1, run_config, str(path), ["run.steps=1", "run.log_samples=12", data])
    samples = read_jsonl(folder / "runs" / "ppo" / "samples.jsonl")
    assert len(samples) == 12
    for sample in samples:
        steps = [step for step in sample["answer"].split("\n") if step.strip()] or [""]
        scores = step_scores(exported, MARKER, "\n\n", sample["prompt"], steps)
        found = list(dict.fromkeys(sample["token_rewards"]))
        assert found == pytest.approx(scores, rel=TOLERANCE, abs=TOLERANCE)


def test_offline_pairs_are_read_at_markers_too(folder):
    pairs = [{"prompt": QUESTION, "chosen": f"It is\n\n{n}.", "rejected": "No\n"} for n in range(4)]
    data = {"train": str(write_lines(folder / "pairs.jsonl", pairs)), "format": "pairs"}
    path = config_of(folder, kind="dpo")
    config = json.loads(path.read_text())
    config["data"] |= data | {"heldout": None}
    path.write_text(json.dumps(config))
    run_on(1, run_config, str(path), ["run.steps=1", "run.log_samples=8"])
    samples = read_jsonl(folder / "runs" / "dpo" / "samples.jsonl")
    assert len(samples) == 8
    for sample in samples:
        steps = [step for step in sample["answer"].split("\n") if step]
        scores = step_scores(folder / "prm", MARKER, "\n", QUESTION, steps)
        found = list(dict.fromkeys(sample["token_rewards"]))
        assert found == pytest.approx(scores, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("reward_model.output=score", "reward_model.output: is score, but the head of"),
        ("reward_model.step_marker=?!x", "reward_model.step_marker: '?!x' is 3 tokens"),
        ("data.step_marker=+", f"is read at {MARKER!r}: set reward_model.step_marker"),
    ],
)
def test_what_does_not_fit_the_prm_is_refused(folder, exported, override, words):
    path = write_config(folder, "ppo", reward_model={"path": str(exported)})
    config = load_config(path, [override])
    with pytest.raises(UserError) as caught:
        load_reward_models(config, load_tokenizer(folder / "policy"))
    assert words in str(caught.value)


def call_main(*arguments: str) -> tuple[int, str]:
    """The exit code, and what stood on stderr."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        code = main(list(arguments))
    return code, stderr.getvalue()


def score_file(folder: Path, name: str, lines: list[dict], world: int, **keys) -> Path:
    path, out = config_of(folder, **keys), folder / name
    answers = write_lines(folder / f"{name}.jsonl", lines)
    arguments = ["score", str(path), "--answers", str(answers), "--out", str(out), "--part", "3"]
    results = run_on(world, call_main, *arguments)
    assert all(code == 0 for code, _ in results), results
    return out


@pytest.mark.parametrize("world", [1, 2])
def test_an_answer_in_steps_and_as_text_has_equal_scores(folder, world):
    texts = []
    for line in GIVEN:
        text = "\n".join(line["steps"]) + "\n" * (line.get("finished") is False)
        ends = {key: line[key] for key in ("truncated",) if key in line}
        ends |= {"truncated": True} if line.get("finished") is False else {}
        texts.append({"prompt": line["prompt"], "response": text} | ends)
    by_steps = score_file(folder, f"steps-{world}", GIVEN, world)
    both = load_file(
        score_file(folder, f"both-{world}", GIVEN + texts, world) / "scores.safetensors"
    )
    half = both["scores"].size // 2
    assert both["scores"][:half] == pytest.approx(both["scores"][half:], rel=1e-4, abs=1e-4)
    for number, line in enumerate(read_jsonl(by_steps / "answers.jsonl")):
        prompt, steps = GIVEN[number]["prompt"], GIVEN[number]["steps"]
        logits = torch.tensor(step_scores(folder / "prm", MARKER, "\n", prompt, steps))
        expected = logits.sigmoid().tolist()
        assert line["step_scores"] == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)
        first, last = both["offsets"][number], both["offsets"][number + 1]
        tokens = both["scores"][first:last]
        found = list(dict.fromkeys(tokens.tolist()))
        assert found == pytest.approx(logits.tolist(), rel=TOLERANCE, abs=TOLERANCE)


def test_scores_at_another_marker_are_not_mixed(folder):
    score_file(folder, "mixed", GIVEN, 1)
    path = config_of(folder, step_marker="\u4e06")
    arguments = ["score", str(path), "--answers", str(folder / "mixed.jsonl")]
    out = ["--out", str(folder / "mixed"), "--part", "3"]
    ((code, stderr),) = run_on(1, call_main, *arguments, *out)
    assert code == 2 and "holds scores with other models: choose another" in stderr
