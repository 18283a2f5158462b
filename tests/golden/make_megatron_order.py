"""Writes megatron_order.json beside it: what Megatron-LM itself does with 24 small data sets.

Run once, in an environment of its own with megatron-core 0.16.1 (its C++ helpers come with the wheel), torch
and numpy; the tests only read the JSON:  python tests/golden/make_megatron_order.py
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import megatron.core
import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.helpers import build_sample_idx
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

SPLITS = ("train", "valid", "test")


class Tokenizer:
    """What GPTDatasetConfig asks of one."""

    vocab_size, eod, pad = None, 0, -1
    unique_identifiers = {"class": "none"}  # noqa: RUF012


def digest(array: np.ndarray) -> dict[str, Any]:
    content = np.ascontiguousarray(array)
    return {
        "dtype": content.dtype.name,
        "shape": list(content.shape),
        "sha256": hashlib.sha256(content.tobytes()).hexdigest(),
    }


def make_case(number: int) -> dict[str, Any]:
    """Inputs of one case; every third is a blend, every fourth keeps the last partial validation sample."""
    choose = random.Random(number)
    num_sources = choose.choice((2, 3, 5)) if number % 3 == 0 else 1
    sources = [
        {
            "lengths": [choose.randint(number % 2, 30) for _ in range(choose.randint(60, 120))],
            "weight": round(choose.uniform(0.05, 3), 3),
        }
        for _ in range(num_sources)
    ]
    return {
        "sources": sources,
        "split": choose.choice(([969, 31, 0], [8, 2, 0], [0.85, 0.15, 0], [7, 3, 0])),
        "seq_len": choose.randint(2, 24),
        "seed": choose.choice((0, 1, 1234, 2**32 - 1)),
        "sizes": [choose.randint(1, 900), choose.randint(1, 60), 0],
        "drop_last": number % 4 != 0,
    }


def run_megatron(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    prefixes, num_tokens = [], 0
    for source in case["sources"]:
        prefix = str(folder / f"source{len(prefixes)}")
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for length in source["lengths"]:
            tokens = list(range(num_tokens, num_tokens + length))
            builder.add_document(np.array(tokens, dtype=np.int32), [length])
            num_tokens += length
        builder.finalize(f"{prefix}.idx")
        prefixes.append(prefix)
    weights = [source["weight"] for source in case["sources"]]
    config = GPTDatasetConfig(
        random_seed=case["seed"],
        sequence_length=case["seq_len"],
        blend=(prefixes, weights if len(prefixes) > 1 else None),
        split=",".join(map(str, case["split"])),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        drop_last_partial_validation_sequence=case["drop_last"],
    )
    built = BlendedMegatronDatasetBuilder(GPTDataset, case["sizes"], lambda: True, config).build()
    return {
        name: describe(dataset) for name, dataset in zip(SPLITS, built, strict=True) if dataset is not None
    }


def describe(dataset: Any) -> dict[str, Any]:
    members = getattr(dataset, "datasets", [dataset])
    samples = [dataset[position] for position in range(len(dataset))]
    tokens = np.array([sample["tokens"].numpy() for sample in samples])
    masks = np.array([sample["loss_mask"].numpy() for sample in samples])
    labels = np.array([sample["labels"].numpy() for sample in samples])
    result: dict[str, Any] = {
        "num_samples": len(dataset),
        "sources": [
            {
                "documents": digest(member.document_index),
                "samples": digest(member.sample_index),
                "shuffle": digest(member.shuffle_index),
            }
            for member in members
        ],
        "first_tokens": tokens[:8, 0].tolist(),
        "tokens": digest(tokens.astype(np.int64)),
        "labels": digest(np.where(masks == 0, -100, labels).astype(np.int64)),
    }
    if len(members) > 1:
        result["blend"] = {
            "sources": digest(dataset.dataset_index),
            "drawn": digest(dataset.dataset_sample_index),
        }
    return result


def partial_samples() -> list[dict[str, Any]]:
    """Sample index with the last, partial sample, of token counts that float32 cannot count."""
    rows = []
    for number in range(40):
        choose = random.Random(number)
        lengths = [choose.randint(5_000_000, 1_200_000_000) for _ in range(4)]
        seq_len = choose.choice((30_000, 32_768, 50_000))
        lengths[0] += seq_len + 1 + choose.choice((0, 1, 9, 90)) - sum(lengths) % seq_len
        tokens = sum(lengths)
        documents = np.array(choose.sample(range(4), 4), dtype=np.int32)
        samples = build_sample_idx(np.array(lengths, np.int32), documents, seq_len, 1, tokens, False, True)
        row = {"lengths": lengths, "documents": documents.tolist(), "seq_len": seq_len}
        rows.append({**row, "samples": digest(samples), "last": samples[-3:].tolist()})
    return rows


def split_ranges() -> list[dict[str, Any]]:
    """First and last document of each split, for several shares and numbers of documents."""
    rows = []
    for shares in ([969, 30, 1], [98, 2, 0], [0.98, 0.02, 0.0], [1, 1, 1], [0, 5, 5], [949, 50, 1]):
        matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(",".join(map(str, shares))))
        for count in (1, 2, 7, 50, 500, 1_500, 12_345_678, 2**31 - 1):
            bounds = [b and [round(edge * float(count)) for edge in b] for b in matrix]
            rows.append({"shares": shares, "documents": count, "ranges": bounds})
    return rows


def main() -> None:
    cases = []
    for number in range(24):
        case = make_case(number)
        with tempfile.TemporaryDirectory() as folder:
            cases.append({**case, "expected": run_megatron(case, Path(folder))})
    facts = {
        "megatron_core": megatron.core.__version__,
        "numpy": np.__version__,
        "splits": split_ranges(),
        "partial": partial_samples(),
        "cases": cases,
    }
    text = json.dumps(facts, separators=(",", ":")).replace(
        '{"sources":[{"lengths"', '\n{"sources":[{"lengths"'
    )
    Path(__file__).with_name("megatron_order.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
