"""Whether Python and the libraries are those of requirements.txt, the same on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from packaging.requirements import Requirement

from megatron_amrlhf.doctor.judge_ranks import by_host
from megatron_amrlhf.doctor.records import Finding, RankFacts, places_text
from megatron_amrlhf.doctor.software import Pins

FEW_VERSIONS = ("torch", "megatron-core", "deepspeed", "transformers")  # named where all is well


def judge_versions(facts: Sequence[RankFacts], pins: Pins) -> list[Finding]:
    """Installed versions against the pins and against each other."""

    def problems(each: RankFacts) -> Iterator[Finding]:
        if not pins.python.contains(each.python):
            yield Finding(
                "versions",
                "error",
                f"Python {each.python} is not {pins.python}",
                "make the environment with another Python (bash launch/install.sh)",
            )
        for wanted in pins.requirements:
            if problem := _version_problem(wanted, each.versions[wanted.name]):
                fix = f"pip install '{wanted}'"
                yield Finding("versions", "error", problem + f", {pins.source} wants {wanted}", fix)

    found = [*by_host(facts, problems), *_mixed_versions(facts)]
    if found:
        return found
    first = facts[0]
    names = [name for name in FEW_VERSIONS if name in first.versions]
    text = ", ".join([f"Python {first.python}", *(f"{x} {first.versions[x]}" for x in names)])
    same = f", the same on all {len(facts)} ranks" if len(facts) > 1 else ""
    return [Finding("versions", "ok", f"{text}; all as in {pins.source}{same}")]


def _version_problem(wanted: Requirement, version: str | None) -> str:
    if version is None:
        return f"{wanted.name} is not installed"
    if not wanted.specifier.contains(version, prereleases=True):
        return f"{wanted.name} {version}"
    return ""


def _mixed_versions(facts: Sequence[RankFacts]) -> Iterator[Finding]:
    columns: dict[str, list[str | None]] = {"Python": [each.python for each in facts]}
    columns |= {name: [each.versions[name] for each in facts] for name in facts[0].versions}
    for name, versions in columns.items():
        if len(set(versions)) == 1:
            continue
        places: dict[str | None, list] = {}
        for each, version in zip(facts, versions, strict=True):
            places.setdefault(version, []).append((each.host, each.rank))
        text = "; ".join(
            f"{version or 'none'} on {places_text(x)}" for version, x in places.items()
        )
        yield Finding(
            "versions", "error", f"{name} differs: {text}", "use one environment on all nodes"
        )
