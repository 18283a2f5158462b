"""TOML files and the files they extend, merged into one mapping that remembers where each value stood."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_b2.config.keys import Key, nearest
from megatron_b2.config.presets import PREFIX, preset_names, preset_path
from megatron_b2.config.toml_lines import key_lines


@dataclass(frozen=True)
class Layer:
    """Nested plain values and, for every key that was written, where."""

    data: Mapping[str, Any] = field(default_factory=dict)
    origins: Mapping[Key, str] = field(default_factory=dict)


def merge(base: Layer, top: Layer) -> Layer:
    """`top` over `base`: tables are merged key by key, everything else (also lists) is replaced whole."""
    origins = dict(base.origins)
    data = _merge(base.data, top.data, (), origins)
    return Layer(data, {**origins, **top.origins})


def _merge(
    base: Mapping[str, Any], top: Mapping[str, Any], key: Key, origins: dict[Key, str]
) -> dict[str, Any]:
    merged = dict(base)
    for name, value in top.items():
        inner = (*key, name)
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping):
            merged[name] = _merge(base[name], value, inner, origins)
            continue
        for covered in [known for known in origins if known[: len(inner)] == inner]:
            del origins[covered]
        merged[name] = value
    return merged


def read_layer(
    source: str | Path, problems: list[str], *, chain: tuple[str, ...] = (), where: str = ""
) -> Layer:
    """The file `source` (a path or "preset:<name>") over everything that it extends, in order.

    Problems (missing file, TOML syntax, circular extends) are appended to `problems`; what could not be read
    counts as empty. `chain` holds the files that led here, `where` the line that names this one.
    """
    at = f"{where}: " if where else ""
    path, label = _locate(source)
    if label in chain:
        problems.append(f"{at}{' extends '.join((*chain, label))}: a circle; remove one of these extends")
        return Layer()
    if not path.is_file():
        problems.append(at + _no_such_file(str(source)))
        return Layer()
    try:
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{label}: not valid TOML: {error}")
        return Layer()
    lines = {key: f"{label}:{line}" for key, line in key_lines(text).items()}
    extends = data.pop("extends", [])
    if not isinstance(extends, list) or not all(isinstance(item, str) for item in extends):
        line = lines[("extends",)]
        problems.append(f'{line}: extends must be a list of strings, as in extends = ["preset:toy"]')
        extends = []
    layer = Layer()
    for index, item in enumerate(extends):
        parent: str | Path = item if item.startswith(PREFIX) else path.parent / item
        line = lines[("extends", index)]
        layer = merge(layer, read_layer(parent, problems, chain=(*chain, label), where=line))
    own = {key: origin for key, origin in lines.items() if key[0] != "extends"}
    return merge(layer, Layer(data, own))


def _locate(source: str | Path) -> tuple[Path, str]:
    """The file, and the name under which messages show it (relative to the working directory if inside)."""
    text = str(source)
    if text.startswith(PREFIX):
        return preset_path(text.removeprefix(PREFIX)), text
    path = Path(source).resolve()
    here = Path.cwd()
    return path, str(path.relative_to(here) if path.is_relative_to(here) else path)


def _no_such_file(source: str) -> str:
    presets = ", ".join(PREFIX + name for name in preset_names())
    close = nearest(source.removeprefix(PREFIX), preset_names())
    hint = f"; did you mean {PREFIX}{close}?" if close else ""
    if source.startswith(PREFIX):
        return f"there is no {source}{hint or f'; presets are {presets}'}"
    return f"there is no configuration file {source}{hint}"
