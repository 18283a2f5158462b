"""Tables of published runs: their three forms, their cells, and what a row becomes.

The forms are those of published/*.csv: Megatron-LM's papers, BLOOM's log and FSDP's tables. megatron_rows.py
and forms.py read the rows of each, published.py whole files.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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


def number(text: str) -> float | None:
    """The first number of a cell: 47 of "47GB", 1024 of "1,024"; None without one."""
    found = re.search(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?", text)
    return float(found[0].replace(",", "")) if found else None


def whole(row: Row, name: str) -> int | None:
    """A cell that holds a positive whole number; None if it is empty.

    Raises:
        RowError: it holds something else.
    """
    value = number(row.get(name, ""))
    if value is None:
        return None
    if value <= 0 or value != int(value):
        raise RowError(f"{name} = {row[name]!r} is no positive whole number")
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


def positive(row: Row, name: str) -> float | None:
    """A measurement; None if the cell is empty, "x" or not above 0."""
    value = number(row.get(name, ""))
    return value if value is not None and value > 0 else None


def memory_of(row: Row) -> float | None:
    """GiB of a device: a cell of its own, or "mem 77.0 GiB" in the notes."""
    for name in ("mem", "mem_gb", "memory", "memory_gb"):
        if (value := positive(row, name)) is not None:
            return value
    found = re.search(r"\bmem(?:ory)?\s*(\d+(?:\.\d+)?)\s*Gi?B", row.get("notes", ""), re.IGNORECASE)
    return float(found[1]) if found else None


def ran_out(row: Row) -> bool:
    """Whether a row says that memory was not enough; "too close to OOM" is a run that did fit."""
    text = " ".join(row.values())
    return re.search(r"(?<!close to )\bOOM\b|out of memory", text, re.IGNORECASE) is not None


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
    rate = re.search(r"([\d,]+)\s*Gbps\s*/\s*(node|gpu)", row.get("interconnect", ""), re.IGNORECASE)
    if rate is None:
        return cluster
    factor = cluster.node.gpus if rate[2].lower() == "gpu" else 1
    return with_nics(cluster, node_bandwidth=float(rate[1].replace(",", "")) * 1e9 / 8 * factor)


def recompute_of(cell: str) -> Recompute | None:
    """full, sel, sel+SP, none, 1, 0, true, false; None for an empty cell or "unstated"."""
    text = cell.strip().lower()
    if text.startswith("sel") or text == "selective":
        return "selective"
    if text in ("full", "1", "true", "yes", "uniform", "block"):
        return "full"
    if text in ("none", "0", "false", "no", "off"):
        return "none"
    return None


def fitted_batch(global_batch: int, *, micro: int, data: int, rounds: int = 1) -> tuple[int, list[str]]:
    """The nearest batch below that the layout can run, and a note if it is another."""
    unit = micro * data * rounds
    batch = max(1, global_batch // unit) * unit
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
