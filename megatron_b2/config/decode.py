"""Plain values to frozen dataclasses, strictly; every problem is collected, with where the value stood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

from megatron_b2.config.fields import default_of, optional_inner, settings, type_hints, type_name
from megatron_b2.config.keys import Key, dotted, nearest
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import ConfigError

Schema = TypeVar("Schema")

FAILED: Final = object()
"""Stands for a value that could not be decoded; the problem is already recorded."""


def from_dict(schema: type[Schema], mapping: Any, *, key: Key = ()) -> Schema:
    """The dataclass `schema` from a nested mapping such as `to_dict` makes.

    `key` is where the mapping stood in the run, for messages. Raises ConfigError with every problem found:
    unknown and missing keys, wrong types.
    """
    decoder = Decoder({})
    config = decoder.table(schema, mapping, key)
    if decoder.problems or decoder.missing:
        raise ConfigError(decoder.problems + decoder.missing)
    assert isinstance(config, schema)
    return config


class Decoder:
    """Decodes nested plain values; `problems` and `missing` hold everything that was wrong.

    `root` is the schema of the whole configuration, which suggestions for unknown keys come from.
    """

    def __init__(self, origins: Mapping[Key, str], root: type = RunConfig) -> None:
        self.origins = origins
        self.root = root
        self.problems: list[str] = []
        self.missing: list[str] = []

    def table(self, schema: type, raw: Any, key: Key) -> Any:
        """An instance of the dataclass `schema`, or FAILED."""
        if not isinstance(raw, Mapping):
            return self.wrong_type(key, "a table", raw)
        hints = type_hints(schema)
        values: dict[str, Any] = {}
        for name in raw:
            if name not in hints:
                self.unknown(key, str(name), hints)
        for field in fields(schema):
            inner = (*key, field.name)
            if field.name in raw:
                values[field.name] = self.value(hints[field.name], raw[field.name], inner)
            elif is_dataclass(hints[field.name]):
                values[field.name] = self.table(hints[field.name], {}, inner)
            else:
                values[field.name] = default_of(field)
                if values[field.name] is MISSING:
                    values[field.name] = self.required(inner)
        return FAILED if any(value is FAILED for value in values.values()) else schema(**values)

    def value(self, annotation: Any, raw: Any, key: Key) -> Any:
        """`raw` as the annotated type, or FAILED."""
        inner, origin = optional_inner(annotation), get_origin(annotation)
        if inner is not None:
            return None if raw is None else self.value(inner, raw, key)
        if is_dataclass(annotation) and isinstance(annotation, type):
            return self.table(annotation, raw, key)
        if origin is Literal:
            return self.choice(annotation, raw, key)
        if origin is tuple:
            return self.sequence(annotation, raw, key)
        if annotation in (bool, int, float, str):
            return self.scalar(annotation, raw, key)
        return dict(raw) if isinstance(raw, Mapping) else self.wrong_type(key, "a table", raw)

    def scalar(self, annotation: Any, raw: Any, key: Key) -> Any:
        if annotation is float and type(raw) is int:
            raw = float(raw)
        if type(raw) is not annotation:
            return self.wrong_type(key, type_name(annotation), raw)
        if annotation is float and not math.isfinite(raw):
            return self.fail(key, f"{dotted(key)} must be a finite number, got {raw}")
        return raw

    def choice(self, annotation: Any, raw: Any, key: Key) -> Any:
        choices = get_args(annotation)
        if any(type(raw) is type(choice) and raw == choice for choice in choices):
            return raw
        close = nearest(raw, map(str, choices)) if isinstance(raw, str) else None
        hint = f"; did you mean {close!r}?" if close else ""
        return self.fail(key, f"{dotted(key)} must be {type_name(annotation)}, got {raw!r}{hint}")

    def sequence(self, annotation: Any, raw: Any, key: Key) -> Any:
        arguments = get_args(annotation)
        if not isinstance(raw, list | tuple):
            return self.wrong_type(key, type_name(annotation), raw)
        is_open = arguments[-1] is Ellipsis
        if not is_open and len(raw) != len(arguments):
            expected = type_name(annotation)
            return self.fail(key, f"{dotted(key)} must be {expected}, got {len(raw)} values: {raw}")
        types = [arguments[0]] * len(raw) if is_open else arguments
        pairs = enumerate(zip(types, raw, strict=True))
        values = tuple(self.value(item_type, item, (*key, index)) for index, (item_type, item) in pairs)
        return FAILED if any(value is FAILED for value in values) else values

    def wrong_type(self, key: Key, expected: str, raw: Any) -> Any:
        hint = ""
        if expected == "an integer" and isinstance(raw, float) and raw.is_integer():
            hint = f"; write {int(raw)}"
        elif isinstance(raw, str) and expected != "a string":
            hint = " (a string; write it without quotes)" if self.origin(key) != "command line" else ""
        return self.fail(key, f"{dotted(key) or 'the configuration'} must be {expected}, got {raw!r}{hint}")

    def required(self, key: Key) -> Any:
        table = dotted(key[:-1])
        where = f"set {key[-1]} under [{table}]" if table else f"set {key[-1]}"
        example = 'extends = ["preset:toy"]'
        self.missing.append(f"{dotted(key)} is missing: {where}, or extend a preset, as in {example}")
        return FAILED

    def unknown(self, table: Key, name: str, known: Mapping[str, Any]) -> None:
        key = (*table, name)
        close = nearest(name, known)
        same_name = [dotted(s.key) for s in settings(self.root) if s.key[-1] == name and s.key[:-1] != table]
        everywhere = nearest(dotted(key), (dotted(setting.key) for setting in settings(self.root)))
        best = dotted((*table, close)) if close else same_name[0] if same_name else everywhere
        listing = f"known here: {', '.join(known)}"
        self.fail(key, f"unknown key {dotted(key)}; " + (f"did you mean {best}?" if best else listing))

    def fail(self, key: Key, text: str) -> Any:
        origin = self.origin(key)
        self.problems.append(f"{origin}: {text}" if origin else text)
        return FAILED

    def origin(self, key: Key) -> str:
        """Where the value, or the nearest table or list around it, was given."""
        lengths = range(len(key), 0, -1)
        return next((self.origins[key[:length]] for length in lengths if key[:length] in self.origins), "")
