"""One model (actor, critic, reference or prm) on this rank: its stage under ZeRO-3."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import deepspeed
import torch
from torch import nn
from transformers import AutoConfig, get_scheduler

from megatron_amrlhf.config.schema import OptimizerSection
from megatron_amrlhf.engine.mpu import Mpu
from megatron_amrlhf.models.loading import load_stage
from megatron_amrlhf.models.mapping import REPLICATED, stage_entries
from megatron_amrlhf.models.shape import ModelShape, read_shape
from megatron_amrlhf.models.source import ShardedWeights, read_hf_config
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.mesh import Mesh

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


@dataclass(frozen=True)
class RoleSpec:
    """What a role is made of.

    Attributes:
        name: actor, critic, reference or prm.
        folder: Hugging Face folder of its weights.
        dtype: of weights and activations.
        head_outputs: None for a language model, else outputs of its linear head.
        trainable: whether it gets an optimizer.
        learning_rate: peak, if trainable.
        total_steps: optimizer steps of the whole run, for the schedule.
    """

    name: str
    folder: Path
    dtype: torch.dtype
    head_outputs: int | None = None
    trainable: bool = False
    learning_rate: float = 0.0
    total_steps: int = 1


class Role:
    """A stage partitioned by ZeRO-3 over its data-parallel group.

    Attributes:
        module: the stage under DeepSpeed's hooks; its parameters are partitioned.
        plain: a twin without hooks or storage. Inside ``window()`` its parameters are the
            gathered weights, so decoding and scoring never touch DeepSpeed's hooks.
        engine: the ``DeepSpeedEngine`` of the stage.
        tied: this stage's copy of a tied embedding that another stage has too, or None.
    """

    def __init__(self, spec: RoleSpec, ds_config: dict, optim: OptimizerSection, mesh: Mesh):
        self.spec, self.mesh = spec, mesh
        self.hf_config = AutoConfig.from_pretrained(spec.folder)
        self.shape: ModelShape = read_shape(read_hf_config(spec.folder))
        build = (self.shape, self.hf_config, mesh, spec.dtype, spec.head_outputs)
        self.module = StageModel(*build).to(mesh.device)
        load_stage(self.module, ShardedWeights(spec.folder), mesh)
        self.entries = stage_entries(self.shape, mesh.pp_rank, mesh.pp_size, spec.head_outputs)
        self._mark_tensor_parallel()
        self.tied = self._tied_copy()
        self.module.requires_grad_(spec.trainable)
        optimizer = scheduler = None
        if spec.trainable:
            optimizer, scheduler = self._optimizer(optim)
        self.engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=ds_config,
            mpu=Mpu(mesh),
            dist_init_required=False,
        )
        self.engine.checkpoint_mp_rank = mesh.tp_rank + mesh.tp_size * mesh.pp_rank
        self.plain = StageModel(*build).to(mesh.device).eval().requires_grad_(False)
        self._release_plain()

    def _optimizer(self, optim: OptimizerSection):
        optimizer = torch.optim.AdamW(
            self.module.parameters(),
            lr=self.spec.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,  # one pass over memory, on CPU too
        )
        scheduler = get_scheduler(
            SCHEDULES[optim.schedule],
            optimizer,
            num_warmup_steps=optim.warmup_steps,
            num_training_steps=max(self.spec.total_steps, 1),
        )
        return optimizer, scheduler

    def _mark_tensor_parallel(self) -> None:
        """Marks the parameters that are cut over the tensor axis, as the gradient norm needs it."""
        parameters = dict(self.module.named_parameters())
        for entry in self.entries:
            parameters[entry.local].tensor_model_parallel = entry.layout is not REPLICATED

    def _tied_copy(self) -> nn.Parameter | None:
        lm_head = self.spec.head_outputs is None
        if not (self.shape.tied and lm_head and self.mesh.pp_size > 1):
            return None
        if self.mesh.is_first_stage:
            return self.module.embedding.word_embeddings.weight
        if self.mesh.is_last_stage:
            return self.module.output_layer.weight
        return None

    def _release_plain(self) -> None:
        for parameter in self.plain.parameters():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    @contextmanager
    def window(self):
        """Gathers the stage's weights once and yields the plain twin to run forwards with.

        Entered by every rank of the stage's data-parallel group. Inside, ranks may run
        different numbers of forwards. Gradients are off and the twin is in eval mode.
        """
        sources = list(self.module.parameters())
        with torch.no_grad(), deepspeed.zero.GatheredParameters(sources):
            for source, target in zip(sources, self.plain.parameters(), strict=True):
                target.data = source.data
            try:
                yield self.plain
            finally:
                self._release_plain()
