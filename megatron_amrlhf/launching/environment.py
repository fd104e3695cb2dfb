"""Which environment variables the ranks of other nodes get, in DeepSpeed's ``.deepspeed_env``."""

from __future__ import annotations

from collections.abc import Mapping

# DeepSpeed forwards these by itself: MLFLOW*, PYTHON*, MV2*, UCX*, and NCCL* on GPUs.
PREFIXES = ("HF_", "TRANSFORMERS_", "TORCH", "GLOO_", "NCCL_", "OMP_", "AMRLHF_")
NAMES = (
    "LD_LIBRARY_PATH",
    "DS_ACCELERATOR",
    "TOKENIZERS_PARALLELISM",
    "CUDA_DEVICE_MAX_CONNECTIONS",
)
# They would be readable in the process list of every node; keys belong into a file.
SECRET_SUFFIXES = ("_TOKEN", "_KEY", "_SECRET", "_PASSWORD")
UNQUOTABLE = '"$`\\\n'  # DeepSpeed puts values into double quotes as they are


def forwarded(environment: Mapping[str, str]) -> tuple[str, list[str]]:
    """The text of ``.deepspeed_env``, and the names that had to be left out."""
    lines, left_out = [], []
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIXES) and name not in NAMES:
            continue
        if name.endswith(SECRET_SUFFIXES) or any(sign in value for sign in UNQUOTABLE):
            left_out.append(name)
        else:
            lines.append(f"{name}={value}\n")
    return "".join(lines), left_out
