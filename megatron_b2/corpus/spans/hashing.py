"""128-bit hashes of texts, raw or folded.

The hash is MurmurHash3 x64 128 (seed 0): among 10^12 texts, any two different ones get one hash with a chance
of about 10^24 / 2^129 = 1.5e-15. It is no defence against somebody who makes collisions on purpose, who could
only get his own text removed.
"""

from __future__ import annotations

import numpy as np

from megatron_b2 import _cpu
from megatron_b2.documents.texts import Texts


def fold_text(text: str) -> str:
    """The form in which texts are compared: no white space, control or format characters, simple lower case.

    Texts that differ only in line breaks, spacing and case are the same (our choice: extractors disagree in
    these, and Chinese has no spaces to rely on). Punctuation counts.
    """
    folded: bytes = _cpu.fold_text(text.encode())
    return folded.decode()


def hash_texts(texts: Texts, *, folded: bool) -> np.ndarray:
    """Hashes uint64 [N, 2] (high, low) of N texts: of their bytes, or of their folded form."""
    hashes: np.ndarray = _cpu.hash_texts(texts.data, texts.offsets, folded=folded)
    return hashes
