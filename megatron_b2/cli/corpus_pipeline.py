"""`b2 corpus run`, `report`, `explain` and `mix`: a pipeline from raw documents to weighted training data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import tyro

from megatron_b2.errors import InputError

if TYPE_CHECKING:
    from megatron_b2.corpus.pipeline.explain import Explanation

TIMES: Final = "times.json"
"""In the work folder: tasks and seconds of each stage in the last run."""
SHORT: Final[Mapping[str, str]] = {
    "--executor": "--execution.executor",
    "--address": "--execution.ray.address",
}
"""Flags of `b2 corpus run` with a shorter form."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Run the stages of a pipeline over a corpus, as far as they are not done.

    Settings of the file can be replaced: --minhash.threshold 0.7, --execution.workers 8, --stages
    normalize exact minhash; `b2 corpus settings` lists them all. A run that was stopped in any way goes on
    where it was; `b2 corpus report` shows the result. The work is done on processes of this machine, on a Ray
    cluster or in SLURM job arrays.

    Example: b2 corpus run examples/corpus/zhen.toml --execution.workers 2

    Example: b2 corpus run examples/corpus/zhen.toml --executor ray --address auto

    Example: b2 corpus run examples/corpus/zhen.toml --executor slurm --execution.slurm.partition cpu
    """

    pipeline: Annotated[Path, tyro.conf.Positional]
    """TOML file."""
    verify: bool = False
    """Read every file that earlier runs made first, and make again what is damaged."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What each stage removed, by language and source: table, JSON, PNG and an HTML page with examples.

    Example: b2 corpus report runs/corpus --out report
    """

    work: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run."""
    out: Path = Path("report")
    """Folder for report.json, funnel.png and report.html."""


@dataclass(frozen=True, kw_only=True)
class Explain:
    """Why a document stayed or went, stage by stage, and which documents are its duplicates.

    Example: b2 corpus explain runs/corpus manpages-zh/usr/share/man/zh_CN/man1/ls.1.gz
    """

    work: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run."""
    document: Annotated[str, tyro.conf.Positional]
    """Its id."""
    text: bool = False
    """Also print the text as each stage left it, where a stage changed it."""
    json: Path | None = None
    """Also write what the stages said to this file."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Write what is kept: a folder of JSONL files for each group of documents of equal weight, and the blend.

    Example: b2 corpus mix runs/corpus --out clean --where '"quality.score" > 0.3'
    """

    work: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run."""
    out: Path
    """New folder; blend.toml in it lists the groups as data sources."""
    where: str = ""
    """A further condition: SQL on attributes, names in double quotes."""
    least_bytes: int = 100_000
    """A smaller group joins that of its language whose weight is nearest: a source must fill a sequence."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes."""
    overwrite: bool = False
    """Replace an earlier mix."""


@dataclass(frozen=True, kw_only=True)
class Remember:
    """Write which texts a corpus had, so that later corpora leave them out: exact.seen = ["FILE"].

    A Bloom filter: about 4 bytes a text at the default rate, all of it in memory while it is made. It never
    misses a text of this corpus.

    Example: b2 corpus remember runs/corpus --out seen.bloom
    """

    work: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished run that had the stage exact."""
    out: Path
    """File to write."""
    false_positive_rate: float = 1e-6
    """Chance that a new text is taken for one of this corpus."""


def main(command: object) -> int:
    """Run a parsed command."""
    match command:
        case Report():
            return _report(command)
        case Explain():
            return _explain(command)
        case Mix():
            return _mix(command)
        case Remember():
            return _remember(command)
    raise AssertionError(f"no such command: {command}")


def run(arguments: Sequence[str]) -> int:
    """`b2 corpus run PIPELINE [--verify] [--key VALUE ...]`."""
    from megatron_b2.corpus.pipeline.config import load_pipeline
    from megatron_b2.corpus.pipeline.execution import executor_of
    from megatron_b2.corpus.pipeline.extract import skipped
    from megatron_b2.corpus.pipeline.run import run_pipeline
    from megatron_b2.files.atomic import write_json

    given = [argument for argument in arguments if argument not in ("--verify", "--no-verify")]
    if not given or given[0].startswith("-"):
        raise InputError("PIPELINE must come first: b2 corpus run PIPELINE.toml [--key VALUE ...]")
    flags = (argument.partition("=") for argument in given[1:])
    overrides = [SHORT.get(flag, flag) + equals + value for flag, equals, value in flags]
    config = load_pipeline(Path(given[0]), overrides)
    work = Path(config.work)
    with executor_of(config.execution, work) as executor:
        done = run_pipeline(
            config.input, config.chosen(), work=work, executor=executor, verify="--verify" in arguments
        )
    rows = [(name, f"{t.tasks:,}", f"{t.reused:,}", f"{t.seconds:,.1f}") for name, t in done.times.items()]
    write_json(work / TIMES, {"stages": {name: asdict(time) for name, time in done.times.items()}})
    _print_table(("stage", "tasks", "done before", "seconds"), rows)
    for line in done.repaired:
        print(f"damaged, made again: {line}")
    print(f"{len(done.units):,} units, {sum(unit.documents for unit in done.units):,} documents in {work}")
    malformed, empty = skipped(done.units)
    if malformed or empty:
        print(f"left out of the input: {malformed:,} malformed records, {empty:,} without text")
    print(f"next: b2 corpus report {work}")
    return 0


def _report(command: Report) -> int:
    from megatron_b2.corpus.pipeline.page import draw_funnel, examples, rows_of, write_page
    from megatron_b2.corpus.pipeline.report import State, make_report
    from megatron_b2.files.atomic import write_json

    report = make_report(command.work)
    rows = [
        (name, f"{documents:,}", f"{of_documents:.2f}", f"{of_bytes:.2f}", "\n".join(reasons[:3]))
        for name, documents, of_documents, of_bytes, reasons in rows_of(report.total)
    ]
    _print_table(("", "documents", "% of raw", "% of raw bytes", "main reasons"), rows)
    kept = [
        (name, f"{f.raw.bytes / 1e6:,.2f}", f"{100 * f.kept.bytes / max(f.raw.bytes, 1):.1f}")
        for name, f in report.languages.items()
    ]
    _print_table(("language", "raw MB", "% of bytes kept"), kept)
    for line in report.fact_lines():
        print(line)
    picture, page = command.out / "funnel.png", command.out / "report.html"
    write_json(command.out / "report.json", report.to_dict())
    draw_funnel(report, picture)
    write_page(report, examples(State.of(command.work)), picture, page)
    print(f"written: {command.out / 'report.json'}, {picture}, {page}")
    return 0


def _explain(command: Explain) -> int:
    from megatron_b2.corpus.pipeline.explain import explain
    from megatron_b2.files.atomic import write_json

    found = explain(command.work, command.document)
    for explanation in found:
        _print_explanation(explanation, text=command.text)
    if command.json is not None:
        write_json(command.json, [explanation.to_dict() for explanation in found])
    return 0


def _print_explanation(found: Explanation, *, text: bool) -> None:
    print(f"{found.id}: row {found.row} of unit {found.unit}, read from {found.path}:{found.line}")
    for stage in found.stages:
        print(f"{stage.name:14} {stage.verdict}")
        for name, value in stage.values.items():
            print(f"{'':14}   {name} = {_short(value)}")
        if stage.relatives:
            print(f"{'':14}   together with {', '.join(stage.relatives)}")
        if text and stage.text is not None:
            print(stage.text)


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _mix(command: Mix) -> int:
    from megatron_b2.corpus.pipeline.mix import mix

    if command.workers < 1:
        raise InputError(f"--workers is {command.workers}; give 1 or more")
    groups = mix(
        command.work,
        command.out,
        where=command.where,
        least_bytes=command.least_bytes,
        workers=command.workers,
        overwrite=command.overwrite,
    )
    total = sum(group.bytes * group.weight for group in groups.values())
    rows = [
        (
            name,
            f"{group.documents:,}",
            f"{group.bytes / 1e6:,.2f}",
            f"{group.weight:.3f}",
            f"{100 * group.bytes * group.weight / max(total, 1e-9):.1f}",
        )
        for name, group in groups.items()
    ]
    _print_table(("group", "documents", "MB", "weight", "% of samples"), rows)
    if not groups:
        print("no document is kept, so the blend has no source: look at `b2 corpus report`, and at --where")
    print(f"blend: {command.out / 'blend.toml'}")
    return 0


def _remember(command: Remember) -> int:
    from megatron_b2.corpus.pipeline.remember import remember

    rate = command.false_positive_rate
    seen = remember(command.work, command.out, false_positive_rate=rate)
    print(f'{seen.added:,} different texts; use it as exact.seen = ["{command.out}"]')
    return 0


def _print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(titles[0], box=box.SIMPLE_HEAD)
    for title in titles[1:]:
        is_text = title == "main reasons"
        table.add_column(title, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
