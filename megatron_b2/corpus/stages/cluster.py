"""`cluster`: topics by k-means on the vectors of `embed`, and documents that say the same inside each topic.

Phases: a sample of vectors; centroids; each unit's documents to their topics; each part of the topics:
duplicates by meaning; verdicts. Of duplicates the document with the best quality score stays.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.pipeline.checked import read_part, read_table
from megatron_b2.corpus.pipeline.shuffle import by_hash, by_unit, evenly, gather
from megatron_b2.corpus.pipeline.stage import Context, Unit
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import View, read_view
from megatron_b2.corpus.semantic.duplicates import find_semantic_duplicates
from megatron_b2.corpus.semantic.kmeans import KMeans, KMeansOptions, train_kmeans
from megatron_b2.errors import ConfigError

DOCUMENTS_A_CLUSTER = 200
MAX_CLUSTERS = 4_096
"""Of an automatic number of clusters."""
DOCUMENTS_A_PART = 200_000
VECTOR, SCORE = "embed.vector", "quality.score"


@dataclass(frozen=True)
class Cluster:
    """Topics, and duplicates by meaning; needs the stage `embed` before it."""

    clusters: int = 0
    """Number of topics, at most one a document; 0: one for 200 documents, at most 4,096."""
    threshold: float = 0.95
    """Cosine of two vectors of a topic from which on the documents say the same; 1 finds copies only."""
    seed: int = 0
    """Of the sample and the first centroids."""

    def __post_init__(self) -> None:
        problems = []
        if self.clusters < 0:
            problems.append(f"cluster.clusters is {self.clusters}: must be 0 (automatic) or more")
        if not 0 < self.threshold <= 1:
            problems.append(f"cluster.threshold is {self.threshold}: must be above 0, at most 1")
        if problems:
            raise ConfigError(problems)

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """See the module."""
        if "embed" not in context.earlier:
            raise ConfigError("stages: cluster needs the vectors of embed; put embed before it")
        documents = sum(unit.documents for unit in context.units)
        wanted = self.clusters or min(MAX_CLUSTERS, 1 + documents // DOCUMENTS_A_CLUSTER)
        options = KMeansOptions(clusters=wanted, seed=self.seed)
        parts = min(wanted, 1 + documents // DOCUMENTS_A_PART)
        units = [_Unit(self, unit, number, parts) for number, unit in enumerate(context.units)]
        share = options.max_points * wanted / max(1, documents)
        samples = [
            context.unit_task(
                unit, _sample, _Sample(1 + int(share * unit.documents)), output="sample-{}.parquet"
            )
            for unit in context.units
        ]
        yield samples
        inputs = [task.output for task in samples]
        train = context.task("centroids", _train, options, inputs, "centroids.parquet")
        yield [train]
        assign = [
            context.unit_task(given.unit, _assign, given, also=[train.output], output="{}.parts")
            for given in units
        ]
        yield assign
        assigned = [task.output for task in assign]
        compare = [
            context.task(
                f"compare {p}", _compare, _Part(self, p, context.units), assigned, f"found-{p:05}.parts"
            )
            for p in range(parts)
        ]
        yield compare
        found = [task.output for task in compare]
        yield [context.unit_task(given.unit, _judge, given, also=found) for given in units]


@dataclass(frozen=True)
class _Sample:
    documents: int


@dataclass(frozen=True)
class _Unit:
    settings: Cluster
    unit: Unit
    number: int
    parts: int


@dataclass(frozen=True)
class _Part:
    settings: Cluster
    number: int
    units: tuple[Unit, ...]


def _view(paths: Sequence[Path]) -> View:
    return read_view(paths, wanted=[VECTOR, SCORE], with_text=False)


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    """float16 [N, D]."""
    vectors = column.combine_chunks()
    return np.asarray(vectors.flatten()).reshape(len(vectors), vectors.type.list_size)


def _sample(task: Task, _: Limits) -> Result:
    view = _view(task.inputs)
    chosen = pa.array(evenly(len(view), task.settings.documents))
    return Result([pa.table({"vector": view.attributes.column(VECTOR).take(chosen)})])


def _train(task: Task, limits: Limits) -> Result:
    options: KMeansOptions = task.settings
    vectors = _vectors(pa.concat_tables([read_table(path) for path in task.inputs]).column("vector"))
    limits.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=limits.scratch) as folder:
        path = Path(folder) / "centroids.safetensors"
        train_kmeans(vectors, path, options)
        return Result([pa.table({"model": pa.array([path.read_bytes()], pa.large_binary())})])


def _assign(task: Task, limits: Limits) -> Result:
    given: _Unit = task.settings
    view = _view(task.inputs[:-1])
    limits.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=limits.scratch) as folder:
        path = Path(folder) / "centroids.safetensors"
        path.write_bytes(read_table(task.inputs[-1]).column("model")[0].as_py())
        clusters, _ = KMeans(path, verify=False).assign(_vectors(view.attributes.column(VECTOR)))
    has_score = SCORE in view.attributes.column_names
    columns = {
        "document": view.rows + given.unit.first,
        "cluster": clusters.astype(np.int64),
        "score": view.attributes.column(SCORE) if has_score else np.zeros(len(view), np.float32),
        "vector": view.attributes.column(VECTOR),
    }
    return Result(by_hash(pa.table(columns), "cluster", given.parts))


def _compare(task: Task, _: Limits) -> Result:
    given: _Part = task.settings
    table = gather(task.inputs, given.number).sort_by("document")
    documents, clusters = (table.column(name).to_numpy() for name in ("document", "cluster"))
    found = find_semantic_duplicates(
        _vectors(table.column("vector")),
        clusters,
        threshold=given.settings.threshold,
        quality=table.column("score").to_numpy(),
    )
    stays = np.where(found.kept, np.arange(len(documents)), found.duplicate_of)
    columns = {
        "document": documents,
        "cluster": clusters,
        "stays": documents[stays],
        "cosine": np.nan_to_num(found.cosine),
    }
    return Result(by_unit(pa.table(columns), "document", given.units))


def _judge(task: Task, _: Limits) -> Result:
    given: _Unit = task.settings
    tables = [read_part(path, given.number) for path in task.inputs[-given.parts :]]
    found = pa.concat_tables(tables).sort_by("document")
    view = _view(task.inputs[: -given.parts])
    stays = found.column("stays").to_numpy()
    keep = stays == found.column("document").to_numpy()
    reason = np.where(keep, "", "says the same as another document")
    columns = {name: found.column(name) for name in ("cluster", "cosine")}
    return Result([view.write("cluster", keep=keep, reason=reason, duplicates=stays, **columns)])
