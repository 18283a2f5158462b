"""Speed of the native encoder against SentencePiece and Hugging Face's tokenizers, in one run on one core.

Texts are in memory and go in batches of about a megabyte; each encoder gives arrays or lists of ids. Seconds
are user + system time of this process. "new" is a native encoder that has seen no text; "again" is the same
encoder on the same texts a second time, as in a corpus much larger than its cache of chunks. The ids are
compared, too.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import tyro

from megatron_b2.documents import read_documents
from megatron_b2.documents.texts import Texts
from megatron_b2.testing.measure import machine
from megatron_b2.tokenizer import Tokenizer, load_tokenizer
from megatron_b2.tokenizer.fast_encoder import FastEncoder, Vocabulary
from megatron_b2.tokenizer.hf import fast_tokenizer

BATCH_CHARACTERS = 1 << 20
Encode = Callable[[list[str]], int]
"""Number of ids of a batch."""


@dataclass(frozen=True)
class Options:
    """What is tokenized."""

    input: tuple[Path, ...] = (Path("quickstart/corpus"),)
    """Files or folders of documents; languages are measured apart."""
    tokenizer: Path = Path("quickstart/tokenizer")
    """tokenizer.model, or the folder that holds it."""
    languages: tuple[str, ...] = ("en", "zh")
    """Prefixes of the language tags to take; each is one group, and all of them together one more."""
    megabytes: float = 16
    """Text of each group, the first documents in order."""
    rounds: int = 5
    """Passes of each encoder over each group, taken in turns."""
    out: Path = Path("runs/bench/encode.json")
    """All numbers as JSON."""


@dataclass
class Row:
    """One encoder on one group."""

    group: str
    encoder: str
    megabytes: float
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """MB of UTF-8 a CPU second, by the median."""
        return self.megabytes / statistics.median(self.seconds)


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    if missing := [str(path) for path in (*options.input, options.tokenizer) if not path.exists()]:
        names = " and no ".join(missing)
        sys.exit(f"error: there is no {names}: run `make quickstart` first, or give --input and --tokenizer")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(options.tokenizer)
    if tokenizer.slow_because:
        sys.exit(f"error: the native encoder does not take this tokenizer: {tokenizer.slow_because}")
    print(check(tokenizer, options.input), flush=True)
    groups = read_groups(options)
    rows = [row for name, texts in groups.items() for row in measure(name, texts, tokenizer, options.rounds)]
    facts = machine("sentencepiece", "tokenizers")
    print(f"V = {tokenizer.vocab_size:,} · {facts}\n\n{markdown_table(rows)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": facts, "vocab_size": tokenizer.vocab_size, "rows": [asdict(row) for row in rows]}
    options.out.write_text(json.dumps(report, indent=2) + "\n")


def read_groups(options: Options) -> dict[str, list[str]]:
    """Texts by language, and "all"."""
    groups: dict[str, list[str]] = {language: [] for language in options.languages}
    sizes = dict.fromkeys(groups, 0)
    for document in read_documents(options.input):
        name = next((name for name in groups if document.language.startswith(name)), "")
        if name and sizes[name] < options.megabytes * 1e6:
            groups[name].append(document.text)
            sizes[name] += len(document.text.encode())
    groups = {name: texts for name, texts in groups.items() if texts}
    return groups | {"all": [text for texts in groups.values() for text in texts]}


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of about a megabyte."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def check(tokenizer: Tokenizer, paths: Sequence[Path]) -> str:
    """End with an error where the native encoder gives other ids than SentencePiece."""
    documents = size = tokens = 0
    for batch in batches(document.text for document in read_documents(paths)):
        column = Texts.of(batch)
        ids, offsets = tokenizer.encode_column(column)
        for i, expected in enumerate(tokenizer.encode_batch(batch)):
            if not np.array_equal(ids[offsets[i] : offsets[i + 1]], expected):
                sys.exit(f"error: other ids than SentencePiece's for {batch[i][:200]!r}")
        documents, size, tokens = documents + len(batch), size + column.num_bytes, tokens + len(ids)
    compared = f"{documents:,} documents, {size / 1e6:,.1f} MB, {tokens:,} tokens"
    return f"{compared}: all ids are SentencePiece's, 0 mismatches"


def measure(name: str, texts: Sequence[str], tokenizer: Tokenizer, rounds: int) -> list[Row]:
    """All encoders on one group, in turns."""
    parts = list(batches(texts))
    columns = {id(part): Texts.of(part) for part in parts}
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    fast = fast_tokenizer(tokenizer)

    def native(encoder: FastEncoder) -> Encode:
        return lambda part: encoder.encode(columns[id(part)])[0].size

    candidates: dict[str, Encode] = {
        "SentencePiece": lambda part: sum(
            map(len, processor.encode(part, num_threads=1, return_type="numpy"))
        ),
        "tokenizers": lambda part: sum(len(e.ids) for e in fast.encode_batch_fast(part)),
    }
    megabytes = sum(column.num_bytes for column in columns.values()) / 1e6
    rows = {key: Row(name, key, megabytes) for key in (*candidates, "native, new", "native, again")}
    for _ in range(rounds):
        encode = native(FastEncoder(Vocabulary.of_model(tokenizer.model_bytes)))
        for key, call in (*candidates.items(), ("native, new", encode), ("native, again", encode)):
            start = time.process_time()
            rows[key].tokens = sum(map(call, parts))
            rows[key].seconds.append(time.process_time() - start)
    return list(rows.values())


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for docs/benchmarks.md."""
    rates = {row.group: row.rate for row in rows if row.encoder == "SentencePiece"}
    lines = [
        "| text | MB | encoder | MB per CPU second | / SentencePiece | tokens |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = row.rate / rates[row.group]
        lines.append(
            f"| {row.group} | {row.megabytes:.1f} | {row.encoder} | {row.rate:.1f} "
            f"| {ratio:.1f} | {row.tokens:,} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
