"""Whole tables of published runs: read them, and write predictions beside the measurements.

`evaluate_rows` is what `b2 plan --rows runs.csv --out predictions.csv` does: every row of the input comes
back with the columns of `ADDED`; a row that cannot be evaluated says why in `reason`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Final

from megatron_b2.errors import ConfigError, OutputError
from megatron_b2.files.atomic import atomic_file
from megatron_b2.planner.constants import Constants, load_constants
from megatron_b2.planner.flops import tflops_per_gpu
from megatron_b2.planner.forms import bloom_run, fsdp_run
from megatron_b2.planner.hardware import load_hardware
from megatron_b2.planner.megatron_rows import megatron_run
from megatron_b2.planner.memory import MemoryPlan, predict_memory
from megatron_b2.planner.rows import Form, PublishedRun, Row, RowError, ran_out, read_table, unswapped
from megatron_b2.planner.step import StepTime, predict_step

GIB: Final = 2**30
MOST_TOKENS: Final = 2**28
"""Of a step; published runs have up to a quarter of it."""

READERS: Final[Mapping[Form, Callable[[Row], PublishedRun]]] = {
    "megatron": megatron_run,
    "bloom": bloom_run,
    "fsdp": fsdp_run,
}

ADDED: Final = (
    *("measured_time", "predicted_time", "predicted_time_low", "predicted_time_high"),
    *("measured_memory", "predicted_memory", "predicted_memory_low", "predicted_memory_high"),
    *("fits", "out_of_memory", "layout", "regime", "assumed", "reason"),
)
"""Columns of the output: seconds a step, GiB of the fullest device."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of a published run."""

    run: PublishedRun
    time: StepTime | None
    memory: MemoryPlan | None
    reason: str = ""
    """Why there is none."""

    @property
    def time_error(self) -> float | None:
        """predicted / measured - 1."""
        if self.time is None or self.run.measured_time is None:
            return None
        return self.time.total / self.run.measured_time - 1

    @property
    def memory_error(self) -> float | None:
        """predicted / measured - 1."""
        if self.memory is None or self.run.measured_memory is None:
            return None
        return self.memory.total / GIB / self.run.measured_memory - 1

    @property
    def fits(self) -> bool | None:
        """Whether the run fits its device, with the memory's error on the safe side."""
        if self.memory is None or self.run.cluster is None:
            return None
        return self.memory.fits(self.run.cluster.gpu.memory_bytes)


def read_runs(path: Path) -> list[PublishedRun]:
    """Every row of a file, in order; those that cannot be read have a reason.

    Raises:
        InputError: the file is no table of a known form.
    """
    form, _, rows = read_table(path)
    readable: Sequence[Row] = unswapped(rows) if form == "bloom" else rows
    return [read_row(form, line, row) for line, row in enumerate(readable, 2)]


def read_row(form: Form, line: int, row: Row) -> PublishedRun:
    """One row of a form; what is wrong with it is its reason."""
    try:
        run = _checked(READERS[form](row))
    except (RowError, ConfigError) as error:
        run = PublishedRun(
            form=form,
            row=line,
            source=row.get("source", ""),
            reason=" ".join(str(error).split()),
            out_of_memory=ran_out(row),
        )
    return replace(run, row=line, cells=row)


def _checked(run: PublishedRun) -> PublishedRun:
    """The run without a measurement that cannot be one: of seconds in milliseconds, tokens of a node.

    Raises:
        RowError: the batch is in tokens.
    """
    work, cluster = run.workload, run.cluster
    assert work is not None
    assert cluster is not None
    if work.tokens_per_step > MOST_TOKENS:
        raise RowError(
            f"{work.global_batch} sequences of {work.seq_len} tokens are {work.tokens_per_step:.2g} tokens a "
            "step: give the global batch in sequences"
        )
    if run.measured_time is None:
        return run
    rate = tflops_per_gpu(work, run.measured_time, "megatron")
    peak = load_hardware(cluster.gpu.name).gpu.peak_flops / 1e12
    if rate <= peak:
        return run
    note = f"measured time left out: {rate:.4g} TFLOP/s a GPU are above its peak of {peak:.0f}"
    return replace(run, measured_time=None, assumed=(*run.assumed, note))


def published_runs(name: str) -> list[PublishedRun]:
    """The runs of published/<name>.csv, which the package carries."""
    with resources.as_file(resources.files(__package__).joinpath(f"published/{name}.csv")) as path:
        return read_runs(path)


def predict_run(run: PublishedRun, constants: Constants | None = None) -> Prediction:
    """The prediction for a run; without a workload there is none."""
    constants = constants or load_constants()
    if run.workload is None or run.cluster is None:
        return Prediction(run, None, None, run.reason)
    memory = predict_memory(run.workload, constants, memory_bytes=run.cluster.gpu.memory_bytes)
    return Prediction(run, predict_step(run.workload, run.cluster, constants), memory)


def evaluate_rows(path_in: Path, path_out: Path, constants: Constants | None = None) -> list[Prediction]:
    """Write the rows of a CSV file with predictions beside the measurements.

    Args:
        path_in: published runs in one of the three forms of published/*.csv.
        path_out: the same rows with the columns of `ADDED`.
        constants: the frozen ones unless given.

    Raises:
        InputError: the file is no table of a known form.
        OutputError: the output cannot be written.
    """
    if path_out.is_dir():
        raise OutputError(f"{path_out} is a folder: give the CSV to write, as in --out predictions.csv")
    _, names, _ = read_table(path_in)
    found = [predict_run(run, constants) for run in read_runs(path_in)]
    text = StringIO()
    columns = [*(name for name in names if name not in ADDED), *ADDED]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**prediction.run.cells, **added_cells(prediction)} for prediction in found)
    with atomic_file(path_out) as file:
        file.write(text.getvalue().encode("utf-8"))
    return found


def added_cells(prediction: Prediction) -> dict[str, str]:
    """The cells of `ADDED` for one run."""
    run, time, memory = prediction.run, prediction.time, prediction.memory
    cells = dict.fromkeys(ADDED, "")
    cells |= {
        "measured_time": _cell(run.measured_time),
        "measured_memory": _cell(run.measured_memory),
        "out_of_memory": "yes" if run.out_of_memory else "no",
        "assumed": "; ".join(run.assumed),
        "reason": prediction.reason,
    }
    if time is not None and run.workload is not None:
        cells |= {
            "predicted_time": _cell(time.total),
            "predicted_time_low": _cell(time.low),
            "predicted_time_high": _cell(time.high),
            "regime": time.regime,
            "layout": run.workload.describe(),
        }
    if memory is not None:
        total = memory.total / GIB
        cells |= {
            "predicted_memory": _cell(total),
            "predicted_memory_low": _cell(total * (1 - memory.band)),
            "predicted_memory_high": _cell(total * (1 + memory.band)),
            "fits": "yes" if prediction.fits else "no",
        }
    return cells


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"
