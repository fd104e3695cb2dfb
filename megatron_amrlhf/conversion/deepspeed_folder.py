"""DeepSpeed's own ZeRO checkpoints: partitions put together by ``deepspeed.utils.zero_to_fp32``.

That module unpickles whatever its files hold. So each file is first read by torch's restricted
unpickler, with the few classes of DeepSpeed that its checkpoints hold; what it refuses is not
opened.
"""

from __future__ import annotations

from pathlib import Path

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor

from megatron_amrlhf.conversion.pickles import load_plain
from megatron_amrlhf.errors import UserError

ALLOWED = (ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address)
STATES = ("*_model_states.pt", "*_optim_states.pt")  # what that module opens
PREFIX = "module."  # of a wrapped model's names


def tag_folder(folder: Path) -> Path | None:
    """The folder of DeepSpeed's files: ``folder`` itself or the one that ``latest`` names."""
    places = [folder]
    latest = folder / "latest"
    if latest.is_file():
        tag = latest.read_text(encoding="utf-8").strip()
        places += [folder / tag] if Path(tag).name == tag else []
    return next((place for place in places if any(place.glob("*_optim_states.pt"))), None)


class DeepSpeedWeights:
    """``NamedWeights`` of a ZeRO checkpoint of a Hugging Face model, float32.

    Raises:
        UserError: a file holds other objects, or files are missing.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        place = tag_folder(folder)
        if place is None:
            raise UserError(f"{folder} has no *_optim_states.pt")
        for path in sorted(path for names in STATES for path in place.glob(names)):
            load_plain(path, ALLOWED)
        if any(place.glob("*mp_rank_01*")):
            raise UserError(
                f"{place} is of a model-parallel run, of whose shards DeepSpeed does not tell how "
                "they lie: convert a run without tensor parallelism"
            )
        try:
            lazy = get_fp32_state_dict_from_zero_checkpoint(
                str(place.parent), tag=place.name, lazy_mode=True
            )
        except (ValueError, FileNotFoundError, KeyError, NotImplementedError) as error:
            raise UserError(f"{place}: {str(error).splitlines()[0]}") from None
        self._tensors = {name.removeprefix(PREFIX): tensor for name, tensor in lazy.items()}

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def get(self, name: str) -> Tensor:
        """The tensor ``name``, gathered from all partitions now."""
        return self._tensors[name].contiguous()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors
