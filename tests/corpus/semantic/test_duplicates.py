"""Duplicates by meaning: the rule against brute force, and planted paraphrases that MinHash cannot see."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2._cpu import words
from megatron_b2.corpus.models.embedding import HashedOptions, train_hashed
from megatron_b2.corpus.semantic.duplicates import find_semantic_duplicates
from megatron_b2.corpus.semantic.kmeans import KMeansOptions, train_kmeans
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import InputError
from tests.corpus.models.languages import english_documents
from tests.corpus.semantic.paraphrases import paraphrased_documents

# Cosines of such rows are multiples of 1/5, 1/25, ...: no pair is so near a threshold that rounding decides.
DIRECTIONS = np.array([[1, 0], [0.8, 0.6], [0.6, 0.8], [0, 1], [-0.6, 0.8], [-1, 0], [0, 0]])


def brute_force(
    vectors: np.ndarray, clusters: np.ndarray, quality: np.ndarray, threshold: float
) -> list[int]:
    """In float64, one pair at a time."""
    order = sorted(
        range(len(vectors)), key=lambda i: (-quality[i] if not np.isnan(quality[i]) else np.inf, i)
    )
    stays: list[int] = []
    duplicate_of = [-1] * len(vectors)
    for i in order:
        cosines = [(float(vectors[i] @ vectors[j]), j) for j in stays if clusters[i] == clusters[j]]
        best = max((cosine for cosine, _ in cosines), default=-2.0)
        if best >= threshold:
            duplicate_of[i] = next(j for cosine, j in cosines if cosine == best)
        else:
            stays.append(i)
    return duplicate_of


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(DIRECTIONS) - 1),
            st.integers(0, 2),
            st.sampled_from([0.1, 0.5, 0.9, float("nan")]),
        ),
        min_size=1,
        max_size=25,
    ),
    st.sampled_from([0.3, 0.7, 0.9]),
    st.integers(1, 30),
)
def test_rule_against_brute_force(
    rows: list[tuple[int, int, float]], threshold: float, block_rows: int
) -> None:
    vectors = DIRECTIONS[[row[0] for row in rows]]
    clusters, quality = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])
    found = find_semantic_duplicates(
        vectors.astype(np.float32), clusters, threshold=threshold, quality=quality, block_rows=block_rows
    )
    assert found.duplicate_of.tolist() == brute_force(vectors, clusters, quality, threshold)
    for i in np.flatnonzero(~found.kept):
        assert found.cosine[i] == pytest.approx(vectors[i] @ vectors[found.duplicate_of[i]], abs=1e-6)
    assert np.isnan(found.cosine[found.kept]).all()


def test_without_quality_the_first_stays_and_half_precision_is_enough() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [1, 0]], np.float16)
    found = find_semantic_duplicates(vectors, np.array([0, 0, 0, 1]), threshold=0.99)
    assert found.duplicate_of.tolist() == [-1, 0, -1, -1]


def test_errors() -> None:
    vectors, clusters = np.ones((2, 2), np.float32), np.zeros(2, int)
    with pytest.raises(InputError, match="threshold = 0"):
        find_semantic_duplicates(vectors, clusters, threshold=0)
    with pytest.raises(InputError, match="do not fit"):
        find_semantic_duplicates(vectors, clusters[:1], threshold=0.5)


def jaccard(a: str, b: str, shingle: int = 5) -> float:
    """Of the sets of word 5-grams, which is what MinHash estimates."""
    sets = []
    for text in (a, b):
        found = words(text.encode())
        sets.append({tuple(found[i : i + shingle]) for i in range(len(found) - shingle + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_paraphrases_in_a_corpus_smaller_than_the_vectors_are_long(tmp_path: Path) -> None:
    """With a direction for each document every two would be orthogonal, and none would say the same."""
    originals, paraphrases = paraphrased_documents(25)
    texts = Texts.of([*originals, *paraphrases, *list(dict.fromkeys(english_documents()))[:50]])
    vectors = train_hashed([texts], tmp_path / "e", HashedOptions(bits=16)).embed(texts)
    found = find_semantic_duplicates(vectors, np.zeros(100, int), threshold=0.85)
    assert (found.duplicate_of[25:50] == np.arange(25)).mean() > 0.9
    assert found.kept[:25].all()


def test_planted_paraphrases_that_minhash_misses(tmp_path: Path) -> None:
    """150 documents, a paraphrase of each, and 300 sections of Python's reference (some of which say the same, too:
    they are there to be in the way, not to be judged)."""
    originals, paraphrases = paraphrased_documents(150)
    others = list(dict.fromkeys(english_documents()))[:300]
    texts = Texts.of([*originals, *paraphrases, *others])
    pairs = zip(originals, paraphrases, strict=True)
    assert max(jaccard(a, b) for a, b in pairs) < 0.1  # LSH made for 0.8 proposes none of these
    embedder = train_hashed([texts], tmp_path / "e", HashedOptions(bits=16))
    vectors = embedder.embed(texts, precision="float16")
    clusters, _ = train_kmeans(vectors, tmp_path / "k", KMeansOptions(clusters=4)).assign(vectors)
    found = find_semantic_duplicates(vectors, clusters, threshold=0.85)
    reported = {(i, int(found.duplicate_of[i])) for i in range(300) if not found.kept[i]}
    true = reported & {(i + 150, i) for i in range(150)}
    print(f"recall {len(true) / 150:.3f}, precision {len(true) / len(reported):.3f}")
    assert len(true) / 150 >= 0.9
    assert len(true) / len(reported) >= 0.98
