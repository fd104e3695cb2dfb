"""ZeRO stages 0 and 1: every data-parallel rank holds the stage's weights.

At stage 1 masters and moments are partitioned, at stage 0 each rank has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_amrlhf.engine.accumulator import GradientAccumulator, partition_spans
from megatron_amrlhf.engine.weights import (
    MASTER,
    MOMENTS,
    Slice,
    Weights,
    adam_step,
    lent,
)
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.mesh import Mesh


class ReplicatedWeights(Weights):
    """A stage whose weights are whole, with AdamW over one flat float32 master.

    Args:
        module: the loaded stage; it trains as it is.
        plain: a twin for forwards without gradient; None: the module serves.
        make_optimizer: gives optimizer and schedule; None for a frozen role.
        gradients: the sum of gradients, watching nothing yet; None for a frozen role.
        shard_optimizer: stage 1; else stage 0.
        mesh: the mesh.
    """

    def __init__(
        self,
        module: StageModel,
        plain: StageModel | None,
        *,
        make_optimizer: Callable | None,
        gradients: GradientAccumulator | None,
        shard_optimizer: bool,
        mesh: Mesh,
    ):
        self.module, self.gradients, self._mesh = module, gradients, mesh
        self.stage = module
        self._plain, self._sharded = plain, shard_optimizer
        sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
        self._spans = partition_spans(sizes, mesh.dp_size)
        if make_optimizer is None:
            return
        flat = self._flatten()
        # A copy, so that the other ranks' rows are freed.
        own = flat[mesh.dp_rank].clone() if shard_optimizer else flat.flatten()
        self._master = nn.Parameter(own)
        self.optimizer, self.schedule = make_optimizer([self._master])
        self.trained_gradients.watch(module.named_parameters())

    @torch.no_grad()
    def _flatten(self) -> Tensor:
        """``[DP, P]`` float32: the weights, a row for each rank's partition."""
        # Padding is 0 and stays so: neither its gradient nor weight decay moves it.
        rows = [
            self._spans[name].rows(parameter, self._mesh.dp_size)
            for name, parameter in self.module.named_parameters()
        ]
        return torch.cat(rows, dim=1).float()

    @contextmanager
    def window(self):
        lend: AbstractContextManager[StageModel] = nullcontext(self.module)
        if self._plain is not None:
            lend = lent(self.module.parameters(), self._plain)
        with torch.no_grad(), lend as stage:
            yield stage.eval()

    @contextmanager
    def training(self):
        self.trained_gradients.begin()
        yield self.module.train()
        self.trained_gradients.finish()

    @torch.no_grad()
    def update(self) -> None:
        gradients = self.trained_gradients
        self._master.grad = gradients.own_flat() if self._sharded else gradients.whole_flat()
        self.optimizer.step()
        self.schedule.scheduler.step()
        # A view, which would keep the sum alive.
        self._master.grad = None
        gradients.drop()
        self._refresh_weights()

    @torch.no_grad()
    def _refresh_weights(self) -> None:
        """Makes the weights of the masters."""
        ranks = self._mesh.dp_size
        dtype = next(self.module.parameters()).dtype
        # Rounded before it is sent: half the bytes in bfloat16, and the same bits everywhere.
        flat = self._master.to(dtype)
        if self._sharded and ranks > 1:
            own, flat = flat, flat.new_empty(ranks * flat.numel())
            dist.all_gather_into_tensor(flat, own, group=self._mesh.dp_group)
        rows = flat.view(ranks, -1)
        for name, parameter in self.module.named_parameters():
            span = self._spans[name]
            # All ranks' partitions one after the other, without the padding at the end.
            whole = rows[:, span.columns].reshape(-1)[: span.numel]
            parameter.copy_(whole.view_as(parameter))

    def slices(self) -> dict[str, Slice]:
        rank = self._mesh.dp_rank
        return {
            name: Slice.of(parameter.shape, self._spans[name].size, rank)
            for name, parameter in self.module.named_parameters()
        }

    def counters(self) -> dict:
        state = self.optimizer.state.get(self._master, {})
        return {
            "optimizer_step": float(state["step"]) if state else None,
            "schedule": self.schedule.state(),
        }

    def read_states(self) -> dict[str, Tensor]:
        flats = {MASTER: self._master.detach()}
        state = self.optimizer.state.get(self._master, {})
        flats |= {moment: state[moment] for moment in MOMENTS if state}
        tensors = {}
        for name, place in self.slices().items():
            for kind, flat in flats.items():
                own = self._own(flat)[self._spans[name].columns]
                tensors[f"{name}.{kind}"] = own[: place.length].detach().cpu()
        return tensors

    @torch.no_grad()
    def write_states(self, tensors: dict[str, Tensor], counters: dict) -> None:
        step = counters["optimizer_step"]
        self.optimizer.state.clear()
        flats: dict[str, Tensor] = {MASTER: self._master}
        # A checkpoint from before the first step has no moments.
        if step is not None:
            state = {moment: torch.zeros_like(self._master) for moment in MOMENTS}
            flats |= state
            self.optimizer.state[self._master] = {
                "step": adam_step(step, self._master),
                **state,
            }
        for name, place in self.slices().items():
            for kind, flat in flats.items():
                own = self._own(flat)[self._spans[name].columns]
                own[: place.length] = tensors[f"{name}.{kind}"].to(own.device)
        for flat in flats.values():
            self._spread(flat)
        self._refresh_weights()

    def _own(self, flat: Tensor) -> Tensor:
        """This rank's row of a flat state."""
        return flat if self._sharded else flat.view(self._mesh.dp_size, -1)[self._mesh.dp_rank]

    def _spread(self, flat: Tensor) -> None:
        """Gives every rank the others' rows of a whole flat state."""
        if not self._sharded and self._mesh.dp_size > 1:
            # A copy: it is a part of what the gather writes.
            own = self._own(flat).clone()
            dist.all_gather_into_tensor(flat.detach(), own, group=self._mesh.dp_group)

    def local_bits(self) -> dict[str, Tensor]:
        return {name: x.detach() for name, x in self.module.named_parameters()}

    def close(self) -> None:
        """Nothing outlives the references."""
