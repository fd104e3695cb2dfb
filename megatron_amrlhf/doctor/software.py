"""Which versions the package wants, and which are installed; nothing is imported for it."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DISTRIBUTION = "megatron-amrlhf"
REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Pins:
    """Wanted versions.

    Attributes:
        source: the file that says so.
        python: versions of Python.
        requirements: one for each distribution.
    """

    source: str
    python: SpecifierSet
    requirements: tuple[Requirement, ...]


def read_pins() -> Pins:
    """From requirements.txt beside the package, else from what pip has kept of it."""
    listed = REPOSITORY / "requirements.txt"
    if listed.is_file():
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
        lines = (line.partition("#")[0].strip() for line in listed.read_text().splitlines())
        python, source = project["project"]["requires-python"], "requirements.txt"
        requirements = [Requirement(line) for line in lines if line]
    else:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
        python, source = metadata["Requires-Python"], f"{DISTRIBUTION}'s metadata"
        wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
        requirements = [each for each in wanted if each.marker is None]  # others: its extras
    return Pins(source, SpecifierSet(python), tuple(requirements))


def installed_versions(pins: Pins) -> dict[str, str | None]:
    """Version of each required distribution; None where it is not installed."""
    return {each.name: _version(each.name) for each in pins.requirements}


def python_version() -> str:
    """Of this interpreter."""
    return platform.python_version()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
