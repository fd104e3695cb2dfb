"""Which environment variables the ranks of other nodes get through pdsh and ssh.

Their values stand in the process list of this machine and of every node. What looks secret is left
out of DeepSpeed's ``.deepspeed_env``, and of the launcher's own environment, from which DeepSpeed
takes more by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PREFIXES = ("HF_", "TRANSFORMERS_", "TORCH", "GLOO_", "NCCL_", "OMP_", "AMRLHF_")
NAMES = (
    "LD_LIBRARY_PATH",
    "DS_ACCELERATOR",
    "TOKENIZERS_PARALLELISM",
    "CUDA_DEVICE_MAX_CONNECTIONS",
)
BY_DEEPSPEED = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")  # beginnings of names; NCCL on GPUs
# DeepSpeed puts values between double quotes as they are, and pdsh has signs of its own.
UNQUOTABLE = re.compile(r'["$`\\\n\ud800-\udfff]|%[hnu%]')
SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL|(TOKEN|KEY)S?(_\d+)?$"
    r"|(^|_)(PASS|PWD|AUTH|COOKIE|PAT|SAS)$",
    re.IGNORECASE,
)
NAME_OF_A_FILE = re.compile(r"_(PATH|FILE|DIR)$", re.IGNORECASE)
SWITCHES = ("", "0", "1", "true", "false", "yes", "no", "on", "off")
SECRET_VALUE = re.compile(
    r"(?i:[a-z][a-z0-9+.-]*://[^/?#\s]*@)"  # a user or password in an address
    r"|(?i:[?&;](\w*token|\w*key|sig|signature|secret|password|auth)=)"
    r"|\b(hf_|gh[pousr]_|github_pat_|glpat-|xox[abp]-|sk-|dapi)\w{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\b(?i:bearer|basic)\s+\S{8,}|\beyJ[\w-]{8,}\.[\w-]+\.|-----BEGIN "
)


@dataclass(frozen=True)
class Forwarding:
    """What becomes of the variables of this process.

    Attributes:
        text: of ``.deepspeed_env``.
        secret: left out, as they look secret; names only.
        unquotable: left out, as a shell or pdsh would change them.
        hidden: those of both that DeepSpeed would forward by itself: to be unset before it runs.
    """

    text: str
    secret: tuple[str, ...]
    unquotable: tuple[str, ...]
    hidden: tuple[str, ...]


def looks_secret(name: str, value: str) -> bool:
    """Whether a variable is, or holds, a password, key or token; in doubt it is one."""
    if SECRET_VALUE.search(value):
        return True
    is_harmless = NAME_OF_A_FILE.search(name) or value.lower() in SWITCHES
    return SECRET_NAME.search(name) is not None and not is_harmless


def forwarding(environment: Mapping[str, str]) -> Forwarding:
    """Sorts the variables that would get to other nodes."""
    lines, secret, unquotable, hidden = [], [], [], []
    for name, value in sorted(environment.items()):
        is_ours = name.startswith(PREFIXES) or name in NAMES
        is_deepspeeds = name.startswith(BY_DEEPSPEED)
        if not is_ours and not is_deepspeeds:
            continue
        if looks_secret(name, value):
            secret.append(name)
        elif UNQUOTABLE.search(value) or not re.fullmatch(r"\w+", name, re.ASCII):
            unquotable.append(name)
        else:
            lines += [f"{name}={value}\n"] if is_ours else []
            continue
        hidden += [name] if is_deepspeeds else []
    return Forwarding("".join(lines), tuple(secret), tuple(unquotable), tuple(hidden))
