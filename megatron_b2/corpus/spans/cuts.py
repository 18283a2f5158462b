"""Turns repeated parts into byte ranges, and cuts these out of texts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_b2 import _cpu
from megatron_b2.documents.texts import Texts

_NONE = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Cuts:
    """What leaves N texts."""

    ranges: np.ndarray
    """int64 [M, 2]: bytes begin, end of a text; the ranges of a text ascend and do not touch."""
    firsts: np.ndarray
    """int64 [N + 1]: the first range of each text, and M."""


def find_cuts(
    texts: Texts,
    documents: np.ndarray,
    *,
    paragraphs: np.ndarray = _NONE,
    runs: np.ndarray = _NONE,
    sentences: np.ndarray = _NONE,
    run_length: int = 0,
) -> Cuts:
    """The bytes of repeated paragraphs, runs of sentences and sentences.

    A cut takes the white space behind it along, so that whole lines vanish; but where it starts inside of a
    line, that line keeps its end, and the cut takes the white space before it instead.

    Args:
        texts, documents: as for `record_spans`.
        paragraphs, runs, sentences: uint64 places, ascending, of what goes; also of other documents.
        run_length: sentences in a run.

    Raises:
        ValueError: if a place names a part that its document does not have: the texts are not those recorded.
    """
    ranges, firsts = _cpu.find_cuts(
        texts.data,
        texts.offsets,
        np.ascontiguousarray(documents, np.int64),
        paragraphs=np.ascontiguousarray(paragraphs, np.uint64),
        runs=np.ascontiguousarray(runs, np.uint64),
        sentences=np.ascontiguousarray(sentences, np.uint64),
        run_length=run_length,
    )
    return Cuts(ranges, firsts)


def apply_cuts(texts: Texts, ranges: np.ndarray, firsts: np.ndarray) -> Texts:
    """N texts without the ranges (see Cuts), in new memory.

    Raises ValueError if ranges overlap, do not ascend, or leave their text.
    """
    data, offsets = _cpu.apply_cuts(
        texts.data,
        texts.offsets,
        np.ascontiguousarray(ranges, np.int64),
        np.ascontiguousarray(firsts, np.int64),
    )
    return Texts(data, offsets)
