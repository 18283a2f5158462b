"""`b2 corpus`: fetch real text, look at your own, clean and de-duplicate it, and see what became of it."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

HELP = "fetch real text; clean, de-duplicate and weigh a corpus"


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Get real text from Debian packages: one JSONL file a language, and a manifest.

    Nothing is installed and no root is needed. Packages are kept in OUT/.cache, so a second run is instant
    and an interrupted one goes on. Without apt, give your own .jsonl, .parquet or .txt files to the later
    commands.

    Example: b2 corpus fetch --out corpus --set quickstart
    """

    out: Path
    """Folder for <language>.jsonl, manifest.json and the cache."""
    set: Literal["quickstart", "zhen", "multilingual"] = "quickstart"
    """Which packages; `b2 corpus sets` lists them."""
    packages: tuple[str, ...] = ()
    """Debian packages to take instead of a set."""
    jobs: int = field(default_factory=lambda: min(8, len(os.sched_getaffinity(0))))
    """Processes that extract text."""
    refresh: bool = False
    """Take newer versions than the cached packages where the archive has them."""


@dataclass(frozen=True, kw_only=True)
class Sets:
    """List the package sets and what each costs."""


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Read documents as every other command does, and count them by language.

    Example: b2 corpus stats --input corpus mytext.jsonl.zst --on-error skip --json stats.json
    """

    input: tuple[str, ...]
    """Files or folders: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt."""
    text_key: str = "text"
    """Key or column that holds the text."""
    on_error: Literal["skip", "stop"] = "stop"
    """What a malformed record does."""
    json: Path | None = None
    """Also write the counts to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; see `b2 corpus --help`."""
    import tyro

    from megatron_b2.cli import corpus_pipeline as pipeline
    from megatron_b2.cli import corpus_settings as known
    from megatron_b2.cli import corpus_train as train
    from megatron_b2.cli.repeated import gather_repeated

    arguments = gather_repeated(argv, ("--input", "--packages", "--clean", "--bad"))
    if arguments[:1] == ["run"] and not {"-h", "--help"} & set(arguments):
        return pipeline.run(arguments[1:])
    subcommand = tyro.conf.subcommand
    commands = (
        Annotated[Fetch, subcommand("fetch")]
        | Annotated[Sets, subcommand("sets")]
        | Annotated[Stats, subcommand("stats")]
        | Annotated[pipeline.Run, subcommand("run")]
        | Annotated[known.Settings, subcommand("settings")]
        | Annotated[known.Rules, subcommand("rules")]
        | Annotated[pipeline.Report, subcommand("report")]
        | Annotated[pipeline.Explain, subcommand("explain")]
        | Annotated[pipeline.Mix, subcommand("mix")]
        | Annotated[pipeline.Remember, subcommand("remember")]
        | Annotated[train.TrainQuality, subcommand("train-quality")]
        | Annotated[train.TrainPerplexity, subcommand("train-perplexity")]
        | Annotated[train.TrainLanguage, subcommand("train-language")]
    )
    command: object = tyro.cli(
        commands, args=arguments, prog="b2 corpus", description=f"b2 corpus: {HELP}."
    )
    match command:
        case Fetch():
            return _fetch(command)
        case Sets():
            return _sets()
        case Stats():
            return _stats(command)
        case train.TrainQuality() | train.TrainPerplexity() | train.TrainLanguage():
            return train.main(command)
        case known.Settings() | known.Rules():
            return known.main(command)
    return pipeline.main(command)


def _fetch(command: Fetch) -> int:
    from megatron_b2.corpus.fetch import MANIFEST_NAME, fetch_corpus
    from megatron_b2.corpus.packages import packages_of
    from megatron_b2.errors import InputError

    if command.jobs < 1:
        raise InputError(f"--jobs is {command.jobs}; give 1 or more")
    started = time.monotonic()
    packages = command.packages or packages_of(command.set)
    manifest = fetch_corpus(command.out, packages, jobs=command.jobs, refresh=command.refresh)
    rows = [
        (name, entry.documents, entry.characters, entry.bytes, str(command.out / entry.file))
        for name, entry in manifest.languages.items()
    ]
    _print_table(rows)
    print(
        f"{len(manifest.packages)} packages, {manifest.duplicates:,} exact duplicates dropped, "
        f"{manifest.unreadable} unreadable files, {time.monotonic() - started:.1f} s"
    )
    if manifest.missing:
        print(f"not in this system's archive: {', '.join(manifest.missing)}")
    print(f"manifest: {command.out / MANIFEST_NAME}")
    return 0


def _sets() -> int:
    from megatron_b2.corpus.packages import SETS, packages_of

    for name, corpus_set in SETS.items():
        packages = packages_of(name)
        print(f"{name}: {corpus_set.summary} ({len(packages)} packages)\n  {' '.join(packages)}")
    return 0


def _stats(command: Stats) -> int:
    from megatron_b2.documents import ReadReport, read_documents
    from megatron_b2.files.atomic import write_json

    report = ReadReport()
    documents: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for document in read_documents(
        command.input, text_key=command.text_key, on_error=command.on_error, report=report
    ):
        documents[document.language] += 1
        characters[document.language] += len(document.text)
        size[document.language] += len(document.text.encode())
    _print_table([(name, documents[name], characters[name], count, "") for name, count in size.most_common()])
    print(report.summary())
    for message in report.messages:
        print(f"  {message}", file=sys.stderr)
    if command.json:
        languages = {
            name: {"documents": documents[name], "characters": characters[name], "bytes": size[name]}
            for name in size
        }
        totals = {"documents": report.documents, "empty": report.empty, "malformed": report.malformed}
        write_json(command.json, {"languages": languages, **totals, "messages": report.messages})
    return 0


def _print_table(rows: Sequence[tuple[str, int, int, int, str]]) -> None:
    """Language, documents, characters, bytes, file."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("language", box=box.SIMPLE_HEAD)
    for title in ("documents", "characters", "MB"):
        table.add_column(title, justify="right")
    table.add_column("file", overflow="fold")
    for name, documents, characters, size, file in rows:
        table.add_row(name, f"{documents:,}", f"{characters:,}", f"{size / 1e6:,.2f}", file)
    table.add_section()
    counts = (sum(row[1] for row in rows), sum(row[2] for row in rows))
    table.add_row("all", *(f"{count:,}" for count in counts), f"{sum(row[3] for row in rows) / 1e6:,.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    from megatron_b2.cli.main import run

    sys.exit(run(main))
