"""The built-in configurations: megatron_b2/config/presets/*.toml, named preset:<file name>."""

from __future__ import annotations

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent / "presets"
PREFIX: Final = "preset:"


def preset_names() -> tuple[str, ...]:
    """Names of the presets that are whole runs; files that start with "_" are shared parts."""
    return tuple(sorted(path.stem for path in FOLDER.glob("[!_]*.toml")))


def preset_path(name: str) -> Path:
    """The file of a preset or shared part (it need not exist)."""
    return FOLDER / f"{name}.toml"
