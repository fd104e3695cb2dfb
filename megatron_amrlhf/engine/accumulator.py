"""Gradients of a role's micro-batches, summed in float32 and shared over data-parallel ranks.

All ZeRO stages and layouts use this one sum. Gradients are taken off the parameters as soon as
autograd has made them, so any number of micro-batches may be in flight (1F1B), which DeepSpeed's
own accumulation does not allow, and bfloat16 models lose nothing in the sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_amrlhf.parallel.mesh import Mesh


@dataclass(frozen=True)
class Span:
    """Columns of a parameter's partition in the rows of the sum; ``size`` includes padding."""

    start: int
    size: int
    numel: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.size)

    def rows(self, flat: Tensor, num_rows: int) -> Tensor:
        """``[num_rows, size]`` of a parameter's elements, padded with 0."""
        # Row r is what rank r has of it; the last rows may be padding alone.
        padding = num_rows * self.size - self.numel
        return F.pad(flat.reshape(-1), (0, padding)).view(num_rows, self.size)


def partition_spans(sizes: dict[str, int], num_ranks: int) -> dict[str, Span]:
    """Where each parameter's partition lies, by name: ZeRO-3's own cut, ``ceil(n / ranks)``."""
    spans, start = {}, 0
    for name, numel in sizes.items():
        size = -(-numel // num_ranks)
        spans[name] = Span(start, size, numel)
        start += size
    return spans


class GradientAccumulator:
    """The sum of a step's gradients.

    Args:
        sizes: elements of each parameter (this tensor rank's shard) by local name, in order.
        mesh: the mesh.
        reduce: over data-parallel ranks once a ``step``, holding a float32 gradient of the whole
            stage until then, or each ``microbatch``, parameter by parameter, holding a partition.
        whole: every rank ends with the whole gradient (ZeRO stage 0), not with its partition.

    Attributes:
        spans: where each parameter's partition lies in a row.
    """

    def __init__(
        self,
        sizes: dict[str, int],
        mesh: Mesh,
        reduce: Literal["step", "microbatch"],
        whole: bool,
    ):
        self.spans = partition_spans(sizes, mesh.dp_size)
        self._mesh, self._reduce, self._whole = mesh, reduce, whole
        self._width = sum(span.size for span in self.spans.values())
        self._sum: Tensor | None = None

    def watch(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Takes the gradients that autograd leaves on these parameters, inside a step."""
        for name, parameter in parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, name=name: self._take(name, parameter)
            )

    def begin(self) -> None:
        """Starts a step's sum."""
        assert self._sum is None, "the step before has not ended"
        # Reduced at each micro-batch, a rank keeps no row but its own.
        held = self._whole or self._reduce == "step"
        rows = self._mesh.dp_size if held else 1
        self._sum = torch.zeros(rows, self._width, device=self._mesh.device)

    def _take(self, name: str, parameter: nn.Parameter) -> None:
        assert self._sum is not None, f"a gradient of {name} outside of a step"
        ranks = self._mesh.dp_size
        assert parameter.grad is not None, "autograd has just left it"
        rows = self.spans[name].rows(parameter.grad, ranks)
        # At once: autograd would add the next micro-batch to it, and this one would count twice.
        parameter.grad = None
        columns = self.spans[name].columns
        # The sum is float32, so a bfloat16 gradient is added in float32.
        if self._reduce == "step" or ranks == 1:
            self._sum[:, columns] += rows
            return
        # Over ranks in float32 too. All of them come here for each parameter: they have as many
        # micro-batches, and every parameter is in the graph of each one.
        rows = rows.float()
        if self._whole:
            dist.all_reduce(rows, group=self._mesh.dp_group)
            self._sum[:, columns] += rows
            return
        own = rows.new_empty(rows.shape[1])
        dist.reduce_scatter_tensor(own, rows.reshape(-1), group=self._mesh.dp_group)
        self._sum[0, columns] += own

    @property
    def _open(self) -> Tensor:
        assert self._sum is not None, "no step has begun"
        return self._sum

    def finish(self) -> None:
        """Ends the sum: from here on it is the mean over data-parallel ranks."""
        ranks, total = self._mesh.dp_size, self._open
        if ranks > 1 and self._reduce == "step":
            if self._whole:
                dist.all_reduce(total, group=self._mesh.dp_group)
            else:
                own = total.new_empty(self._width)
                dist.reduce_scatter_tensor(own, total.view(-1), group=self._mesh.dp_group)
                total = self._sum = own[None]
        # The mean, as ZeRO takes it: the losses have the factor DP (losses/reduce.py).
        total /= ranks

    def drop(self) -> None:
        """Frees the sum."""
        self._sum = None

    def held(self, name: str) -> Tensor:
        """``[rows, size]`` view of what this rank holds of a gradient: its partition, or all."""
        return self._open[:, self.spans[name].columns]

    def own(self, name: str) -> Tensor:
        """``[size]`` view of this rank's partition of a gradient; padding is 0."""
        return self.own_flat()[self.spans[name].columns]

    def own_flat(self) -> Tensor:
        """This rank's partitions of all gradients, in order."""
        # After a reduce-scatter there is one row, and it is this rank's.
        return self._open[self._mesh.dp_rank if self._open.shape[0] > 1 else 0]

    def whole_flat(self) -> Tensor:
        """The whole gradient, one partition after the other (``whole`` only)."""
        assert self._whole
        return self._open.view(-1)

    def scale(self, factor: float) -> None:
        """Multiplies the sum in place."""
        self._open.mul_(factor)
