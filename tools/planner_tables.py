"""Tables and plot of docs/planner.md, from the frozen constants and the published rows.

    python tools/planner_tables.py            writes docs/planner.md and docs/planner_published.png
    python tools/planner_tables.py --check    says whether the document is current, and writes nothing

In the document a table stands between <!-- begin NAME --> and <!-- end NAME -->. The constants come from
`python -m megatron_b2.planner.fit`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_b2.errors import B2Error, InputError
from megatron_b2.files.atomic import atomic_file
from megatron_b2.planner.constants import FITTED, Constants, ErrorRow, load_constants, load_errors
from megatron_b2.planner.fit import MEMORY_SETS, TIME_SETS, Judged, choices, judge
from megatron_b2.planner.flops import tflops_per_gpu
from megatron_b2.planner.hardware import load_hardware
from megatron_b2.planner.published import GIB
from megatron_b2.planner.step import predict_step
from megatron_b2.planner.workload import ModelShape, Workload

DOCUMENT: Final = Path(__file__).resolve().parents[1] / "docs" / "planner.md"
PLOT: Final = DOCUMENT.with_name("planner_published.png")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(error: float | None) -> str:
    """+3.1 %, or nothing."""
    return "" if error is None else f"{100 * error:+.1f} %"


def constants_table(constants: Constants) -> str:
    """Fitted constants with their rows."""
    origin = {name: fit.says for fit in (*TIME_SETS, *MEMORY_SETS) for name in fit.constants}
    return table(
        ("constant", "value", "fitted on"),
        [(f"`{name}`", f"{getattr(constants, name):.4g}", origin[name]) for name in FITTED],
    )


def errors_table(errors: Sequence[ErrorRow]) -> str:
    """Errors of each set."""
    rows = [
        (
            row.name,
            row.quantity,
            f"fitted: {row.fitted}" if row.fitted else "**held out**",
            str(row.rows),
            f"{100 * row.mape:.1f} %",
            percent(row.bias),
            f"{100 * row.worst:.1f} %",
        )
        for row in errors
    ]
    return table(("rows", "quantity", "", "number", "MAPE", "bias", "worst"), rows)


def bands_table(constants: Constants) -> str:
    """Error bands."""
    return table(
        ("regime", "band"), [(name, f"± {100 * band:.1f} %") for name, band in constants.bands.items()]
    )


def rows_table(judged: Sequence[Judged]) -> str:
    """Every published row."""
    rows = []
    for item in judged:
        prediction, run = item.prediction, item.prediction.run
        work, time, memory = run.workload, prediction.time, prediction.memory
        assert work is not None
        assert time is not None
        assert memory is not None
        line = f", line {run.cells['line']}" if run.form == "bloom" else ""
        fitted = [text for text in (item.fitted_time, item.fitted_memory) if text]
        rows.append(
            (
                f"{item.set_name}{line}",
                run.cells.get("model") or f"{run.cells.get('size')}, h {work.shape.hidden_size}",
                f"{work.gpus}",
                f"{work.describe()}",
                f"{run.measured_time:.4g}" if run.measured_time else "out of memory",
                f"{time.total:.4g}",
                percent(prediction.time_error),
                f"{run.measured_memory:.4g}" if run.measured_memory else "",
                f"{memory.total / GIB:.4g}",
                percent(prediction.memory_error),
                "; ".join(fitted),
            )
        )
    columns = (
        *("source", "model", "GPUs", "layout", "s/step", "predicted", "error"),
        *("GiB", "predicted", "error", "fitted here"),
    )
    return table(columns, rows)


def crossover_table(constants: Constants) -> str:
    """Baichuan 2 13B at 4M tokens a step on more and more A800."""
    cluster = load_hardware("a800-80g")
    shape = ModelShape(
        hidden_size=5120, ffn_hidden_size=13_696, num_layers=40, num_heads=40, vocab_size=125_696
    )
    rows = []
    for gpus in (64, 128, 256, 512, 1024):
        cells = [str(gpus)]
        for tensor in (1, 2, 4, 8):
            work = Workload(
                shape=shape,
                seq_len=4096,
                micro_batch_size=min(8, 1024 * tensor // gpus),
                global_batch=1024,
                tensor=tensor,
                data=gpus // tensor,
                zero_stage=3,
                sequence_parallel=tensor > 1,
                recompute="full",
            )
            seconds = predict_step(work, cluster, constants).total
            cells.append(f"{tflops_per_gpu(work, seconds, 'megatron'):.0f}")
        rows.append(cells)
    return table(("GPUs", "ZeRO-3 alone", "tensor 2", "tensor 4", "tensor 8"), rows)


def mean_error(judged: Sequence[Judged], quantity: str, source: str, *, held_out: bool | None = None) -> str:
    """MAPE of the rows of a source, and their number; only held-out or fitted ones where that is said."""
    errors = []
    for item in judged:
        error = getattr(item.prediction, f"{quantity}_error")
        is_held_out = not getattr(item, f"fitted_{quantity}")
        if error is not None and item.set_name.startswith(source) and held_out in (None, is_held_out):
            errors.append(abs(error))
    kind = {None: "", True: "held out, ", False: "fitted, "}[held_out]
    return f"{100 * sum(errors) / len(errors):.1f} % ({kind}{len(errors)} rows)"


def peers_table(judged: Sequence[Judged]) -> str:
    """Errors of other models on the same rows, as they were run before ours was built, and ours."""
    zero_3 = [mean_error(judged, "time", "SC21-T2-ZeRO3", held_out=part) for part in (True, False)]
    rows = [
        (
            "SC21 table 1, time",
            "10.3 % (worst 17.8 %, always too fast)",
            "3.6 % (fitted)",
            mean_error(judged, "time", "SC21-T1", held_out=False),
        ),
        (
            "SC21 table 2, all 12 rows, time",
            "not run",
            "not run",
            mean_error(judged, "time", "SC21-T2"),
        ),
        ("of them ZeRO-3", "cannot", "cannot", "; ".join(zero_3)),
        (
            "Korthikanti table 5, time",
            "3.65 % (8 rows, its own validation)",
            "10.9 %",
            mean_error(judged, "time", "Korthikanti", held_out=True),
        ),
        (
            "MegaScale table 2, Megatron-LM, time",
            "7.6 % (8 rows, worst 14.2 %)",
            "19.3 %",
            mean_error(judged, "time", "MegaScale-Megatron", held_out=True),
        ),
        (
            "BLOOM, time",
            "28 to 33 % (75 rows)",
            "24.7 % (132 lines)",
            mean_error(judged, "time", "BLOOM", held_out=True),
        ),
        (
            "BLOOM, memory",
            "34 % too low (46 rows)",
            "4.3 and 5.1 % (two constants)",
            f"{mean_error(judged, 'memory', 'BLOOM', held_out=True)}, one constant",
        ),
        (
            "FSDP, time",
            "not run",
            "not run",
            " and ".join(
                mean_error(judged, "time", source, held_out=True) for source in ("llm-foundry", "torchtitan")
            ),
        ),
    ]
    return table(("rows", "Calculon", "four parameters", "this model"), rows)


def choices_table(judged: Sequence[Judged]) -> str:
    """What the model would have chosen in each group of BLOOM's log."""
    rows = []
    for choice in choices(judged, ("section", "nodes", "size")):
        run = choice.chosen.prediction.run
        assert run.workload is not None
        rows.append(
            (
                ", ".join((choice.group[0], f"{choice.group[1]} nodes", choice.group[2])),
                str(choice.rows),
                f"line {run.cells['line']}: {run.workload.describe()}, {run.workload.shape.num_heads} heads",
                f"{run.measured_time:.4g}",
                f"{choice.best:.4g}",
                percent(choice.regret),
            )
        )
    return table(("group", "rows", "predicted fastest", "its s/step", "best s/step", "slower by"), rows)


def tables(judged: Sequence[Judged]) -> dict[str, str]:
    """Every table of the document, by name."""
    constants = load_constants()
    return {
        "constants": constants_table(constants),
        "errors": errors_table(load_errors()),
        "bands": bands_table(constants),
        "peers": peers_table(judged),
        "choices": choices_table(judged),
        "crossover": crossover_table(constants),
        "rows": rows_table(judged),
    }


def filled(text: str, parts: dict[str, str]) -> str:
    """The document with its tables.

    Raises:
        InputError: a table has no place in it.
    """
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if pattern.search(text) is None:
            raise InputError(f"{DOCUMENT} has no <!-- begin {name} --> ... <!-- end {name} -->: add both")
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


def draw(judged: Sequence[Judged], path: Path) -> None:
    """Predicted against measured, time and memory, held-out rows filled."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels = (
        ("seconds a step", "time_error", "measured_time", "fitted_time"),
        ("GiB of the fullest device", "memory_error", "measured_memory", "fitted_memory"),
    )
    for axes, (label, error_of, measured_of, fitted_of) in zip(figure.subplots(1, 2), panels, strict=True):
        groups: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        for item in judged:
            error, measured = getattr(item.prediction, error_of), getattr(item.prediction.run, measured_of)
            if error is not None:
                key = item.set_name.split(",")[0], not getattr(item, fitted_of)
                groups.setdefault(key, []).append((measured, measured * (1 + error)))
        names = list(dict.fromkeys(name for name, _ in groups))
        for (name, is_held_out), points in groups.items():
            color = f"C{names.index(name)}"
            axes.scatter(
                *zip(*points, strict=True),
                s=26,
                facecolors=color if is_held_out else "none",
                edgecolors=color,
                label=f"{name}, {'held out' if is_held_out else 'fitted'} ({len(points)})",
            )
        ends = [min(x for p in groups.values() for x, _ in p), max(x for p in groups.values() for x, _ in p)]
        axes.plot(ends, ends, color="black", linewidth=1)
        for share in (0.9, 1.1):
            axes.plot(ends, [end * share for end in ends], color="grey", linewidth=0.7, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(f"measured: {label}")
        axes.set_ylabel("predicted; dotted: 10 % off")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    FigureCanvasAgg(figure)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the document is stale")
    arguments = parser.parse_args(argv)
    judged = judge(load_constants())
    try:
        old = DOCUMENT.read_text(encoding="utf-8")
        new = filled(old, tables(judged))
    except (OSError, B2Error) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        print("current" if new == old else f"{DOCUMENT} is stale: run python {Path(__file__).name}")
        return int(new != old)
    with atomic_file(DOCUMENT) as stream:
        stream.write(new.encode("utf-8"))
    draw(judged, PLOT)
    print(f"wrote {DOCUMENT} and {PLOT}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
