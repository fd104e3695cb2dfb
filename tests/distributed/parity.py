"""What each rank does in ``test_algorithm_parity.py``: three optimizer steps of a case."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amrlhf.algorithms.kto import KtoBatch
from megatron_amrlhf.algorithms.orm import Orm
from megatron_amrlhf.algorithms.prm import Prm
from megatron_amrlhf.commands.train import ALGORITHMS
from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.pairs import EncodedPair
from megatron_amrlhf.data.prm_data import PrmExample
from megatron_amrlhf.engine import zero3
from megatron_amrlhf.engine.weights import Weights
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.losses.dpo import PairTargets
from megatron_amrlhf.losses.grpo import GrpoTargets
from megatron_amrlhf.losses.kto import KtoTargets
from megatron_amrlhf.losses.ppo import PpoTargets
from megatron_amrlhf.losses.reduce import denominator_mask, row_weights
from megatron_amrlhf.losses.rejection_sampling import SelectedTargets
from megatron_amrlhf.models.mapping import REPLICATED, stage_entries
from megatron_amrlhf.models.shape import read_shape
from megatron_amrlhf.models.source import read_hf_config
from megatron_amrlhf.parallel.mesh import Mesh, build_mesh
from megatron_amrlhf.types import RolloutBatch, TrainBatch, last_true
from tests.distributed.contexts import make_config, make_context
from tests.reference import Hyper, Row, mismatched

SAMPLING_TEMPERATURE = 0.7
TARGETS = {
    "ppo": PpoTargets,
    "grpo": GrpoTargets,
    "dpo": PairTargets,
    "kto": KtoTargets,
    "rejection_sampling": SelectedTargets,
}
# loss -> (algorithm of the config, role, outputs of the linear head or None)
# "epochs": 2 has the ratio to other log-probs than the policy's own.
LOSSES: dict[str, tuple[dict, str, int | None]] = {
    "prm_bce": ({"kind": "prm", "num_attributes": 5, "loss": "bce"}, "prm", 5),
    "prm_mse": ({"kind": "prm", "num_attributes": 1, "loss": "mse"}, "prm", 1),
    "ppo_actor": ({"kind": "ppo"}, "actor", None),
    "ppo_actor_kl": (
        {"kind": "ppo", "kl_in": "loss", "kl_estimator": "k2", "epochs": 2},
        "actor",
        None,
    ),
    "ppo_critic": ({"kind": "ppo"}, "critic", 1),
    "grpo_token": ({"kind": "grpo", "length_normalise": "token", "epochs": 2}, "actor", None),
    "grpo_sequence": ({"kind": "grpo", "length_normalise": "sequence", "epochs": 2}, "actor", None),
    "kto": ({"kind": "kto"}, "actor", None),
    "orm": ({"kind": "orm"}, "orm", 1),
    "dpo_inside": ({"kind": "dpo", "form": "inside"}, "actor", None),
    "dpo_pair": ({"kind": "dpo", "form": "pair"}, "actor", None),
    "rejection_sampling_k2": (
        {"kind": "rejection_sampling", "kl_estimator": "k2"},
        "actor",
        None,
    ),
    "rejection_sampling_k3": (
        {"kind": "rejection_sampling", "kl_estimator": "k3"},
        "actor",
        None,
    ),
}
# what of the reference's numbers an algorithm is told
HYPER = {
    "prm": (),
    "orm": (),
    "ppo": ("clip_eps", "value_clip_eps", "kl_coef"),
    "grpo": ("clip_eps", "clip_eps_high", "kl_coef"),
    "dpo": ("beta",),
    "kto": ("beta", "desirable_weight", "undesirable_weight"),
    "rejection_sampling": ("kl_coef",),
}


@dataclass(frozen=True)
class Case:
    """One training of three steps; ``cut`` and what follows differ in test_layouts.py alone."""

    model: str
    reduce: str
    loss: str
    masked: bool
    denominator: str = "response"
    virtual: int = 1
    uneven: tuple[int | None, int | None] = (None, None)
    sequence: bool = False
    engine: tuple[tuple[str, object], ...] = (("micro_batch_size", 2),)

    @property
    def name(self) -> str:
        masked = "masked" if self.masked else "unmasked"
        parts = [self.model, self.reduce, self.loss, masked]
        parts += [f"virtual-{self.virtual}"] if self.virtual > 1 else []
        parts += [f"uneven-{self.uneven}"] if any(self.uneven) else []
        parts += ["sequence"] if self.sequence else []
        parts += [f"{key}-{value}" for key, value in self.engine if key != "micro_batch_size"]
        parts += [f"rows-{dict(self.engine).get('micro_batch_size')}"]
        return "/".join(parts)

    @property
    def cut(self) -> tuple[int, tuple[int | None, int | None], bool]:
        """What the mesh depends on, beside the sizes of its axes."""
        return self.virtual, self.uneven, self.sequence

    @property
    def hyper(self) -> Hyper:
        # The policy of PPO and GRPO is the softmax at the sampling temperature, the others' the
        # plain one.
        is_sampling = self.loss.startswith(("ppo_actor", "grpo"))
        temperature = SAMPLING_TEMPERATURE if is_sampling else 1.0
        return Hyper(denominator=self.denominator, temperature=temperature)


@dataclass(frozen=True)
class RankResult:
    """What a rank of DP rank 0 returns: its shards by local parameter name."""

    tp_rank: int
    pp_rank: int
    losses: list[float]
    norms: list[float]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]


def config_of(case: Case, folder: str, mesh: Mesh) -> Config:
    hyper = case.hyper
    algorithm = dict(LOSSES[case.loss][0])
    algorithm |= {name: getattr(hyper, name) for name in HYPER[algorithm["kind"]]}
    optimizer = ("lr", "betas", "eps", "weight_decay", "max_grad_norm")
    return make_config(
        folder,
        mesh,
        algorithm,
        engine={"reduce": case.reduce, **dict(case.engine)},
        rollout={"temperature": SAMPLING_TEMPERATURE},
        loss={"denominator": case.denominator},
        optimizer={name: getattr(hyper, name) for name in optimizer},
    )


def my_rows(rows: list[Row], mesh: Mesh) -> list[Row]:
    """This replica's rows; pairs stay together, ranks may have different numbers of them."""
    pairs = torch.arange(len(rows) // 2).tensor_split(mesh.dp_size)[mesh.dp_rank].tolist()
    return [rows[2 * pair + i] for pair in pairs for i in (0, 1)]


def rectangle(rows: list[Row], width: int, field: str, fill: float) -> Tensor:
    """``[B, width]`` of a field of the rows; padding holds ``fill``."""
    out = torch.full((len(rows), width), fill)
    for place, row in enumerate(rows):
        out[place, : row.num_response] = getattr(row, field).float()
    return out


def train_batch(rows: list[Row], width: int, case: Case, mesh: Mesh) -> TrainBatch:
    """The rows as the algorithms make them; padding holds garbage that nobody may read."""
    settings = LOSSES[case.loss][0]
    lengths = torch.tensor([row.num_response for row in rows], dtype=torch.int64)
    valid = torch.arange(width) < lengths[:, None]
    mask = rectangle(rows, width, "mask", 0.0).bool()
    targets = {"mask": mask, "valid": valid, "denominator": valid}
    for field in ("advantages", "behaviour_logprobs", "reference_logprobs", "old_values"):
        targets[field] = rectangle(rows, width, field, 1e3)
    targets["returns"] = rectangle(rows, width, "returns", float("nan"))
    if settings["kind"] == "rejection_sampling":
        targets["denominator"] = denominator_mask(valid, mask, case.denominator)
    elif settings["kind"] == "grpo":
        targets |= grpo_targets(targets, case.denominator, settings["length_normalise"])
    elif settings["kind"] == "dpo":
        targets["denominator"] = torch.tensor([[True], [False]]).repeat(len(rows) // 2, 1)
    elif settings["kind"] == "kto":
        targets |= kto_targets(rows, width)
    targets["kl_scale"] = torch.ones(len(rows), 1)
    record = TARGETS[settings["kind"]]
    fields_read = [field.name for field in fields(record)]
    batch = TrainBatch.whole(
        rows=tuple(row.tokens for row in rows),
        prompt_lengths=torch.tensor([row.prompt_length for row in rows], dtype=torch.int64),
        targets=record(**{x: targets[x] for x in fields_read}) if mesh.is_last_stage else None,
    )
    batch = replace(batch, kept_lengths=last_true(mask) + 1)
    return batch if settings["kind"] != "kto" else kto_batch(batch, rows)


def grpo_targets(targets: dict[str, Tensor], denominator: str, normalise: str) -> dict[str, Tensor]:
    """One advantage an answer, its weight and what is counted."""
    counted = denominator_mask(targets["valid"], targets["mask"], denominator)
    ones, by_row = torch.ones(len(counted), 1), normalise == "sequence"
    return {
        "advantages": targets["advantages"][:, 0],
        "weight": row_weights(counted) if by_row else ones,
        "denominator": ones.bool() if by_row else counted,
    }


def kto_targets(rows: list[Row], width: int) -> dict[str, Tensor]:
    """Even rows are chosen; what the reference says about the mismatched pairs."""
    pairs, every = mismatched(rows), torch.ones(len(rows), dtype=torch.bool)
    return {
        "chosen": torch.arange(len(rows)) % 2 == 0,
        "mismatched_mask": rectangle(pairs, width, "mask", 0.0).bool(),
        "mismatched_reference": rectangle(pairs, width, "reference_logprobs", 1e3),
        "mismatched_has_reward": every,
        "denominator": every[:, None],
    }


def kto_batch(batch: TrainBatch, rows: list[Row]) -> KtoBatch:
    flags = torch.zeros(len(rows), dtype=torch.bool)
    pairs = RolloutBatch(
        rows=tuple(row.tokens for row in mismatched(rows)),
        prompt_lengths=batch.prompt_lengths,
        group_ids=batch.ids,
        sample_ids=batch.ids,
        from_reference=flags,
        ended=flags,
    )
    return KtoBatch(**vars(batch), mismatched=pairs)


def prm_examples(rows: list[Row], attributes: int) -> list[PrmExample]:
    """Every kept token as the end of a labelled step; solutions without one do not exist."""
    return [
        PrmExample(
            row=row.tokens,
            prompt_length=row.prompt_length,
            label_positions=row.prompt_length + row.mask.nonzero()[:, 0],
            labels=row.labels[row.mask][:, :attributes],
        )
        for row in rows
        if row.mask.any()
    ]


def orm_examples(rows: list[Row]) -> list[EncodedPair]:
    """Two rows a pair; they need not have a prompt in common."""
    pairs = zip(rows[0::2], rows[1::2], strict=True)
    return [EncodedPair(chosen.tokens, rejected.tokens, 1) for chosen, rejected in pairs]


def optimizer_step(context: Context, case: Case, rows: list[Row]):
    """One step of the case's role through the algorithm's own update."""
    settings, role, head = LOSSES[case.loss]
    algorithm = object.__new__(ALGORITHMS[settings["kind"]])  # no prompts, no PRM folder
    algorithm.context, algorithm.section = context, context.config.algorithm
    mine, width = my_rows(rows, context.mesh), max(row.num_response for row in rows)
    if isinstance(algorithm, Prm):
        batch, at = algorithm.batch(prm_examples(mine, head))
        return algorithm.train_step(batch, at)
    if isinstance(algorithm, Orm):
        batch, at = algorithm.batch(orm_examples(mine))
        return algorithm.train_step(batch, at)
    part = train_batch(mine, width, case, context.mesh)
    update = algorithm.critic_step if role == "critic" else algorithm.actor_step
    return update(part)


def gather_gradients(weights: Weights, mesh: Mesh) -> dict[str, Tensor]:
    """Whole local gradients by parameter name, put together from all DP ranks' partitions."""
    found = {}
    for name, place in weights.slices().items():
        partition = weights.gradients.own(name).contiguous()
        parts = [torch.empty_like(partition) for _ in range(mesh.dp_size)]
        dist.all_gather(parts, partition, group=mesh.dp_group)
        found[name] = torch.cat(parts)[: math.prod(place.shape)].reshape(place.shape).clone()
    return found


def train_case(case: Case, folder: str, steps: list[list[Row]], mesh: Mesh) -> RankResult:
    config = config_of(case, folder, mesh)
    context = make_context(config, mesh)
    engine = context.engine
    _, role, head = LOSSES[case.loss]
    context.role(role, Path(folder), head, learning_rate=case.hyper.lr, total_steps=len(steps))
    gradients, losses, norms = [], [], []

    def spy(*arguments):
        gradients.append(gather_gradients(engine.roles[role].weights, mesh))
        return norm_of(*arguments)

    norm_of, zero3.global_norm = zero3.global_norm, spy
    try:
        for rows in steps:
            result, metrics = optimizer_step(context, case, rows)
            name = {"critic": "value", "prm": "prm", "orm": "orm"}.get(role, "policy")
            losses.append(context.publish(metrics)[f"loss/{name}"])
            norms.append(result.grad_norm)
    finally:
        zero3.global_norm = norm_of
    with engine.roles[role].window() as stage:
        weights = {name: p.detach().clone() for name, p in stage.named_parameters()}
    engine.roles[role].weights.close()
    return RankResult(mesh.tp_rank, mesh.pp_rank, losses, norms, gradients, weights)


def train_cases(
    wanted: list[Case],
    folders: dict[tuple[str, int | None], str],
    batches: dict[tuple[str, bool], list[list[Row]]],
    tensor: int,
    pipeline: int,
) -> dict[str, RankResult] | None:
    """All cases one after the other; results on DP rank 0."""
    gc.freeze()  # DeepSpeed collects garbage at each start; leave out what the imports made
    results, cut, mesh = {}, None, None
    for case in wanted:
        print(case.name, flush=True)  # a failing rank's log names its case
        if case.cut != cut:
            cut = case.cut
            pipeline_cut = PipelineCut(pipeline, case.virtual, *case.uneven)
            mesh = build_mesh(tensor, pipeline_cut, case.sequence)
        folder = folders[case.model, LOSSES[case.loss][2]]
        results[case.name] = train_case(case, folder, batches[case.model, case.masked], mesh)
    return results if mesh.dp_rank == 0 else None


def merge(
    results: list[RankResult],
    folder: str,
    case: Case,
    pick: Callable[[RankResult], dict[str, Tensor]],
) -> list[tuple[str, Tensor]]:
    """Hugging Face names and whole tensors of what ``pick`` takes from each rank's result.

    A copy that lies on several stages (tied embedding) or tensor ranks (norms, heads) is listed
    once for each.
    """
    shape, found = read_shape(read_hf_config(folder)), []
    num_stages = 1 + max(result.pp_rank for result in results)
    cut, head = PipelineCut(num_stages, case.virtual, *case.uneven), LOSSES[case.loss][2]
    for stage in range(num_stages):
        ranks = sorted(
            (result for result in results if result.pp_rank == stage), key=lambda r: r.tp_rank
        )
        entries = stage_entries(shape, cut, stage, head)
        assert {entry.local for entry in entries} == set(pick(ranks[0]))
        for entry in entries:
            shards = [pick(rank)[entry.local] for rank in ranks]
            if entry.layout is REPLICATED:
                found += [(entry.hf[0], shard) for shard in shards]
            else:
                found += zip(entry.hf, entry.layout.merge(shards, shape), strict=True)
    return found
