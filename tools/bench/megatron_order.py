"""Building the index of Megatron-LM's order: ours against megatron-core, arrays compared.

One epoch of documents of random lengths, in memory. One visit is a fresh process; the two take turns.
Theirs is the three functions that GPTDataset calls. "CPU" is user + system time, which other work on the
machine disturbs less than wall time; "peak" is the resident memory above the lengths. Both must give the
same SHA-256.

    pip install --no-deps megatron-core==0.16.1

It is no dependency of this project: --megatron-python names the interpreter of an environment that has it.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from megatron_b2.testing.measure import machine

ROOT = Path(__file__).resolve().parents[2]
COMMON = """
import hashlib, json, resource, sys, time
import numpy as np
count, length, seq_len, seed = map(int, sys.argv[1:])
lengths = np.random.default_rng(0).integers(1, 2 * length, count, dtype=np.int32)
tokens = int(lengths.sum())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def report(arrays, moments, wall):
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    seconds = [after - earlier for earlier, after in zip(moments, moments[1:])]
    digests = [hashlib.sha256(np.ascontiguousarray(array)).hexdigest() for array in arrays]
    print(json.dumps({"cpu": [*seconds, sum(seconds)], "wall": wall, "peak_mib": peak, "sha256": digests}))
"""
OURS = """
from megatron_b2.data.megatron_index import build_index, plan_index
plan = plan_index(tokens, seq_len=seq_len, requested=(tokens - 1) // seq_len)
wall, moments = time.perf_counter(), [time.process_time()]
arrays = build_index(lengths, 0, count, plan=plan, seq_len=seq_len, seed=seed,
                     progress=lambda entries: moments.append(time.process_time()))
wall = time.perf_counter() - wall
report((arrays.documents, arrays.samples, arrays.shuffle), [*moments[:2], moments[3], moments[-1]], wall)
"""
THEIRS = """
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import _build_document_index, _build_shuffle_index
wall, moments = time.perf_counter(), [time.process_time()]
state = np.random.RandomState(seed)
documents = _build_document_index(np.arange(count, dtype=np.int32), 1, state, False)
moments.append(time.process_time())
samples = helpers.build_sample_idx(lengths, documents, seq_len, 1, tokens, True, True)
moments.append(time.process_time())
shuffle = _build_shuffle_index(samples.shape[0] - 1, samples.shape[0] - 1, state)
moments.append(time.process_time())
report((documents, samples, shuffle), moments, time.perf_counter() - wall)
"""
PARTS = ("documents", "samples", "shuffle", "together")


@dataclass(frozen=True)
class Options:
    """What is built."""

    documents: int = 100_000_000
    """Documents of the source."""
    length: int = 903
    """Tokens a document in the mean."""
    seq_len: int = 4_096
    """Tokens a sample."""
    rounds: int = 3
    """Fresh processes of each."""
    megatron_python: Path = Path(sys.executable)
    """Interpreter of an environment with megatron-core."""
    out: Path = Path("runs/bench/megatron_order.json")
    """All numbers as JSON."""


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    found = subprocess.run(
        [options.megatron_python, "-c", "import megatron.core"], capture_output=True
    ).returncode
    if found != 0:
        sys.exit(
            f"error: {options.megatron_python} has no megatron-core: give --megatron-python (see --help)"
        )
    ours: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for number in range(options.rounds):
        theirs.append(visit(options.megatron_python, THEIRS, options))
        ours.append(visit(Path(sys.executable), OURS, options))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    if len({tuple(run["sha256"]) for run in (*ours, *theirs)}) != 1:
        sys.exit("error: the arrays differ")
    facts, rows = machine("numpy"), [row("megatron-core", theirs), row("ours", ours)]
    title = (
        f"{options.documents:,} documents of {options.length} tokens, S = {options.seq_len:,}, arrays equal"
    )
    print(f"{title} · {facts}\n\n{markdown_table(rows)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": facts, "title": title, "rows": rows}, indent=2) + "\n")


def visit(python: Path, code: str, options: Options) -> dict[str, Any]:
    """Numbers of one fresh process."""
    arguments = [str(number) for number in (options.documents, options.length, options.seq_len, 1234)]
    command = [str(python), "-W", "ignore", "-c", COMMON + code, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians."""
    parts = zip(PARTS, zip(*(run["cpu"] for run in runs), strict=True), strict=True)
    return {
        "name": name,
        **{part: statistics.median(seconds) for part, seconds in parts},
        "wall": statistics.median(run["wall"] for run in runs),
        "peak_mib": statistics.median(run["peak_mib"] for run in runs),
        "runs": runs,
    }


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows for docs/benchmarks.md."""
    lines = [
        "| | documents CPU s | samples CPU s | shuffle CPU s | together CPU s | wall s | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in rows:
        seconds = " | ".join(f"{item[part]:.2f}" for part in (*PARTS, "wall"))
        lines.append(f"| {item['name']} | {seconds} | {item['peak_mib']:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
