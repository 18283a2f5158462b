"""The point table of a ladder: what each run's loss was at which compute; JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from megatron_b2.errors import InputError
from megatron_b2.files.atomic import atomic_files
from megatron_b2.scaling.compute import ComputeConvention
from megatron_b2.scaling.options import LossName

FORMAT: Final = "megatron_b2 scaling points 1"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One moment of a run. Losses are nats a token, without the max-z term."""

    run: str
    num_parameters: int
    """N of the report's Table 10: without embedding and head."""
    total_parameters: int
    """With embedding and head."""
    step: int
    tokens: int
    """D: tokens seen."""
    flops_training: float
    """C by the convention `training` (compute.py)."""
    flops_6nd: float
    """C by the convention `6ND`."""
    train_ce: float | None
    """Trailing mean over the steps that the table's `smoothing` says."""
    valid_ce: float | None
    """None where the run was not validated."""
    final: bool
    """The run ends here, its learning rate decayed: only these points are fitted."""

    def loss(self, name: LossName) -> float | None:
        """The loss of that name."""
        return self.valid_ce if name == "valid_ce" else self.train_ce

    def flops(self, convention: ComputeConvention) -> float:
        """C by that convention."""
        return self.flops_6nd if convention == "6ND" else self.flops_training


@dataclass(frozen=True, kw_only=True)
class PointTable:
    """The points of several runs, in the order of the runs and their steps."""

    points: tuple[Point, ...]
    smoothing: str
    """How train_ce was smoothed, in words."""

    @property
    def final(self) -> tuple[Point, ...]:
        """The last point of each run."""
        return tuple(point for point in self.points if point.final)

    def write(self, path: Path) -> None:
        """Write `path` as JSON and, beside it, the same table as .csv."""
        rows = [asdict(point) for point in self.points]
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(Point)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_files(path.with_suffix(".csv"), path) as (table, stream):
            table.write(text.getvalue().encode())
            document = {"format": FORMAT, "smoothing": self.smoothing, "points": rows}
            stream.write((json.dumps(document, indent=1) + "\n").encode())


def read_points(path: Path) -> PointTable:
    """A table that `write` made. Raises InputError that names file, point, key and value."""
    document = read_document(path, FORMAT, "b2 scaling collect")
    rows = document.get("points")
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: has no points; make the table with `b2 scaling collect`")
    points = tuple(_point(row, where=f"{path}: point {index}") for index, row in enumerate(rows, 1))
    return PointTable(points=points, smoothing=str(document.get("smoothing", "unknown")))


def read_document(path: Path, form: str, maker: str) -> dict[str, Any]:
    """A JSON object whose `format` is `form`. Raises InputError when it is anything else."""
    try:
        document: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != form:
        raise InputError(f"{path}: not a file that `{maker}` wrote ({form})")
    return document


def _point(row: Any, *, where: str) -> Point:
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is no object: {row!r}")
    names = [field.name for field in fields(Point)]
    if missing := [name for name in names if name not in row]:
        raise InputError(f"{where} has no {', '.join(missing)}")
    for name in ("num_parameters", "total_parameters", "step", "tokens", "flops_training", "flops_6nd"):
        if not _is_number(row[name]) or not row[name] > 0:
            raise InputError(f"{where} ({row['run']}): {name} = {row[name]!r} is not a positive number")
    for name in ("train_ce", "valid_ce"):
        if row[name] is not None and (not _is_number(row[name]) or not row[name] > 0):
            raise InputError(f"{where} ({row['run']}): {name} = {row[name]!r} is not a positive loss")
    return Point(**{name: row[name] for name in names})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def finals(table: PointTable, loss: LossName) -> Sequence[Point]:
    """The final points, all of which have the loss. Raises InputError that names those which have none."""
    points = table.final
    if not points:
        raise InputError("the table has no final points: collect runs that are finished")
    if without := [point.run for point in points if point.loss(loss) is None]:
        raise InputError(
            f"{', '.join(without)}: no {loss} at the end of the run; fit the other loss (--loss)"
        )
    return points
