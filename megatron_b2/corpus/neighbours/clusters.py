"""Clusters of near-duplicates: connected components of verified pairs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_b2 import _cpu
from megatron_b2.corpus.neighbours.lsh import candidate_pairs, distinct_pairs, records
from megatron_b2.corpus.neighbours.minhash import signatures
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.corpus.neighbours.verify import ShingleSets, verified
from megatron_b2.documents.texts import Texts


def components(edges: Iterable[np.ndarray], documents: int) -> np.ndarray:
    """Cluster of every document, int64 [documents]: the smallest document connected with it.

    The order of the edges does not matter. Memory is 8 bytes a document beside one array of edges.

    Args:
        edges: arrays int64 [E, 2] of document indices.
    """
    parents = np.arange(documents, dtype=np.int64)
    for pairs in edges:
        _cpu.connect(parents, pairs)
    _cpu.flatten(parents)
    return parents


def near_duplicates(texts: Texts, settings: NearDuplicates) -> np.ndarray:
    """Clusters, int64 [N], of texts in memory; a text is kept where its cluster is its own index."""
    partitions = records(signatures(texts, settings), settings, first_document=0, ranges=1)
    pairs = distinct_pairs([candidate_pairs([partition], settings) for partition in partitions])
    documents = np.unique(pairs)
    sets = ShingleSets.of(Texts.of_arrow(texts.to_arrow().take(documents)), documents, settings)
    return components([verified(pairs, [sets], settings).pairs], len(texts))
