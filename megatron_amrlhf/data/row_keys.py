"""What of a data row is read; what is not must not change what the row means.

A reader takes what it knows from a `Row`, which notes the keys. The others are counted and told at
the start; one that can change the row's meaning (``tools``, ``images``, ``weight``) is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from megatron_amrlhf.errors import UserError

MEANINGFUL = frozenset(
    # what else would stand before the answer
    "system system_prompt system_message history context document documents input instruction "
    "prompt messages conversation conversations turns dialog dialogue prefill assistant_prefix "
    "chat_template chat_template_kwargs enable_thinking "
    "tools tool_calls tool_choice functions function_call "
    "image images image_path video videos audio audios "
    # how the answer ends, and how much it counts
    "truncated finished weight loss_weight sample_weight loss_mask margin".split()
)
"""Keys, also of turns, that change what a row means where a reader knows nothing of them."""
WITHOUT_EFFECT = {
    "finished": (True,),
    "weight": (1,),
    "loss_weight": (1,),
    "sample_weight": (1,),
    "enable_thinking": (),  # a template that knows it does something else on false
}
"""Values of such keys that change nothing, beside null; of other keys all that are empty or 0."""


class Row(dict):
    """A record that notes which of its keys are read, those of objects within it too.

    Attributes:
        read: paths of the keys that were read, such as ``conversations[].from``.
    """

    def __init__(self, record: dict, path: str = "", read: set[str] | None = None):
        self._path, self.read = path, set() if read is None else read
        super().__init__({key: self._within(value, path + key) for key, value in record.items()})

    def _within(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return Row(value, f"{path}.", self.read)
        if isinstance(value, list):
            return [self._within(item, f"{path}[]") for item in value]
        return value

    def __getitem__(self, key: str) -> Any:
        self.read.add(self._path + key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        return self[key] if key in self else default

    def unread(self) -> Iterator[tuple[str, str, Any]]:
        """Path, key and value of what was not read; nothing of what is inside that."""
        for key, value in self.items():
            path = self._path + key
            if path in self.read:
                yield from _unread_within(value)
            else:
                yield path, key, value


def _unread_within(value: Any) -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, Row):
        yield from value.unread()
    elif isinstance(value, list):
        for item in value:
            yield from _unread_within(item)


def unread_paths(row: Row, ignored: Collection[str], where: str) -> set[str]:
    """Paths of the keys of a row that its reader did not read.

    Args:
        row: after reading.
        ignored: keys of which the user says that they change nothing.
        where: ``path:line``.

    Raises:
        UserError: one of them changes what the row means.
    """
    paths = set()
    for path, key, value in row.unread():
        if key in MEANINGFUL and key not in ignored and _has_effect(key, value):
            raise UserError(
                f"{where}: '{path}' is not read in rows of this format and can change what the row "
                f"means: drop the key, or name it in data.ignored_keys"
            )
        paths.add(path)
    return paths


def _has_effect(key: str, value: Any) -> bool:
    if key in WITHOUT_EFFECT:
        return value is not None and value not in WITHOUT_EFFECT[key]
    return bool(value)
