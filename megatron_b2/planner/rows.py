"""Tables of published runs: their three forms, their cells, and what a row becomes.

The forms are those of published/*.csv: Megatron-LM's papers, BLOOM's log and FSDP's tables. megatron_rows.py
and forms.py read the rows of each, published.py whole files.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Final, Literal

from megatron_b2.errors import InputError
from megatron_b2.planner.hardware import Cluster, gpu_names, load_hardware, with_nics
from megatron_b2.planner.workload import Recompute, Workload

Row = Mapping[str, str]
Form = Literal["megatron", "bloom", "fsdp"]

FORM_COLUMNS: Final[Mapping[Form, tuple[str, ...]]] = {
    "bloom": ("nodes", "dp", "tp", "pp", "mbs", "gbs", "mem", "sec_it", "tflops"),
    "fsdp": ("gpu", "model", "gpus", "seq", "mbs", "act_ckpt", "tok_s_gpu", "parallel"),
    "megatron": ("gpu", "model", "hidden", "layers", "heads", "seq", "gpus", "gbs", "recompute"),
}
"""Columns by which a form is known; others may be missing."""


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """One measured run."""

    form: Form
    row: int
    """Line of the file, where the header is 1."""
    source: str
    workload: Workload | None = None
    """None where the row cannot be read."""
    cluster: Cluster | None = None
    measured_time: float | None = None
    """Seconds a step."""
    measured_memory: float | None = None
    """GiB of the fullest device, as nvidia-smi or PyTorch say (the sources write GB)."""
    out_of_memory: bool = False
    """The source says that the run did not fit."""
    assumed: tuple[str, ...] = ()
    """What the source does not say."""
    reason: str = ""
    """Why there is no workload."""
    cells: Row = field(default_factory=dict)
    """The row as it stands."""


class RowError(ValueError):
    """A row cannot be read; the message says why."""


def read_table(path: Path) -> tuple[Form, list[str], list[dict[str, str]]]:
    """Form, column names and rows of a CSV file.

    Raises:
        InputError: the file cannot be read, or its columns are of no known form.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            rows = [
                {name: (row.get(name) or "").strip() for name in names}
                for row in reader
                if any(isinstance(value, str) and value.strip() for value in row.values())
            ]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    for form, columns in FORM_COLUMNS.items():
        if set(columns) <= set(names):
            return form, names, rows
    nearest = min(FORM_COLUMNS, key=lambda form: len(set(FORM_COLUMNS[form]) - set(names)))
    missing = ", ".join(sorted(set(FORM_COLUMNS[nearest]) - set(names)))
    raise InputError(
        f"{path}: the columns are of no known form of published runs; nearest is {nearest}, of which "
        f"{missing} are missing"
    )


NUMBER: Final = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][+-]?\d+)?")
SECONDS: Final[Mapping[str, float]] = {"ms": 1e-3, "min": 60.0, "h": 3600.0}
GIBIBYTES: Final[Mapping[str, float]] = {"mb": 2.0**-10, "mib": 2.0**-10}
"""The sources write GB for GiB, so MB for MiB."""
THOUSANDS: Final[Mapping[str, float]] = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
"""Units by which a cell is scaled; others are words."""


def number(text: str, units: Mapping[str, float] | None = None) -> float | None:
    """The first number of a cell: 47 of "47GB", 1024 of "1,024", 1.1 of "1100 ms" with `SECONDS`; None
    without one.

    Raises:
        RowError: it is too large, or has a decimal comma.
    """
    found = NUMBER.search(text)
    if found is None:
        return None
    rest = text[found.end() :]
    if re.match(r",\d", rest):
        raise RowError(f"{text!r} has a comma that does not part thousands: write a decimal point")
    unit = re.match(r"\s*([A-Za-z]+)", rest)
    value = float(found[0].replace(",", "")) * (units or {}).get(unit[1].lower() if unit else "", 1.0)
    if not isfinite(value):
        raise RowError(f"{text!r} is too large")
    return value


def whole(row: Row, name: str) -> int | None:
    """A cell that holds a positive whole number; None if it is empty.

    Raises:
        RowError: it holds something else, or thousands ("8k").
    """
    cell = row.get(name, "")
    value = number(cell)
    if value is None:
        return None
    if number(cell, THOUSANDS) != value:
        raise RowError(f"{name} = {cell!r} has a unit: write the number in full")
    if value <= 0 or value != int(value):
        raise RowError(f"{name} = {cell!r} is no positive whole number")
    return int(value)


def needed(row: Row, name: str) -> int:
    """A cell that must hold a positive whole number.

    Raises:
        RowError: it is empty, or holds something else.
    """
    value = whole(row, name)
    if value is None:
        raise RowError(f"{name} is missing")
    return value


def positive(row: Row, name: str, units: Mapping[str, float] | None = None) -> float | None:
    """A measurement; None if the cell is empty, "x" or not above 0."""
    value = number(row.get(name, ""), units)
    return value if value is not None and value > 0 else None


def memory_of(row: Row) -> float | None:
    """GiB of a device: a cell of its own, or "mem 77.0 GiB" in the notes."""
    for name in ("mem", "mem_gb", "memory", "memory_gb"):
        if (value := positive(row, name, GIBIBYTES)) is not None:
            return value
    found = re.search(r"\bmem(?:ory)?\s*(\d+(?:\.\d+)?)\s*Gi?B", row.get("notes", ""), re.IGNORECASE)
    return float(found[1]) if found else None


def ran_out(row: Row) -> bool:
    """Whether a row says that memory was not enough; "too close to OOM" or "no OOM" is a run that did fit."""
    pattern = r"(?<!close to )(?<!no )(?<!without )\bOOM\b|out of memory"
    return re.search(pattern, " ".join(row.values()), re.IGNORECASE) is not None


PRESET_SIZES: Final = r"(40|64|80|94|96|141)"
"""Gigabytes that the GPUs of published rows have."""


def cluster_of(row: Row) -> Cluster:
    """The preset that a GPU's and a network's description means: A100-SXM4-40GB, 8xH100, H100-96(500W).

    Raises:
        RowError: the GPU is none of the presets.
    """
    text = row["gpu"].upper().replace("AMPERE", "A100")
    found = re.search(r"(?<![A-WYZ])([AH]\d00)(?!\d)", text)
    presets = [name for name in gpu_names() if found and name.startswith(f"{found[1].lower()}-")]
    if found is None or not presets:
        raise RowError(f"GPU {row['gpu']!r} is none of the presets")
    if re.search(r"\bPCI-?E\b|\bNVL\b", text):
        raise RowError(f"GPU {row['gpu']!r} is none of the presets, which are of SXM modules")
    after = text[found.end() :]
    patterns = (rf"(?<!\d){PRESET_SIZES}\s*G", rf"(?<!\d){PRESET_SIZES}(?![\dW])")
    given = next((found for found in (re.search(pattern, after) for pattern in patterns) if found), None)
    sizes = {int(name.split("-")[1].removesuffix("g")): name for name in presets}
    wanted = int(given[1]) if given else max(sizes)
    nearest = min(sizes, key=lambda size: abs(size - wanted))
    cluster = load_hardware(sizes[nearest])
    gpu = replace(cluster.gpu, memory_bytes=cluster.gpu.memory_bytes * wanted / nearest)
    watts = re.search(r"\b(\d+)\s*W\b", text)
    if watts is not None:
        # Large products run at the power limit (our assumption: their rate is proportional to it).
        gpu = replace(gpu, peak_flops=gpu.peak_flops * min(1.0, float(watts[1]) / gpu.tdp_watts))
    cluster = replace(cluster, gpu=gpu)
    cell = row.get("interconnect", "")
    rate = re.search(r"[\d.,]+\s*([GT])b(?:ps|/s)\s*(?:/|per)\s*(node|gpu)", cell, re.IGNORECASE)
    bits = (number(rate[0]) or 0.0) * (1e12 if rate[1].upper() == "T" else 1e9) if rate else 0.0
    if rate is None or bits == 0:
        return cluster
    factor = cluster.node.gpus if rate[2].lower() == "gpu" else 1
    return with_nics(cluster, node_bandwidth=bits / 8 * factor)


def recompute_of(cell: str) -> Recompute | None:
    """full, sel, sel+SP, full+SP, none, 1, 0, true, false; None for an empty cell or "unstated"."""
    text = re.split(r"[^a-z0-9]", cell.strip().lower())[0]
    if text.startswith("sel"):
        return "selective"
    if text in ("full", "1", "true", "yes", "uniform", "block"):
        return "full"
    if text in ("none", "0", "false", "no", "off"):
        return "none"
    return None


ZERO: Final = r"\bzero[-_ ]?(?:stage[-_ ]?)?"
STAGES: Final[tuple[tuple[str, Literal[0, 1, 2, 3]], ...]] = (
    (rf"{ZERO}0\b", 0),
    (rf"{ZERO}1\b", 1),
    (rf"{ZERO}2\b|shard[-_ ]grad[-_ ]op", 2),
    (rf"{ZERO}3\b", 3),
    (r"no[-_ ]?shard|\bDDP\b", 0),
)
"""How sources name the stages of ZeRO, by its own name first."""


def stage_of(text: str) -> Literal[0, 1, 2, 3] | None:
    """The ZeRO stage that a text names, if it does."""
    return next((stage for name, stage in STAGES if re.search(name, text, re.IGNORECASE)), None)


SAME_BATCH: Final = 0.9
"""Of a row's batch: what a layout must at least be able to run of it."""


def fitted_batch(global_batch: int, *, micro: int, data: int, rounds: int = 1) -> tuple[int, list[str]]:
    """The nearest batch below that the layout can run, and a note if it is another.

    Raises:
        RowError: it is so far off that the row's time is not that of the layout.
    """
    unit = micro * data * rounds
    batch = global_batch // unit * unit
    if batch < SAME_BATCH * global_batch:
        several = f" x pipeline = {micro} x {data} x {rounds}" if rounds > 1 else f" = {micro} x {data}"
        raise RowError(f"global batch {global_batch} is no multiple of micro-batch x data{several}")
    note = [] if batch == global_batch else [f"global batch {batch} instead of {global_batch}"]
    return batch, note


def unswapped(rows: Sequence[Row]) -> list[Row]:
    """BLOOM's log has two rows whose seconds and TFLOP/s stand in each other's column. They repeat an earlier
    row of the same layout, by which they are known."""
    layout = ("size", "nodes", "dp", "tp", "pp", "mbs", "gbs", "zs")
    first: dict[tuple[str, ...], tuple[str, str]] = {}
    fixed = []
    for row in rows:
        pair = (row.get("sec_it", ""), row.get("tflops", ""))
        known = first.setdefault(tuple(row.get(name, "") for name in layout), pair)
        is_swapped = pair == known[::-1] != known
        fixed.append({**row, "sec_it": pair[1], "tflops": pair[0]} if is_swapped else row)
    return fixed
