"""Heuristic signals, and exact, paragraph and sentence de-duplication: MB/s on one core.

    b2 corpus fetch --out corpus-demo/raw --set zhen              # the texts
    python tools/bench/signals.py
    python tools/bench/signals.py --peers peers/bin/python     # requirements/bench.txt

The sample is that of tools/bench/dedup.py: 16.4 MB of Chinese and 35.1 MB of English documents. The time is
user + system time of one thread from texts in memory to the result, the median of the rounds:

- signals: all columns of all documents; with rules: and the verdicts.
- datatrove: its Gopher repetition, Gopher quality, C4 and FineWeb filters on the first English documents.
  Each filter stops at the first rule that a document breaks; ours never stops.
- de-duplication: documents, paragraphs, runs of three sentences and boilerplate sentences are hashed, grouped
  over the whole sample, and cut out; in memory, and with so little memory that it uses files.
- its three parts alone, sentences, personal data, and a Bloom filter of paragraphs.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from dedup import ROOT, sample, script

from megatron_b2.corpus.pii import find_pii, replace_pii
from megatron_b2.corpus.signals import configure, judge, measure_signals
from megatron_b2.corpus.spans import (
    BloomFilter,
    Records,
    RepeatFinder,
    SpanLimits,
    apply_cuts,
    find_cuts,
    find_repeats,
    record_spans,
    split_sentences,
)
from megatron_b2.documents.texts import Texts
from megatron_b2.testing.measure import machine

PEER = ROOT / "tools" / "bench" / "peers" / "signals.py"
LIMITS = SpanLimits()
KINDS = (("paragraphs", 1), ("runs", 1), ("sentences", LIMITS.sentence_count))


@dataclass(frozen=True)
class Options:
    """What is measured."""

    corpus: Path = Path("corpus-demo/raw")
    """Output folder of `b2 corpus fetch --set zhen`."""
    peers: Path | None = None
    """Python of the environment of requirements/bench.txt; without it only ours runs."""
    peer_megabytes: float = 2.0
    """English text for datatrove's filters."""
    rounds: int = 7
    """Runs of each step of ours; the peer runs once."""
    memory: int = 32
    """MiB for records in the run with files."""
    out: Path = Path("runs/bench/signals.json")
    """All numbers as JSON."""


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    if not (options.corpus / "zh-Hans.jsonl").is_file():
        sys.exit(f"error: there is no {options.corpus}/zh-Hans.jsonl: run `b2 corpus fetch --set zhen` first")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = sample(options.corpus, folder / "sample.jsonl")
        rows = ours(documents, folder, options)
        if options.peers:
            english = first_english(documents, options.peer_megabytes * 1e6)
            rows.append(
                measure("signals and rules, the peer's text", lambda: judged(english, "en"), english, options)
            )
            rows += peer(english, folder, options)
    facts = machine("numpy", "pyarrow")
    title = f"{Texts.of(documents).num_bytes / 1e6:.1f} MB, {len(documents):,} documents"
    print(f"{title} · {facts}\n\n{markdown(rows)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": facts, "title": title, "rows": rows}, indent=2) + "\n")


def ours(documents: Sequence[str], folder: Path, options: Options) -> list[dict[str, Any]]:
    """All steps of ours, on everything and by script."""
    scripts = list(map(script, documents))
    everything = Texts.of(documents)
    rows = []
    for name in ("all", "zh", "en"):
        texts = everything
        if name != "all":
            texts = Texts.of(text for text, found in zip(documents, scripts, strict=True) if found == name)
        rows += [
            measure(f"signals, {name}", lambda texts=texts: measure_signals(texts), texts, options),
            measure(f"de-duplication, {name}", lambda texts=texts: deduplicated(texts), texts, options),
        ]
    files = folder / "records"
    files.mkdir()
    records = recorded(everything)
    repeats = grouped(records)
    hashes = np.stack([records.paragraphs["high"], records.paragraphs["low"]], axis=1)
    spans = find_pii(everything)
    steps: dict[str, Callable[[], object]] = {
        "signals and rules": lambda: judged(everything, "und"),
        f"de-duplication in {options.memory} MiB": lambda: deduplicated(everything, files, options.memory),
        "records": lambda: recorded(everything),
        "grouping": lambda: grouped(records),
        "cutting": lambda: cut(everything, repeats),
        "sentences": lambda: split_sentences(everything),
        "personal data found": lambda: find_pii(everything),
        "personal data replaced": lambda: replace_pii(everything, spans),
        f"Bloom filter of {len(hashes):,} paragraphs": lambda: BloomFilter.for_keys(
            len(hashes), false_positive_rate=1e-5
        ).add(hashes),
    }
    return rows + [measure(name, step, everything, options) for name, step in steps.items()]


def judged(texts: Texts, language: str) -> np.ndarray:
    """Verdicts by all rules that are on."""
    return judge(measure_signals(texts), [language] * len(texts), configure({})).broken


def recorded(texts: Texts) -> Records:
    """One unit of all documents."""
    return record_spans(texts, np.arange(len(texts)), LIMITS)


def grouped(records: Records) -> dict[str, np.ndarray]:
    """Places of what is repeated, in memory; documents that are copies go first, as in the pipeline."""
    found = {name: find_repeats([getattr(records, name)], more_than=more) for name, more in KINDS}
    return {"documents": find_repeats([records.documents])["place"]} | {
        k: v["place"] for k, v in found.items()
    }


def grouped_in_files(records: Records, folder: Path, megabytes: int) -> dict[str, np.ndarray]:
    """The same with little memory."""
    places = {}
    for name, more_than in (("documents", 1), *KINDS):
        finder = RepeatFinder(folder, memory_bytes=megabytes << 20, more_than=more_than)
        finder.add(getattr(records, name))
        places[name] = np.sort(np.concatenate([repeats["place"] for repeats in finder.repeats()]))
    return places


def cut(texts: Texts, places: dict[str, np.ndarray]) -> Texts:
    """What is left."""
    parts = {name: places[name] for name, _ in KINDS}
    cuts = find_cuts(texts, np.arange(len(texts)), run_length=LIMITS.run_length, **parts)
    return apply_cuts(texts, cuts.ranges, cuts.firsts)


def deduplicated(texts: Texts, folder: Path | None = None, megabytes: int = 0) -> Texts:
    """The whole way."""
    records = recorded(texts)
    return cut(texts, grouped_in_files(records, folder, megabytes) if folder else grouped(records))


def measure(name: str, step: Callable[[], object], texts: Texts, options: Options) -> dict[str, Any]:
    """CPU seconds of a step, after one call that does not count."""
    step()
    seconds = []
    for _ in range(options.rounds):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    cpu = statistics.median(seconds)
    megabytes = texts.num_bytes / 1e6
    return {"step": name, "mb": megabytes, "cpu_s": cpu, "rounds_cpu_s": seconds, "mb_per_s": megabytes / cpu}


def first_english(documents: Sequence[str], size: float) -> Texts:
    """English documents up to `size` bytes."""
    taken: list[str] = []
    left = size
    for text in documents:
        if left > 0 and script(text) == "en":
            taken.append(text)
            left -= len(text.encode())
    return Texts.of(taken)


def peer(texts: Texts, folder: Path, options: Options) -> list[dict[str, Any]]:
    """datatrove's four filters, each alone and all together."""
    given, result = folder / "english.json", folder / "result.json"
    given.write_text(json.dumps([text.decode() for text in texts]))
    done = subprocess.run(
        [str(options.peers), str(PEER), str(given), str(result)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: the peer ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    megabytes = texts.num_bytes / 1e6
    facts = json.loads(result.read_text())
    seconds = facts["cpu_s"] | {"all four": sum(facts["cpu_s"].values())}
    return [
        {
            "step": f"datatrove {facts['version']}: {name}",
            "mb": megabytes,
            "cpu_s": cpu,
            "mb_per_s": megabytes / cpu,
        }
        for name, cpu in seconds.items()
    ]


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for docs/benchmarks.md."""
    lines = ["| | MB | CPU-s | MB/s per core |", "|---|---|---|---|"]
    lines += [f"| {r['step']} | {r['mb']:.1f} | {r['cpu_s']:.3f} | {r['mb_per_s']:.2f} |" for r in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
