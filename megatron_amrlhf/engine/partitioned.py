"""ZeRO stage 3: DeepSpeed partitions weights, masters and moments over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_grad,
    safe_set_local_optimizer_state,
)
from pydantic import ValidationError
from torch import Tensor, nn

from megatron_amrlhf.config.deepspeed import resolve_deepspeed
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.accumulator import GradientAccumulator
from megatron_amrlhf.engine.disk import Disk
from megatron_amrlhf.engine.mpu import Mpu
from megatron_amrlhf.engine.weights import (
    MASTER,
    MOMENTS,
    Slice,
    Weights,
    adam_step,
    lent,
    release,
)
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.mesh import Mesh

DeepspeedCounter = Literal["global_steps", "global_samples", "micro_steps", "skipped_steps"]
DEEPSPEED_COUNTERS = get_args(DeepspeedCounter)


class PartitionedWeights(Weights):
    """A stage under a DeepSpeed engine.

    Args:
        module: the loaded stage; its parameters become partitions.
        plain: a twin for forwards without gradient; its weights are dropped.
        trainer: a twin to train with if the stage is gathered once a step, else None: then the
            module trains under DeepSpeed's hooks, which gather each layer when it is needed.
        make_optimizer: gives optimizer and schedule; None for a frozen role.
        gradients: the sum of gradients, watching nothing yet; None for a frozen role.
        ds_config: the resolved DeepSpeed configuration.
        mesh: the mesh.

    Raises:
        UserError: DeepSpeed does not take its configuration.
    """

    def __init__(
        self,
        module: StageModel,
        plain: StageModel,
        *,
        trainer: StageModel | None,
        make_optimizer: Callable | None,
        gradients: GradientAccumulator | None,
        ds_config: dict,
        mesh: Mesh,
    ):
        self.module, self.gradients, self._mesh = module, gradients, mesh
        self._plain, self._trainer = plain, trainer
        self.stage = trainer or module
        # By identity: one twin may serve for both.
        for twin in {id(x): x for x in (plain, trainer) if x is not None}.values():
            release(twin)
        optimizer = scheduler = None
        if make_optimizer is not None:
            optimizer, self.schedule = make_optimizer(module.parameters())
            scheduler = self.schedule.scheduler
        try:
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                lr_scheduler=scheduler,
                config=ds_config,
                mpu=Mpu(mesh),
                dist_init_required=False,
            )
        except ValidationError as error:
            raise _refused(error) from None
        # DeepSpeed names files by it; its own choice, the tensor rank, is the same on all stages.
        self.engine.checkpoint_mp_rank = mesh.tp_rank + mesh.tp_size * mesh.pp_rank
        self._disk: Disk | None = None  # of masters and moments
        if gradients is not None:
            # DeepSpeed would sum a norm, which nobody reads, over the replica once a sub-group:
            # stages that have different numbers of these would wait for each other for ever.
            self.engine.optimizer.model_parallel_group = None
            self._free_gradient_buffer()
            gradients.watch((trainer or module).named_parameters())

    @torch.no_grad()
    def move_to_disk(self, disk: Disk, parameters: bool, optimizer: bool) -> None:
        """Puts what DeepSpeed has offloaded to the host's memory into files.

        Args:
            disk: where.
            parameters: the partitions of the weights.
            optimizer: masters, moments (made now) and DeepSpeed's own gradients beside them.

        Raises:
            UserError: the disk has no room.
        """
        trained = self.gradients is not None
        if parameters and not trained:
            for _, parameter in self._partitions():
                parameter.ds_tensor.data = disk.copy_of(parameter.ds_tensor)
        elif parameters:
            zero = self.engine.optimizer
            for index, flat in enumerate(zero.fp16_partitioned_groups_flat):
                # In .data, so that it stays the tensor that the optimizer knows.
                flat.data = disk.copy_of(flat)
                # The parameters' partitions are views of the flat tensor: these anew.
                zero._unflatten_partitioned_parameters(index)
            zero.param_groups_fp16_flat_cpu_memory.clear()  # where the flat ones were
        if optimizer and trained:
            self._disk = disk
            for flat in self._flat_masters:
                assert flat.grad is not None, "DeepSpeed offloads it with the master"
                flat.data, flat.grad.data = disk.copy_of(flat), disk.copy_of(flat.grad)
            self._make_moments(0.0)  # so that a full disk is known at the start

    @contextmanager
    def window(self):
        sources = list(self.module.parameters())
        with torch.no_grad(), deepspeed.zero.GatheredParameters(sources):
            # The twin has no hooks of DeepSpeed, which would gather each layer at each forward.
            with lent(sources, self._plain):
                yield self._plain.eval()

    @contextmanager
    def training(self):
        self.trained_gradients.begin()
        # Inside, DeepSpeed reduces nothing: the accumulator takes every gradient before.
        with self.engine.coalesce_grad_reduction():
            if self._trainer is None:
                self.engine.train()
                yield self.engine
            else:
                sources = list(self.module.parameters())
                with deepspeed.zero.GatheredParameters(sources), lent(sources, self._trainer):
                    yield self._trainer.train()
        self.trained_gradients.finish()

    def _free_gradient_buffer(self) -> None:
        """DeepSpeed's partitions of the gradients in the model's dtype: the sum is ours."""
        zero = self.engine.optimizer
        partitions = zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition
        nothing = zero.grad_partitions_flat_buffer = zero.grad_partitions_flat_buffer.new_empty(0)
        partitions.update(dict.fromkeys(partitions, nothing))

    def update(self) -> None:
        zero, own = self.engine.optimizer, self.trained_gradients.own
        if zero.offload_optimizer:
            for name, parameter in self.module.named_parameters():
                safe_set_local_grad(parameter, own(name))
        else:  # safe_set_local_grad would round to the model's dtype
            names = {parameter: name for name, parameter in self.module.named_parameters()}
            for index, group in enumerate(zero.fp16_groups):
                zero.averaged_gradients[index] = [own(names[parameter]) for parameter in group]
        # Without offload DeepSpeed has views of the sum: its memory goes in the step.
        self.trained_gradients.drop()
        if self._disk is not None and not self._has_moments:
            self._make_moments(0.0)  # AdamW would make them in memory
        self.engine.step()

    def skip(self) -> None:
        super().skip()
        # What DeepSpeed does itself where it finds an overflow.
        self.engine.optimizer.zero_grad()
        self.engine.optimizer.averaged_gradients = {}

    def _partitions(self) -> Iterator[tuple[str, Any]]:
        """The parameters by name, with what DeepSpeed has added to them."""
        return self.module.named_parameters()

    def slices(self) -> dict[str, Slice]:
        rank = self._mesh.dp_rank
        return {
            name: Slice.of(parameter.ds_shape, parameter.partition_numel(), rank)
            for name, parameter in self._partitions()
        }

    def counters(self) -> dict:
        states = [self._state.get(flat, {}) for flat in self._flat_masters]
        steps = {float(state["step"]) if state else None for state in states}
        assert len(steps) == 1, f"sub-groups are at different steps: {steps}"
        return {
            "optimizer_step": steps.pop(),
            "schedule": self.schedule.state(),
            "deepspeed": {name: getattr(self.engine, name) for name in DEEPSPEED_COUNTERS},
        }

    def read_states(self) -> dict[str, Tensor]:
        kinds = (MASTER, *(MOMENTS if self._has_moments else ()))
        tensors = {}
        for name, place in self.slices().items():
            parameter = self.module.get_parameter(name)
            for kind in kinds:
                # Without the padding, which depends on the number of ranks.
                tensors[f"{name}.{kind}"] = _get(parameter, kind)[: place.length].detach().cpu()
        return tensors

    @torch.no_grad()
    def write_states(self, tensors: dict[str, Tensor], counters: dict) -> None:
        self._make_moments(counters["optimizer_step"])
        kinds = (MASTER, *(MOMENTS if self._has_moments else ()))
        for name, place in self.slices().items():
            parameter = self.module.get_parameter(name)
            for kind in kinds:
                partition = _get(parameter, kind).clone()
                partition[: place.length] = tensors[f"{name}.{kind}"].to(partition.device)
                _set(parameter, partition, kind)
        self._refresh_weights()
        for name, value in counters.get("deepspeed", {}).items():
            setattr(self.engine, name, value)

    def local_bits(self) -> dict[str, Tensor]:
        return {name: x.ds_tensor.data for name, x in self._partitions()}

    def close(self) -> None:
        self.engine.destroy()

    @property
    def _state(self) -> dict:
        return self.engine.optimizer.state

    @property
    def _flat_masters(self) -> list[Tensor]:
        """One flat fp32 tensor a sub-group of parameters; keys of the torch optimizer's state."""
        return self.engine.optimizer.fp32_partitioned_groups_flat

    @property
    def _has_moments(self) -> bool:
        return all(self._state.get(flat) for flat in self._flat_masters)

    def _make_moments(self, step: float | None) -> None:
        """Adam's state as its first step would make it, but at ``step``; none if that is None."""
        self._state.clear()
        if step is None:
            return
        zeros_like = torch.zeros_like if self._disk is None else self._disk.zeros_like
        # DeepSpeed steps each flat master on its own, so torch's state is by these.
        for flat in self._flat_masters:
            self._state[flat] = {"step": adam_step(step, flat)}
            self._state[flat] |= {moment: zeros_like(flat) for moment in MOMENTS}

    def _refresh_weights(self) -> None:
        """Makes the weights anew from the masters, as DeepSpeed's optimizer step does."""
        optimizer = self.engine.optimizer
        # Small parameters, which DeepSpeed keeps whole, are cut before and gathered after: the
        # masters are copied into partitions.
        if optimizer.persistent_parameters:
            optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()


def _get(parameter: nn.Parameter, kind: str) -> Tensor:
    if kind == MASTER:
        return safe_get_local_fp32_param(parameter)
    return safe_get_local_optimizer_state(parameter, kind)


def _set(parameter: nn.Parameter, value: Tensor, kind: str) -> None:
    if kind == MASTER:
        safe_set_local_fp32_param(parameter, value)
    else:
        safe_set_local_optimizer_state(parameter, value, kind)


def check_deepspeed(config: Config) -> None:
    """Lets DeepSpeed look at its settings before any process group starts.

    Raises:
        UserError: it refuses one.
    """
    if config.engine.zero_stage < 3:  # its engine is not used
        return
    settings = resolve_deepspeed(config, None, "actor", trainable=True)
    del settings["train_batch_size"]  # of all ranks, which it counts
    try:
        DeepSpeedConfig(settings)
    except ValidationError as error:
        raise _refused(error) from None


def _refused(error: ValidationError) -> UserError:
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    return UserError(f"engine.deepspeed: {error.title}: {key}: {problem['msg']}")
