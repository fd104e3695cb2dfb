"""One model (actor, critic, reference, prm or orm) on this rank: a stage and how it is shared."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from megatron_amrlhf.config.deepspeed import resolve_deepspeed
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.accumulator import GradientAccumulator
from megatron_amrlhf.engine.disk import Disk
from megatron_amrlhf.engine.partitioned import PartitionedWeights
from megatron_amrlhf.engine.replicated import ReplicatedWeights
from megatron_amrlhf.engine.weights import Weights, make_optimizer
from megatron_amrlhf.models.families import config_object
from megatron_amrlhf.models.loading import load_stage
from megatron_amrlhf.models.mapping import stage_entries, tied_name
from megatron_amrlhf.models.shape import ModelShape, read_shape
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config
from megatron_amrlhf.models.stage import StageModel, StageOptions
from megatron_amrlhf.parallel.mesh import Mesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # model.dtype's


@dataclass(frozen=True)
class RoleSpec:
    """What a role is made of.

    Attributes:
        name: actor, critic, reference, prm or orm.
        folder: Hugging Face folder of its weights.
        dtype: of weights and activations.
        head_outputs: None for a language model, else outputs of its linear head.
        trainable: whether it gets an optimizer.
        learning_rate: peak, if trainable.
        total_steps: optimizer steps of the whole run, for the schedule.
        steps_at_once: optimizer steps in one step of the run.
    """

    name: str
    folder: Path
    dtype: torch.dtype
    head_outputs: int | None = None
    trainable: bool = False
    learning_rate: float = 0.0
    total_steps: int = 1
    steps_at_once: int = 1

    @property
    def dtype_name(self) -> str:
        """As configurations and files have it: ``float32``, ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")

    def sizes(self, shape: ModelShape) -> dict:
        """Sizes of the model with its head, JSON-able; for a checkpoint."""
        return dataclasses.asdict(shape) | {"head_outputs": self.head_outputs}


class Role:
    """A stage and its weights.

    Attributes:
        shape: sizes of the whole model.
        entries: how the stage's parameters lie in a Hugging Face folder.
        tied: local name of this stage's copy of an embedding that another stage has too, or None.
        weights: the stage's weights and optimizer over the data-parallel ranks.
        loaded_not_finite: `not_finite` of the stage as it was loaded.
    """

    def __init__(self, spec: RoleSpec, config: Config, mesh: Mesh):
        self.spec, self.mesh = spec, mesh
        hf_config = read_hf_config(spec.folder)
        self.shape: ModelShape = read_shape(hf_config)
        self.hf_config = config_object(hf_config)
        place = (self.shape, mesh.cut, mesh.pp_rank, spec.head_outputs)
        self.entries, self.tied = stage_entries(*place), tied_name(*place)
        options = StageOptions(
            sequence_parallel=mesh.sequence_parallel,
            recompute=config.engine.recompute,
            logit_positions=config.engine.logit_positions,
        )
        module = self._build(options).requires_grad_(spec.trainable)
        load_stage(module, spec.head_outputs, ShardedWeights(spec.folder), mesh)
        # Now, while this rank has the tensors whole: ZeRO-3 cuts them next.
        self.loaded_not_finite = self.not_finite(module)
        self.weights = self._share(module, options, config)

    @property
    def tensor_names(self) -> frozenset[str]:
        """Hugging Face names of all tensors of the model, of every stage."""
        cut, outputs = self.mesh.cut, self.spec.head_outputs
        stages = (stage_entries(self.shape, cut, x, outputs) for x in range(cut.stages))
        return frozenset(name for entries in stages for entry in entries for name in entry.hf)

    def _build(self, options: StageOptions) -> StageModel:
        spec, mesh = self.spec, self.mesh
        build = (self.shape, self.hf_config, mesh, spec.dtype, spec.head_outputs)
        return StageModel(*build, options=options).to(mesh.device)

    def _plain(self, options: StageOptions) -> StageModel:
        """A stage for forwards of any length: sequence parallelism needs a multiple of TP."""
        return self._build(dataclasses.replace(options, sequence_parallel=False))

    def _share(self, module: StageModel, options: StageOptions, config: Config) -> Weights:
        spec, mesh = self.spec, self.mesh
        section = config.engine.of_role(spec.name)
        optimizer = gradients = None
        if spec.trainable:
            sizes = {name: x.numel() for name, x in module.named_parameters()}
            # At stage 0 each rank steps all masters, from the whole gradient.
            whole = section.zero_stage == 0
            gradients = GradientAccumulator(sizes, mesh, config.engine.reduce, whole)
            optimizer = partial(
                make_optimizer,
                rate=spec.learning_rate,
                total_steps=spec.total_steps,
                steps_at_once=spec.steps_at_once,
                section=config.optimizer,
            )
        if section.stage < 3:
            plain = self._plain(options) if options.sequence_parallel else None
            shard = section.zero_stage == 1
            return ReplicatedWeights(
                module,
                plain,
                make_optimizer=optimizer,
                gradients=gradients,
                shard_optimizer=shard,
                mesh=mesh,
            )
        trainer = plain = None
        if spec.trainable and config.engine.gather == "step":
            trainer = self._build(options)
        # Without gradients nothing is recomputed, so the trainer can serve for both.
        plain = self._plain(options) if options.sequence_parallel else trainer
        plain = plain or self._plain(options)
        ds_config = resolve_deepspeed(config, mesh.dp_size, spec.name, spec.trainable)
        weights = PartitionedWeights(
            module,
            plain,
            trainer=trainer,
            make_optimizer=optimizer,
            gradients=gradients,
            ds_config=ds_config,
            mesh=mesh,
        )
        to_disk = [x == "nvme" for x in (section.offload_parameters, section.offload_optimizer)]
        if any(to_disk):
            assert config.engine.nvme_folder is not None, "checked with the configuration"
            weights.move_to_disk(Disk(config.engine.nvme_folder), *to_disk)
        return weights

    def not_finite(self, stage: StageModel) -> list[str]:
        """Hugging Face names of the stage's weights that hold NaN or an infinity."""
        parameters = dict(stage.named_parameters())
        wrong = [x for x in self.entries if not parameters[x.local].detach().isfinite().all()]
        return [name for entry in wrong for name in entry.hf]

    def window(self) -> AbstractContextManager[StageModel]:
        """``Weights.window`` of this role."""
        return self.weights.window()
