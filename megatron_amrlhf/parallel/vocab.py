"""Log-probs and entropy from vocabulary-parallel logits, without gathering them.

Logits of ``N`` positions lie as ``[N, V_padded / TP]`` on the ranks of the tensor group. Columns
past the true vocabulary (padding to a multiple of TP), and those of ids that are no token, take no
part anywhere. All is computed in float32 at least, in chunks of positions, so that a float32
``[N, V]`` is never held whole.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# float32 [256, V / TP] at a time: 154 MB for a vocabulary of 150,000 at TP 1.
CHUNK_POSITIONS = 256


def _all_reduce(tensor: Tensor, op, group: dist.ProcessGroup) -> Tensor:
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op, group=group)
    return tensor


def wide(
    logits: Tensor, first_column: int, vocab_size: int, usable: Tensor | None = None
) -> Tensor:
    """A float32 (float64 stays) copy of ``logits`` with the columns of no token at -inf."""
    # A copy even of float32: -inf is written into it, and the caller goes on with its own.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    # 0 on a tensor rank that holds nothing but padding.
    num_true = min(max(vocab_size - first_column, 0), logits.shape[-1])
    logits[..., num_true:] = float("-inf")
    if usable is not None:
        own = usable[first_column : first_column + num_true].to(logits.device)
        logits[..., :num_true].masked_fill_(~own, float("-inf"))
    return logits


def _log_sum_exp(wide_logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[n]`` log-sum-exp over all columns of the group."""
    # The peak of all ranks is finite also where this one has only -inf: no inf - inf below.
    peak = _all_reduce(wide_logits.amax(dim=-1), dist.ReduceOp.MAX, group)
    total = (wide_logits - peak[:, None]).exp().sum(dim=-1)
    return peak + _all_reduce(total, dist.ReduceOp.SUM, group).log()


class _TokenLogProbs(torch.autograd.Function):
    """log softmax(logits)[target] with the softmax recomputed chunk by chunk in the backward."""

    @staticmethod
    def forward(ctx, logits, targets, vocab_size, temperature, group, usable):  # noqa: PLR0917
        columns = logits.shape[-1]
        first_column = dist.get_rank(group) * columns
        local = targets - first_column
        here = (local >= 0) & (local < columns)
        # A column that exists, for gather; what it finds is dropped where the target is elsewhere.
        safe = torch.where(here, local, 0)
        pieces, lse_pieces = [], []
        for start in range(0, logits.shape[0], CHUNK_POSITIONS):
            part = slice(start, start + CHUNK_POSITIONS)
            chunk = wide(logits[part], first_column, vocab_size, usable) / temperature
            lse = _log_sum_exp(chunk, group)
            own = chunk.gather(-1, safe[part, None])[:, 0]
            own = torch.where(here[part], own, torch.zeros_like(own))
            # One rank has the target's column: the sum over the ranks is its logit.
            pieces.append(_all_reduce(own, dist.ReduceOp.SUM, group) - lse)
            lse_pieces.append(lse)
        # The logits in their own dtype and [N] numbers: a float32 softmax is not kept.
        ctx.save_for_backward(logits, here, safe, torch.cat(lse_pieces))
        ctx.first_column, ctx.vocab_size, ctx.temperature = first_column, vocab_size, temperature
        ctx.usable = usable
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx, grad):
        logits, here, safe, lse = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for start in range(0, logits.shape[0], CHUNK_POSITIONS):
            part = slice(start, start + CHUNK_POSITIONS)
            chunk = wide(logits[part], ctx.first_column, ctx.vocab_size, ctx.usable)
            chunk = chunk / ctx.temperature
            # d log softmax[target] / d logit = 1[target] - softmax. lse is of all ranks already, so
            # the backward needs no collective.
            out = chunk.sub_(lse[part, None]).exp_().neg_()
            out.scatter_add_(-1, safe[part, None], here[part, None].to(out.dtype))
            grad_logits[part] = out * (grad[part, None] / ctx.temperature)
        return grad_logits, None, None, None, None, None


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    *,
    temperature: float = 1.0,
    usable: Tensor | None = None,
) -> Tensor:
    """Log-prob of each target token, differentiable in ``logits``.

    Args:
        logits: ``[N, V_padded / TP]`` of this tensor rank, any float dtype; not changed.
        targets: ``[N]`` int64 token ids below ``vocab_size``; negative ids are refused.
        vocab_size: true vocabulary size.
        group: tensor-parallel group; every rank of it must call.
        temperature: logits are divided by it.
        usable: ``[vocab_size]`` bool, ids that are tokens; the others have no probability. None:
            all are.

    Returns:
        ``[N]`` float32 (float64 for float64 logits) log-probs in nats, equal on all ranks.
    """
    assert targets.shape == logits.shape[:1], (targets.shape, logits.shape)
    # A label such as -100 would be on no rank, and its log-prob -lse without a word.
    assert not targets.numel() or (int(targets.min()) >= 0 and int(targets.max()) < vocab_size)
    if not targets.numel():
        return logits.sum(dim=-1).to(torch.promote_types(logits.dtype, torch.float32))
    return _TokenLogProbs.apply(logits, targets, vocab_size, temperature, group, usable)


@torch.no_grad()
def entropy(
    logits: Tensor, vocab_size: int, group: dist.ProcessGroup, usable: Tensor | None = None
) -> Tensor:
    """``[N]`` entropy of the softmax at each position in nats, without gradient."""
    columns = logits.shape[-1]
    first_column = dist.get_rank(group) * columns
    pieces = [torch.zeros(0, device=logits.device)]
    for start in range(0, logits.shape[0], CHUNK_POSITIONS):
        chunk = wide(logits[start : start + CHUNK_POSITIONS], first_column, vocab_size, usable)
        lse = _log_sum_exp(chunk, group)
        probs = (chunk - lse[:, None]).exp()
        # At -inf the probability is 0, and 0 log 0 is 0 here; 0 times -inf would be nan.
        mean = (probs * chunk.masked_fill(probs == 0, 0.0)).sum(dim=-1)
        # H = -sum p log p = lse - sum p logit, as log p is logit - lse.
        pieces.append((lse - _all_reduce(mean, dist.ReduceOp.SUM, group)).float())
    return torch.cat(pieces)


def gather_logits(logits: Tensor, vocab_size: int, group: dist.ProcessGroup) -> Tensor:
    """``[N, V]`` float32 logits of the whole true vocabulary on every tensor rank."""
    if dist.get_world_size(group) == 1:
        return logits.float()[:, :vocab_size]
    shards = [torch.empty_like(logits) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, logits.contiguous(), group=group)
    return torch.cat(shards, dim=-1).float()[:, :vocab_size]
