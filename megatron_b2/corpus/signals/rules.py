"""The rules of the published filters as data, and the vectorised judge.

A document goes if it breaks one rule; the verdict names the first that it breaks. Rules about words that are
made for languages with spaces between words do not apply to the others, which have rules of their own.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa

from megatron_b2.errors import ConfigError

Comparison = Literal[">=", "<=", ">", "<"]

_COMPARE: Final[Mapping[Comparison, Callable[[np.ndarray, float], np.ndarray]]] = MappingProxyType(
    {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less}
)

UNSPACED: Final = ("zh", "yue", "ja", "ko", "th", "lo", "km", "my", "bo", "dz")
"""Languages whose words here are single characters or clusters, so that counts and lengths of words mean
other things. Korean has spaces, but its words are cut into syllables too."""
CJK: Final = ("zh", "yue", "ja", "ko")


@dataclass(frozen=True)
class Rule:
    """What holds for a good document: `signal` `comparison` `threshold`."""

    name: str
    signal: str
    comparison: Comparison
    threshold: float
    source: str
    languages: tuple[str, ...] = ()
    """Primary BCP 47 subtags it applies to; none: all languages."""
    but_not: tuple[str, ...] = ()
    """Primary subtags it does not apply to."""
    is_on: bool = True

    def applies_to(self, language: str) -> bool:
        """Whether it applies to a document of this primary subtag."""
        return (not self.languages or language in self.languages) and language not in self.but_not

    def __str__(self) -> str:
        return f"{self.name}: {self.signal} {self.comparison} {self.threshold:g}"


def _spaced(name: str, signal: str, comparison: Comparison, threshold: float, source: str) -> Rule:
    return Rule(name, signal, comparison, threshold, source, but_not=UNSPACED)


_A1 = "Rae et al. 2021, table A1"
_GOPHER = "Rae et al. 2021, A.1.1"
_C4 = "Raffel et al. 2020, 2.2"
_FINEWEB = "Penedo et al. 2024, 3.6"

RULES: Final = (
    _spaced("gopher_words_min", "words", ">=", 50, _GOPHER),
    _spaced("gopher_words_max", "words", "<=", 100_000, _GOPHER),
    _spaced("gopher_word_length_min", "mean_word_length", ">=", 3, _GOPHER),
    _spaced("gopher_word_length_max", "mean_word_length", "<=", 10, _GOPHER),
    Rule("gopher_hashes", "hashes_per_word", "<=", 0.1, _GOPHER),
    Rule("gopher_ellipses", "ellipses_per_word", "<=", 0.1, _GOPHER),
    Rule("gopher_bullet_lines", "bullet_lines", "<=", 0.9, _GOPHER),
    Rule("gopher_ellipsis_lines", "ellipsis_lines", "<=", 0.3, _GOPHER),
    Rule("gopher_alphabetic_words", "alphabetic_words", ">=", 0.8, _GOPHER),
    Rule("gopher_stop_words", "stop_words", ">=", 2, _GOPHER, languages=("en",)),
    # A Chinese word has about 1.6 characters: the limits of 50 and 100,000 words in characters.
    Rule("cjk_characters_min", "cjk_characters", ">=", 80, "ours", languages=CJK),
    Rule("cjk_characters_max", "cjk_characters", "<=", 160_000, "ours", languages=CJK),
    Rule("zh_stop_words", "stop_words_zh", ">=", 2, "ours, after Gopher's", languages=("zh",)),
    Rule("gopher_duplicate_lines", "duplicate_lines", "<=", 0.30, _A1),
    Rule("gopher_duplicate_paragraphs", "duplicate_paragraphs", "<=", 0.30, _A1),
    Rule("gopher_duplicate_line_characters", "duplicate_line_characters", "<=", 0.20, _A1),
    Rule("gopher_duplicate_paragraph_characters", "duplicate_paragraph_characters", "<=", 0.20, _A1),
    Rule("gopher_top_2_gram", "top_2_gram", "<=", 0.20, _A1),
    Rule("gopher_top_3_gram", "top_3_gram", "<=", 0.18, _A1),
    Rule("gopher_top_4_gram", "top_4_gram", "<=", 0.16, _A1),
    _spaced("gopher_duplicate_5_grams", "duplicate_5_grams", "<=", 0.15, _A1),
    _spaced("gopher_duplicate_6_grams", "duplicate_6_grams", "<=", 0.14, _A1),
    _spaced("gopher_duplicate_7_grams", "duplicate_7_grams", "<=", 0.13, _A1),
    _spaced("gopher_duplicate_8_grams", "duplicate_8_grams", "<=", 0.12, _A1),
    _spaced("gopher_duplicate_9_grams", "duplicate_9_grams", "<=", 0.11, _A1),
    _spaced("gopher_duplicate_10_grams", "duplicate_10_grams", "<=", 0.10, _A1),
    # Ten characters are about six words: Gopher's limit for those.
    Rule("unspaced_duplicate_10_grams", "duplicate_10_grams", "<=", 0.14, "ours", languages=UNSPACED),
    Rule("c4_lorem_ipsum", "lorem_ipsum", "<=", 0, _C4),
    # Off as published rules that remove most technical text; FineWeb left out C4's need for terminal
    # punctuation.
    Rule("c4_curly_brackets", "curly_brackets", "<=", 0, _C4, is_on=False),
    Rule("c4_sentences", "c4_sentences", ">=", 3, _C4, is_on=False),
    # Thai and Lao have no full stop.
    Rule("fineweb_punctuated_lines", "punctuated_lines", ">", 0.12, _FINEWEB, but_not=("th", "lo")),
    Rule("fineweb_short_lines", "short_lines", "<", 0.67, _FINEWEB),
    # 0.1 in the paper; the default in FineWeb's code is 0.01.
    Rule("fineweb_duplicate_line_characters", "duplicate_line_characters", "<", 0.1, _FINEWEB),
    Rule("fineweb_newlines", "newlines_per_word", "<=", 0.3, "FineWeb's code"),
    Rule("broken_characters", "broken", "<=", 0.01, "ours"),
)
"""In the order in which they are tried."""


def configure(overrides: Mapping[str, Any], rules: Sequence[Rule] = RULES) -> tuple[Rule, ...]:
    """The rules that are on, with changed thresholds.

    Args:
        overrides: name of a rule to a number (its threshold; the rule is on), true or false (on or off).

    Raises:
        ConfigError: with all unknown names and all values that are neither.
    """
    problems = []
    by_name = {rule.name: rule for rule in rules}
    for name, value in overrides.items():
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; rules: {', '.join(by_name)}"
            problems.append(f"there is no rule {name!r}{hint}")
        elif isinstance(value, bool):
            by_name[name] = replace(by_name[name], is_on=value)
        elif isinstance(value, int | float) and math.isfinite(value):
            by_name[name] = replace(by_name[name], threshold=float(value), is_on=True)
        else:
            problems.append(f"rule {name}: {value!r} is neither a finite threshold nor true or false")
    if problems:
        raise ConfigError(problems)
    return tuple(rule for rule in by_name.values() if rule.is_on)


@dataclass(frozen=True)
class Verdicts:
    """What the rules say of N documents."""

    rules: tuple[Rule, ...]
    broken: np.ndarray
    """int16 [N]: index in `rules` of the first rule that the document breaks; -1: it breaks none."""

    @property
    def is_kept(self) -> np.ndarray:
        """bool [N]."""
        return self.broken < 0

    def to_arrow(self) -> pa.DictionaryArray:
        """Name of the first broken rule of each document, null for those that are kept."""
        indices = pa.array(self.broken, mask=self.is_kept)
        return pa.DictionaryArray.from_arrays(indices, pa.array([rule.name for rule in self.rules]))

    def counts(self) -> dict[str, int]:
        """How many documents each rule was the first to remove, rules without any left out."""
        counts = np.bincount(self.broken[~self.is_kept], minlength=len(self.rules))
        return {rule.name: int(n) for rule, n in zip(self.rules, counts, strict=True) if n}


def judge(table: np.ndarray, languages: Sequence[str], rules: Sequence[Rule]) -> Verdicts:
    """Apply `rules` (see `configure`) in their order.

    Args:
        table: of `measure_signals`, [N].
        languages: BCP 47 tag of each document; a rule sees the primary subtag only ("zh" of "zh-Hans").

    Raises:
        ValueError: if there are not N languages.
    """
    if len(languages) != len(table):
        raise ValueError(f"{len(table)} documents need as many languages, not {len(languages)}")
    primary, codes = np.unique(
        [language.partition("-")[0].lower() for language in languages], return_inverse=True
    )
    broken = np.full(len(table), -1, np.int16)
    for index, rule in enumerate(rules):
        applies = np.array([rule.applies_to(str(language)) for language in primary], dtype=bool)[codes]
        values = table[rule.signal]
        # A share of exactly the threshold must meet it, so that the threshold is rounded as the shares are.
        threshold = float(np.float32(rule.threshold)) if values.dtype == np.float32 else rule.threshold
        fails = applies & ~_COMPARE[rule.comparison](values, threshold)
        broken[fails & (broken < 0)] = index
    return Verdicts(tuple(rules), broken)
