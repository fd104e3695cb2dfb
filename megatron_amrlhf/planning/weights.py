"""How many parameters a stage has and how many bytes a rank holds for them, by arithmetic alone.

Nothing here needs processes or a device, so a layout can be judged before it is started.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_amrlhf.config.cut import PipelineCut, pipeline_cut
from megatron_amrlhf.config.layout import EngineSection, RoleSection
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.models.mapping import (
    EMBEDDING,
    HEAD,
    NORM,
    QK_NORMS,
    Entry,
    stage_entries,
    tied_name,
)
from megatron_amrlhf.models.shape import ModelShape

FLOAT32_BYTES = 4
NUM_MOMENTS = 2
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "auto": 2}  # auto: as on most GPUs


@dataclass(frozen=True)
class StageSpec:
    """One model's stage on one rank.

    Attributes:
        name: of the role.
        shape: sizes of the whole model.
        cut: the pipeline axis.
        stage: pipeline rank.
        tensor: tensor-parallel size.
        data: data-parallel size.
        sequence: whether training splits positions over the tensor axis.
        weight_bytes: of a weight and of an activation: 2 (bfloat16) or 4 (float32).
        head_outputs: None for a language model, else outputs of its linear head.
        trainable: whether it has an optimizer.
        role: how it is shared over the data-parallel ranks (``EngineSection.of_role``).
        engine: gather, reduce, recompute, micro-batches.
    """

    name: str
    shape: ModelShape
    cut: PipelineCut
    stage: int
    tensor: int
    data: int
    sequence: bool
    weight_bytes: int
    head_outputs: int | None
    trainable: bool
    role: RoleSection
    engine: EngineSection

    @property
    def has_embedding(self) -> bool:
        """Whether the model's first chunk is here."""
        return self.stage == 0

    @property
    def has_head(self) -> bool:
        """Whether the model's last chunk is here."""
        return self.stage == self.cut.stages - 1

    @property
    def num_layers(self) -> int:
        """Layers of all chunks of this rank."""
        return sum(
            len(chunk.layers) for chunk in self.cut.chunks(self.shape.num_layers, self.stage)
        )

    @property
    def gathers_once(self) -> bool:
        """Whether training gathers the whole stage before the first micro-batch."""
        return self.role.zero_stage == 3 and self.engine.gather == "step"

    @property
    def holds_whole_gradients(self) -> bool:
        """Whether gradients of the whole stage are held while micro-batches run."""
        return self.role.zero_stage == 0 or self.engine.reduce == "step"

    @cached_property
    def _entries(self) -> list[Entry]:
        return stage_entries(self.shape, self.cut, self.stage, self.head_outputs)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Elements of each parameter (this tensor rank's shard) by local name."""
        return {entry.local: self._elements(entry.local) for entry in self._entries}

    @property
    def summed_norms(self) -> list[str]:
        """Local names of norms whose gradients are summed over the tensor ranks."""
        return [entry.local for entry in self._entries if entry.is_summed(self.sequence)]

    @cached_property
    def num_parameters(self) -> int:
        """Elements of the stage on one tensor rank."""
        return sum(self.sizes.values())

    @cached_property
    def num_multiplied(self) -> int:
        """Elements that each token is multiplied with: an embedding only where it is the head."""
        is_head = self.cut.stages == 1 and self.shape.tied and self.head_outputs is None
        looked_up = [] if is_head else [x for x in self.sizes if x.endswith(EMBEDDING)]
        return self.num_parameters - sum(self.sizes[name] for name in looked_up)

    @cached_property
    def num_partitioned(self) -> int:
        """Elements of a data-parallel rank's partitions, each parameter's rounded up."""
        return sum(-(-size // self.data) for size in self.sizes.values())

    @property
    def window_bytes(self) -> int:
        """Whole weights beside the partitions in a gather window (rollout, score)."""
        gathers = self.role.zero_stage == 3 and self.data > 1  # one rank's partitions are whole
        return gathers * self.num_partitioned * self.data * self.weight_bytes

    @property
    def tied(self) -> str | None:
        """Local name of this stage's copy of an embedding that another stage has too."""
        return tied_name(self.shape, self.cut, self.stage, self.head_outputs)

    def _elements(self, name: str) -> int:
        shape, tensor = self.shape, self.tensor
        hidden = shape.hidden_size
        queries = shape.num_heads * shape.head_dim
        qkv = queries + 2 * shape.num_kv_heads * shape.head_dim
        if name.endswith(QK_NORMS):
            return shape.head_dim
        if name.endswith(NORM):
            return hidden
        if self.head_outputs is not None and name.endswith("output_layer.weight"):
            return self.head_outputs * hidden
        if name.endswith("output_layer.bias"):
            assert self.head_outputs is not None, "only a linear head has a bias"
            return self.head_outputs
        split = {
            EMBEDDING: shape.padded_vocab(tensor) * hidden,
            HEAD: shape.padded_vocab(tensor) * hidden,
            "linear_qkv.weight": qkv * hidden,
            "linear_qkv.bias": qkv,
            "linear_proj.weight": queries * hidden,
            "linear_fc1.weight": 2 * shape.ffn_size * hidden,
            "linear_fc2.weight": shape.ffn_size * hidden,
        }
        return next(size for end, size in split.items() if name.endswith(end)) // tensor


def stage_spec(
    config: Config,
    shape: ModelShape,
    stage: int,
    data: int,
    name: str,
    *,
    trainable: bool,
    head_outputs: int | None = None,
) -> StageSpec:
    """The stage of a role in a run.

    Args:
        config: the run.
        shape: the role's model.
        stage: pipeline rank.
        data: data-parallel size.
        name: of the role.
        trainable: whether it has an optimizer.
        head_outputs: None for a language model, else outputs of its linear head.
    """
    parallel = config.parallel
    return StageSpec(
        name=name,
        shape=shape,
        cut=pipeline_cut(parallel),
        stage=stage,
        tensor=parallel.tensor,
        data=data,
        sequence=parallel.sequence and parallel.tensor > 1,
        weight_bytes=WEIGHT_BYTES[config.dtype_of(name)],
        head_outputs=head_outputs,
        trainable=trainable,
        role=config.engine.of_role(name),
        engine=config.engine,
    )


@dataclass(frozen=True)
class HeldBytes:
    """Bytes on a rank for one model, activations apart.

    Attributes:
        weights: as they rest between phases.
        masters: float32 copies that the optimizer updates.
        moments: Adam's two, float32.
        gradients: the float32 sum while micro-batches run.
        gathered: whole weights beside the partitions while micro-batches run; for
            ``gather: microbatch`` the largest parameter, which is what must be whole at a time.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    gathered: int

    @property
    def resting(self) -> int:
        """Between optimizer steps."""
        return self.weights + self.masters + self.moments

    @property
    def training(self) -> int:
        """While micro-batches run."""
        return self.resting + self.gradients + self.gathered


def held_bytes(spec: StageSpec) -> HeldBytes:
    """What a rank holds of a stage. Offloaded parts are counted too, wherever they are."""
    zero, whole = spec.role.zero_stage, spec.num_partitioned * spec.data
    weights = spec.num_partitioned if zero == 3 else spec.num_parameters
    optimized = whole if zero == 0 else spec.num_partitioned
    summed = whole if spec.holds_whole_gradients else spec.num_partitioned
    gathered = 0
    if spec.trainable:
        largest = max(spec.sizes.values()) * spec.weight_bytes
        gathered = spec.window_bytes if spec.gathers_once else min(largest, spec.window_bytes)
    train = int(spec.trainable)
    return HeldBytes(
        weights=weights * spec.weight_bytes,
        masters=train * optimized * FLOAT32_BYTES,
        moments=train * optimized * FLOAT32_BYTES * NUM_MOMENTS,
        gradients=train * summed * FLOAT32_BYTES,
        gathered=gathered,
    )
