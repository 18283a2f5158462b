"""Fit of the constants, and how far predictions are off on the rows that were not fitted.

    python -m megatron_b2.planner.fit        writes constants.toml

Time: three rates of a device (products, memory, NVLink) on the ten rows of SC21's Table 1, and on nothing
else. What those rows do not show has its own few rows, named in `TIME_SETS`; all others are held out. Memory:
one constant on every second line of BLOOM's log, and one of FSDP on one row of torchtitan. Least squares of
log(predicted / measured), within bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, log
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from scipy.optimize import least_squares, minimize_scalar

from megatron_b2.config.encode import toml_value
from megatron_b2.files.atomic import atomic_file
from megatron_b2.planner.constants import CONSTANTS_FILE, FITTED, Constants, ErrorRow, load_constants
from megatron_b2.planner.memory import predict_memory
from megatron_b2.planner.published import GIB, Prediction, predict_run, published_runs
from megatron_b2.planner.rows import PublishedRun
from megatron_b2.planner.step import predict_step, regime_of

TABLES: Final = ("megatron", "megatron_more", "bloom", "bloom_more", "fsdp", "fsdp_more")
"""Files of published runs."""
DEVICE: Final = ("ampere_matmul", "memory", "nvlink")
"""Constants that SC21's Table 1 shows."""
BOUNDS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "ampere_matmul": (0.5, 0.95),
        "hopper_matmul": (0.4, 0.95),
        "memory": (0.4, 0.95),
        "nvlink": (0.4, 0.95),
        "network": (0.2, 0.95),
        "omnipath": (0.05, 0.95),
        "interference": (0.01, 0.9),
        "scalar_attention": (0.01, 0.25),
        "ampere_flash_1": (0.1, 0.9),
        "hopper_flash_1": (0.1, 0.9),
        "allocator_bytes": (1e9, 20e9),
        "fsdp_allocator_bytes": (1e9, 20e9),
    }
)
PASSES: Final = 2
"""Rounds of all fits: the network's share has a small part in Table 1, and the device's in the others."""
LONG: Final = 4096
"""Tokens of a sample above which attention decides the time of small models."""
QUANTILE: Final = 0.9
"""Share of held-out rows within a band."""


@dataclass(frozen=True)
class FitSet:
    """Rows on which constants were fitted."""

    constants: tuple[str, ...]
    says: str
    """Which rows, for people."""
    holds: Callable[[str, PublishedRun], bool]
    """Whether a row of a table belongs to it."""
    spread_only: bool = False
    """Fit the differences between rows, and leave what all rows have in common as an error."""


def _line(run: PublishedRun) -> int:
    return int(run.cells.get("line") or 0)


def _is_foundry(run: PublishedRun, **cells: str) -> bool:
    """Whether a run is llm-foundry's and has these cells."""
    return run.source == "llm-foundry" and all(run.cells[name] == cell for name, cell in cells.items())


TIME_SETS: Final = (
    FitSet(DEVICE, "SC21 table 1, all 10 rows", lambda table, run: run.source == "SC21-T1"),
    FitSet(
        ("network",),
        "SC21 table 2, ZeRO-3, the 2 rows with the most GPUs (175B on 1,536, 530B on 2,240)",
        lambda table, run: run.source == "SC21-T2-ZeRO3" and run.cells["gpus"] in ("1536", "2240"),
    ),
    FitSet(
        ("interference",),
        "SC21 table 2, ZeRO-3, 1 row (175B on 384)",
        lambda table, run: run.source == "SC21-T2-ZeRO3" and run.cells["gpus"] == "384",
    ),
    FitSet(
        ("hopper_matmul",),
        "llm-foundry, 1 H100 row (70B on 64), whose products are the largest",
        lambda table, run: _is_foundry(run, gpu="H100-80", model="70b", gpus="64"),
    ),
    FitSet(
        ("ampere_flash_1",),
        "llm-foundry, 1 A100 row (7B, sequences of 65,536, nearly all attention)",
        lambda table, run: _is_foundry(run, gpu="A100-80", model="7b", seq="65536"),
    ),
    FitSet(
        ("hopper_flash_1",),
        "llm-foundry, 1 H100 row (7B, sequences of 65,536, nearly all attention)",
        lambda table, run: _is_foundry(run, gpu="H100-80", model="7b", seq="65536"),
    ),
    FitSet(
        ("scalar_attention",),
        "BLOOM, 1 row (line 740: heads of width 108)",
        lambda table, run: table == "bloom" and _line(run) == 740,
    ),
    FitSet(
        ("omnipath",),
        "BLOOM, the differences between 9 rows (lines 476 to 484)",
        lambda table, run: table == "bloom" and 476 <= _line(run) <= 484,
        spread_only=True,
    ),
)
MEMORY_SETS: Final = (
    FitSet(
        ("allocator_bytes",),
        "BLOOM, rows of odd lines",
        lambda table, run: table == "bloom" and _line(run) % 2 == 1,
    ),
    FitSet(
        ("fsdp_allocator_bytes",),
        "torchtitan, 1 row (8B on 8)",
        lambda table, run: run.source == "torchtitan" and run.cells["gpus"] == "8",
    ),
)


def all_runs() -> list[tuple[str, PublishedRun]]:
    """Every published row of the package, each BLOOM line once, with its table's name."""
    found: list[tuple[str, PublishedRun]] = []
    seen: set[tuple[str, ...]] = set()
    for table in TABLES:
        for run in published_runs(table):
            # BLOOM's log repeats rows under several headings.
            key = tuple(value for name, value in run.cells.items() if name not in ("line", "section"))
            if table.startswith("bloom") and key in seen:
                continue
            seen.add(key)
            found.append((table, run))
    return found


def fit_constants(start: Constants | None = None) -> Constants:
    """All fitted constants, from the published rows; `start` defaults to the frozen ones."""
    constants, runs = start or load_constants(), all_runs()
    for _ in range(PASSES):
        for fit in TIME_SETS:
            chosen = [run for table, run in runs if fit.holds(table, run) and run.measured_time]
            constants = _fitted(constants, fit, chosen, _time_logs)
    for fit in MEMORY_SETS:
        chosen = [run for table, run in runs if fit.holds(table, run) and run.measured_memory]
        constants = _fitted(constants, fit, chosen, _memory_logs)
    return constants


Logs = Callable[[Sequence[PublishedRun], Constants], list[float]]


def _fitted(constants: Constants, fit: FitSet, runs: Sequence[PublishedRun], logs: Logs) -> Constants:
    names = fit.constants
    low, high = zip(*(BOUNDS[name] for name in names), strict=True)

    def errors(values: Sequence[float]) -> list[float]:
        trial = constants.with_values(dict(zip(names, map(float, values), strict=True)))
        found = logs(runs, trial)
        mean = sum(found) / len(found) if fit.spread_only else 0.0
        return [error - mean for error in found]

    if len(names) == 1:
        best = minimize_scalar(
            lambda value: float(np.square(errors([value])).sum()),
            bounds=(low[0], high[0]),
            method="bounded",
            options={"xatol": 1e-4 * high[0]},
        )
        values: Sequence[float] = [float(best.x)]
    else:
        start = [getattr(constants, name) for name in names]
        found = least_squares(errors, start, bounds=(low, high), diff_step=1e-3, xtol=1e-4, ftol=1e-5)
        values = [float(value) for value in found.x]
    rounded = {name: float(f"{value:.4g}") for name, value in zip(names, values, strict=True)}
    return constants.with_values(rounded)


def _time_logs(runs: Sequence[PublishedRun], constants: Constants) -> list[float]:
    return [
        log(predict_step(run.workload, run.cluster, constants).total / run.measured_time)
        for run in runs
        if run.workload is not None and run.cluster is not None and run.measured_time
    ]


def _memory_logs(runs: Sequence[PublishedRun], constants: Constants) -> list[float]:
    return [
        log(
            predict_memory(run.workload, constants, memory_bytes=run.cluster.gpu.memory_bytes).total
            / GIB
            / run.measured_memory
        )
        for run in runs
        if run.workload is not None and run.cluster is not None and run.measured_memory
    ]


@dataclass(frozen=True)
class Judged:
    """A published row with its prediction, and whether it is held out."""

    table: str
    prediction: Prediction
    fitted_time: str
    """Constants of the time that were fitted on the row; empty: held out."""
    fitted_memory: str
    """The same of the memory."""

    @property
    def set_name(self) -> str:
        """Source, and the section of BLOOM's log or the kind of device."""
        run = self.prediction.run
        if run.form == "bloom":
            return f"BLOOM, {run.cells['section']}"
        if run.form == "fsdp":
            assert run.workload is not None
            long = ", sequences over 4,096" if run.workload.seq_len > LONG else ""
            return f"{run.source}, {run.cells['gpu'].split('-')[0]}{long}"
        return run.source


def judge(constants: Constants) -> list[Judged]:
    """Predictions for every published row of the package."""
    return [
        Judged(
            table,
            predict_run(run, constants),
            *(
                ", ".join(name for fit in sets if fit.holds(table, run) for name in fit.constants)
                for sets in (TIME_SETS, MEMORY_SETS)
            ),
        )
        for table, run in all_runs()
    ]


def bands(judged: Sequence[Judged]) -> dict[str, float]:
    """What nine in ten held-out rows kept, by regime of the time, and of the memory: |measured / predicted
    - 1|, since a band stands around the prediction."""
    found: dict[str, list[float]] = {}
    for item in judged:
        prediction, run = item.prediction, item.prediction.run
        if prediction.time_error is not None and not item.fitted_time:
            assert run.workload is not None
            assert run.cluster is not None
            regime = regime_of(run.workload, run.cluster)
            found.setdefault(regime, []).append(_away(prediction.time_error))
        if prediction.memory_error is not None and not item.fitted_memory:
            found.setdefault("memory", []).append(_away(prediction.memory_error))
    return {name: round(_quantile(errors), 3) for name, errors in found.items()}


def _away(error: float) -> float:
    """|measured / predicted - 1| of predicted / measured - 1."""
    return abs(1 / (1 + error) - 1)


def _quantile(errors: Sequence[float]) -> float:
    return sorted(errors)[ceil(QUANTILE * len(errors)) - 1]


def error_rows(judged: Sequence[Judged]) -> list[ErrorRow]:
    """Errors of each set of rows, fitted and held-out rows apart."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for item in judged:
        for quantity, error, fitted in (
            ("time", item.prediction.time_error, item.fitted_time),
            ("memory", item.prediction.memory_error, item.fitted_memory),
        ):
            if error is not None:
                groups.setdefault((quantity, item.set_name, fitted), []).append(error)
    return [
        ErrorRow(
            name=name,
            quantity=quantity,
            rows=len(errors),
            mape=round(sum(map(abs, errors)) / len(errors), 4),
            worst=round(max(map(abs, errors)), 4),
            bias=round(sum(errors) / len(errors), 4),
            fitted=fitted,
        )
        for (quantity, name, fitted), errors in sorted(groups.items(), key=lambda item: item[0][0] != "time")
    ]


@dataclass(frozen=True)
class Choice:
    """What the model would have chosen among measured layouts."""

    group: tuple[str, ...]
    rows: int
    chosen: Judged
    """The row that it predicts to be the fastest."""
    best: float
    """Seconds of the row that was the fastest, as measured."""

    @property
    def regret(self) -> float:
        """How much slower the chosen one was, as measured."""
        measured = self.chosen.prediction.run.measured_time
        assert measured is not None
        return measured / self.best - 1


def choices(judged: Sequence[Judged], columns: Sequence[str]) -> list[Choice]:
    """The choice in each group of two or more BLOOM rows that agree in `columns`."""
    groups: dict[tuple[str, ...], list[tuple[float, float, Judged]]] = {}
    for item in judged:
        run, time = item.prediction.run, item.prediction.time
        if run.form == "bloom" and run.measured_time and time is not None:
            key = tuple(run.cells[name] for name in columns)
            groups.setdefault(key, []).append((time.total, run.measured_time, item))
    return [
        Choice(key, len(rows), min(rows, key=lambda row: row[0])[2], min(row[1] for row in rows))
        for key, rows in groups.items()
        if len(rows) > 1
    ]


def constants_toml(constants: Constants) -> str:
    """constants.toml: the constants, where they were fitted, the errors, the bands."""
    judged = judge(constants)
    return "".join(f"{line}\n" for line in _lines(constants, judged))


def _lines(constants: Constants, judged: Sequence[Judged]) -> Iterator[str]:
    yield "# Written by python -m megatron_b2.planner.fit: do not edit. docs/planner.md has the sources."
    yield ""
    yield "[constants]"
    origin = {name: fit.says for fit in (*TIME_SETS, *MEMORY_SETS) for name in fit.constants}
    for name in FITTED:
        yield f"# fitted on {origin[name]}"
        yield f"{name} = {getattr(constants, name):.4g}"
    yield ""
    yield "# |measured / predicted - 1| that nine in ten held-out rows kept."
    yield "[bands]"
    for name, band in bands(judged).items():
        yield f"{toml_value(name)} = {band}"
    for row in error_rows(judged):
        yield ""
        yield "[[errors]]"
        yield from (f"{key} = {toml_value(value)}" for key, value in asdict(row).items())


def main() -> None:
    """Fit, and write constants.toml beside this module."""
    constants = fit_constants()
    path = Path(__file__).with_name(CONSTANTS_FILE)
    with atomic_file(path) as file:
        file.write(constants_toml(constants).encode("utf-8"))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
