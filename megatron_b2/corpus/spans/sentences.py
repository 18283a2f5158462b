"""Sentences and paragraphs of texts, as columns over the same bytes.

The rules for the ends of sentences are in csrc/cpu/text/sentences.h. No byte is lost: the parts of a text
behind each other are the text. White space belongs to the part before it, up to the last end of a line.
"""

from __future__ import annotations

import numpy as np

from megatron_b2 import _cpu
from megatron_b2.documents.texts import Texts


def split_sentences(texts: Texts) -> tuple[Texts, np.ndarray]:
    """All sentences of N texts, and int64 [N + 1]: the first sentence of each text, and their number."""
    offsets, firsts = _cpu.split_texts(texts.data, texts.offsets, paragraphs=False)
    return Texts(texts.data, offsets), firsts


def split_paragraphs(texts: Texts) -> tuple[Texts, np.ndarray]:
    """The same for paragraphs: what stands between blank lines, or each line of a text without blank
    lines."""
    offsets, firsts = _cpu.split_texts(texts.data, texts.offsets, paragraphs=True)
    return Texts(texts.data, offsets), firsts
