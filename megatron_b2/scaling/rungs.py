"""The sizes of a ladder: the report's seven (Table 10), or any others from a CSV table."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_b2.config.schema import ModelConfig
from megatron_b2.errors import InputError

FFN_RATIO: Final = 3
"""Width of the SwiGLU layer over the hidden width (report Table 10)."""
REQUIRED: Final = ("hidden", "layers", "heads")
OPTIONAL: Final = ("max_lr",)


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One size; the FFN width is three times the hidden width."""

    hidden: int
    layers: int
    heads: int
    max_lr: float | None = None
    """Peak learning rate; none takes that of the base configuration."""

    @property
    def ffn(self) -> int:
        """Width of the SwiGLU inner layer."""
        return FFN_RATIO * self.hidden

    @property
    def num_parameters(self) -> int:
        """N of the report's Table 10: parameters without embedding and head."""
        return ModelConfig(
            hidden_size=self.hidden,
            ffn_hidden_size=self.ffn,
            num_layers=self.layers,
            num_heads=self.heads,
        ).num_block_parameters


TABLE_10: Final = tuple(
    Rung(hidden=hidden, layers=layers, heads=heads)
    for hidden, layers, heads in (
        (384, 6, 6),
        (704, 8, 8),
        (832, 12, 8),
        (1_216, 16, 8),
        (1_792, 20, 14),
        (2_240, 24, 14),
        (2_880, 28, 20),
    )
)
"""The seven sizes of the report, 11.51 M to 3,019 M parameters."""


def read_rungs(path: Path) -> tuple[Rung, ...]:
    """Sizes from a CSV file with the columns hidden, layers, heads and, if wanted, max_lr; smallest first.

    Raises InputError that names file, line and value for a missing file or column, a value that is no
    positive number, heads that do not divide the hidden width, and a size that stands twice.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such table; it is a CSV file with the columns {', '.join(REQUIRED)}")
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(line for line in stream if not line.startswith("#"))
        columns = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = columns
        unknown = [name for name in columns if name not in (*REQUIRED, *OPTIONAL)]
        missing = [name for name in REQUIRED if name not in columns]
        if unknown or missing:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has the unknown {', '.join(unknown)}"
            raise InputError(
                f"{path}: the header {wrong}; columns are {', '.join(REQUIRED)} and, if wanted, max_lr"
            )
        rungs = [_rung(row, where=f"{path}: size {number}") for number, row in enumerate(reader, 1)]
    if not rungs:
        raise InputError(f"{path}: the table has a header and no sizes")
    for number, rung in enumerate(rungs):
        if rung in rungs[:number]:
            raise InputError(f"{path}: size {number + 1} stands twice: {rung.hidden} x {rung.layers}")
    return tuple(sorted(rungs, key=lambda rung: rung.num_parameters))


def _rung(row: Mapping[str, str | None], *, where: str) -> Rung:
    if None in row:
        raise InputError(f"{where} has more values than the header has columns")
    numbers = {name: _positive(row.get(name), where=f"{where}, {name}") for name in REQUIRED}
    sizes = {name: int(value) for name, value in numbers.items()}
    if broken := [name for name, value in numbers.items() if value != sizes[name]]:
        raise InputError(f"{where}, {broken[0]}: {row[broken[0]]!r} is not a whole number")
    if sizes["hidden"] % sizes["heads"]:
        raise InputError(f"{where}: hidden = {sizes['hidden']} is not a multiple of heads = {sizes['heads']}")
    rate = (row.get("max_lr") or "").strip()
    return Rung(**sizes, max_lr=_positive(rate, where=f"{where}, max_lr") if rate else None)


def _positive(text: str | None, *, where: str) -> float:
    try:
        value = float((text or "").strip().replace("_", ""))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{where}: {text!r} is not a positive number")
    return value
