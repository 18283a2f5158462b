"""Words and MinHash signatures of texts (csrc/cpu/text)."""

from __future__ import annotations

import numpy as np

from megatron_b2 import _cpu
from megatron_b2.corpus.neighbours.han import characters
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.documents.texts import Texts

NO_HASH = np.uint32(0xFFFFFFFF)
"""Every hash of a text without words."""


def words(text: str) -> list[str]:
    """The words of a text as shingles see them: lower case, without punctuation, one for each Han, kana and
    Hangul character, one for each grapheme cluster of scripts without spaces. Raises UnicodeEncodeError for a
    lone surrogate."""
    return _cpu.words(text.encode())


def signatures(texts: Texts, settings: NearDuplicates) -> np.ndarray:
    """MinHash signatures, uint32 [N, permutations]; the same on every machine.

    The share of equal hashes of two rows estimates the Jaccard similarity of the shingle sets. A text shorter
    than a shingle has one shingle of all its words; a text without words has NO_HASH everywhere and is no
    duplicate of anything.
    """
    return _cpu.minhash_signatures(
        texts.data,
        texts.offsets,
        length=settings.ngram,
        permutations=settings.permutations,
        seed=settings.seed,
        characters=characters(settings.across_scripts),
    )
