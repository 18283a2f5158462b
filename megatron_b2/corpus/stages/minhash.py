"""`minhash`: near-duplicate documents, found by locality-sensitive hashing and proven by their exact Jaccard
similarity; of a cluster the first document stays.

Phases, each a shuffle of small records. Only 3 and 6 look at the whole corpus; they hold 9 and 13 bytes a
document of it, and a unit's or a file's records at a time:

1. each unit: signatures, and their records by band and range of hashes
2. each partition of records: pairs to compare
3. all pairs: connected components, so that what must be compared can come together
4. each unit: shingle sets of the documents in pairs, by component; each partition: pairs, by component
5. each part of the components: exact similarities, and the pairs that reach the threshold; however large a
   component is, its shingle sets are compared in blocks that fit the memory
6. all of these: clusters
7. each unit: verdicts
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.neighbours.clusters import components
from megatron_b2.corpus.neighbours.lsh import candidate_pairs, distinct_pairs, hash_ranges, records
from megatron_b2.corpus.neighbours.minhash import signatures
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.corpus.neighbours.verify import Edges, ShingleSets, verified
from megatron_b2.corpus.pipeline.checked import part_bytes, read_part, read_parts, read_table
from megatron_b2.corpus.pipeline.shuffle import by_hash
from megatron_b2.corpus.pipeline.stage import Context, Unit
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import read_view
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import ConfigError

PARTITION_BYTES = 1 << 28
"""Memory to group one partition of records, whatever the limit: the files must not depend on it."""
DOCUMENTS_A_PART = 100_000
"""Of phase 5."""
BLOCK_SHARE = 4
"""A block of phase 5 takes this part of the memory; two are held at a time, beside their pairs."""


@dataclass(frozen=True)
class MinHash(NearDuplicates):
    """Near-duplicates over the whole corpus."""

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ConfigError as error:
            raise ConfigError([f"minhash.{problem}" for problem in error.problems]) from None

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """See the module."""
        documents = sum(unit.documents for unit in context.units)
        ranges = hash_ranges(documents, self, memory=PARTITION_BYTES)
        parts = 1 + documents // DOCUMENTS_A_PART
        sign = [
            context.unit_task(unit, _sign, _Unit(self, unit, ranges, parts), output="records-{}.parts")
            for unit in context.units
        ]
        yield sign
        signed = tuple(task.output for task in sign)
        partitions = [
            context.task(f"pairs {p}", _pair, _Partition(self, p, parts), signed, f"pairs-{p:05}.parquet")
            for p in range(self.bands * ranges)
        ]
        yield partitions
        pairs = tuple(task.output for task in partitions)
        whole = _Whole(self, context.units)
        together = context.task("components", _bring_together, whole, pairs, "components.parts")
        yield [together]
        sets = [
            context.unit_task(
                unit,
                _shingle,
                _Unit(self, unit, ranges, parts, number),
                also=(together.output,),
                output="sets-{}.parts",
            )
            for number, unit in enumerate(context.units)
        ]
        moved = [
            context.task(
                f"move {p}", _move, _Partition(self, p, parts), (path, together.output), f"moved-{p:05}.parts"
            )
            for p, path in enumerate(pairs)
        ]
        yield [*sets, *moved]
        inputs = tuple(task.output for task in (*sets, *moved))
        compare = [
            context.task(f"compare {part}", _compare, given, inputs, f"edges-{part:05}.parquet")
            for part, given in enumerate(_Compare(self, q, context.units) for q in range(parts))
        ]
        yield compare
        edges = tuple(task.output for task in compare)
        clusters = context.task("clusters", _cluster, whole, edges, "clusters.parts")
        yield [clusters]
        yield [
            context.unit_task(unit, _judge, _Unit(self, unit, ranges, parts, number), also=(clusters.output,))
            for number, unit in enumerate(context.units)
        ]


@dataclass(frozen=True)
class _Unit:
    settings: NearDuplicates
    unit: Unit
    ranges: int
    parts: int
    number: int = 0
    """Of the unit."""


@dataclass(frozen=True)
class _Partition:
    settings: NearDuplicates
    number: int
    parts: int


@dataclass(frozen=True)
class _Whole:
    settings: NearDuplicates
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class _Compare:
    settings: NearDuplicates
    part: int
    units: tuple[Unit, ...]
    """The first inputs hold the shingle sets of one each; the others hold pairs."""


def _sign(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    view = read_view(task.inputs)
    documents = pa.array(view.rows + given.unit.first)
    hashes = signatures(view.texts, given.settings)
    tables = records(hashes, given.settings, first_document=0, ranges=given.ranges)
    return Result([t.set_column(1, "document", documents.take(t.column("document"))) for t in tables])


def _pair(task: Task, _: Limits) -> Result:
    given: _Partition = task.settings
    pairs = candidate_pairs([read_part(path, given.number) for path in task.inputs], given.settings)
    return Result([_pair_table(pairs)])


def _pair_table(pairs: np.ndarray, **columns: np.ndarray) -> pa.Table:
    return pa.table({"left": pairs[:, 0], "right": pairs[:, 1], **columns})


def _pairs_of(table: pa.Table) -> np.ndarray:
    return np.column_stack([table.column(name).to_numpy() for name in ("left", "right")])


def _all_pairs(paths: Sequence[Path]) -> Iterator[np.ndarray]:
    return (_pairs_of(read_table(path)) for path in paths)


def _bring_together(task: Task, _: Limits) -> Result:
    """Component of each document that is in a pair, by unit."""
    given: _Whole = task.settings
    whole = components(_all_pairs(task.inputs), sum(unit.documents for unit in given.units))
    is_in_pair = np.zeros(len(whole), bool)
    for pairs in _all_pairs(task.inputs):
        is_in_pair[pairs] = True
    return Result(_by_unit(is_in_pair, given.units, component=whole))


def _by_unit(chosen: np.ndarray, units: Sequence[Unit], **columns: np.ndarray) -> Iterator[pa.Table]:
    """A table a unit of its `chosen` documents; bool [N] and columns [N], of the whole corpus."""
    for unit in units:
        documents = unit.first + np.flatnonzero(chosen[unit.first : unit.first + unit.documents])
        yield pa.table({"document": documents, **{name: all_[documents] for name, all_ in columns.items()}})


def _shingle(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    wanted = read_part(task.inputs[-1], given.number)
    view = read_view(task.inputs[:-1])
    documents = wanted.column("document").to_numpy()
    rows = np.searchsorted(view.rows, documents - given.unit.first)
    texts = Texts.of_arrow(view.text.take(pa.array(rows)))
    sets = ShingleSets.of(texts, documents, given.settings)
    table = sets.to_arrow().append_column("component", wanted.column("component"))
    return Result(by_hash(table, "component", given.parts))


def _move(task: Task, _: Limits) -> Result:
    given: _Partition = task.settings
    pairs = _pairs_of(read_table(task.inputs[0]))
    component = np.empty(len(pairs), np.int64)
    for known in read_parts(task.inputs[1]):  # both are sorted
        documents = known.column("document").to_numpy()
        if len(documents):
            begin, end = np.searchsorted(pairs[:, 0], [documents[0], documents[-1] + 1])
            index = np.searchsorted(documents, pairs[begin:end, 0])
            component[begin:end] = known.column("component").to_numpy()[index]
    return Result(by_hash(_pair_table(pairs, component=component), "component", given.parts))


def _compare(task: Task, limits: Limits) -> Result:
    """Every block of documents with itself and with those behind it."""
    given: _Compare = task.settings
    sets, moved = task.inputs[: len(given.units)], task.inputs[len(given.units) :]
    blocks = _blocks(sets, given.part, limits.memory // BLOCK_SHARE)
    edges = [Edges(np.empty((0, 2), np.int64), np.empty(0))]
    for number in range(len(blocks)):
        edges += _edges(given, sets, moved, blocks[number:])
    table = _pair_table(
        np.concatenate([found.pairs for found in edges]),
        jaccard=np.concatenate([found.jaccard for found in edges]),
    )
    return Result([table.sort_by([("left", "ascending"), ("right", "ascending")])])


def _edges(
    given: _Compare, sets: Sequence[Path], moved: Sequence[Path], blocks: Sequence[range]
) -> Iterator[Edges]:
    """Of the documents of the first block with one another and with those of the other blocks."""
    begin, end = _documents(given.units, blocks[0])
    found = (_pairs_of(read_part(path, given.part)) for path in moved)
    candidates = distinct_pairs([pairs[(begin <= pairs[:, 0]) & (pairs[:, 0] < end)] for pairs in found])
    mine = _sets(sets, given.part, blocks[0])
    for block in blocks:
        begin, end = _documents(given.units, block)
        chosen = candidates[(begin <= candidates[:, 1]) & (candidates[:, 1] < end)]
        if len(chosen):
            theirs = _sets(sets, given.part, block if block is not blocks[0] else range(0))
            yield verified(chosen, [*mine, *theirs], given.settings)
            del theirs  # before the next ones are read


def _sets(paths: Sequence[Path], part: int, block: range) -> list[ShingleSets]:
    return [ShingleSets.of_arrow(read_part(paths[unit], part)) for unit in block]


def _blocks(paths: Sequence[Path], part: int, most: int) -> list[range]:
    """Units in a row whose shingle sets take `most` bytes together, or one unit whose sets take more."""
    blocks: list[range] = []
    size = 0
    for unit, path in enumerate(paths):
        size += (more := part_bytes(path, part))
        if not blocks or size > most:
            blocks.append(range(unit, unit))
            size = more
        blocks[-1] = range(blocks[-1].start, unit + 1)
    return blocks


def _documents(units: Sequence[Unit], block: range) -> tuple[int, int]:
    """The first document of a block, and the one behind its last."""
    last = units[block[-1]]
    return units[block[0]].first, last.first + last.documents


def _cluster(task: Task, _: Limits) -> Result:
    """Cluster of each document but the first of it, and its largest similarity to an earlier one, by unit."""
    given: _Whole = task.settings
    whole = components(_all_pairs(task.inputs), sum(unit.documents for unit in given.units))
    similarity = np.zeros(len(whole), np.float32)
    for path in task.inputs:
        table = read_table(path)
        np.maximum.at(similarity, table.column("right").to_numpy(), table.column("jaccard").to_numpy())
    is_later = np.zeros(len(whole), bool)
    for unit in given.units:
        documents = np.arange(unit.first, unit.first + unit.documents)
        is_later[documents] = whole[documents] != documents
    return Result(_by_unit(is_later, given.units, cluster=whole, similarity=similarity))


def _judge(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    found = read_part(task.inputs[-1], given.number)
    view = read_view(task.inputs[:-1])
    documents = view.rows + given.unit.first
    cluster, similarity = documents.copy(), np.zeros(len(documents), np.float32)
    rows = np.searchsorted(documents, found.column("document").to_numpy())
    cluster[rows] = found.column("cluster").to_numpy()
    similarity[rows] = found.column("similarity").to_numpy()
    keep = cluster == documents
    reason = np.where(keep, "", "near-duplicate")
    columns = {"duplicates": cluster, "similarity": similarity}
    return Result([view.write("minhash", keep=keep, reason=reason, **columns)])
