"""Time from nothing to the first batch of a large tokenized source.

Opens the metadata of up to a trillion tokens: `.idx` files of real size (20 bytes a document, lengths at
random from 1 to twice the mean), `.bin` files that are sparse (all zeros, which is a token id). One visit
is a fresh process: it opens the train split, makes its fingerprint and assembles one batch; imports are not
counted. "Cold" is after the kernel was asked to forget the `.idx`. The order of Megatron-LM, which must be
built, is built once and opened again, at a smaller size.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from megatron_b2.data.indexed import HEADER, MAGIC, VERSION, bin_path, dtype_code, idx_path
from megatron_b2.testing.measure import machine

ROOT = Path(__file__).resolve().parents[2]
VISIT = """
import json, sys, time
from pathlib import Path
import numpy as np
from megatron_b2.config.schema import DataConfig, SourceConfig
from megatron_b2.data.blended import BlendedDataset
prefix, order, batch, seq_len, planned = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
source = SourceConfig(prefix=prefix)
data = DataConfig(sources=(source,), order=order, seq_len=seq_len, split=(0.98, 0.02, 0.0))
moments, cpu = [time.perf_counter()], time.process_time()
dataset = BlendedDataset.build(data, split="train", seed=1, global_batch_size=batch, planned_samples=planned)
moments.append(time.perf_counter())
dataset.fingerprint
moments.append(time.perf_counter())
dataset.sample_batch(np.arange(batch))
moments.append(time.perf_counter())
parts = [after - before for before, after in zip(moments, moments[1:])]
print(json.dumps([*parts, moments[-1] - moments[0], time.process_time() - cpu]))
"""
PARTS = ("open_s", "fingerprint_s", "first_batch_s", "total_s", "cpu_s")


@dataclass(frozen=True)
class Options:
    """What is opened."""

    documents: tuple[int, ...] = (1_000_000, 10_000_000, 100_000_000)
    """Documents of the source, one row each."""
    length: int = 10_000
    """Tokens a document in the mean."""
    seq_len: int = 4_096
    """Tokens a sample."""
    batch: int = 64
    """Samples of the first batch."""
    megatron_documents: int = 10_000_000
    """Documents for the order of Megatron-LM, for one epoch of their train split; 0 leaves it out."""
    rounds: int = 5
    """Fresh processes of each row."""
    folder: Path | None = None
    """Where the files are made and removed again; the default is the system's folder for temporary files."""
    out: Path = Path("runs/bench/data_open.json")
    """All numbers as JSON."""


def main() -> None:
    """Run the benchmark, print the tables, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for documents in options.documents:
            prefix = Path(folder) / "source"
            write_source(prefix, documents, options.length)
            for is_cold in (False, True):
                visits = [
                    visit(prefix, documents, options, "stateless", is_cold=is_cold)
                    for _ in range(options.rounds)
                ]
                rows.append(row("stateless, cold" if is_cold else "stateless", documents, visits, options))
        if documents := options.megatron_documents:
            prefix = Path(folder) / "megatron"
            write_source(prefix, documents, options.length)
            visits = [visit(prefix, documents, options, "megatron") for _ in range(options.rounds + 1)]
            rows.append(row("megatron, built", documents, visits[:1], options))
            rows.append(row("megatron, again", documents, visits[1:], options))
    facts = machine("numpy", "torch")
    title = (
        f"first batch of {options.batch} x {options.seq_len:,} tokens, {options.length:,} tokens a document"
    )
    print(f"{title} · {facts}\n\n{markdown_table(rows)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": facts, "title": title, "rows": rows}, indent=2) + "\n")


def write_source(prefix: Path, documents: int, length: int) -> None:
    """A pair of int32 zeros; the `.bin` takes no space on file systems with holes."""
    lengths = np.random.default_rng(0).integers(1, 2 * length, documents, dtype="<i4")
    pointers = np.zeros(documents + 1, dtype="<i8")
    np.cumsum(lengths, out=pointers[1:])
    pointers *= lengths.itemsize
    with idx_path(prefix).open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, dtype_code(lengths.dtype), documents, documents + 1))
        for field in (lengths, pointers[:-1], np.arange(documents + 1, dtype="<i8")):
            file.write(field.data)
        file.flush()
        os.fsync(file.fileno())
    with bin_path(prefix).open("wb") as file:
        os.truncate(file.fileno(), int(pointers[-1]))


def visit(
    prefix: Path, documents: int, options: Options, order: str, *, is_cold: bool = False
) -> list[float]:
    """Seconds of each part in a fresh process."""
    if is_cold:
        with idx_path(prefix).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    planned = int(0.97 * documents * options.length) // options.seq_len
    arguments = [str(prefix), order, *map(str, (options.batch, options.seq_len, planned))]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", VISIT, *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    print(f"{order}, {documents:,} documents: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    seconds: list[float] = json.loads(done.stdout)
    return seconds


def row(name: str, documents: int, visits: list[list[float]], options: Options) -> dict[str, Any]:
    """Medians of the parts, and the slowest visit."""
    medians = {
        part: statistics.median(values) for part, values in zip(PARTS, zip(*visits, strict=True), strict=True)
    }
    slowest = max(seconds[3] for seconds in visits)
    tokens = documents * options.length
    return {"order": name, "documents": documents, "tokens": tokens, **medians, "slowest_s": slowest}


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows for docs/benchmarks.md."""
    lines = [
        "| order | documents | tokens | open s | fingerprint s | batch s | together s | slowest s | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in rows:
        cells = [f"{item[name]:.3f}" for name in (*PARTS[:4], "slowest_s", "cpu_s")]
        lines.append(
            f"| {item['order']} | {item['documents']:,} | {item['tokens']:.0e} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
