"""Modified Kneser-Ney smoothing from its definition, with dictionaries and exact fractions of the counts.

Written from Chen & Goodman (TR-10-98, 1998), sections 4.1.6 and 4.2.2, apart from the C++ code and without its data
structures: recursion over the definition instead of stored back-off weights.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

Gram = tuple[int, ...]
BEGIN, END, UNKNOWN = -1, -2, -3
FALLBACK = (0.5, 1.0, 1.5)


@dataclass
class KneserNey:
    """A model of `num_tokens` token ids (and the unknown word and the end)."""

    order: int
    num_tokens: int
    sequences: Sequence[Sequence[int]]
    prune: Sequence[int]

    def __post_init__(self) -> None:
        occurrences: dict[int, Counter[Gram]] = {k: Counter() for k in range(1, self.order + 1)}
        for sequence in self.sequences:
            padded = [BEGIN, *sequence, END]
            for end in range(2, len(padded) + 1):
                for k in range(1, min(self.order, end) + 1):
                    occurrences[k][tuple(padded[end - k : end])] += 1
        self.adjusted: dict[int, dict[Gram, int]] = {self.order: dict(occurrences[self.order])}
        for k in range(1, self.order):
            before: dict[Gram, set[int]] = defaultdict(set)
            for gram in occurrences[k + 1]:
                before[gram[1:]].add(gram[0])
            self.adjusted[k] = {
                gram: count if gram[0] == BEGIN else len(before[gram])
                for gram, count in occurrences[k].items()
            }
        self.kept = {
            k: {gram for gram, count in occurrences[k].items() if count > self.prune[k - 1]}
            for k in range(1, self.order + 1)
        }
        self.discounts = {k: self._discounts(k) for k in range(1, self.order + 1)}
        self.followers: dict[Gram, list[Gram]] = defaultdict(list)
        for k in range(1, self.order + 1):
            for gram in self.adjusted[k]:
                self.followers[gram[:-1]].append(gram)

    def _discounts(self, k: int) -> tuple[float, ...]:
        n = Counter(self.adjusted[k].values())
        if not all(n[i] for i in (1, 2, 3, 4)):
            return FALLBACK
        y = n[1] / (n[1] + 2 * n[2])
        found = tuple(i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3))
        return found if all(0 <= d <= i for i, d in enumerate(found, 1)) else FALLBACK

    def probability(self, word: int, context: Gram) -> float:
        """P(word | context), `context` of at most order - 1 tokens."""
        if context and self.followers.get(context) is None:
            return self.probability(word, context[1:])
        k = len(context) + 1
        grams = self.followers[context]
        total = sum(self.adjusted[k][gram] for gram in grams)
        freed, own = 0.0, 0.0
        for gram in grams:
            count = self.adjusted[k][gram]
            discount = self.discounts[k][min(count, 3) - 1]
            freed += discount if gram in self.kept[k] else count
            if gram[-1] == word and gram in self.kept[k]:
                own = count - discount
        lower = self.probability(word, context[1:]) if context else 1 / (self.num_tokens + 2)
        return own / total + freed / total * lower

    def log10(self, sequence: Sequence[int]) -> list[float]:
        """Log10 probabilities of the tokens of a sequence and of its end."""
        padded = [BEGIN, *sequence, END]
        return [
            math.log10(self.probability(word, tuple(padded[max(0, i + 1 - (self.order - 1)) : i + 1])))
            for i, word in enumerate(padded[1:])
        ]
