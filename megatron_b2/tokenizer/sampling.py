"""How often each document is taken: language weights, temperature, byte budget. Pure arithmetic."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from megatron_b2.errors import InputError

MAX_COPIES = 4.0
"""A language short of its share is repeated at most this often (our choice)."""


def parse_weights(items: Sequence[str]) -> dict[str, float]:
    """Weights from strings such as zh=0.4; raises InputError for another form or a sum above 1."""
    weights: dict[str, float] = {}
    for item in items:
        language, equals, value = item.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = float("nan")
        if not (language and equals and 0 < weight <= 1):
            raise InputError(
                f"language weight {item!r}: write LANGUAGE=SHARE with 0 < SHARE <= 1, such as zh=0.4"
            )
        if language in weights:
            raise InputError(f"language weight {item!r}: {language} has a weight already")
        weights[language] = weight
    if sum(weights.values()) > 1 + 1e-9:
        raise InputError(
            f"the language weights add up to {sum(weights.values()):g}; they are shares, at most 1 together"
        )
    return weights


def sampling_rates(
    sizes: Mapping[str, int], *, weights: Mapping[str, float], temperature: float, max_bytes: int | None
) -> dict[str, float]:
    """Copies to take of each document, by language (1.5: every document once, half of them twice).

    sizes: bytes of text by language. weights: shares of the sample; "zh" stands for zh and all zh-*; what
    they leave of 1 goes to the other languages. Inside a weight, and without weights, shares follow
    size^(1/temperature). max_bytes: size of the sample; none, or more than there is, means as much as there
    is.

    Raises InputError when there is no text, or none of a weighted language.
    """
    if temperature < 1:
        raise InputError(f"temperature is {temperature:g}; give 1 (by size) or more (flatter)")
    present = {language: size for language, size in sizes.items() if size > 0}
    if not present:
        raise InputError("the input has no text")
    shares: dict[str, float] = {}
    for key, weight in weights.items():
        members = [lang for lang in present if lang == key or lang.startswith(f"{key}-")]
        if not members or any(lang in shares for lang in members):
            problem = "is covered by another weight" if members else "is not in the input"
            raise InputError(
                f"language {key!r} has a weight but {problem}; languages: {', '.join(sorted(present))}"
            )
        shares.update(_split(weight, {lang: present[lang] for lang in members}, temperature))
    others = {lang: size for lang, size in present.items() if lang not in shares}
    left = 1 - sum(weights.values())
    if others:
        shares.update(_split(max(left, 0.0), others, temperature))
    total = min(max_bytes or sum(present.values()), sum(present.values()))
    norm = sum(shares.values())
    return {lang: min(shares[lang] / norm * total / size, MAX_COPIES) for lang, size in present.items()}


def num_copies(rate: float, *, seed: int, index: int) -> int:
    """Copies of document number `index`: rate rounded up or down by a hash of (seed, index)."""
    whole = int(rate)
    return whole + (uniform(seed, index) < rate - whole)


def uniform(seed: int, index: int) -> float:
    """Number in [0, 1) that depends on nothing but its arguments."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _split(weight: float, sizes: Mapping[str, int], temperature: float) -> dict[str, float]:
    powers = {language: size ** (1 / temperature) for language, size in sizes.items()}
    total = sum(powers.values())
    return {language: weight * power / total for language, power in powers.items()}
