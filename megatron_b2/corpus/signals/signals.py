"""What the heuristic signals of a document are; csrc/cpu/text/signals.cpp measures all of them in one pass.

Words, lines, paragraphs and sentences are the same for every signal:

- A word is a run of letters and digits, or a single Han, kana or Hangul character, or a grapheme cluster of a
  script without spaces (Thai, Khmer, ...), in lower case. So Chinese needs no dictionary and is no one long
  word. The papers name no tokenizer.
- A line ends where `str.splitlines` ends one. Lines are seen without the white space around them, and blank
  lines
  are no lines.
- A paragraph is a block of lines between blank lines; in a text without blank lines, each line is one.
- Sentences end at 。！？ as well as at . ! ? (`megatron_b2.corpus.spans.split_sentences`).
- "Duplicate" is what is equal to something before it in the document. Duplicates and n-grams are looked for
  in
  the first 1,048,576 words, lines and paragraphs; this bounds the memory.

Sources: Gopher = Rae et al. 2021, arXiv 2112.11446, A.1.1 and table A1. C4 = Raffel et al. 2020, JMLR 21
(140), 2.2, with the constants of its code. FineWeb = Penedo et al. 2024, arXiv 2406.17557, 3.6, with the
constants of its code. "Ours" = in none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import pyarrow as pa

from megatron_b2 import _cpu
from megatron_b2.documents.texts import Texts


@dataclass(frozen=True)
class Signal:
    """A column."""

    name: str
    kind: Literal["count", "share"]
    """A count is an int64; a share (or another ratio) is a float32, and 0 where it would be 0 / 0."""
    source: str
    meaning: str


def _counts(source: str, **meanings: str) -> tuple[Signal, ...]:
    return tuple(Signal(name, "count", source, meaning) for name, meaning in meanings.items())


def _shares(source: str, **meanings: str) -> tuple[Signal, ...]:
    return tuple(Signal(name, "share", source, meaning) for name, meaning in meanings.items())


SIGNALS: Final = (
    *_counts(
        "Ours",
        bytes="bytes of UTF-8",
        characters="characters, white space included",
        lines="lines that are not blank",
        paragraphs="paragraphs",
        sentences="sentences",
    ),
    *_counts("Gopher", words="words"),
    *_counts("Ours", cjk_characters="Han, kana and Hangul characters"),
    *_counts("Gopher", stop_words="how many of: the, be, to, of, and, that, have, with; in any case"),
    *_counts("Ours", stop_words_zh="how many of: 的 了 是 在 和 有 不 这 (or 這)"),
    *_counts(
        "C4",
        c4_sentences="sentences in the lines that C4 keeps: see c4_characters",
        javascript_lines="lines with the word JavaScript in any case",
        policy_lines="lines with: terms of use, privacy policy, cookie policy, uses cookies, "
        "use of cookies, or use cookies, in any case",
        long_word_lines="lines with more than 1,000 characters without white space",
        curly_brackets="{ and }",
        lorem_ipsum="how often 'lorem ipsum' occurs in any case",
    ),
    *_counts(
        "Ours",
        urls="http://, https://, and www. where none of these is before it",
        replacement_characters="U+FFFD, and bytes that are no UTF-8",
        mojibake="places where UTF-8 was read as Windows-1252 (Ã©, â€™) or as GBK (锟斤拷)",
        control_characters="C0 and C1 controls but tab, line feed and carriage return, and DEL",
    ),
    *_shares(
        "Gopher",
        mean_word_length="characters a word, of the words of scripts with spaces between words",
        hashes_per_word="# a word",
        ellipses_per_word="... and … a word",
        bullet_lines="lines that start with a bullet such as •, or with - * – — and white space",
        ellipsis_lines="lines that end with ... or …",
        alphabetic_words="words with a letter, of all words and of pieces between white space without a word",
        duplicate_lines="duplicate lines",
        duplicate_paragraphs="duplicate paragraphs",
        duplicate_line_characters="characters in duplicate lines, of those in lines (FineWeb has it too)",
        duplicate_paragraph_characters="characters in duplicate paragraphs, of those in lines",
        top_2_gram="characters in the most frequent sequence of 2 words if it is repeated, of those "
        "in words; of several most frequent ones the longest, then the first",
        top_3_gram="the same for 3 words",
        top_4_gram="the same for 4 words",
        duplicate_5_grams="characters in duplicate sequences of 5 words, each once, of those in words",
        duplicate_6_grams="the same for 6 words",
        duplicate_7_grams="the same for 7 words",
        duplicate_8_grams="the same for 8 words",
        duplicate_9_grams="the same for 9 words",
        duplicate_10_grams="the same for 10 words",
    ),
    *_shares(
        "C4",
        terminal_lines='lines that end with . ! ? " ” 。 ！ ？ ｡ ． 」 』 or the full stop of another script '
        "(Hindi, Urdu, Burmese, Khmer, ...), but not with ... or …",
        few_word_lines="lines with fewer than 5 words",
        c4_characters="characters in the lines that C4 keeps, of those in lines: terminal lines without "
        "few words, long words, JavaScript or policies",
    ),
    *_shares(
        "FineWeb",
        punctuated_lines="terminal lines, and those that end with ' ’ ... or …",
        short_lines="lines of at most 30 characters; Han, kana, Hangul and their punctuation count 2",
        newlines_per_word="ends of lines a word",
    ),
    *_shares(
        "Ours",
        latin="Latin letters, of all characters but white space",
        other_letters="letters of other scripts with spaces between words, of the same",
        han="Han characters, of the same",
        kana="kana, of the same",
        hangul="Hangul, of the same",
        unspaced_letters="letters of scripts without spaces such as Thai, of the same",
        digits="digits, of the same",
        punctuation="punctuation and symbols, of the same",
        white_space="white space, of all characters",
        broken="replacement_characters, mojibake and control_characters a character",
    ),
)
"""The columns in order."""


def measure_signals(texts: Texts) -> np.ndarray:
    """All signals of N texts: a structured array [N] with the fields of SIGNALS (int64 and float32)."""
    table: np.ndarray = _cpu.signals(texts.data, texts.offsets)
    return table


def to_arrow(table: np.ndarray) -> pa.Table:
    """The columns of `measure_signals` for a Parquet file."""
    return pa.table({signal.name: np.ascontiguousarray(table[signal.name]) for signal in SIGNALS})
