"""`b2 data`: look at tokenized data sets, and join them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from megatron_b2.data.indexed import IndexedDataset

HELP = "look at a tokenized data set: sizes, lengths, tokens"


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a .bin/.idx pair holds, ours or Megatron-LM's: documents, tokens, lengths, the first tokens.

    Example: b2 data inspect data/zh --tokenizer tokenizer --document 3
    """

    prefix: Annotated[Path, tyro.conf.Positional]
    """Path of the pair without extension."""
    tokenizer: Path | None = None
    """Also decode the tokens, and check that this is the tokenizer the data was made with."""
    document: int = 0
    """Document whose first tokens are shown."""
    tokens: int = 32
    """How many of them."""
    json: Path | None = None
    """Also write everything to this file."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Join data sets of one tokenizer into one, in the order given.

    Example: b2 data merge data/part1 data/part2 --output data/all
    """

    prefixes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Paths of the pairs, without extension."""
    output: Path
    """Path of the new pair; it must not exist."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; see `b2 data --help`."""
    commands = (
        Annotated[Inspect, tyro.conf.subcommand("inspect")] | Annotated[Merge, tyro.conf.subcommand("merge")]
    )
    command: Inspect | Merge = tyro.cli(
        commands,
        args=None if argv is None else list(argv),
        prog="b2 data",
        description=f"b2 data: {HELP}.",
    )
    return _inspect(command) if isinstance(command, Inspect) else _merge(command)


def _inspect(command: Inspect) -> int:
    from megatron_b2.data.indexed import IndexedDataset
    from megatron_b2.data.manifest import read_manifest
    from megatron_b2.files.atomic import write_json

    dataset = IndexedDataset(command.prefix)
    manifest = read_manifest(command.prefix)
    facts: dict[str, Any] = {
        "prefix": str(command.prefix),
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "fingerprint": dataset.fingerprint,
        "tokenizer": None if manifest is None else manifest.tokenizer,
        "lengths": _length_histogram(dataset),
    }
    if dataset.num_documents:
        facts["document"] = {"number": command.document, **_first_tokens(dataset, command)}
    if command.json is not None:
        write_json(command.json, facts)
    _print_facts(facts)
    return 0


def _length_histogram(dataset: IndexedDataset) -> list[dict[str, int]]:
    """Documents and tokens by powers of two of the length; [] for an empty data set. Reads the whole .idx."""
    import numpy as np

    starts = np.append(dataset.sequence_pointers // dataset.dtype.itemsize, dataset.num_tokens)
    lengths = np.diff(starts[dataset.document_indices])
    exponents = np.zeros(lengths.size, dtype=np.int64)
    exponents[lengths > 0] = np.frexp(lengths[lengths > 0])[1]
    return [
        {
            "from": 2 ** (exponent - 1) if exponent else 0,
            "to": 2**exponent - 1,
            "documents": int((exponents == exponent).sum()),
            "tokens": int(lengths[exponents == exponent].sum()),
        }
        for exponent in np.unique(exponents).tolist()
    ]


def _first_tokens(dataset: IndexedDataset, command: Inspect) -> dict[str, Any]:
    from megatron_b2.data.manifest import check_tokenizer
    from megatron_b2.tokenizer import load_tokenizer

    whole = dataset.document(command.document)
    tokens = whole[: command.tokens].tolist()
    if command.tokenizer is None:
        return {"length": whole.size, "tokens": tokens}
    tokenizer = load_tokenizer(command.tokenizer)
    check_tokenizer(dataset.prefix, tokenizer.fingerprint)
    return {"length": whole.size, "tokens": tokens, "text": tokenizer.decode(tokens)}


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for key in ("documents", "sequences", "tokens", "dtype", "fingerprint", "tokenizer"):
        value = facts[key]
        table.add_row(key, f"{value:,}" if isinstance(value, int) else value or "unknown (no manifest)")
    console.print(table)
    histogram = Table("document length", "documents", "tokens", "share of tokens", box=None, pad_edge=False)
    for column in histogram.columns[1:3]:
        column.justify = "right"
    most = max((row["tokens"] for row in facts["lengths"]), default=0)
    for row in facts["lengths"]:
        bar = "█" * round(30 * row["tokens"] / max(most, 1))
        span = f"{row['from']:,} to {row['to']:,}" if row["to"] else "empty"
        histogram.add_row(span, f"{row['documents']:,}", f"{row['tokens']:,}", bar)
    console.print(histogram)
    if "document" in facts:
        document = facts["document"]
        console.print(f"document {document['number']} ({document['length']:,} tokens) begins with")
        console.print(Text(str(document["tokens"])))
        if "text" in document:
            console.print(Text(repr(document["text"])))


def _merge(command: Merge) -> int:
    from megatron_b2.data.indexed import IndexedDataset, bin_path, idx_path, merge
    from megatron_b2.errors import DataError

    for path in (bin_path(command.output), idx_path(command.output)):
        if path.exists():
            raise DataError(f"{path} exists; choose another --output")
    merge(command.prefixes, command.output)
    joined = IndexedDataset(command.output)
    print(f"{command.output}: {joined.num_documents:,} documents, {joined.num_tokens:,} tokens")
    return 0


if __name__ == "__main__":
    from megatron_b2.cli.main import run

    sys.exit(run(main))
