"""The report for people: a table, a picture of the funnel, and one HTML page with examples."""

from __future__ import annotations

import hashlib
import heapq
import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.report import Funnel, Report, State
from megatron_b2.corpus.pipeline.run import made_again_by_the_next_run
from megatron_b2.corpus.pipeline.view import read_view
from megatron_b2.files.atomic import atomic_file

EXAMPLES = 4
LANGUAGES = 8
"""That have a colour of their own in the picture."""
EXCERPT = 400
"""Characters of an example that are shown."""


@dataclass(frozen=True, order=True)
class Example:
    """A document that a stage removed."""

    rank: str
    """Hash of the id: the examples are a sample that the order of work does not change."""
    id: str
    reason: str
    excerpt: str


def examples(state: State, *, each: int = EXAMPLES) -> dict[str, list[Example]]:
    """Some documents that each stage removed.

    Raises:
        DamagedFileError: a file is damaged; the next run makes it again.
    """
    with made_again_by_the_next_run(state.work):
        return _examples(state, each)


def _examples(state: State, each: int) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {stage: [] for stage in state.stages}
    for unit in state.units:
        paths = list(state.attribute_paths(unit).items())
        for number, (stage, path) in enumerate(paths):
            table = read_table(path, ["id", f"{stage}.keep", f"{stage}.reason"])
            gone = [
                (hashlib.sha256(row["id"].encode()).hexdigest(), row["id"], row[f"{stage}.reason"], place)
                for place, row in enumerate(table.to_pylist())
                if row[f"{stage}.keep"] is False
            ]
            chosen = heapq.nsmallest(each, gone)
            if not chosen:
                continue
            view = read_view([state.unit_path(unit), *(path for _, path in paths[:number])])
            texts = dict(zip(view.rows.tolist(), view.text.to_pylist(), strict=True))
            fresh = [Example(rank, id_, why, texts[place][:EXCERPT]) for rank, id_, why, place in chosen]
            found[stage] = heapq.nsmallest(each, [*found[stage], *fresh])
    return found


def draw_funnel(report: Report, path: Path) -> None:
    """The funnel as a PNG: what is left of the raw bytes after each stage, by language."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = ["raw", *report.total.stages]
    figure = Figure(figsize=(8, 0.5 * len(steps) + 1.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    totals = _left(report.total)
    start = [0.0] * len(steps)
    for language, sizes in _bars(report).items():
        widths = [100 * size / max(totals[0], 1) for size in sizes]
        axes.barh(steps, widths, left=start, label=language)
        start = [a + b for a, b in zip(start, widths, strict=True)]
    for number, left in enumerate(totals):
        axes.text(101, number, f"{100 * left / max(totals[0], 1):.1f} %", va="center")
    axes.invert_yaxis()
    axes.set(xlim=(0, 112), xlabel="% of the raw bytes that are left after the stage")
    figure.legend(loc="outside upper center", ncols=LANGUAGES + 1, fontsize="small", columnspacing=1)
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _bars(report: Report) -> dict[str, list[int]]:
    """As `_left`, for the languages with the most bytes, and for all others together."""
    bars = {name: _left(funnel) for name, funnel in list(report.languages.items())[:LANGUAGES]}
    others = [total - sum(parts) for total, *parts in zip(_left(report.total), *bars.values(), strict=True)]
    return {**bars, "others": others} if any(others) or not bars else bars


def _left(funnel: Funnel) -> list[int]:
    """Bytes before the first stage and after each."""
    left = [funnel.raw.bytes]
    for stage in funnel.stages.values():
        left.append(left[-1] - stage.removed.bytes)
    return left


def rows_of(funnel: Funnel) -> Iterator[tuple[str, int, float, float, list[str]]]:
    """Table rows: name, documents, % of raw documents, % of raw bytes, reasons, most documents first."""
    plain = funnel.to_dict()
    for name, row in [("raw", plain["raw"]), *plain["stages"].items(), ("kept", plain["kept"])]:
        reasons = [f"{reason} {count:,}" for reason, count in row.get("reasons", {}).items()]
        yield name, row["documents"], row["percent_of_documents"], row["percent_of_bytes"], reasons


def write_page(report: Report, shown: Mapping[str, list[Example]], picture: Path, path: Path) -> None:
    """One HTML page; the picture is linked by its name."""
    parts = [_HEAD, "<h1>Corpus report</h1>", f'<img src="{html.escape(picture.name)}" alt="funnel">']
    parts.append(_table("All documents", report.total))
    parts += [_table(f"Language {name}", funnel) for name, funnel in report.languages.items()]
    parts.append("<h2>Examples of what each stage removed</h2>")
    for stage, found in shown.items():
        if not found:
            continue
        parts.append(f"<h3>{html.escape(stage)}</h3>")
        for example in found:
            title = f"<b>{html.escape(example.id)}</b>: {html.escape(example.reason)}"
            parts.append(f"<p>{title}</p><pre>{html.escape(example.excerpt)}</pre>")
    parts.append(_sources(report.sources))
    parts.append("<h2>Counted beside</h2><ul>")
    parts += [f"<li>{html.escape(line)}</li>" for line in [*report.fact_lines(), *report.messages]]
    parts.append("</ul>")
    with atomic_file(path) as file:
        file.write("\n".join(parts).encode())


def _table(title: str, funnel: Funnel) -> str:
    heads = ("", "documents", "% of documents", "% of bytes", "reasons")
    lines = [f"<h2>{html.escape(title)}</h2>", f"<table><tr>{''.join(f'<th>{h}</th>' for h in heads)}</tr>"]
    for name, documents, of_documents, of_bytes, reasons in rows_of(funnel):
        cells = (name, f"{documents:,}", f"{of_documents:.2f}", f"{of_bytes:.2f}", ", ".join(reasons))
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _sources(sources: Mapping[str, Funnel]) -> str:
    lines = ["<h2>By source</h2><table><tr><th>source</th><th>raw MB</th><th>% of bytes kept</th></tr>"]
    for name, funnel in sources.items():
        share = 100 * funnel.kept.bytes / max(funnel.raw.bytes, 1)
        lines.append(
            f"<tr><td>{html.escape(name)}</td><td>{funnel.raw.bytes / 1e6:,.2f}</td><td>{share:.1f}</td></tr>"
        )
    return "\n".join([*lines, "</table>"])


_HEAD = """<!doctype html><meta charset="utf-8"><title>Corpus report</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
td, th { border: 1px solid #bbb; padding: .2rem .6rem; text-align: right; }
td:first-child, td:last-child { text-align: left; }
pre { background: #f4f4f4; padding: .6rem; white-space: pre-wrap; }
img { max-width: 100%; }
</style>"""
