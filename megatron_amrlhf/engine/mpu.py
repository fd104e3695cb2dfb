"""The mesh in the words that DeepSpeed asks for (its ``mpu`` argument)."""

from __future__ import annotations

import torch.distributed as dist

from megatron_amrlhf.parallel.mesh import Mesh


class Mpu:
    """Adapter of a ``Mesh``; megatron-core's parallel_state lacks half of these names.

    The model-parallel *rank* is the tensor rank while the model-parallel *group* is the whole
    replica: DeepSpeed counts a replicated parameter where the rank is 0, which must be so on
    every pipeline stage.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size * self._mesh.pp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.replica_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.tp_group

    def get_pipeline_model_parallel_rank(self) -> int:
        return self._mesh.pp_rank

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._mesh.pp_size

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.pp_group

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.dp_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._mesh.dp_group)
