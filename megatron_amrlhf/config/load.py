"""Reads a run's YAML file and the ``--set`` overrides into a validated ``Config``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_amrlhf.config.problems import describe_problems, shortened
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError

INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
NUMBERS = {
    INT: re.compile(r"^([-+]?[0-9][0-9_]*|0o[0-7_]+|0x[0-9a-fA-F_]+)$"),
    FLOAT: re.compile(
        r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
        r"|\.(inf|Inf|INF))$|^\.(nan|NaN|NAN)$"
    ),
}


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2 and duplicate keys refused.

    So ``1e-6`` is a number, ``010`` is ten and not eight, and ``12:00:00`` is a text.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        base = {"0x": 16, "0o": 8}.get(text[:2].lower(), 10)
        return int(text[2:] if base != 10 else text, base)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):  # what PyYAML raises for wrong scalars
            kind = node.tag.rpartition(":")[2]
            problem = f"'{shortened(node.value)}' is no {kind}, in quotes it is text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key_node.value}' is given twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts a text in quotes where either version of YAML would take it for a number."""


for _tag, _pattern in NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _pattern, list("-+0123456789."))
_Loader.add_constructor(INT, _Loader.construct_yaml_int)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads and validates a run's configuration.

    Args:
        path: the YAML file.
        overrides: ``section.key=value`` texts; values are YAML without comments.

    Raises:
        UserError: the file is missing or malformed, or any key or value is wrong. All problems
            are named at once, on one line.
    """
    data = read_yaml(Path(path))
    for section in [name for name, value in data.items() if value is None]:
        del data[section]  # "mask:" with every key commented out means the defaults
    from_override = {_apply_override(data, text) for text in overrides}
    _check_characters(data, path)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        problems = describe_problems(error, data, from_override)
        raise UserError(f"{path}: {'; '.join(problems)}") from None


def dump_config(config: Config) -> str:
    """Writes a configuration, defaults included, as YAML that ``load_config`` reads back."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """What a text says, by the same rules as a run's configuration.

    Raises:
        yaml.YAMLError: it is no YAML, or nested too deeply.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def read_yaml(path: Path, kind: str = "run", examples: str = "configs/") -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        path: the file.
        kind: whose settings it holds, for errors.
        examples: where such files are, for errors.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file (give the path of a {kind}'s YAML, see {examples})")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, give the YAML file itself")
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_yaml_problem(error)}") from None
    if not isinstance(data, dict):
        found = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise UserError(f"{path}: {found}, must be a mapping of a {kind}'s keys, see {examples}")
    return data


def _check_characters(value: Any, path: str | Path, key: str = "") -> None:
    """Refuses texts that no tokenizer and no file system takes."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_characters(str(name), path, key)
            _check_characters(item, path, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            _check_characters(item, path, key)
    elif isinstance(value, str):
        wrong = next((x for x in value if x == "\0" or "\ud800" <= x <= "\udfff"), None)
        if wrong is not None:
            what = "half a character (a cut emoji)" if wrong != "\0" else "no character of a text"
            raise UserError(f"{path}: {key}: \\u{ord(wrong):04x} is {what}; correct it")


def _yaml_problem(error: yaml.YAMLError) -> str:
    """``, line 3: malformed YAML (...)``, without the several lines that PyYAML writes."""
    mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
    what = error.problem if isinstance(error, yaml.MarkedYAMLError) else str(error)
    where = f", line {mark.line + 1}" if mark else ""
    return f"{where}: malformed YAML ({' '.join(str(what).split())})"


def _override_value(raw: str) -> Any:
    """What the text behind the equals sign of ``--set`` says.

    It is YAML, so lists, numbers and null are what they are in a file; but nothing of it is a
    comment, and a text without quotes is the text as it stands, line breaks and signs too.

    Raises:
        yaml.YAMLError: it is no YAML, or a comment follows a list, a mapping or a quoted text.
    """
    text, node = raw.strip(), yaml.compose(raw, Loader=_Loader)
    if node is None:
        return text or raw or None  # nothing, or what YAML takes for a comment or white space
    value, comment = parse_yaml(raw), _skipped(raw)
    is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
    is_sign = text in ("|", ">") or text.startswith(("&", "! "))
    if is_sign or (is_plain and (comment or isinstance(value, str)) and text[0] != "!"):
        return text
    if comment:
        problem = (
            f"'{shortened(comment)}' is a comment: a text with # needs quotes around all of it"
        )
        raise yaml.MarkedYAMLError(problem=problem)
    return value


def _skipped(raw: str) -> str:
    """What YAML's scanner leaves out between its tokens: the comments."""
    end, skipped = 0, ""
    for token in yaml.scan(raw, Loader=_Loader):
        skipped += raw[end : token.start_mark.index]
        end = max(end, token.end_mark.index)
    return (skipped + raw[end:]).strip()


def _apply_override(data: dict[str, Any], text: str) -> str:
    """Writes one ``a.b=c`` into the raw data and returns its dotted key."""
    key, equals, raw = text.partition("=")
    key, text = key.strip(), shortened(text)
    if not equals or not all(part.strip() for part in key.split(".")):
        raise UserError(f"--set {text}: must look like section.key=value")
    try:
        value = _override_value(raw)
    except yaml.YAMLError as error:
        raise UserError(f"--set {text}{_yaml_problem(error)}") from None
    *parents, leaf = key.split(".")
    node = data
    for depth, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {text}: {'.'.join(parents[: depth + 1])} is not a section")
    node[leaf] = value
    return key
