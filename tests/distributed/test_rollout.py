"""Rollouts on every layout: greedy equals Hugging Face, sampled text never changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_amrlhf.parallel.mesh import Mesh, build_mesh
from megatron_amrlhf.rollout.generator import EngineGenerator
from megatron_amrlhf.rollout.sampling import SamplingSettings
from megatron_amrlhf.types import PromptBatch, RolloutBatch
from tests.distributed.contexts import make_config, make_context
from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

VOCAB_SIZE = 131
PROMPT_LENGTHS = [3, 7, 5, 9, 4, 6]
MAX_NEW_TOKENS = 16
SHORT_ROW = 14  # cuts answers of long prompts before MAX_NEW_TOKENS
END_IDS = tuple(range(20, 32))
SAMPLES, REFERENCE_SAMPLES, SEED, STEP = 3, 1, 7, 2
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 4, 1), (1, 1, 3), (2, 2, 2)]  # (TP, PP, DP)

GREEDY = SamplingSettings(MAX_NEW_TOKENS, 64, 0.0, 0, 1.0, END_IDS)
SHORT = replace(GREEDY, max_row_tokens=SHORT_ROW)
SAMPLED = SamplingSettings(MAX_NEW_TOKENS, 64, 1.0, 50, 0.95, END_IDS)


@dataclass(frozen=True)
class Rollouts:
    """What one rank saw: greedy, greedy in short rows, sampled from both, from the reference."""

    dp_rank: int
    greedy: RolloutBatch
    short: RolloutBatch
    mixture: RolloutBatch
    reference_alone: RolloutBatch
    num_reported: int


def prompt_rows() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB_SIZE, (n,), generator=random) for n in PROMPT_LENGTHS]


def my_prompts(mesh: Mesh) -> PromptBatch:
    rows = prompt_rows()
    mine = torch.arange(len(rows)).tensor_split(mesh.dp_size)[mesh.dp_rank]
    return PromptBatch(
        tuple(rows[i] for i in mine), mine, tuple("" for _ in mine), (None,) * len(mine)
    )


def roll_out(policy: str, reference: str, tensor: int, pipeline: int) -> Rollouts:
    mesh = build_mesh(tensor, pipeline)
    config = make_config(policy, mesh, {"kind": "ppo"})
    context, swapped = make_context(config, mesh), make_context(config, mesh)
    context.role("actor", Path(policy))
    context.role("reference", Path(reference))
    swapped.role("actor", Path(reference))
    prompts, ended = my_prompts(mesh), []

    def answers(engine, settings, samples, reference_samples, micro_batch_size, on_done):
        engine.tick = on_done
        generator = EngineGenerator(engine, settings, SEED, micro_batch_size)
        return generator.generate(prompts, STEP, samples, reference_samples)

    return Rollouts(
        dp_rank=mesh.dp_rank,
        greedy=answers(context.engine, GREEDY, 1, 0, 2, ended.append),
        short=answers(context.engine, SHORT, 1, 0, 4, lambda count: None),
        mixture=answers(
            context.engine, SAMPLED, SAMPLES, REFERENCE_SAMPLES, 2 + mesh.dp_size, ended.append
        ),
        reference_alone=answers(swapped.engine, SAMPLED, SAMPLES, 0, 5, lambda count: None),
        num_reported=sum(ended),
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 0), ("reference", 1)):
        make_tiny_model(folder / name, family="llama", tied=True, seed=seed)
    return str(folder / "policy"), str(folder / "reference")


@pytest.fixture(scope="module")
def rollouts(folders):
    """layout -> the results of its ranks; each layout is launched once."""
    made = {}

    def of(layout: tuple[int, int, int]) -> list[Rollouts]:
        if layout not in made:
            tensor, pipeline, data = layout
            world_size = tensor * pipeline * data
            made[layout] = run_on(world_size, roll_out, *folders, tensor, pipeline)
        return made[layout]

    return of


def whole(ranks: list[Rollouts], field: str) -> list[tuple]:
    """All answers in order of their samples, once it is clear that replicas agree in themselves."""
    replicas: dict[int, list[tuple]] = {}
    for rank in ranks:
        batch: RolloutBatch = getattr(rank, field)
        answers = [
            (sample, row.tolist(), int(length), int(group), bool(reference), bool(ended))
            for sample, row, length, group, reference, ended in zip(
                batch.sample_ids.tolist(),
                batch.rows,
                batch.prompt_lengths,
                batch.group_ids,
                batch.from_reference,
                batch.ended,
                strict=True,
            )
        ]
        assert replicas.setdefault(rank.dp_rank, answers) == answers, "ranks of a replica differ"
    return sorted(answer for answers in replicas.values() for answer in answers)


@pytest.fixture(scope="module")
def hugging_face(folders):
    """(row tokens, ended) of each prompt under greedy ``generate``, by longest row."""
    model = AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)

    def of(max_row_tokens: int) -> list[tuple[list[int], bool]]:
        found = []
        for prompt in prompt_rows():
            room = min(MAX_NEW_TOKENS, max_row_tokens - prompt.numel())
            row = model.generate(
                prompt[None],
                attention_mask=torch.ones(1, prompt.numel(), dtype=torch.int64),
                max_new_tokens=room,
                do_sample=False,
                eos_token_id=list(END_IDS),
                pad_token_id=0,
            )[0].tolist()
            found.append((row, row[-1] in END_IDS))
        return found

    return of


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("field", ["greedy", "short"])
def test_greedy_equals_hugging_faces_generate(rollouts, hugging_face, layout, field):
    expected = hugging_face({"greedy": 64, "short": SHORT_ROW}[field])
    lengths = {len(row) - n for (row, _), n in zip(expected, PROMPT_LENGTHS, strict=True)}
    assert len(lengths) > 2 and {ended for _, ended in expected} == {True, False}
    found = whole(rollouts(layout), field)
    assert [(row, ended) for _, row, _, _, _, ended in found] == expected
    assert [length for _, _, length, _, _, _ in found] == PROMPT_LENGTHS


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_sampled_text_is_the_same_on_every_layout(rollouts, layout):
    """Also with micro-batches of other sizes: 3 rows at DP 1, 5 at DP 3, 4 at DP 2."""
    assert whole(rollouts(layout), "mixture") == whole(rollouts(LAYOUTS[0]), "mixture")


def test_samples_of_a_prompt_differ(rollouts):
    answers = whole(rollouts(LAYOUTS[0]), "mixture")
    assert len({tuple(row) for _, row, *_ in answers}) == len(answers)


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[-1]], ids=str)
def test_the_last_samples_of_a_prompt_are_the_references(rollouts, layout):
    """The same text that a rollout of the reference alone samples there, and marked so."""
    mixture = whole(rollouts(layout), "mixture")
    alone = whole(rollouts(layout), "reference_alone")
    policy_samples = SAMPLES - REFERENCE_SAMPLES
    for (sample, row, _, group, from_reference, _), other in zip(mixture, alone, strict=True):
        assert from_reference == (sample % SAMPLES >= policy_samples)
        assert group == sample // SAMPLES
        assert (row == other[1]) == from_reference
        assert not other[4]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_answer_is_reported_once(rollouts, layout):
    """Greedy answers and the mixture's, which the progress bar counts."""
    answers = (1 + SAMPLES) * len(PROMPT_LENGTHS)
    assert {rank.num_reported for rank in rollouts(layout)} == {answers // layout[2]}
