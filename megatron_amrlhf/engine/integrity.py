"""Weights that must not change, and copies that must be equal: checked by their bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amrlhf.engine.role import Role
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.mapping import REPLICATED
from megatron_amrlhf.parallel.collectives import gather_objects
from megatron_amrlhf.parallel.mesh import Mesh

MAX_NAMES = 3


class NotFinite(RuntimeError):
    """A trained model gives numbers that are not finite."""


class WeightsDiffer(RuntimeError):
    """A frozen role changed, or copies of a weight are not equal any more."""


def checksum(tensors: Iterable[Tensor]) -> str:
    """Hex digest of the tensors' bits, one after the other."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        # As bytes, since numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_checksums(roles: dict[str, Role]) -> dict[str, str]:
    """Checksum of what this rank holds of each role that is not trained."""
    return {
        name: checksum(role.weights.local_bits().values())
        for name, role in roles.items()
        if not role.spec.trainable
    }


def check_frozen(roles: dict[str, Role], before: dict[str, str]) -> None:
    """Compares with what ``frozen_checksums`` gave. Entered by every rank.

    Raises:
        WeightsDiffer: names the roles and the ranks, on every rank.
    """
    now = frozen_checksums(roles)
    changed = [name for name, digest in before.items() if now[name] != digest]
    _raise_if("a frozen role changed: {what}", changed)


def check_copies(roles: dict[str, Role], mesh: Mesh) -> str | None:
    """Compares the bits of all copies of a trained weight. Entered by every rank.

    Both copies of a tied embedding get one gradient, so a difference is an error. Norms and
    linear heads are updated on each rank of a tensor group by itself from gradients that are the
    same but for the hardware's rounding, so a difference is told. (Weights of data-parallel
    replicas come from one all-reduce or all-gather.)

    Returns:
        One line about norms and heads that differ, on every rank; None if none do.

    Raises:
        WeightsDiffer: names the roles and ranks with unequal embeddings, on every rank.
    """
    untied, drifted = [], []
    for name, role in roles.items():
        if not role.spec.trainable:
            continue
        bits = role.weights.local_bits()
        if mesh.tp_size > 1:
            replicated = [x.local for x in role.entries if x.layout is REPLICATED]
            digest = checksum(bits[local] for local in replicated)
            if len(set(gather_objects(digest, mesh.tp_group))) > 1:
                drifted.append(name)
        if role.tied is not None:
            # In this group are the first and last stage only, where role.tied is not None.
            digests = gather_objects(checksum([bits[role.tied]]), mesh.tie_group)
            if len(set(digests)) > 1:
                untied.append(name)
    _raise_if("copies of the tied embedding differ on the first and last stage: {what}", untied)
    found = _by_rank(drifted)
    return f"norms or heads differ on the ranks of a tensor group: {found}" if found else None


def check_loaded(role: Role) -> None:
    """Looks at the weights that a role was made of. Entered by every rank.

    Raises:
        UserError: some are not finite; the same message on every rank.
    """
    if names := _names(role.loaded_not_finite):
        raise UserError(
            f"{role.spec.folder}: the weights of the {role.spec.name} are not finite: {names}"
        )


def not_finite_weights(role: Role) -> str:
    """Names of a role's weights that are not finite now, or nothing. Entered by every rank."""
    with role.window() as stage:
        return _names(role.not_finite(stage))


def _names(mine: list[str]) -> str:
    """The first of all ranks' names, and how many more there are."""
    everyone = gather_objects(mine, dist.group.WORLD)
    # Each once: ranks that hold parts of one tensor all name it.
    names = list(dict.fromkeys(name for names in everyone for name in names))
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def _raise_if(text: str, found: list[str]) -> None:
    if what := _by_rank(found):
        raise WeightsDiffer(text.format(what=what))


def _by_rank(found: list[str]) -> str:
    """What any rank found, with its ranks; empty if none found anything."""
    ranks: dict[str, list[int]] = {}
    for rank, items in enumerate(gather_objects(found, dist.group.WORLD)):
        for item in items:
            ranks.setdefault(item, []).append(rank)
    return "; ".join(f"{item} (ranks {_numbers(where)})" for item, where in ranks.items())


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
