"""From the folders of finished runs to one point table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron_b2.config.loader import load_config
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import ConfigError, InputError
from megatron_b2.scaling.compute import run_flops
from megatron_b2.scaling.ladder import MANIFEST, read_manifest
from megatron_b2.scaling.options import WINDOW
from megatron_b2.scaling.points import Point, PointTable
from megatron_b2.training.metrics import read_metrics

CONFIG: Final = "config.toml"
METRICS: Final = "metrics.jsonl"
RISE: Final = 1.01
"""A run whose loss ends this much above its lowest has diverged or overfitted (our choice)."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The table, and why runs are not in it."""

    table: PointTable
    left_out: tuple[str, ...]


def collect(folders: Sequence[Path], *, window: int = WINDOW, skip: bool = False) -> Collected:
    """Points of the runs in `folders`: at each validation, and at the end.

    A folder is the output_dir of a run, or that of a ladder, which stands for all its runs. The training loss
    of a point is the mean of the cross-entropy of the last `window` steps until it.

    Raises InputError that lists every run which is missing, unfinished, not finite or rising at its end;
    with `skip` they are left out instead, unless all are.
    """
    points: list[Point] = []
    problems: list[str] = []
    runs = list(dict.fromkeys(run for folder in folders for run in _runs(folder)))
    names: dict[str, Path] = {}
    for run in runs:
        try:
            found = run_points(run, window=window)
            if (other := names.setdefault(found[0].run, run)) != run:
                raise InputError(f"{run}: is called {found[0].run}, as {other} is: give the runs other names")
            points += found
        except (InputError, ConfigError) as error:
            problems.append(str(error))
    if problems and (not skip or not points):
        listed = "".join(f"\n  {number}. {problem}" for number, problem in enumerate(problems, 1))
        hint = "; --skip leaves them out" if points else ""
        raise InputError(f"{len(problems)} of {len(runs)} runs cannot be used{hint}:{listed}")
    smoothing = f"mean of the last {window} steps"
    return Collected(table=PointTable(points=tuple(points), smoothing=smoothing), left_out=tuple(problems))


def run_points(folder: Path, *, window: int = WINDOW) -> list[Point]:
    """Points of one finished run. Raises InputError or ConfigError otherwise."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run; give the output_dir of a run, or the folder of a ladder")
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: has no {CONFIG}: the run was not started, or this is no output_dir")
    config = load_config(folder / CONFIG).config
    try:
        records = read_metrics(folder / METRICS)
    except json.JSONDecodeError as error:
        raise InputError(f"{folder / METRICS}: a line is not JSON: {error}") from error
    train = [record for record in records if record["kind"] == "train"]
    valid = {record["step"]: record for record in records if record["kind"] == "valid"}
    last = train[-1]["step"] if train else 0
    if last < config.train.steps:
        raise InputError(
            f"{folder}: unfinished, at step {last:,} of {config.train.steps:,}: run "
            f"`b2 pretrain {folder / CONFIG}` to its end"
        )
    _require_finite(folder, [*train, *valid.values()])
    steps = sorted({*valid, last})
    tokens = {record["step"]: record["tokens"] for record in train}
    points = [
        _point(
            config,
            step=step,
            tokens=tokens[step],
            train_ce=_mean([record["ce"] for record in train if step - window < record["step"] <= step]),
            valid_ce=valid[step]["ce"] if step in valid else None,
            final=step == last,
        )
        for step in steps
    ]
    _require_falling(folder, points)
    return points


def _runs(folder: Path) -> list[Path]:
    path = folder / MANIFEST
    return [folder / run["output_dir"] for run in read_manifest(path)["runs"]] if path.is_file() else [folder]


def _point(
    config: RunConfig,
    *,
    step: int,
    tokens: int,
    train_ce: float,
    valid_ce: float | None,
    final: bool,
) -> Point:
    model, seq_len = config.model, config.data.seq_len
    return Point(
        run=config.name,
        num_parameters=model.num_block_parameters,
        total_parameters=model.num_parameters,
        step=step,
        tokens=tokens,
        flops_training=run_flops(model, seq_len=seq_len, tokens=tokens, convention="training"),
        flops_6nd=run_flops(model, seq_len=seq_len, tokens=tokens, convention="6ND"),
        train_ce=train_ce,
        valid_ce=valid_ce,
        final=final,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _require_finite(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Metrics hold null where a value was NaN or infinite."""
    for record in records:
        if record["ce"] is None or record.get("skipped"):
            what = "a skipped step" if record.get("skipped") else "a loss that is no finite number"
            raise InputError(
                f"{folder}: {what} at step {record['step']:,} ({METRICS}): it is no clean point of a law; "
                "repeat the run, with a lower optim.max_lr if it diverged"
            )


def _require_falling(folder: Path, points: Sequence[Point]) -> None:
    """The last point is the lowest, but for a little noise."""
    for name in ("valid_ce", "train_ce"):
        seen = [(value, point.step) for point in points if (value := getattr(point, name)) is not None]
        lowest, step = min(seen, default=(math.inf, 0))
        if seen and seen[-1][0] > RISE * lowest:
            raise InputError(
                f"{folder}: {name} rose from {lowest:.4f} at step {step:,} to {seen[-1][0]:.4f} at the end: "
                "the run diverged or saw its data too often"
            )
