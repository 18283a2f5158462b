#!/usr/bin/env python3
"""Cores, hours, disk and memory of the corpus pipeline for trillions of tokens, from a run that was measured.

    b2 corpus run examples/corpus/zhen.toml --execution.workers 1 --work runs/scale/work
    python tools/corpus_scale.py runs/scale/work

Reads times.json and the sizes of the work folder of a run with one worker and scales them with the raw bytes.
What does not grow with the bytes (training of the topic model, of the embedding) is counted as if it did.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_b2.corpus.pipeline.report import make_report

TERA, GIGA = 1e12, 1e9
LARGEST_BYTES, UNION_BYTES = 16, 13
"""For each document of the corpus: of any process, at most (docs/corpus-pipeline.md); of union-find."""


@dataclass(frozen=True)
class Options:
    """What is scaled to what."""

    work: tyro.conf.Positional[Path]
    """Work folder of the measured run."""
    tokens: tuple[float, ...] = (1e12, 1e13)
    """Tokens that must be left."""
    bytes_per_token: float = 3.6
    """Of the tokenizer, on what is left."""
    kept: float | None = None
    """Share of the raw bytes that is left; none: that of the measured run."""
    cores: int = 1024
    """Of the cluster, for the hours."""
    out: Path = Path("runs/bench/corpus_scale.json")
    """All numbers as JSON."""


@dataclass(frozen=True)
class Measured:
    """The run."""

    documents: int
    raw: int
    """UTF-8 bytes of text."""
    kept: float
    """Share of the raw bytes."""
    seconds: Mapping[str, float]
    """By stage, one worker."""
    folders: Mapping[str, int]
    """Bytes on disk."""

    @classmethod
    def of(cls, work: Path) -> Measured:
        """From a work folder."""
        times = json.loads((work / "times.json").read_text())["stages"]
        reused = [name for name, time in times.items() if time["reused"]]
        if reused:
            sys.exit(f"error: {work}: {', '.join(reused)} had been done before; measure a run from the start")
        total = make_report(work).total
        return cls(
            documents=total.raw.documents,
            raw=total.raw.bytes,
            kept=total.kept.bytes / total.raw.bytes,
            seconds={name: time["seconds"] for name, time in times.items()},
            folders={
                name: sum(path.stat().st_size for path in (work / name).rglob("*") if path.is_file())
                for name in ("documents", "attributes", "between")
            },
        )


def stage_table(measured: Measured, options: Options) -> str:
    """Speed of each stage, and core-hours."""
    heads = " | ".join(f"core-hours, {tokens / TERA:g}T tokens" for tokens in options.tokens)
    lines = [f"| stage | seconds | MB/s per core | {heads} |", "|---|---|---|" + "---|" * len(options.tokens)]
    rows = [*measured.seconds.items(), ("all", sum(measured.seconds.values()))]
    for name, seconds in rows:
        hours = " | ".join(
            f"{raw_bytes(measured, options, t) / measured.raw * seconds / 3600:,.0f}" for t in options.tokens
        )
        lines.append(f"| {name} | {seconds:.1f} | {measured.raw / 1e6 / seconds:,.1f} | {hours} |")
    return "\n".join(lines)


def raw_bytes(measured: Measured, options: Options, tokens: float) -> float:
    """Text that must go in so that `tokens` are left."""
    return tokens * options.bytes_per_token / (options.kept or measured.kept)


def sizes(measured: Measured, options: Options, tokens: float) -> dict[str, float]:
    """Everything for one size."""
    raw = raw_bytes(measured, options, tokens)
    factor = raw / measured.raw
    documents = measured.documents * factor
    hours = sum(measured.seconds.values()) * factor / 3600
    return {
        "tokens": tokens,
        "raw_tb": raw / TERA,
        "documents": documents,
        "core_hours": hours,
        "hours_on_all_cores": hours / options.cores,
        **{f"{name}_tb": size * factor / TERA for name, size in measured.folders.items()},
        "union_find_gb": UNION_BYTES * documents / GIGA,
        "largest_process_gb": LARGEST_BYTES * documents / GIGA,
    }


def main() -> None:
    """Print the tables, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    measured = Measured.of(options.work)
    rows = [sizes(measured, options, tokens) for tokens in options.tokens]
    kept = options.kept or measured.kept
    print(f"{measured.raw / 1e6:,.0f} MB, {measured.documents:,} documents, {measured.kept:.1%} left.")
    print(f"For {options.bytes_per_token} bytes a token, {kept:.0%} left, {options.cores:,} cores:")
    print(f"\n{stage_table(measured, options)}\n")
    print("| | " + " | ".join(f"{row['tokens'] / TERA:g}T tokens" for row in rows) + " |")
    print("|---|" + "---|" * len(rows))
    for key in list(rows[0])[1:]:
        print(f"| {key.replace('_', ' ')} | " + " | ".join(f"{row[key]:,.4g}" for row in rows) + " |")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"measured": measured.__dict__, "sizes": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
