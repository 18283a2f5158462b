"""k-means: faiss's centroids against Lloyd's conditions, assignment against all distances."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_b2.corpus.semantic.kmeans import KMeans, KMeansOptions, train_kmeans
from megatron_b2.errors import InputError

RNG_ROWS = 600


def blobs(seed: int = 0, dimension: int = 8, clusters: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Rows of length 1 around some directions, and which."""
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.normal(size=(dimension, clusters)))[0].T
    which = rng.integers(0, clusters, RNG_ROWS)
    rows = centres[which] + 0.1 * rng.normal(size=(RNG_ROWS, dimension))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), which


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_centroids_are_the_means_of_pure_groups(tmp_path: Path, metric: str) -> None:
    """Lloyd's fixed point; with more clusters than groups, no cluster mixes two of them."""
    rows, which = blobs()
    options = KMeansOptions(clusters=12, metric=metric, iterations=100)  # type: ignore[arg-type]
    model = train_kmeans(rows, tmp_path / "k", options)
    clusters, nearness = model.assign(rows)
    assert clusters.dtype == np.int32
    assert all(len(set(which[clusters == k])) == 1 for k in range(12))
    means = np.stack([rows[clusters == k].mean(axis=0) for k in range(12)])
    if metric == "cosine":
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        expected = (rows * model.centroids[clusters]).sum(axis=1)
    else:
        expected = ((rows - model.centroids[clusters]) ** 2).sum(axis=1)
    np.testing.assert_allclose(model.centroids, means, atol=1e-4)
    np.testing.assert_allclose(nearness, expected, atol=1e-5)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_assignment_is_to_the_nearest_of_all(tmp_path: Path, metric: str) -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(300, 6)).astype(np.float32)
    options = KMeansOptions(clusters=40, metric=metric, iterations=3)  # type: ignore[arg-type]
    model = train_kmeans(rows, tmp_path / "k", options)
    others = rng.normal(size=(20_000, 6)).astype(np.float16)
    clusters, _ = model.assign(others)
    exact, centroids = others.astype(np.float64), model.centroids.astype(np.float64)
    if metric == "cosine":
        distance = -(exact @ centroids.T)
    else:
        distance = ((exact[:, None] - centroids[None]) ** 2).sum(axis=2)
    chosen = distance[np.arange(len(others)), clusters]
    np.testing.assert_allclose(chosen, distance.min(axis=1), atol=1e-4)


def test_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    """Also when a sample is trained on, which the seed decides."""
    rows, _ = blobs()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_kmeans(
            rows, tmp_path / name, KMeansOptions(clusters=4, max_points=50, seed=seed), facts={"x": 1}
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    model = KMeans(tmp_path / "a")
    assert model.facts["rows"] == 200
    assert model.facts["x"] == 1
    assert not np.array_equal(model.centroids, KMeans(tmp_path / "c").centroids)


def test_fewer_rows_than_clusters(tmp_path: Path) -> None:
    """Each row is a cluster of its own; without rows there is one, which takes whatever comes later."""
    rows = np.eye(8, dtype=np.float32)[:5]
    model = train_kmeans(rows, tmp_path / "k", KMeansOptions(clusters=9))
    assert len(model.centroids) == 5
    clusters, nearness = model.assign(rows)
    assert sorted(clusters) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(nearness, 1, atol=1e-6)
    nothing = train_kmeans(rows[:0], tmp_path / "none", KMeansOptions(clusters=9))
    assert nothing.centroids.shape == (1, 8)
    assert nothing.assign(rows)[0].tolist() == [0] * 5


def test_errors(tmp_path: Path) -> None:
    rows, _ = blobs()
    with pytest.raises(InputError, match="clusters = 0"):
        train_kmeans(rows, tmp_path / "k", KMeansOptions(clusters=0))
    bad = rows.copy()
    bad[3, 3] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        train_kmeans(bad, tmp_path / "k", KMeansOptions(clusters=2))
    model = train_kmeans(rows, tmp_path / "k", KMeansOptions(clusters=2))
    with pytest.raises(InputError, match="rows of length 8"):
        model.assign(rows[:, :5])
    clusters, nearness = model.assign(rows[:0])
    assert len(clusters) == len(nearness) == 0
