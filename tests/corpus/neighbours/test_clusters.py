"""Clusters against networkx; the whole search on planted near-duplicates, cut and run in every way."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import networkx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2 import _cpu
from megatron_b2.corpus.neighbours.clusters import components, near_duplicates
from megatron_b2.corpus.neighbours.lsh import candidate_pairs, distinct_pairs, records
from megatron_b2.corpus.neighbours.minhash import signatures
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.corpus.neighbours.verify import Edges, ShingleSets, verified
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import DataError
from tests.corpus.neighbours.languages import ALPHABETS, random_words, written
from tests.corpus.neighbours.test_minhash import exact_jaccard, python_shingles

SETTINGS = NearDuplicates()
LANGUAGES = [*ALPHABETS, "mixed"]
EDGES = st.lists(st.tuples(st.integers(0, 24), st.integers(0, 24)), max_size=40)


def search(
    units: list[list[str]], *, ranges: int = 1, settings: NearDuplicates = SETTINGS, threads: int = 1
) -> tuple[np.ndarray, Edges]:
    """Clusters and edges of a corpus of several files, as a pipeline finds them."""
    firsts = [0, *itertools.accumulate(map(len, units))]
    columns = [Texts.of(unit) for unit in units]
    with ThreadPoolExecutor(threads) as pool:
        cut = list(
            pool.map(
                lambda texts, first: records(
                    signatures(texts, settings), settings, first_document=first, ranges=ranges
                ),
                columns,
                firsts,
            )
        )
        partitions = list(zip(*cut, strict=True))
        pairs = distinct_pairs(list(pool.map(lambda part: candidate_pairs(part[::-1], settings), partitions)))
    wanted = np.unique(pairs)
    sets = []
    for unit, first in zip(units, firsts, strict=False):
        documents = wanted[(first <= wanted) & (wanted < first + len(unit))]
        sets.append(ShingleSets.of(Texts.of(unit[i - first] for i in documents), documents, settings))
    blocks = np.array_split(pairs, 3)
    found = [verified(block, sets, settings) for block in blocks]
    edges = Edges(np.concatenate([e.pairs for e in found]), np.concatenate([e.jaccard for e in found]))
    return components([e.pairs for e in reversed(found)], firsts[-1]), edges


def planted(language: str, jaccard: float, chance: random.Random, words: int = 200) -> tuple[str, str]:
    """Two texts that share their first words, so many that their shingle sets have about this similarity."""
    shingles = words - 4
    shared = round(2 * jaccard * shingles / (1 + jaccard)) + 4
    head = random_words(language, shared, chance)
    one, two = (head + random_words(language, words - shared, chance) for _ in range(2))
    return written(one), written(two)


@given(EDGES, st.randoms(use_true_random=False))
def test_components_are_those_of_networkx_in_any_order(
    edges: list[tuple[int, int]], chance: random.Random
) -> None:
    graph = networkx.Graph(edges)
    graph.add_nodes_from(range(25))
    expected = {node: min(group) for group in networkx.connected_components(graph) for node in group}
    for _ in range(3):
        chance.shuffle(edges)
        cut = chance.randint(0, len(edges))
        parts = [np.array(part, np.int64).reshape(-1, 2) for part in (edges[:cut], edges[cut:])]
        assert components(parts, 25).tolist() == [expected[i] for i in range(25)]


def test_long_chains() -> None:
    count = 200_000
    chain = np.stack([np.arange(count - 1), np.arange(1, count)], axis=1)
    assert (components([chain[::-1].copy()], count) == 0).all()
    assert (components([chain[1::2].copy()], count)[2::2] == np.arange(1, count - 1, 2)).all()


def test_memory_is_eight_bytes_a_document() -> None:
    edges = np.random.default_rng(0).integers(0, 1_000_000, (100_000, 2))
    tracemalloc.start()
    components([edges], 1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8.5 * 1_000_000


def test_wrong_edges_and_parents_are_refused() -> None:
    with pytest.raises(IndexError, match="edge 1 names node 3 of 3"):
        components([np.array([[0, 1], [2, 3]])], 3)
    with pytest.raises(IndexError, match="node -1"):
        components([np.array([[0, -1]])], 3)
    for parents in ([0, 2, 2], [0, -1, 2]):
        with pytest.raises(ValueError, match=r"of 1 is not in 0\.\.1"):
            _cpu.connect(np.array(parents), np.array([[1, 2]]))
        with pytest.raises(ValueError, match=r"of 1 is not in 0\.\.1"):
            _cpu.flatten(np.array(parents))


def test_verification_is_exact_and_survives_arrow() -> None:
    chance = random.Random(5)
    column = [text for j in (0.5, 0.79, 0.8, 0.81, 0.95) for text in planted("zh", j, chance)]
    sets = ShingleSets.of(Texts.of(column), np.arange(100, 110), SETTINGS)
    table = sets.to_arrow()
    batches = [ShingleSets.of_arrow(part) for part in (table[:4].combine_chunks(), table[4:])]
    pairs = np.array(list(itertools.combinations(range(100, 110), 2)))
    edges = verified(pairs, batches, SETTINGS)
    shingles = [python_shingles(text, 5) for text in column]
    expected = {(a, b): exact_jaccard(shingles[a - 100], shingles[b - 100]) for a, b in pairs}
    assert dict(zip(map(tuple, edges.pairs.tolist()), edges.jaccard.tolist(), strict=True)) == {
        pair: value for pair, value in expected.items() if value >= 0.8
    }
    with pytest.raises(DataError, match=r"1 documents of candidate pairs have no .* the first is 110"):
        verified(np.array([[100, 110]]), batches, SETTINGS)
    assert pa.types.is_large_list(table.schema.field("shingles").type)


def test_the_threshold_itself_is_a_duplicate() -> None:
    settings = NearDuplicates(ngram=1)
    sets = ShingleSets.of(Texts.of(["a b c d", "a b c d e", "a b c d e f"]), np.arange(3), settings)
    edges = verified(np.array([[0, 1], [0, 2], [1, 2]]), [sets], settings)
    assert edges.pairs.tolist() == [[0, 1], [1, 2]]
    assert edges.jaccard.tolist() == [4 / 5, 5 / 6]


@pytest.mark.parametrize("language", LANGUAGES)
def test_planted_duplicates_are_found_as_the_s_curve_says_and_nothing_else(language: str) -> None:
    chance = random.Random(LANGUAGES.index(language))
    count = 150
    for target in (0.6, 0.7, 0.75, 0.82, 0.9, 0.95):
        texts = [text for _ in range(count) for text in planted(language, target, chance)]
        clusters, edges = search([texts])
        shingles = [python_shingles(text, 5) for text in texts]
        true = [exact_jaccard(shingles[i], shingles[i + 1]) for i in range(0, 2 * count, 2)]
        found = {tuple(pair) for pair in edges.pairs.tolist()}
        assert all(i % 2 == 0 and j == i + 1 for i, j in found)  # no pair but planted ones
        assert {i // 2 for i, _ in found} <= {k for k, value in enumerate(true) if value >= 0.8}
        assert (clusters != np.arange(2 * count)).sum() == len(found)
        eligible = sum(value >= 0.8 for value in true)
        expected = float(np.mean(SETTINGS.probability(np.array(true))))
        if eligible:
            deviation = np.sqrt(expected * (1 - expected) / eligible)
            assert abs(len(found) / eligible - expected) <= 5 * deviation + 1e-3


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    chance = random.Random(6)
    texts = ["", "...", "one word", "One, word!"]
    for _ in range(60):
        language = chance.choice(LANGUAGES)
        texts += planted(language, chance.choice([0.5, 0.7, 0.8, 0.85, 0.9, 1.0]), chance, words=60)
    template = random_words("en", 100, chance)
    texts += [written([*template, str(i)]) for i in range(80)]
    chance.shuffle(texts)
    return texts


def test_units_partitions_and_threads_change_nothing(corpus: list[str]) -> None:
    expected, edges = search([corpus])
    assert (near_duplicates(Texts.of(corpus), SETTINGS) == expected).all()
    assert len(set(expected.tolist())) < len(corpus) - 80
    for units, ranges, threads in ((1, 7, 1), (2, 1, 2), (5, 64, 4), (len(corpus), 2, 2)):
        bounds = np.linspace(0, len(corpus), units + 1).astype(int)
        cut = [corpus[begin:end] for begin, end in itertools.pairwise(bounds)]
        clusters, other = search(cut, ranges=ranges, threads=threads)
        assert (clusters == expected).all()
        assert (other.pairs == edges.pairs).all()
        assert (other.jaccard == edges.jaccard).all()


def test_large_buckets_are_joined_by_few_comparisons(corpus: list[str]) -> None:
    full = NearDuplicates(first=len(corpus))
    assert (search([corpus], settings=full)[0] == search([corpus])[0]).all()


def test_empty_texts_are_no_duplicates_of_each_other() -> None:
    assert near_duplicates(Texts.of(["", "", " . ", "a", "A!"]), SETTINGS).tolist() == [0, 1, 2, 3, 3]
    assert near_duplicates(Texts.of([]), SETTINGS).tolist() == []
