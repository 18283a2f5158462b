"""Clusters of dense features: k-means by faiss, trained on a sample, then applied to any number of
documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from megatron_b2.corpus.models.classifier import missing_library
from megatron_b2.corpus.models.model_file import read_model, write_model
from megatron_b2.errors import InputError

KIND = "b2-kmeans"
VERSION = 1
ROWS_AT_ONCE = 16_384


@dataclass(frozen=True, kw_only=True)
class KMeansOptions:
    """How centroids are trained."""

    clusters: int
    iterations: int = 20
    metric: Literal["cosine", "euclidean"] = "cosine"
    """"cosine": inner product with centroids of length 1 (spherical k-means), for rows of length 1."""
    max_points: int = 256
    """Rows for each centroid that are trained on; more are sampled with `seed`."""
    seed: int = 0


class KMeans:
    """Trained centroids."""

    def __init__(self, path: Path | str, *, verify: bool = True) -> None:
        """Raises InputError when `path` holds no centroids or is damaged."""
        file = read_model(Path(path), kind=KIND, version=VERSION, verify=verify)
        self.facts = file.facts
        self.sha256 = file.sha256
        self.centroids = file.arrays["centroids"]
        """float32 [clusters, D]."""
        self._cosine = file.facts["options"]["metric"] == "cosine"

    def assign(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The nearest centroid of each row, int32 [N], and how near it is, float32 [N]: inner product
        (cosine of rows of length 1) or squared distance. Ties go to the lowest number. `vectors` float16 or
        float32 [N, D], e.g. a memory map: rows are read a few at a time.

        Raises InputError for vectors of another length or that are not finite.
        """
        clusters, nearness = np.empty(len(vectors), np.int32), np.empty(len(vectors), np.float32)
        for start in range(0, len(vectors), ROWS_AT_ONCE):
            rows = _checked(vectors[start : start + ROWS_AT_ONCE], self.centroids.shape[1])
            values = rows @ self.centroids.T
            if not self._cosine:
                squares = (self.centroids**2).sum(axis=1) - 2 * values
                values = -np.maximum(squares + (rows**2).sum(axis=1, keepdims=True), 0)
            best = values.argmax(axis=1)
            clusters[start : start + len(rows)] = best
            nearness[start : start + len(rows)] = np.abs(values[np.arange(len(rows)), best])
        return clusters, nearness


def train_kmeans(
    vectors: np.ndarray, path: Path, options: KMeansOptions, *, facts: Mapping[str, Any] | None = None
) -> KMeans:
    """Train centroids on rows of `vectors` (float16 or float32 [N, D]) and write them to `path`.

    Of fewer rows than clusters each becomes a centroid; without rows there is one centroid of zeros.

    faiss runs with one thread: the same rows and options give the same centroids on the same kind of
    processor.

    Raises InputError for bad options and for rows that are not finite, OutputError when faiss is not
    installed.
    """
    for name in ("clusters", "iterations", "max_points"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} = {getattr(options, name)}: must be 1 or more")
    rows = _checked(_sample(vectors, options), vectors.shape[1])
    arrays = {"centroids": _centroids(rows, options)}
    everything = {**(facts or {}), "options": asdict(options), "rows": len(rows)}
    write_model(path, kind=KIND, version=VERSION, arrays=arrays, facts=everything)
    return KMeans(path, verify=False)


def _centroids(rows: np.ndarray, options: KMeansOptions) -> np.ndarray:
    """float32 [clusters, D] of faiss, or all rows where there are no more."""
    if len(rows) <= options.clusters:
        return rows if len(rows) else np.zeros((1, rows.shape[1]), np.float32)
    with _one_thread() as faiss:
        kmeans = faiss.Kmeans(
            rows.shape[1],
            options.clusters,
            niter=options.iterations,
            spherical=options.metric == "cosine",
            seed=options.seed,
            min_points_per_centroid=1,
            max_points_per_centroid=options.max_points,
        )
        kmeans.train(rows)
    return np.ascontiguousarray(kmeans.centroids, np.float32)


def _sample(vectors: np.ndarray, options: KMeansOptions) -> np.ndarray:
    wanted = options.clusters * options.max_points
    if len(vectors) <= wanted:
        return vectors
    chosen = np.random.default_rng(options.seed).choice(len(vectors), wanted, replace=False)
    return vectors[np.sort(chosen)]


def _checked(rows: np.ndarray, dimension: int) -> np.ndarray:
    """`rows` as float32 [n, dimension]."""
    if rows.ndim != 2 or rows.shape[1] != dimension:
        raise InputError(f"vectors of the shape {rows.shape}; expected rows of length {dimension}")
    result = np.ascontiguousarray(rows, np.float32)
    if not np.isfinite(result).all():
        raise InputError("a vector holds NaN or infinity; embed the texts again")
    return result


@contextmanager
def _one_thread() -> Iterator[ModuleType]:
    """faiss with one thread inside the block."""
    with missing_library("faiss", "faiss-cpu"):
        import faiss
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(threads)
