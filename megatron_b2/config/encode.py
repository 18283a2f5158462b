"""Frozen dataclasses back to plain values and to TOML text that loads to exactly the same configuration."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Final

from megatron_b2.config.keys import Key, dotted
from megatron_b2.config.schema import RunConfig

BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Nested plain values (dict, list, str, int, float, bool, None), ready for JSON and for `from_dict`."""
    mapping = plain(config)
    assert isinstance(mapping, dict)
    return mapping


def to_toml(config: RunConfig, *, provenance: Mapping[str, str] | None = None) -> str:
    """The whole configuration as TOML; `load_config` of it gives an equal RunConfig.

    With `provenance` (of a ResolvedConfig) each line ends in a comment that says where the value came from.
    Settings that are None are left out, since TOML has no such value and None is their default.
    """
    return "\n".join(_table(to_dict(config), (), provenance or {})).strip() + "\n"


def plain(value: Any) -> Any:
    """A setting's value with dataclasses and mappings as dict, and sequences as list."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _is_table_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _table(table: Mapping[str, Any], key: Key, provenance: Mapping[str, str]) -> Iterator[str]:
    tables = {name: item for name, item in table.items() if isinstance(item, dict) or _is_table_list(item)}
    for name, value in table.items():
        if name in tables or value is None:
            continue
        origin = provenance.get(dotted((*key, name)))
        yield f"{_name(name)} = {toml_value(value)}" + (f"  # {_comment(origin)}" if origin else "")
    for name, value in tables.items():
        names = [part for part in (*key, name) if isinstance(part, str)]
        header = ".".join(map(_name, names))
        if isinstance(value, dict):
            if not key and not value:
                continue
            yield from ("", f"[{header}]")
            yield from _table(value, (*key, name), provenance)
            continue
        for index, item in enumerate(value):
            yield from ("", f"[[{header}]]")
            yield from _table(item, (*key, name, index), provenance)


def _name(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else _string(name)


def _comment(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007F")


def toml_value(value: Any) -> str:
    """A plain value as TOML writes it in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_name(name)} = {toml_value(item)}" for name, item in value.items()) + "}"
    return repr(value)
