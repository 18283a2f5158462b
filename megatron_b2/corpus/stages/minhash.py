"""`minhash`: near-duplicate documents, found by locality-sensitive hashing and proven by their exact Jaccard
similarity; of a cluster the first document stays.

Phases, each a shuffle of small records, none of which holds more than 8 bytes a document of the corpus:

1. each unit: signatures, and their records by band and range of hashes
2. each partition of records: pairs to compare
3. all pairs: connected components, so that what must be compared can come together
4. each unit: shingle sets of the documents in pairs, by component; each partition: pairs, by component
5. each part of the components: exact similarities, and the pairs that reach the threshold
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
from megatron_b2.corpus.neighbours.verify import ShingleSets, verified
from megatron_b2.corpus.pipeline.checked import read_part, read_parts, read_table
from megatron_b2.corpus.pipeline.shuffle import by_hash, by_unit
from megatron_b2.corpus.pipeline.stage import Context, Unit
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import read_view
from megatron_b2.documents.texts import Texts

PARTITION_BYTES = 1 << 30
"""Memory to group one partition of records."""
DOCUMENTS_A_PART = 100_000
"""Of phase 5."""


@dataclass(frozen=True)
class MinHash(NearDuplicates):
    """Near-duplicates over the whole corpus."""

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
            for part, given in enumerate(_Compare(self, q, len(sets)) for q in range(parts))
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
    sets: int
    """How many of the inputs hold shingle sets; the others hold pairs."""


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
    documents = np.flatnonzero(is_in_pair)
    table = pa.table({"document": documents, "component": whole[documents]})
    return Result(by_unit(table, "document", given.units))


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
    known = read_parts(task.inputs[1])
    index = np.searchsorted(known.column("document").to_numpy(), pairs[:, 0])
    table = _pair_table(pairs, component=known.column("component").to_numpy()[index])
    return Result(by_hash(table, "component", given.parts))


def _compare(task: Task, _: Limits) -> Result:
    given: _Compare = task.settings
    sets = [ShingleSets.of_arrow(read_part(path, given.part)) for path in task.inputs[: given.sets]]
    moved = [_pairs_of(read_part(path, given.part)) for path in task.inputs[given.sets :]]
    edges = verified(distinct_pairs(moved), sets, given.settings)
    return Result([_pair_table(edges.pairs, jaccard=edges.jaccard)])


def _cluster(task: Task, _: Limits) -> Result:
    """Cluster of each document that has duplicates, and its largest similarity to an earlier one, by unit."""
    given: _Whole = task.settings
    whole = components(_all_pairs(task.inputs), sum(unit.documents for unit in given.units))
    similarity = np.zeros(len(whole), np.float32)
    for path in task.inputs:
        table = read_table(path)
        np.maximum.at(similarity, table.column("right").to_numpy(), table.column("jaccard").to_numpy())
    is_single = whole == np.arange(len(whole))
    is_single[whole[~is_single]] = False
    documents = np.flatnonzero(~is_single)
    columns = {"document": documents, "cluster": whole[documents], "similarity": similarity[documents]}
    return Result(by_unit(pa.table(columns), "document", given.units))


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
