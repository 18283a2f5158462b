"""`exact`, `paragraph` and `sentence`: what has occurred before in the corpus, byte for byte or nearly so.

All three have the same phases: each unit writes records (hash, place) by range of the hash; each range is
grouped, and what repeats is sent to its unit; each unit judges. The first occurrence in the order of the
corpus stays.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.pipeline.checked import read_part
from megatron_b2.corpus.pipeline.shuffle import by_unit
from megatron_b2.corpus.pipeline.stage import Context, Unit
from megatron_b2.corpus.pipeline.tasks import Function, Limits, Result, Task
from megatron_b2.corpus.pipeline.view import View, read_view
from megatron_b2.corpus.spans import (
    RECORD,
    REPEAT,
    Records,
    RepeatFinder,
    SpanLimits,
    document_of,
    find_cuts,
    hash_texts,
    place_of,
    record_spans,
    split_by_hash,
)
from megatron_b2.documents.texts import Texts

DOCUMENTS_A_PART = 2_000_000
"""About a gigabyte of records of sentences."""


@dataclass(frozen=True)
class Exact:
    """Documents whose text, or whose id, has occurred before."""

    folded: bool = True
    """Texts that differ only in white space and case are equal."""

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """Kinds of records: texts, ids."""
        kinds = (_Kind("text"), _Kind("id"))
        yield from _phases(context, self, kinds, _record_documents, _judge_documents)


@dataclass(frozen=True)
class Paragraph:
    """Paragraphs that have occurred before, in any document, are cut out."""

    least_bytes: int = SpanLimits.paragraph_bytes
    """Shorter paragraphs stay; bytes without white space, a Han character has 3."""

    def __post_init__(self) -> None:
        self.limits()

    def limits(self) -> SpanLimits:
        """For `record_spans`."""
        return SpanLimits(paragraph_bytes=self.least_bytes, run_length=0, sentence_count=0)

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """One kind of records."""
        yield from _phases(context, self, (_Kind("paragraphs"),), _record_spans, _cut)


@dataclass(frozen=True)
class Sentence:
    """Runs of sentences that have occurred before, and boilerplate sentences, are cut out."""

    run_length: int = SpanLimits.run_length
    """Sentences in a row that go together when they occur again (C4: 3); 0 leaves runs out."""
    run_bytes: int = SpanLimits.run_bytes
    """Shorter runs stay; bytes without white space."""
    least_bytes: int = SpanLimits.sentence_bytes
    """Shorter sentences are no boilerplate, however often they occur."""
    boilerplate: int = SpanLimits.sentence_count
    """A sentence that occurs more often in the corpus is boilerplate: only its first occurrence stays."""

    def __post_init__(self) -> None:
        self.limits()

    def limits(self) -> SpanLimits:
        """For `record_spans`."""
        return SpanLimits(
            run_length=self.run_length,
            run_bytes=self.run_bytes,
            sentence_bytes=self.least_bytes,
            sentence_count=self.boilerplate,
        )

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """Kinds of records: runs, sentences."""
        kinds = (_Kind("runs"), _Kind("sentences", more_than=self.boilerplate))
        yield from _phases(context, self, kinds, _record_spans, _cut)


@dataclass(frozen=True)
class _Kind:
    name: str
    more_than: int = 1
    """Records of a hash that has more than so many are repeats."""


@dataclass(frozen=True)
class _Unit:
    settings: Any
    kinds: tuple[_Kind, ...]
    unit: Unit
    number: int
    parts: int
    stage: str


@dataclass(frozen=True)
class _Group:
    kind: _Kind
    part: int
    """Of the records' files."""
    units: tuple[Unit, ...]


def _phases(
    context: Context, settings: object, kinds: tuple[_Kind, ...], record: Function, judge: Function
) -> Iterator[Sequence[Task]]:
    parts = 1 + sum(unit.documents for unit in context.units) // DOCUMENTS_A_PART
    units = [
        _Unit(settings, kinds, unit, number, parts, context.stage)
        for number, unit in enumerate(context.units)
    ]
    records = [context.unit_task(given.unit, record, given, output="records-{}.parts") for given in units]
    yield records
    written = [task.output for task in records]
    groups = []
    for number, kind in enumerate(kinds):
        for part in range(parts):
            given = _Group(kind, number * parts + part, context.units)
            name = f"repeats-{kind.name}-{part:05}.parts"
            groups.append(context.task(f"repeats of {kind.name} {part}", _group, given, written, name))
    yield groups
    found = [task.output for task in groups]
    yield [context.unit_task(given.unit, judge, given, also=found) for given in units]


def _table(records: np.ndarray) -> pa.Table:
    return pa.table({name: np.ascontiguousarray(records[name]) for name in records.dtype.names or ()})


def _array(table: pa.Table, dtype: np.dtype) -> np.ndarray:
    records = np.empty(table.num_rows, dtype)
    for name in dtype.names or ():
        records[name] = table.column(name).to_numpy()
    return records


def _record_documents(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    view = read_view(task.inputs)
    ids = Texts.of_arrow(view.documents.column("id"))
    hashes = (hash_texts(view.texts, folded=given.settings.folded), hash_texts(ids, folded=False))
    tables = []
    for pair in hashes:
        records = np.empty(len(view), RECORD)
        records["high"], records["low"] = pair[:, 0], pair[:, 1]
        records["place"] = place_of(view.rows + given.unit.first)
        tables += [_table(part) for part in split_by_hash(records, given.parts)]
    return Result(tables)


def _record_spans(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    view = read_view(task.inputs)
    records: Records = record_spans(view.texts, view.rows + given.unit.first, given.settings.limits())
    found = [getattr(records, kind.name) for kind in given.kinds]
    return Result([_table(part) for array in found for part in split_by_hash(array, given.parts)])


def _group(task: Task, limits: Limits) -> Result:
    """What repeats, by unit: rows (document, place, first)."""
    given: _Group = task.settings
    limits.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=limits.scratch) as folder:
        finder = RepeatFinder(Path(folder), memory_bytes=limits.memory, more_than=given.kind.more_than)
        for path in task.inputs:
            finder.add(_array(read_part(path, given.part), RECORD))
        found = np.concatenate([np.empty(0, REPEAT), *finder.repeats()])
    repeats = found[np.argsort(found["place"])]
    columns = {
        "document": document_of(repeats["place"]),
        "place": np.ascontiguousarray(repeats["place"]),
        "first": document_of(repeats["first"]),
    }
    return Result(by_unit(pa.table(columns), "document", given.units))


def _repeats(task: Task) -> tuple[View, list[pa.Table]]:
    """The view of a unit, and the rows of `_group` that are about it, one table a kind, by place."""
    given: _Unit = task.settings
    count = len(given.kinds) * given.parts
    tables = [read_part(path, given.number) for path in task.inputs[-count:]]
    by_kind = [tables[start : start + given.parts] for start in range(0, count, given.parts)]
    return read_view(task.inputs[:-count]), [pa.concat_tables(kind).sort_by("place") for kind in by_kind]


def _judge_documents(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    view, (texts, ids) = _repeats(task)
    documents = view.rows + given.unit.first
    duplicates = documents.copy()
    reason = np.full(len(view), "", dtype=object)
    for table, why in ((ids, "the id has occurred before"), (texts, "the text has occurred before")):
        rows = np.searchsorted(documents, table.column("document").to_numpy())
        reason[rows] = why
        duplicates[rows] = table.column("first").to_numpy()
    keep = reason == ""
    table = view.write(given.stage, keep=keep, reason=reason.tolist(), duplicates=duplicates)
    return Result([table])


def _cut(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    view, found = _repeats(task)
    pairs = zip(given.kinds, found, strict=True)
    places = {kind.name: table.column("place").to_numpy() for kind, table in pairs}
    run_length = getattr(given.settings, "run_length", 0)
    cuts = find_cuts(view.texts, view.rows + given.unit.first, run_length=run_length, **places)
    lists = pa.ListArray.from_arrays(pa.array(2 * cuts.firsts, pa.int32()), pa.array(cuts.ranges.reshape(-1)))
    total = np.concatenate([[0], np.cumsum(cuts.ranges[:, 1] - cuts.ranges[:, 0])])
    left = np.diff(view.texts.offsets) - np.diff(total[cuts.firsts])
    keep = left > 0
    reason = np.where(keep, "", "nothing is left")
    number = np.diff(cuts.firsts)
    return Result([view.write(given.stage, keep=keep, reason=reason, cuts=lists, number=number)])
