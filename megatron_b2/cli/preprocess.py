"""`b2 preprocess`: tokenize text into the .bin/.idx pair that training reads."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from megatron_b2.data.manifest import Counts, Manifest
    from megatron_b2.files.progress import ProgressBar

HELP = "tokenize text into the .bin/.idx pair that training reads"


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Tokenize text into PREFIX.bin and PREFIX.idx (Megatron-LM's format) and a manifest PREFIX.json.

    Inputs are .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt files or folders of them; keep one language or
    source per output, so that data.sources can weight them. Documents keep the order of the inputs, whatever
    the number of workers. A run that was interrupted goes on when the same command is given again.

    Example: b2 preprocess corpus/zh-Hans.jsonl --tokenizer tokenizer --output data/zh --workers 8
    """

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT...")]
    """Files and folders to read, in this order."""
    tokenizer: Path
    """SentencePiece tokenizer.model, or the folder that holds it."""
    output: Path
    """Prefix of the files to write, without extension."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes; the default is the number of cores."""
    on_error: Literal["skip", "stop"] = "stop"
    """What a malformed record does: end the run, or be counted and named in the manifest."""
    text_key: str = "text"
    """Key (JSON) or column (Parquet) that holds the text."""
    eod: bool = True
    """End each document with the end-of-document token, </s>; training relies on it."""
    overwrite: bool = False
    """Replace an output that was made from other inputs or options."""
    json: Path | None = None
    """Also write the summary to this file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; see `b2 preprocess --help`."""
    args = tyro.cli(Preprocess, args=None if argv is None else list(argv), prog="b2 preprocess")

    from megatron_b2.data.preprocess import preprocess
    from megatron_b2.files.atomic import write_json

    started = time.monotonic()
    with _Bars() as bars:
        result = preprocess(
            args.inputs,
            tokenizer=args.tokenizer,
            output=args.output,
            workers=args.workers,
            text_key=args.text_key,
            on_error=args.on_error,
            end_of_document=args.eod,
            overwrite=args.overwrite,
            progress=bars,
        )
    seconds = time.monotonic() - started
    summary = {
        "output": str(args.output),
        "seconds": round(seconds, 3),
        "workers": args.workers,
        "shards": result.num_shards,
        "reused_shards": result.reused_shards,
        "already_done": result.already_done,
        "encoder": "SentencePiece" if result.slow_because else "native",
        "slow_because": result.slow_because,
        "manifest": asdict(result.manifest),
    }
    if args.json is not None:
        write_json(args.json, summary)
    if result.already_done:
        print(f"{args.output}: already done from the same inputs, tokenizer and options")
    elif result.reused_shards:
        print(f"{result.reused_shards} of {result.num_shards} shards were done by an earlier run")
    if not result.already_done:
        slow = f"SentencePiece itself, which is slower: {result.slow_because}"
        print(f"encoder: {slow if result.slow_because else 'native'}")
    _print_summary(args.output, result.manifest, seconds=None if result.already_done else seconds)
    return 0


class _Bars:
    """One progress bar a phase; the callback of `preprocess`."""

    TITLES = (("scan", "hash inputs"), ("encode", "tokenize"), ("join", "join shards"))

    def __enter__(self) -> _Bars:
        self._phase = ""
        self._bar: ProgressBar | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def __call__(self, phase: str, done: int, total: int) -> None:
        from megatron_b2.files.progress import ProgressBar

        if phase != self._phase:
            self.__exit__()
            self._phase = phase
            self._bar = ProgressBar(dict(self.TITLES)[phase], total=total, unit="bytes")
            self._bar.__enter__()
        assert self._bar is not None
        self._bar.update(done)


def _print_summary(output: Path, manifest: Manifest, *, seconds: float | None) -> None:
    from rich.console import Console
    from rich.table import Table

    tally = manifest.tally
    table = Table("language", "documents", "tokens", "text MB", "bytes/token", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows: list[tuple[str, Counts]] = sorted(tally.languages.items())
    for name, counts in [*rows, ("all", tally.total)] if len(rows) > 1 else rows:
        table.add_row(
            name,
            f"{counts.documents:,}",
            f"{counts.tokens:,}",
            f"{counts.text_bytes / 1e6:,.2f}",
            f"{counts.text_bytes / max(counts.tokens, 1):.3f}",
        )
    console = Console()
    console.print(table)
    if tally.malformed:
        print(f"{tally.malformed:,} malformed records skipped:", file=sys.stderr)
        for message in tally.malformed_examples:
            print(f"  {message}", file=sys.stderr)
    if tally.empty:
        print(f"{tally.empty:,} records without text skipped")
    rate = f", {tally.total.text_bytes / 1e6 / seconds:,.2f} MB/s in {seconds:,.1f} s" if seconds else ""
    print(f"{output}.bin: {manifest.dtype}, {manifest.bin_bytes / 1e6:,.1f} MB{rate}")


if __name__ == "__main__":
    from megatron_b2.cli.main import run

    sys.exit(run(main))
