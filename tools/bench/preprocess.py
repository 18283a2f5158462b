"""Speed of `b2 preprocess` against SentencePiece alone.

SentencePiece works on texts that are in memory already: nothing is read, parsed, hashed or written, and the
start of its process is not counted. Against it stands the whole command, from its start to the fsync of the
last file. Both run in turn, with one process and with `workers`; the table has medians. CPU seconds are user
and system time of all processes, which other work disturbs less than wall time.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from megatron_b2.documents import JsonlWriter, read_documents
from megatron_b2.testing.measure import machine

ROOT = Path(__file__).resolve().parents[2]
PEER = """
import json, sys, time
import sentencepiece
from megatron_b2.documents import read_documents
part, parts, model, *inputs = sys.argv[1:]
processor = sentencepiece.SentencePieceProcessor(model_file=model)
texts = [document.text for document in read_documents(inputs)][int(part)::int(parts)]
wall, cpu = time.perf_counter(), time.process_time()
for start in range(0, len(texts), 256):
    processor.encode(texts[start:start + 256], num_threads=1, return_type="numpy")
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


@dataclass(frozen=True)
class Options:
    """What is tokenized."""

    input: tuple[Path, ...] = (Path("quickstart/corpus"),)
    """Files or folders of documents."""
    tokenizer: Path = Path("quickstart/tokenizer")
    """tokenizer.model, or the folder that holds it."""
    megabytes: int = 100
    """The input is repeated up to this size, so that starting the processes does not decide."""
    rounds: int = 5
    """Runs of each variant, taken in turns."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes of the parallel variants; the default is the number of cores."""
    out: Path = Path("runs/bench/preprocess.json")
    """All numbers as JSON."""


@dataclass
class Variant:
    """One line of the table, with the seconds of each round."""

    name: str
    workers: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def row(self, megabytes: float, peers: dict[int, Variant]) -> dict[str, Any]:
        """Medians, rates in MB of UTF-8 text a second, and ratios to SentencePiece with as many processes."""
        wall, cpu = statistics.median(self.wall), statistics.median(self.cpu)
        peer = peers[self.workers]
        return {
            "variant": self.name,
            "workers": self.workers,
            "wall_s": wall,
            "cpu_s": cpu,
            "mb_per_s": megabytes / wall,
            "mb_per_cpu_s": megabytes / cpu,
            "ratio_wall": statistics.median(peer.wall) / wall,
            "ratio_cpu": statistics.median(peer.cpu) / cpu,
            "rounds_wall_s": self.wall,
            "rounds_cpu_s": self.cpu,
        }


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    if missing := [str(path) for path in (*options.input, options.tokenizer) if not path.exists()]:
        names = " and no ".join(missing)
        sys.exit(f"error: there is no {names}: run `make quickstart` first, or give --input and --tokenizer")
    model = options.tokenizer
    if model.is_dir():
        model = model / "tokenizer.model"
    counts = sorted({1, options.workers})
    peers = {count: Variant("SentencePiece alone", count) for count in counts}
    commands = {count: Variant("b2 preprocess", count) for count in counts}
    manifest: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = repeated(options.input, Path(folder) / "text.jsonl", size=options.megabytes * 10**6)
        for number in range(options.rounds):
            for count in counts:
                measure_peer(peers[count], model, text)
                manifest = measure_command(commands[count], model, text)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    total = manifest["tally"]["total"]
    megabytes = total["text_bytes"] / 1e6
    facts = machine("sentencepiece", "numpy", "orjson")
    rows = [variant.row(megabytes, peers) for variant in (*peers.values(), *commands.values())]
    title = f"{megabytes:.1f} MB of text, {total['documents']:,} documents, V = {manifest['vocab_size']:,}"
    print(f"{title} · {facts}\n\n{markdown_table(rows)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": facts, "title": title, "rows": rows}, indent=2) + "\n")


def repeated(inputs: Sequence[Path], output: Path, *, size: int) -> Path:
    """The documents of `inputs`, over and over up to `size` bytes, as JSONL."""
    with JsonlWriter(output) as writer:
        written = 0
        while written < size:
            for document in read_documents(inputs):
                writer.write({"text": document.text, "language": document.language})
                written += len(document.text.encode())
                if written >= size:
                    break
    return output


def measure_peer(variant: Variant, model: Path, text: Path) -> None:
    """One round of `workers` processes that encode an equal part of the texts each."""
    count = variant.workers
    processes = [start("-c", PEER, str(part), str(count), str(model), str(text)) for part in range(count)]
    seconds = [json.loads(finish(process)) for process in processes]
    variant.wall.append(max(wall for wall, _ in seconds))
    variant.cpu.append(sum(cpu for _, cpu in seconds))


def measure_command(variant: Variant, model: Path, text: Path) -> dict[str, Any]:
    """One round of the whole command; returns the manifest it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        process = start(
            *("-m", "megatron_b2.cli.main", "preprocess", str(text), "--tokenizer", str(model)),
            *("--output", f"{folder}/out", "--workers", str(variant.workers)),
        )
        finish(process)
        variant.wall.append(time.perf_counter() - begin)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        variant.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        manifest: dict[str, Any] = json.loads(Path(f"{folder}/out.json").read_text())
    return manifest


def start(*arguments: str) -> subprocess.Popen[str]:
    """A Python process that works in this checkout."""
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Its standard output."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args!r} ended with status {process.returncode}")
    return output


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The table for docs/benchmarks.md."""
    lines = [
        "| | processes | median s | MB/s | MB per CPU second | / SentencePiece | / SentencePiece, CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['variant']} | {row['workers']} | {row['wall_s']:.2f} | {row['mb_per_s']:.2f} "
            f"| {row['mb_per_cpu_s']:.2f} | {row['ratio_wall']:.2f} | {row['ratio_cpu']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
