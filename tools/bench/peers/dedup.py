"""Near-duplicate detection by other systems, run by tools/bench/dedup.py with the interpreter of their own
environment (requirements/bench.txt): `python dedup.py SYSTEM SAMPLE.jsonl RESULT.json FOLDER`.

Every system sees shingles of 5 words and, where it has them, 16 bands of 8 rows. datasketch and rensa take
shingles, so a user writes the shingling: `shingles` below, which is also what the truth is made from.
datatrove and text-dedup read the file and have tokenizers of their own. What is measured is text to clusters;
imports, and reading the file for datasketch and rensa, are not.
"""

from __future__ import annotations

import importlib.metadata
import json
import pickle
import re
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

NGRAM, BANDS, ROWS = 5, 16, 8
CJK = (
    r"\u3005-\u3007\u3041-\u3096\u30a1-\u30fa\u30fc"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003fffd"
)
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


def shingles(text: str) -> list[str]:
    """Distinct 5-grams of lower-cased words, a Han or kana character being one."""
    words = WORD.findall(text.lower())
    if len(words) <= NGRAM:
        return [" ".join(words)] if words else []
    return list({" ".join(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)})


def clusters_of(pairs: Iterable[tuple[int, int]], count: int) -> list[int]:
    """Smallest connected document of each of `count` documents."""
    parent = list(range(count))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for pair in pairs:
        low, high = sorted(map(find, pair))
        parent[high] = low
    return [find(node) for node in range(count)]


def read(path: Path) -> list[str]:
    """The texts of the sample."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def datasketch(sample: Path, _: Path) -> Callable[[], list[int]]:
    """MinHash.bulk with xxh32, the faster of the hashes, and MinHashLSH."""
    import xxhash
    from datasketch import MinHash, MinHashLSH

    texts = read(sample)

    def run() -> list[int]:
        sets = [[shingle.encode() for shingle in shingles(text)] for text in texts]
        hashes = MinHash.bulk(sets, num_perm=BANDS * ROWS, hashfunc=xxhash.xxh32_intdigest)
        index = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
        for document, minhash in enumerate(hashes):
            if sets[document]:
                index.insert(document, minhash)
        pairs = (
            (document, other)
            for document, minhash in enumerate(hashes)
            if sets[document]
            for other in index.query(minhash)
        )
        return clusters_of(pairs, len(texts))

    return run


def rensa(sample: Path, _: Path) -> Callable[[], list[int]]:
    """R-MinHash of whole sets (`from_token_sets`) and RMinHashLSH."""
    from rensa import RMinHash, RMinHashLSH

    texts = read(sample)

    def run() -> list[int]:
        sets = [shingles(text) for text in texts]
        hashes = RMinHash.from_token_sets(sets, num_perm=BANDS * ROWS, seed=42)
        index = RMinHashLSH(threshold=0.8, num_perm=BANDS * ROWS, num_bands=BANDS)
        index.insert_many(hashes)
        found = index.query_all(hashes)
        pairs = ((document, other) for document, others in enumerate(found) for other in others)
        return clusters_of(pairs, len(texts))

    return run


def datatrove(sample: Path, folder: Path) -> Callable[[], list[int]]:
    """Signatures, buckets and clusters with the English tokenizer; 14 bands of 8 and xxhash, its defaults."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.hashing import HashConfig

    count = len(read(sample))
    config = MinhashConfig(
        hash_config=HashConfig(precision=64, hash_fc="xxhash"),
        num_buckets=14,
        hashes_per_bucket=ROWS,
        n_grams=NGRAM,
    )
    steps = [
        [
            JsonlReader(str(sample.parent), glob_pattern=sample.name),
            MinhashDedupSignature(output_folder=f"{folder}/signatures", config=config, language="eng"),
        ],
        [
            MinhashDedupBuckets(
                input_folder=f"{folder}/signatures", output_folder=f"{folder}/buckets", config=config
            )
        ],
        [
            MinhashDedupCluster(
                input_folder=f"{folder}/buckets",
                output_folder=f"{folder}/clusters",
                config=config,
                save_cluster_id=True,
            )
        ],
    ]

    def run() -> list[int]:
        for number, step in enumerate(steps):
            LocalPipelineExecutor(
                pipeline=step, tasks=14 if number == 1 else 1, workers=1, logging_dir=f"{folder}/logs{number}"
            ).run()
        clusters = list(range(-count, 0))
        for document, cluster in struct.iter_unpack(
            "<2I", (folder / "clusters/000000.clusters").read_bytes()
        ):
            clusters[document] = cluster
        return clusters

    return run


def text_dedup(sample: Path, folder: Path) -> Callable[[], list[int]]:
    """The command text_dedup.minhash with xxh3, the faster of the hashes."""
    from text_dedup.minhash import main

    count = len(read(sample))
    options = {
        "path": "json",
        "data_files": str(sample),
        "split": "train",
        "cache_dir": str(folder / "cache"),
        "output": str(folder / "output"),
        "column": "text",
        "ngram": NGRAM,
        "num_perm": BANDS * ROWS,
        "b": BANDS,
        "r": ROWS,
        "threshold": 0.8,
        "hash_func": "xxh3",
        "num_proc": 1,
    }
    arguments = [item for name, value in options.items() for item in (f"--{name}", str(value))]

    def run() -> list[int]:
        main([*arguments, "--debug"], standalone_mode=False)
        with (folder / "output" / "uf.pkl").open("rb") as stream:
            forest = pickle.load(stream)
        return [forest.find(document) for document in range(count)]

    return run


SYSTEMS = {"datasketch": datasketch, "rensa": rensa, "datatrove": datatrove, "text-dedup": text_dedup}


def cpu_seconds() -> float:
    """User and system time of this process and its children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_megabytes() -> float:
    """Largest resident memory of this process since it started (ru_maxrss would count the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    """Run one system and write what it found and took."""
    system, sample, result, folder = sys.argv[1], *map(Path, sys.argv[2:5])
    run = SYSTEMS[system](sample, folder)
    cpu, wall = cpu_seconds(), time.perf_counter()
    clusters = run()
    facts = {
        "version": importlib.metadata.version(system),
        "cpu_s": cpu_seconds() - cpu,
        "wall_s": time.perf_counter() - wall,
        "peak_mb": peak_megabytes(),
        "clusters": clusters,
    }
    result.write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
