"""Near-duplicate detection against datatrove, text-dedup, datasketch and rensa: CPU time, recall, precision.

    b2 corpus fetch --out corpus-demo/raw --set zhen              # the texts
    python3.11 -m venv peers                             # the peers, apart from this project's packages
    peers/bin/pip install -r requirements/bench.txt
    python tools/bench/dedup.py --peers peers/bin/python

The sample is 16.4 MB of Chinese and 35.1 MB of English documents of the corpus, drawn and mixed with seed 0.
Every system runs in fresh processes with one thread; the time is user + system time from texts to clusters,
the median of the rounds. Truth is exact: all pairs with a Jaccard similarity of at least 0.8 over 5-grams of
words (cut by Python's re, with the marks on letters), found by a prefix-filtering join, not by hashing.
Recall is the share of those pairs that are in one cluster, precision the share of removed documents that
have such a partner in their cluster. datasketch and rensa get Python's \\w as words, as their users would
write it: that is faster, and cuts a few documents differently. Ours runs with across_scripts = false, since
in the truth a traditional character is another one than its simplified form.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from peers.dedup import CJK, NGRAM, SYSTEMS

from megatron_b2.corpus.neighbours.lsh import candidate_pairs, distinct_pairs, records
from megatron_b2.corpus.neighbours.minhash import signatures, words
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.corpus.neighbours.verify import ShingleSets, verified
from megatron_b2.documents import JsonlWriter, read_documents
from megatron_b2.documents.texts import Texts
from megatron_b2.testing.measure import machine

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "tools" / "bench" / "peers" / "dedup.py"
OURS = """
import json, sys, time
import pyarrow.compute
from megatron_b2.corpus.neighbours.clusters import near_duplicates
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.documents.texts import Texts
bands, rows, _, sample, result, _ = sys.argv[1:]
texts = [json.loads(line)["text"] for line in open(sample, encoding="utf-8")]
cpu, wall = time.process_time(), time.perf_counter()
settings = NearDuplicates(bands=int(bands), rows=int(rows), across_scripts=False)
clusters = near_duplicates(Texts.of(texts), settings)
facts = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
facts["peak_mb"] = int(status["VmHWM"].split()[0]) / 1024
json.dump({**facts, "version": "", "clusters": clusters.tolist()}, open(result, "w"))
"""
THREADS = ("OMP", "RAYON", "OPENBLAS", "MKL", "POLARS_MAX", "TOKENIZERS")
CHINESE, ENGLISH = (("zh-Hans", "zh-Hant"), 16.4e6), (("en",), 35.1e6)
SCRIPTS = ("zh", "mixed", "en")
BANDS = ((16, 8), (16, 6))
"""Of ours: those of the peers, and the default, which finds more."""
PLANTED, PLANTED_PAIRS = (0.6, 0.7, 0.75, 0.82, 0.85, 0.9, 0.95), 1000


@dataclass(frozen=True)
class Options:
    """What is compared."""

    corpus: Path = Path("corpus-demo/raw")
    """Output folder of `b2 corpus fetch --set zhen`."""
    peers: Path | None = None
    """Python of the environment of requirements/bench.txt; without it only ours runs."""
    systems: tuple[str, ...] = ("datasketch", "rensa", "text-dedup", "datatrove")
    """Peers to run."""
    rounds: int = 5
    """Runs of ours; peers run once."""
    out: Path = Path("runs/bench/dedup.json")
    """All numbers as JSON."""


@dataclass(frozen=True)
class Truth:
    """What there is to find."""

    pairs: np.ndarray
    """int64 [E, 2]"""
    jaccard: np.ndarray
    script: Sequence[str]
    """Of each document."""

    def of_script(self, name: str) -> np.ndarray:
        """The pairs of documents of one script; those of two scripts count as mixed."""
        kept = [
            name == (self.script[a] if self.script[a] == self.script[b] else "mixed") for a, b in self.pairs
        ]
        return self.pairs[np.array(kept, bool)]


def main() -> None:
    """Run the benchmark, print the tables, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    if not (options.corpus / "zh-Hans.jsonl").is_file():
        sys.exit(f"error: there is no {options.corpus}/zh-Hans.jsonl: run `b2 corpus fetch --set zhen` first")
    unknown = set(options.systems) - set(SYSTEMS)
    if unknown:
        sys.exit(f"error: unknown system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    peers = options.systems if options.peers else ()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = sample(options.corpus, folder / "sample.jsonl")
        truth = exact_pairs(texts)
        rows = [
            row(
                f"ours, {shape[0]} bands of {shape[1]}", run_ours(shape, options.rounds, folder), texts, truth
            )
            for shape in BANDS
        ]
        for system in peers:
            print(f"running {system}", file=sys.stderr)
            facts = run([str(options.peers), str(PEERS)], system, folder)
            rows.append(row(system, [facts], texts, truth))
            print(json.dumps(rows[-1]), file=sys.stderr)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    differing = sum(words(text) != true_words(text) for text in texts)
    counts = Counter(truth.script)
    documents = ", ".join(f"{counts[name]:,} {name}" for name in SCRIPTS)
    pairs = ", ".join(f"{len(truth.of_script(name)):,} {name}" for name in SCRIPTS)
    title = (
        f"{megabytes:.1f} MB, {len(texts):,} documents ({documents}), {len(truth.pairs):,} true pairs "
        f"({pairs}); {differing} documents have other words in ours than in the truth"
    )
    facts = machine("numpy", "pyarrow")
    print(f"{title} · {facts}\n\n{markdown(rows)}\n\n{s_curves(truth)}\n")
    made = planted(texts, truth)
    print(planted_markdown(made))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"machine": facts, "title": title, "rows": rows, "planted": made}, indent=2) + "\n"
    )


def sample(corpus: Path, path: Path) -> list[str]:
    """Draw the documents, write them as JSONL."""
    chance = random.Random(0)
    drawn: list[str] = []
    for languages, size in (CHINESE, ENGLISH):
        pool = [document.text for document in read_documents(corpus / f"{name}.jsonl" for name in languages)]
        chance.shuffle(pool)
        taken = 0
        for text in pool:
            if taken >= size:
                break
            drawn.append(text)
            taken += len(text.encode())
    chance.shuffle(drawn)
    with JsonlWriter(path) as writer:
        for number, text in enumerate(drawn):
            writer.write({"id": str(number), "text": text})
    return drawn


def exact_pairs(texts: Sequence[str]) -> Truth:
    """All pairs with a similarity of at least the threshold.

    Two sets of that similarity share a member among the first n - ceil(t n) + 1 of each, in any common order;
    the rarest first makes few candidates (Chaudhuri et al. 2006, "A Primitive Operator for Similarity
    Joins").
    """
    threshold = NearDuplicates().threshold
    sets = [np.array(list(true_shingles(text)), np.int64) for text in texts]
    _, ranks, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    order = np.empty(len(counts), np.int64)
    order[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    bounds = np.cumsum([0, *map(len, sets)])
    ordered = [np.sort(order[ranks[begin:end]]) for begin, end in pairwise(bounds)]
    prefixes = [items[: len(items) - math.ceil(threshold * len(items)) + 1] for items in ordered]
    owners = np.repeat(np.arange(len(texts)), list(map(len, prefixes)))
    items = np.concatenate(prefixes)
    by_item = np.argsort(items, kind="stable")
    candidates: set[tuple[int, int]] = set()
    for group in np.split(owners[by_item], np.flatnonzero(np.diff(items[by_item])) + 1):
        candidates.update((int(a), int(b)) for i, b in enumerate(group) for a in group[:i])
    found = {pair: similarity(ordered[pair[0]], ordered[pair[1]]) for pair in sorted(candidates)}
    kept = [pair for pair, value in found.items() if value >= threshold]
    return Truth(
        np.array(kept, np.int64).reshape(-1, 2),
        np.array([found[pair] for pair in kept]),
        list(map(script, texts)),
    )


def true_shingles(text: str) -> set[int]:
    """64-bit hashes of the 5-grams; of all words where they are fewer."""
    found = true_words(text)
    length = min(NGRAM, len(found))
    return {hash(tuple(found[i : i + length])) for i in range(len(found) - length + 1)} if found else set()


def true_words(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and their marks; a Han or kana character is a word."""
    return word_pattern().findall("".join(map(simple_lower, text)))


def simple_lower(character: str) -> str:
    """One character for one, which str.lower does not promise."""
    lowered = character.lower()
    return lowered if len(lowered) == 1 else lowered[0]


@cache
def word_pattern() -> re.Pattern[str]:
    """Python's \\w leaves out marks, and so cuts the words of India's scripts."""
    codes = groupby(range(sys.maxunicode + 1), key=lambda code: unicodedata.category(chr(code))[0] == "M")
    runs = [list(run) for is_mark, run in codes if is_mark]
    marks = "".join(rf"\U{run[0]:08x}-\U{run[-1]:08x}" for run in runs)
    return re.compile(rf"[{CJK}][{marks}]*|[^\W_{CJK}]+(?:[{marks}]+[^\W_{CJK}]*)*")


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sets without repeats."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def script(text: str) -> str:
    """zh, en or mixed, by the share of Han characters among the words."""
    found = true_words(text)
    share = sum("\u3400" <= word[0] <= "\u9fff" for word in found) / max(1, len(found))
    return "zh" if share > 0.8 else "mixed" if share > 0.05 else "en"


def run_ours(shape: tuple[int, int], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Our own system, in fresh processes."""
    command = [sys.executable, "-c", OURS, *map(str, shape)]
    return [run(command, "ours", folder) for _ in range(rounds)]


def run(command: Sequence[str], system: str, folder: Path) -> dict[str, Any]:
    """One fresh process with one thread."""
    result, scratch = folder / "result.json", folder / system
    scratch.mkdir(exist_ok=True)
    one = {f"{name}_NUM_THREADS": "1" for name in THREADS} | {"POLARS_MAX_THREADS": "1"}
    done = subprocess.run(
        [*command, system, str(folder / "sample.jsonl"), str(result), str(scratch)],
        cwd=ROOT,
        env={**os.environ, **one, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"error: {system} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    facts: dict[str, Any] = json.loads(result.read_text())
    return facts


def row(system: str, runs: Sequence[dict[str, Any]], texts: Sequence[str], truth: Truth) -> dict[str, Any]:
    """One line of the table."""
    clusters = np.array(runs[-1]["clusters"])
    cpu = statistics.median(facts["cpu_s"] for facts in runs)
    return {
        "system": f"{system} {runs[-1]['version']}".strip(),
        "cpu_s": cpu,
        "rounds_cpu_s": [facts["cpu_s"] for facts in runs],
        "mb_per_s": sum(len(text.encode()) for text in texts) / 1e6 / cpu,
        "peak_mb": max(facts["peak_mb"] for facts in runs),
        "kept": len(set(clusters.tolist())),
        "precision": precision(clusters, truth),
        "recall": {name: recall(clusters, truth.of_script(name)) for name in SCRIPTS}
        | {"all": recall(clusters, truth.pairs)},
    }


def recall(clusters: np.ndarray, pairs: np.ndarray) -> float:
    """Share of the pairs that are in one cluster."""
    return float((clusters[pairs[:, 0]] == clusters[pairs[:, 1]]).mean()) if len(pairs) else math.nan


def precision(clusters: np.ndarray, truth: Truth) -> float:
    """Share of removed documents with a true partner in their cluster."""
    partnered = set(truth.pairs[clusters[truth.pairs[:, 0]] == clusters[truth.pairs[:, 1]]].ravel().tolist())
    removed = list(removed_documents(clusters))
    return sum(document in partnered for document in removed) / max(1, len(removed))


def planted(texts: Sequence[str], truth: Truth) -> list[dict[str, Any]]:
    """Pairs made to have a similarity: 200 words of the sample, of which they share the first ones."""
    chance, settings = random.Random(0), NearDuplicates()
    rows = []
    for name in SCRIPTS:
        documents = [text for text, script in zip(texts, truth.script, strict=True) if script == name]
        pool = [word for text in chance.sample(documents, 500) for word in true_words(text)]
        for target in PLANTED:
            shared = round(2 * target * 196 / (1 + target)) + 4
            column = []
            for _ in range(PLANTED_PAIRS):
                head = chance.choices(pool, k=shared)
                column += [" ".join(head + chance.choices(pool, k=200 - shared)) for _ in range(2)]
            partitions = records(signatures(Texts.of(column), settings), settings, first_document=0, ranges=1)
            pairs = distinct_pairs([candidate_pairs([table], settings) for table in partitions])
            sets = ShingleSets.of(Texts.of(column), np.arange(len(column)), settings)
            every = np.arange(len(column)).reshape(-1, 2)
            true = {tuple(pair) for pair in verified(every, [sets], settings).pairs.tolist()}
            found = {tuple(pair) for pair in verified(pairs, [sets], settings).pairs.tolist()}
            compared = {tuple(pair) for pair in pairs.tolist()} & {tuple(pair) for pair in every.tolist()}
            rows.append(
                {
                    "script": name,
                    "similarity": target,
                    "compared": len(compared) / PLANTED_PAIRS,
                    "expected": float(settings.probability(target)),
                    "duplicates": len(true),
                    "found": len(found & true),
                    "false": len(found - true),
                }
            )
    return rows


def planted_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each similarity, the scripts beside each other."""
    lines = [
        "| similarity | S-curve | "
        + " | ".join(f"{n}: compared | duplicates found | false" for n in SCRIPTS)
        + " |",
        "|---|---|" + "---|---|---|" * len(SCRIPTS),
    ]
    for target in PLANTED:
        same = [row for row in rows if row["similarity"] == target]
        cells = (f"{r['compared']:.3f} | {r['found']} of {r['duplicates']} | {r['false']}" for r in same)
        lines.append(f"| {target:.2f} | {same[0]['expected']:.3f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def removed_documents(clusters: np.ndarray) -> Iterator[int]:
    """All documents but the first of each cluster."""
    seen: set[int] = set()
    for document, cluster in enumerate(clusters.tolist()):
        if cluster in seen:
            yield document
        seen.add(cluster)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for docs/benchmarks.md."""
    lines = [
        "| | CPU-s | MB/s per core | CPU-s / ours | peak MB | kept | precision | recall | zh | mixed | en |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in rows:
        recalls = " | ".join(f"{line['recall'][name]:.4f}" for name in ("all", *SCRIPTS))
        lines.append(
            f"| {line['system']} | {line['cpu_s']:.2f} | {line['mb_per_s']:.2f} "
            f"| {line['cpu_s'] / rows[0]['cpu_s']:.1f} | {line['peak_mb']:,.0f} | {line['kept']:,} "
            f"| {line['precision']:.4f} | {recalls} |"
        )
    return "\n".join(lines)


def s_curves(truth: Truth) -> str:
    """What our bands promise, for any corpus and for the true pairs of this one."""
    points = [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
    lines = [
        "| chance to be compared | "
        + " | ".join(f"{point:.2f}" for point in points)
        + " | mean below the threshold | above | true pairs |",
        "|---" * (len(points) + 4) + "|",
    ]
    for bands, rows in BANDS:
        settings = NearDuplicates(bands=bands, rows=rows)
        chances = [*settings.probability(np.array(points)), settings.expected_waste()]
        chances += [settings.expected_recall(), settings.probability(truth.jaccard).mean()]
        lines.append(f"| {bands} bands of {rows} | " + " | ".join(f"{c:.4f}" for c in chances) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
