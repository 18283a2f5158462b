"""`exact`, `paragraph` and `sentence`: what has occurred before in the corpus, byte for byte or nearly so.

All three have the same phases: each unit writes records (hash, place) by range of the hash; each range is
grouped, and what repeats is sent to its unit; each unit judges. The first occurrence in the order of the
corpus stays. `exact` does it twice, for ids and then for the texts of the documents that ids have left: a
text that goes with its document's id takes no other copy along.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Sequence
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
    BloomFilter,
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
from megatron_b2.errors import ConfigError, InputError
from megatron_b2.files.hashing import hash_file

DOCUMENTS_A_PART = 2_000_000
"""About a gigabyte of records of sentences."""


@dataclass(frozen=True)
class Exact:
    """Documents whose text, or whose id, has occurred before."""

    folded: bool = True
    """Texts that differ only in white space and case are equal."""
    seen: tuple[str, ...] = ()
    """Files of `b2 corpus remember`: texts of these earlier corpora go too."""

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """Ids; then texts of documents whose id is the first."""
        earlier = _Earlier(self, tuple(hash_file(Path(path)).sha256 for path in self._checked()))
        ids = yield from _find(context, self, (_Kind("ids"),), _record_ids)
        texts = yield from _find(context, self, (_Kind("texts"),), _record_texts, also=ids)
        yield _judgements(context, earlier, (_Kind("ids"), _Kind("texts")), _judge_documents, [*ids, *texts])

    def _checked(self) -> tuple[str, ...]:
        """`seen`, whose texts were hashed as these are."""
        problems = []
        for path in self.seen:
            try:
                folded = BloomFilter.load(Path(path)).facts.get("folded")
                if folded != self.folded:
                    is_not = f"is of texts with folded = {folded}, but exact.folded is {self.folded}"
                    problems.append(f"exact.seen: {path} {is_not}")
            except InputError as error:
                problems.append(f"exact.seen: {error}")
        if problems:
            raise ConfigError(problems)
        return self.seen


@dataclass(frozen=True)
class _Earlier:
    settings: Exact
    sha256: tuple[str, ...]
    """Of the files of `seen`."""


@dataclass(frozen=True)
class Paragraph:
    """Paragraphs that have occurred before, in any document, are cut out."""

    least_bytes: int = SpanLimits.paragraph_bytes
    """Shorter paragraphs stay; bytes without white space, a Han character has 3."""

    def __post_init__(self) -> None:
        _refuse_negative("paragraph", least_bytes=self.least_bytes)

    def limits(self) -> SpanLimits:
        """For `record_spans`."""
        return SpanLimits(paragraph_bytes=self.least_bytes, run_length=0, sentence_count=0)

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """One kind of records."""
        kinds = (_Kind("paragraphs"),)
        found = yield from _find(context, self, kinds, _record_spans)
        yield _judgements(context, self, kinds, _cut, found)


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
        _refuse_negative(
            "sentence",
            run_length=self.run_length,
            run_bytes=self.run_bytes,
            least_bytes=self.least_bytes,
            boilerplate=self.boilerplate,
        )

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
        found = yield from _find(context, self, kinds, _record_spans)
        yield _judgements(context, self, kinds, _cut, found)


def _refuse_negative(stage: str, **settings: int) -> None:
    problems = [
        f"{stage}.{name} is {value}: must be 0 or more" for name, value in settings.items() if value < 0
    ]
    if problems:
        raise ConfigError(problems)


@dataclass(frozen=True)
class _Kind:
    name: str
    more_than: int = 1
    """Records of a hash that has more than so many are repeats."""


@dataclass(frozen=True)
class _Unit:
    settings: Any
    kinds: tuple[_Kind, ...]
    """Of the records that are written, or of the repeats that are judged."""
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


def _units(context: Context, settings: object, kinds: tuple[_Kind, ...]) -> list[_Unit]:
    parts = 1 + sum(unit.documents for unit in context.units) // DOCUMENTS_A_PART
    return [
        _Unit(settings, kinds, unit, number, parts, context.stage)
        for number, unit in enumerate(context.units)
    ]


def _find(
    context: Context,
    settings: object,
    kinds: tuple[_Kind, ...],
    record: Function,
    *,
    also: Sequence[Path] = (),
) -> Generator[Sequence[Task], None, list[Path]]:
    """Two phases, records and their groups; the files of `_group`, those of a kind behind each other.

    Args:
        also: such files of kinds that were found before, for `record`.
    """
    units = _units(context, settings, kinds)
    output = f"records-{'-'.join(kind.name for kind in kinds)}-{{}}.parts"
    records = [context.unit_task(given.unit, record, given, also=also, output=output) for given in units]
    yield records
    written = [task.output for task in records]
    groups = []
    parts = units[0].parts if units else 0
    for number, kind in enumerate(kinds):
        for part in range(parts):
            given = _Group(kind, number * parts + part, context.units)
            name = f"repeats-{kind.name}-{part:05}.parts"
            groups.append(context.task(f"repeats of {kind.name} {part}", _group, given, written, name))
    yield groups
    return [task.output for task in groups]


def _judgements(
    context: Context, settings: object, kinds: tuple[_Kind, ...], judge: Function, found: Sequence[Path]
) -> list[Task]:
    """The last phase: each unit with what was found of each kind."""
    units = _units(context, settings, kinds)
    return [context.unit_task(given.unit, judge, given, also=found) for given in units]


def _table(records: np.ndarray) -> pa.Table:
    return pa.table({name: np.ascontiguousarray(records[name]) for name in records.dtype.names or ()})


def _array(table: pa.Table, dtype: np.dtype) -> np.ndarray:
    records = np.empty(table.num_rows, dtype)
    for name in dtype.names or ():
        records[name] = table.column(name).to_numpy()
    return records


def _record_ids(task: Task, _: Limits) -> Result:
    view = read_view(task.inputs, with_text=False)
    return _record_documents(task.settings, view.rows, Texts.of_arrow(view.documents.column("id")), False)


def _record_texts(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    view, (ids,) = _repeats(task)
    first = np.ones(len(view), bool)
    first[_rows(view, given, ids.column("document"))] = False
    texts = Texts.of_arrow(view.text.filter(pa.array(first)))
    return _record_documents(given, view.rows[first], texts, given.settings.folded)


def _record_documents(given: _Unit, rows: np.ndarray, texts: Texts, folded: bool) -> Result:
    hashes = hash_texts(texts, folded=folded)
    records = np.empty(len(rows), RECORD)
    records["high"], records["low"] = hashes[:, 0], hashes[:, 1]
    records["place"] = place_of(rows + given.unit.first)
    return Result([_table(part) for part in split_by_hash(records, given.parts)], {"folded": folded})


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
    found = [path for path in task.inputs if path.suffix == ".parts"]
    tables = [read_part(path, given.number) for path in found]
    by_kind = [tables[start : start + given.parts] for start in range(0, len(found), given.parts)]
    view = read_view(task.inputs[: len(task.inputs) - len(found)])
    return view, [pa.concat_tables(kind).sort_by("place") for kind in by_kind]


def _rows(view: View, given: _Unit, documents: pa.ChunkedArray) -> np.ndarray:
    """Where documents of the corpus are among those of the view."""
    return np.searchsorted(view.rows + given.unit.first, documents.to_numpy())


def _judge_documents(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    view, found = _repeats(task)
    duplicates = view.rows + given.unit.first
    reason = np.full(len(view), "", dtype=object)
    settings: Exact = given.settings.settings
    for path in settings.seen:
        is_seen = BloomFilter.load(Path(path)).contains(hash_texts(view.texts, folded=settings.folded))
        reason[is_seen] = "the text was in an earlier corpus"
    whys = ("the id has occurred before", "the text has occurred before")
    for table, why in zip(found, whys, strict=True):
        rows = _rows(view, given, table.column("document"))
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
    columns = {"cuts": lists, "number": number, "first": _firsts(view, given, found)}
    return Result([view.write(given.stage, keep=keep, reason=reason, **columns)])


def _firsts(view: View, given: _Unit, found: Sequence[pa.Table]) -> pa.ListArray:
    """For each document, the others in which its repeated parts occurred first, ascending."""
    table = pa.concat_tables(found)
    pairs = np.stack([_rows(view, given, table.column("document")), table.column("first").to_numpy()], axis=1)
    others = np.unique(pairs[pairs[:, 1] != view.rows[pairs[:, 0]] + given.unit.first], axis=0)
    offsets = np.searchsorted(others[:, 0], np.arange(len(view) + 1))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(others[:, 1]))
