"""Which weights a folder holds, in one short text."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import hash_ends

SAMPLED_BYTES = 4 * 1024 * 1024


def model_fingerprint(folder: str | Path) -> str:
    """Hash of a model's weights: of each safetensors file its name, size, beginning and end.

    Training changes all of a model's weights, so a few megabytes of each file tell two models
    apart, and a large model needs no minute of reading.

    Raises:
        UserError: no such file, or it cannot be read.
    """
    digest, files = hashlib.sha256(), sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise UserError(f"model folder {folder} has no *.safetensors file")
    for file in files:
        try:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            hash_ends(digest, file, SAMPLED_BYTES)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:32]
