"""Where a value stands in a configuration: ("data", "sources", 0, "prefix") is data.sources[0].prefix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

Key: TypeAlias = tuple[str | int, ...]


def dotted(key: Key) -> str:
    """The key as users write it."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key)
    return text.removeprefix(".")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None when nothing is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def leaves(value: Any, key: Key = ()) -> Iterable[tuple[Key, Any]]:
    """Every value that is neither a table nor a list of tables, with its key, in order."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from leaves(item, (*key, name))
    elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            yield from leaves(item, (*key, index))
    else:
        yield key, value
