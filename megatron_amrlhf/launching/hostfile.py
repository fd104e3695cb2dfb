"""The hostfile of the deepspeed launcher: one ``HOST slots=N`` a line."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_amrlhf.errors import UserError

LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)(\s|#|$)", re.ASCII)


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes of each host, in the file's order; ``#`` begins a comment line.

    Raises:
        UserError: the file is missing, empty or has a wrong line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: cannot be read ({error})") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = LINE.match(text)
        if match is None:
            raise UserError(f"{path}, line {number}: '{text}' is not HOST slots=N")
        if match[1] in hosts:
            raise UserError(f"{path}, line {number}: {match[1]} is there twice, add up its slots")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise UserError(f"{path}: no host in it; write one HOST slots=N a line")
    return hosts
