"""Speed of `b2 preprocess` against the tokenizer alone.

The floor is one core running SentencePiece over texts that are already in memory, ids as lists, nothing read and
nothing written. Against it: the whole command (start of the processes, hashing, JSON, tokens to disk, fsync) with
one worker and with one a core. All variants run in turn, `--repeats` times, and medians are reported, both of wall
time and of CPU time (user + system of all processes), which other work on the machine disturbs less.

Example: python tools/bench/preprocess.py --input corpus --tokenizer tokenizer --json preprocess.json
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FLOOR = """
import json, sys, time
import sentencepiece
from megatron_b2.documents import read_documents
processor = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
texts = [document.text for document in read_documents(sys.argv[2:])]
wall, cpu = time.perf_counter(), time.process_time()
for start in range(0, len(texts), 256):
    processor.encode(texts[start:start + 256], num_threads=1)
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))
"""


@dataclass
class Variant:
    """One line of the table; seconds of each repeat."""

    name: str
    workers: int
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def row(self, megabytes: float, floor: "Variant") -> dict[str, object]:
        """Rates in MB of UTF-8 text a second, and shares of the floor's rate."""
        wall, cpu = statistics.median(self.wall), statistics.median(self.cpu)
        floor_wall, floor_cpu = statistics.median(floor.wall), statistics.median(floor.cpu)
        return {
            "variant": self.name,
            "workers": self.workers,
            "wall_seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "mb_per_second": round(megabytes / wall, 3),
            "mb_per_second_per_core": round(megabytes / wall / self.workers, 3),
            "mb_per_cpu_second": round(megabytes / cpu, 3),
            "share_of_floor_wall": round(floor_wall / wall / self.workers, 3),
            "share_of_floor_cpu": round(floor_cpu / cpu, 3),
        }


def main() -> int:
    """Run the benchmark and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, help="files or folders of documents")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.model or its folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="of the parallel run"
    )
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    args = parser.parse_args()
    model = args.tokenizer / "tokenizer.model" if args.tokenizer.is_dir() else args.tokenizer
    floor = Variant("SentencePiece alone", 1)
    runs = [Variant("b2 preprocess", workers) for workers in sorted({1, args.workers})]
    manifest: dict[str, object] = {}
    for repeat in range(args.repeats):
        measure_floor(floor, model, args.input)
        for run in runs:
            manifest = measure_preprocess(run, model, args.input)
        print(f"repeat {repeat + 1} of {args.repeats} done", file=sys.stderr)
    total = manifest["tally"]["total"]  # type: ignore[index]
    megabytes = total["text_bytes"] / 1e6
    report = {
        "versions": {name: version(name) for name in ("sentencepiece", "numpy")}
        | {"python": platform.python_version()},
        "cores": len(os.sched_getaffinity(0)),
        "repeats": args.repeats,
        "documents": total["documents"],
        "tokens": total["tokens"],
        "megabytes": megabytes,
        "vocab_size": manifest["vocab_size"],
        "rows": [variant.row(megabytes, floor) for variant in [floor, *runs]],
    }
    print(to_markdown(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def measure_floor(variant: Variant, model: Path, inputs: list[str]) -> None:
    """One run of the tokenizer alone, in a process of its own."""
    output = run_python("-c", FLOOR, str(model), *inputs)
    seconds = json.loads(output)
    variant.wall.append(seconds["wall"])
    variant.cpu.append(seconds["cpu"])


def measure_preprocess(variant: Variant, model: Path, inputs: list[str]) -> dict[str, object]:
    """One run of the whole command; returns the manifest it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        run_python(
            *("-m", "megatron_b2.cli.preprocess", *inputs, "--tokenizer", str(model)),
            *("--output", f"{folder}/out", "--workers", str(variant.workers)),
        )
        variant.wall.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        variant.cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        manifest: dict[str, object] = json.loads(Path(f"{folder}/out.json").read_text())
    return manifest


def run_python(*arguments: str) -> str:
    """Standard output of a Python process that sees this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def to_markdown(report: dict[str, object]) -> str:
    """The table for docs/benchmarks.md."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())  # type: ignore[attr-defined]
    lines = [
        f"{report['megabytes']:.1f} MB of text, {report['documents']:,} documents, {report['tokens']:,} tokens, "
        f"vocabulary {report['vocab_size']:,}; {report['cores']} cores; medians of {report['repeats']}; {versions}",
        "",
        "| | workers | wall s | MB/s | MB/s per core | of the floor (wall) | of the floor (CPU) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:  # type: ignore[attr-defined]
        lines.append(
            f"| {row['variant']} | {row['workers']} | {row['wall_seconds']:.2f} | {row['mb_per_second']:.2f} "
            f"| {row['mb_per_second_per_core']:.2f} | {row['share_of_floor_wall']:.1%} "
            f"| {row['share_of_floor_cpu']:.1%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
