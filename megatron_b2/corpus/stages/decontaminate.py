"""`decontaminate`: documents that contain items of evaluation sets.

An item and a document are compared by their words as `minhash` sees them: lower case, no punctuation, no
spaces, simplified Chinese characters, so that an item is found however it is spaced, cased and punctuated. A
document that has a run of `ngram` words of an item goes (Brown et al. 2020, appendix C, with 13 words); an
item of fewer words counts when all of it is there.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_b2 import _cpu
from megatron_b2.corpus.neighbours.han import characters
from megatron_b2.corpus.neighbours.minhash import words
from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import read_view
from megatron_b2.documents import expand_inputs, read_documents
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import ConfigError
from megatron_b2.files.hashing import hash_file

MAX_ITEMS = 10
"""Items named for a document."""


@dataclass(frozen=True)
class Decontaminate:
    """Remove what evaluation sets ask."""

    paths: tuple[str, ...] = ()
    """Evaluation sets: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt files and folders."""
    text_key: str = "text"
    """Key or column of the items' text."""
    ngram: int = 13
    """Words of a run that counts."""
    min_words: int = 8
    """Items of fewer words are too common to be looked for; `b2 corpus report` says how many."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_words <= self.ngram:
            raise ConfigError(
                f"decontaminate.min_words is {self.min_words}: must be from 1 to ngram = {self.ngram}"
            )

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """The items' hashes; then each unit against them."""
        files = expand_inputs(self.paths) if self.paths else []
        sets = tuple((str(path), hash_file(path).sha256) for path in files)
        index = context.task("items", _index, _Sets(self, sets), (), "items.parquet", version=2)
        yield [index]
        yield [context.unit_task(unit, _search, self, also=[index.output]) for unit in context.units]


@dataclass(frozen=True)
class _Sets:
    settings: Decontaminate
    files: tuple[tuple[str, str], ...]
    """Path and SHA-256."""


def _index(task: Task, _: Limits) -> Result:
    """Rows (words of the run, its hash, name of the item), by words and hash; of equal ones the first."""
    given: _Sets = task.settings
    texts: dict[int, list[str]] = {}
    names: dict[int, list[str]] = {}
    facts = Counter(items=0, too_short=0)
    paths = [Path(path) for path, _ in given.files]
    for document in read_documents(paths, text_key=given.settings.text_key) if paths else ():
        text = unicodedata.normalize("NFC", document.text)  # as the documents are
        count = len(words(text))
        facts["items"] += 1
        if count < given.settings.min_words:
            facts["too_short"] += 1
            continue
        length = min(count, given.settings.ngram)
        texts.setdefault(length, []).append(text)
        name = document.id or str(document.line)
        names.setdefault(length, []).append(f"{Path(document.path).name}:{name}")
    tables = [_runs(Texts.of(texts[length]), names[length], length) for length in sorted(texts)]
    table = pa.concat_tables([_SCHEMA.empty_table(), *tables])
    return Result([table.replace_schema_metadata({name: str(count) for name, count in facts.items()})])


_SCHEMA = pa.schema([("length", pa.int64()), ("hash", pa.uint64()), ("item", pa.string())])


def _runs(texts: Texts, names: Sequence[str], length: int) -> pa.Table:
    values, offsets = _shingles(texts, length)
    owners = np.repeat(np.arange(len(names)), np.diff(offsets))
    hashes, first = np.unique(values, return_index=True)
    items = pa.array(names).take(pa.array(owners[first]))
    return pa.table([np.full(len(hashes), length), hashes, items], schema=_SCHEMA)


def _shingles(texts: Texts, length: int) -> tuple[np.ndarray, np.ndarray]:
    return _cpu.shingle_sets(texts.data, texts.offsets, length=length, characters=characters(True))


def _search(task: Task, _: Limits) -> Result:
    index = read_table(task.inputs[-1])
    view = read_view(task.inputs[:-1])
    texts, found = view.texts, [list[str]() for _ in range(len(view))]
    for length in np.unique(index.column("length").to_numpy()).tolist():
        runs = index.filter(pa.compute.equal(index.column("length"), length))
        hashes, items = runs.column("hash").to_numpy(), runs.column("item").to_pylist()
        values, offsets = _shingles(texts, length)
        where = np.minimum(np.searchsorted(hashes, values), len(hashes) - 1)
        hits = np.flatnonzero(hashes[where] == values)
        documents = np.searchsorted(offsets, hits, side="right") - 1
        for document, hit in zip(documents.tolist(), hits.tolist(), strict=True):
            found[document].append(items[where[hit]])
    keep = np.array([not items for items in found], dtype=bool)
    reason = [f"has evaluation item {items[0]}" if items else "" for items in found]
    named = [list(dict.fromkeys(items))[:MAX_ITEMS] for items in found]
    columns = {"items": pa.array(named, pa.list_(pa.string())), "runs": [len(items) for items in found]}
    facts = {name.decode(): int(count) for name, count in (index.schema.metadata or {}).items()}
    return Result([view.write("decontaminate", keep=keep, reason=reason, **columns)], facts)
