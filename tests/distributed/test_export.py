"""A role that is exported gives back the Hugging Face tensors it was loaded from, bit for bit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from megatron_amrlhf.checkpoint.export import export_role
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.tokenizer import load_tokenizer
from megatron_amrlhf.engine.role import RoleSpec
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.source import ShardedWeights
from megatron_amrlhf.parallel.mesh import build_mesh
from megatron_amrlhf.rewards.kinds import KEYS
from tests.distributed.processes import run_on
from tests.helpers_models import make_tiny_model

pytestmark = pytest.mark.distributed

LOGIT_TOLERANCE = 1e-5
HEAD_OUTPUTS = 3
VOCAB = 131  # odd: padded at TP 2


@dataclass(frozen=True)
class Case:
    """A model to send through a role and back."""

    family: str
    tied: bool
    head: bool = False
    dtype: str = "float32"
    trainable: bool = False
    rope: str = "default"
    role: str = "actor"

    @property
    def name(self) -> str:
        return "-".join(f"{value}" for value in vars(self).values())


CASES = (
    Case("qwen2", tied=False),
    Case("qwen2", tied=True, trainable=True),
    Case("llama", tied=True),
    Case("llama", tied=False, trainable=True),
    Case("qwen2", tied=True, head=True),
    Case("llama", tied=False, head=True),
    Case("qwen2", tied=True, dtype="bfloat16", trainable=True),
    Case("mistral", tied=False, trainable=True),
    Case("mistral", tied=True),
    Case("qwen3", tied=False),
    Case("qwen3", tied=True, trainable=True),
    Case("qwen3", tied=False, head=True, role="prm"),
    Case("mistral", tied=True, head=True, role="orm"),
    Case("llama", tied=False, head=True, dtype="bfloat16", role="orm"),
    Case("llama", tied=True, rope="llama3"),
    Case("qwen3", tied=True, rope="yarn"),
)
ROPES = {
    "default": None,
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,  # the tokens below are 22
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
}


def make_source(folder: Path, case: Case) -> None:
    """A model folder, with a head if the case has one."""
    model = make_tiny_model(
        folder, case.family, case.tied, seed=3, vocab_size=VOCAB, rope=ROPES[case.rope]
    )
    if case.head:
        generator = torch.Generator().manual_seed(5)
        weight = torch.randn(HEAD_OUTPUTS, model.config.hidden_size, generator=generator)
        bias = torch.randn(HEAD_OUTPUTS, generator=generator)
        tensors = load_file(folder / "model.safetensors")
        tensors |= {"head.weight": weight, "head.bias": bias}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def export_all(sources: str, exports: str, tensor: int, pipeline: int) -> None:
    """On every rank: loads each case's folder into a role and exports it, the first one twice."""
    mesh = build_mesh(tensor, pipeline)
    for case in (*CASES, CASES[0]):
        source = Path(sources) / case.name
        config = Config.model_validate(
            {
                "run": {"name": "x"},
                "model": {"path": str(source), "dtype": case.dtype},
                "algorithm": {"kind": "ppo"},
                "data": {"train": "a"},
                "parallel": {"tensor": tensor, "pipeline": pipeline},
            }
        )
        engine = Zero3Engine(config, mesh)
        training = {"trainable": True, "learning_rate": 1e-3} if case.trainable else {}
        head = HEAD_OUTPUTS if case.head else None
        engine.add_role(RoleSpec(case.role, source, getattr(torch, case.dtype), head, **training))
        export_role(engine, case.role, Path(exports) / "new" / case.name, load_tokenizer(source))
    _refuses_a_folder_that_is_no_export(engine, Path(sources))


def _refuses_a_folder_that_is_no_export(engine: Zero3Engine, folder: Path) -> None:
    tokenizer = load_tokenizer(folder / CASES[0].name)
    with pytest.raises(UserError, match="was not made by this version"):
        export_role(engine, "actor", folder, tokenizer)


def assert_same_tensors(case: Case, source: Path, export: Path) -> None:
    """The export has each tensor of the source, in the role's dtype, once."""
    before, after = ShardedWeights(source), ShardedWeights(export)
    expected = set(before.names())
    if case.head:
        expected.discard("lm_head.weight")  # a role with a head of its own has no LM head
    if case.role == "orm":  # transformers' class has no bias
        expected.discard("head.bias")
        bias = before.get("head.bias").to(getattr(torch, case.dtype))
        assert json.loads((export / "config.json").read_text())["score_bias"] == bias.tolist()
    assert set(after.names()) == expected
    for name in expected:
        wanted, got = before.get(name).to(getattr(torch, case.dtype)), after.get(name)
        assert got.dtype == wanted.dtype and torch.equal(got, wanted), (case, name)


def assert_sound_index(case: Case, export: Path, pipeline: int) -> None:
    index = json.loads((export / "model.safetensors.index.json").read_text())
    weights = ShardedWeights(export)
    size = sum(weights.get(name).nbytes for name in weights.names())
    assert index["metadata"]["total_size"] == size
    stages = {f"model-{i + 1:05d}-of-{pipeline:05d}.safetensors" for i in range(pipeline)}
    assert set(index["weight_map"].values()) == stages
    assert {path.name for path in export.glob("*.safetensors")} == stages
    config = json.loads((export / "config.json").read_text())
    assert config["dtype"] == case.dtype and "torch_dtype" not in config
    kind = {"prm": "process", "orm": "outcome"}.get(case.role)
    assert config.get("reward_kind") == kind
    assert kind or not config.keys() & set(KEYS), "a policy says nothing about rewards"
    assert config["tie_word_embeddings"] == case.tied


def assert_opens_in_transformers(case: Case, source: Path, export: Path) -> None:
    tokens = torch.arange(3, 25)[None] % VOCAB
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (source, export)]
    with torch.no_grad():
        before, after = (model(tokens).logits for model in models)
    assert torch.allclose(before, after, rtol=0, atol=LOGIT_TOLERANCE), case
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, export)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template is not None
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    generation = [(folder / "generation_config.json").read_bytes() for folder in (source, export)]
    assert generation[0] == generation[1]


def assert_gives_its_scores_in_transformers(case: Case, source: Path, export: Path) -> None:
    """The class that the export names reads the head as the source's tensors say."""
    tokens = torch.arange(3, 25)[None] % VOCAB
    weights = ShardedWeights(source)
    auto = AutoModelForSequenceClassification if case.role == "orm" else None
    model, told = (auto or AutoModelForTokenClassification).from_pretrained(
        export, output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"], told
    assert model.config.architectures == [type(model).__name__]
    with torch.no_grad():
        backbone = AutoModelForCausalLM.from_pretrained(source).model
        wanted = backbone(tokens).last_hidden_state @ weights.get("head.weight").T
        found = model.eval()(tokens).logits
    wanted = wanted[:, -1] if auto else wanted + weights.get("head.bias")
    torch.testing.assert_close(found, wanted, rtol=0, atol=LOGIT_TOLERANCE)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for case in CASES:
        make_source(folder / case.name, case)
    config_file = folder / CASES[0].name / "config.json"
    config = json.loads(config_file.read_text())
    stale = {"torch_dtype": "float16", "reward_kind": "process", "step_marker": "+"}
    config_file.write_text(json.dumps(config | stale))
    return folder


@pytest.mark.parametrize(
    ("tensor", "pipeline", "data"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)]
)
def test_hf_to_role_to_hf_is_bitwise(sources, tmp_path, tensor, pipeline, data):
    run_on(tensor * pipeline * data, export_all, str(sources), str(tmp_path), tensor, pipeline)
    for case in CASES:
        source, export = sources / case.name, tmp_path / "new" / case.name
        assert_same_tensors(case, source, export)
        assert_sound_index(case, export, pipeline)
        if case.dtype == "float32":
            check = assert_gives_its_scores_in_transformers
            (check if case.head else assert_opens_in_transformers)(case, source, export)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {case.name for case in CASES}
