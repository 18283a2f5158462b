"""b2 ops: what kernels there are, which of them this machine can run, and proof that they are right."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from megatron_b2.cli.main import run
from megatron_b2.errors import InputError
from megatron_b2.files.atomic import write_json

if TYPE_CHECKING:  # it imports torch: only once the command line is understood
    import torch

HELP = "which kernels this machine can run, and proof that they are right"


@dataclass(frozen=True)
class List:
    """Every operation and backend, and why it can or cannot run here.

    The backend that `ops.backend = "auto"` takes is marked with *.

    Example: b2 ops list
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU where there is one."""
    json: Path | None = None
    """Also write the table to this file."""


@dataclass(frozen=True)
class Verify:
    """Compare every kernel with float64: its error may be at most twice that of torch in the same dtype.

    A few fp32 units of the largest value are always allowed: torch happens to be exact now and then.

    On a CPU Triton kernels run under Triton's interpreter and CUDA sources through a header that makes g++
    understand them. Exit status 1 if any quantity is too far off.

    Example: b2 ops verify --quick
    """

    quick: bool = False
    """Small shapes of every kind (minutes on a CPU)."""
    full: bool = False
    """Every dtype, head width, length and number of heads (hours on a CPU)."""
    only: str = ""
    """Run only the checks whose text contains this, such as "swiglu" or "bfloat16"."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU where there is one."""
    json: Path | None = None
    """Also write the results to this file."""


@dataclass(frozen=True)
class Table:
    """Compile every kernel for sm_80 and sm_90 and write docs/kernels.md and docs/kernels.json.

    Registers, spills, shared memory, occupancy, widths of accesses and tensor-core instructions, read from
    the machine code. Needs no GPU; CUDA C++ is part of it where nvcc is found.

    Example: b2 ops table
    """

    out: Path = Path("docs")
    """Folder of the two files."""
    cache: Path = Path("runs/kernels")
    """Compiled kernels of earlier calls."""


@dataclass(frozen=True)
class Bench:
    """Time every kernel on the GPU of this machine, beside torch and other projects where installed.

    Prints bandwidth, FLOP/s and the share of what the device's data sheet allows. Without a GPU nothing is
    measured and nothing is stated.

    Example: b2 ops bench --json kernels.json
    """

    sanitize: bool = False
    """First run the quick checks under compute-sanitizer: memory, races, barriers."""
    json: Path | None = None
    """Also write the measurements to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    options: List | Verify | Table | Bench = tyro.extras.subcommand_cli_from_dict(
        {"list": List, "verify": Verify, "table": Table, "bench": Bench},
        prog="b2 ops",
        description=HELP,
        args=argv,
    )
    if isinstance(options, List):
        return _list(options)
    if isinstance(options, Bench):
        return _bench(options)
    return _verify(options) if isinstance(options, Verify) else _table(options)


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device(name)


def _list(options: List) -> int:
    from rich.console import Console
    from rich.table import Table as RichTable

    from megatron_b2.config.schema import OpsConfig
    from megatron_b2.ops.registry import BACKENDS, choose, unavailable

    device = _device(options.device)
    automatic = {choice.op: choice.backend for choice in choose(OpsConfig(), device=device)}
    table = RichTable("operation", "backend", f"on {device.type}", "why not")
    records = []
    for op, backends in BACKENDS.items():
        for backend in backends:
            reason = unavailable(op, backend, device=device)
            mark = " *" if automatic[op] == backend else ""
            table.add_row(op, backend + mark, "no" if reason else "yes", reason)
            records.append({"op": op, "backend": backend, "why_not": reason, "automatic": bool(mark)})
    Console(soft_wrap=True).print(table)
    print('* what ops.backend = "auto" takes; [ops] in the configuration or --ops.NAME BACKEND chooses')
    if options.json is not None:
        write_json(options.json, {"device": device.type, "operations": records})
    return 0


def _verify(options: Verify) -> int:
    if options.quick == options.full:
        raise InputError("b2 ops verify takes either --quick or --full")
    from megatron_b2.testing.kernels.verify import all_checks, missing, verify

    device = _device(options.device)
    checks = all_checks(quick=options.quick, only=options.only)
    if not checks:
        raise InputError(f"--only {options.only!r}: no check's text contains it; leave it out to see all")
    if lacks := missing(checks, device):
        why = "; ".join(f"{backend} needs what is not here: {reason}" for backend, reason in lacks.items())
        raise InputError(f"b2 ops verify on {device.type}: {why}; mend that, or use --only")
    print(f"{len(checks)} checks on {device.type}", flush=True)
    start, results = time.monotonic(), []
    for index, result in enumerate(verify(checks, device), 1):
        results.append(result)
        left = (time.monotonic() - start) / index * (len(checks) - index)
        name = f"{result.check.op} {result.check.backend} {result.check.name}"
        print(f"{index:4}/{len(checks)}  left {left:4.0f} s  {name:70}  {result.describe()}", flush=True)
    passed = sum(result.passed for result in results)
    print(f"{passed} of {len(results)} within twice the error of torch, or a few fp32 units")
    if options.json is not None:
        records = [
            {
                "op": r.check.op,
                "backend": r.check.backend,
                "name": r.check.name,
                "passed": r.passed,
                "failure": r.failure,
                "deviations": [asdict(deviation) for deviation in r.deviations],
            }
            for r in results
        ]
        write_json(options.json, records)
    return 0 if passed == len(results) else 1


def _table(options: Table) -> int:
    if find_spec("triton") is None:
        raise InputError("b2 ops table compiles with the triton package, which is not installed: install it")
    from megatron_b2.testing.kernels.table import broken_rules, write_table

    problems = [line for row in write_table(options.out, cache=options.cache) for line in broken_rules(row)]
    print("\n".join(problems) if problems else "every kernel keeps every rule")
    return 1 if problems else 0


def _bench(options: Bench) -> int:
    import torch

    from megatron_b2.testing.kernels.gpu import NO_GPU, markdown, measure, sanitize

    if not torch.cuda.is_available():
        print(NO_GPU)
        return 0
    problems = sanitize() if options.sanitize else []
    device = torch.device("cuda")
    measurements = list(measure(device, device_name=torch.cuda.get_device_name(device)))
    print("\n".join([*problems, markdown(measurements)]))
    if options.json is not None:
        write_json(options.json, [asdict(row) for row in measurements])
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run(main))
