"""Made-up English prose for the tests of the corpus."""

from __future__ import annotations

import random

WORDS = ["river", "stone", "market", "window", "garden", "letter", "winter", "bridge", "village", "teacher", "engine", "forest", "silver", "paper", "station", "morning", "captain", "island", "doctor", "summer", "kitchen", "harbour", "mountain", "painter", "story", "meadow", "lantern", "carpet"]  # fmt: skip
SENTENCE = "The {} {} near the {} was seen by a {} and the {} of the {} that have {} with {}."


def prose(chance: random.Random, sentences: int = 12) -> str:
    """Paragraphs of four sentences, about 80 bytes each."""
    lines = [SENTENCE.format(*chance.choices(WORDS, k=8)) for _ in range(sentences)]
    return "\n\n".join(" ".join(lines[start : start + 4]) for start in range(0, sentences, 4))
