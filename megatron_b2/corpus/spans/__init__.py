"""Repeated documents, paragraphs and sentences of a corpus: hashed, grouped, cut out.

    records = record_spans(texts, documents, limits)     each unit of documents, anywhere, in any order
    repeats = find_repeats([records.paragraphs, ...])    over all units; RepeatFinder in little memory
    cuts = find_cuts(texts, documents, paragraphs=repeats["place"], ...)     each unit
    texts = apply_cuts(texts, cuts.ranges, cuts.firsts)

The first occurrence in the order of the corpus (document, then position) stays and all later ones go, so the
result does not depend on how the corpus is cut into units, on the memory, or on who worked when.
"""

from megatron_b2.corpus.spans.bloom import BloomFilter, bloom_rate
from megatron_b2.corpus.spans.cuts import Cuts, apply_cuts, find_cuts
from megatron_b2.corpus.spans.hashing import fold_text, hash_texts
from megatron_b2.corpus.spans.records import (
    RECORD,
    Records,
    SpanLimits,
    document_of,
    place_of,
    position_of,
    record_spans,
    split_by_hash,
)
from megatron_b2.corpus.spans.repeats import REPEAT, RepeatFinder, find_repeats
from megatron_b2.corpus.spans.sentences import split_paragraphs, split_sentences

__all__ = [
    "RECORD",
    "REPEAT",
    "BloomFilter",
    "Cuts",
    "Records",
    "RepeatFinder",
    "SpanLimits",
    "apply_cuts",
    "bloom_rate",
    "document_of",
    "find_cuts",
    "find_repeats",
    "fold_text",
    "hash_texts",
    "place_of",
    "position_of",
    "record_spans",
    "split_by_hash",
    "split_paragraphs",
    "split_sentences",
]
