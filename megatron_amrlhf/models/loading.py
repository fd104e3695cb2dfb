"""Fills a stage with the weights of a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

import torch

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.heads import bias_beside
from megatron_amrlhf.models.mapping import stage_entries
from megatron_amrlhf.models.shards import NamedWeights
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.mesh import Mesh


@torch.no_grad()
def load_stage(
    model: StageModel, head_outputs: int | None, weights: NamedWeights, mesh: Mesh
) -> None:
    """Copies this rank's shard of every parameter of the stage.

    A linear head that the folder does not have starts at zero (its outputs are 0 for every
    token); anything else that is missing is an error.

    Raises:
        UserError: a tensor is missing or has another shape than the config says.
    """
    parameters = dict(model.named_parameters())
    entries = stage_entries(model.shape, mesh.cut, mesh.pp_rank, head_outputs)
    names = {entry.local for entry in entries}
    assert names == set(parameters), names.symmetric_difference(parameters)
    for entry in entries:
        parameter = parameters[entry.local]
        is_head = entry.hf[0].startswith("head.")
        if is_head and entry.hf[0] not in weights:
            parameter.zero_()
            if parameter.ndim == 1:
                # transformers' sequence classifiers have no bias: ours lies in config.json.
                parameter.copy_(bias_beside(weights.folder, len(parameter)))
            continue
        # Read whole and cut, one entry at a time: no rank ever holds the whole model.
        tensors = [weights.get(name) for name in entry.hf]
        shard = entry.layout.split(tensors, mesh.tp_size, model.shape)[mesh.tp_rank]
        if shard.shape != parameter.shape:
            raise UserError(
                f"{weights.folder}: {', '.join(entry.hf)} give shape {tuple(shard.shape)}, "
                f"the model's config needs {tuple(parameter.shape)}"
            )
        parameter.copy_(shard)
