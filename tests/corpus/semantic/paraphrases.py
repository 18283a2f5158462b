"""Pairs of documents that say the same in other words: sentences in another order, synonyms, other inflections."""

from __future__ import annotations

import random

_VERBS = (  # he ..., they ..., a synonym
    ("checks", "check", "verifies"),
    ("describes", "describe", "explains"),
    ("collects", "collect", "gathers"),
    ("repairs", "repair", "fixes"),
    ("publishes", "publish", "releases"),
    ("examines", "examine", "inspects"),
    ("removes", "remove", "deletes"),
    ("compares", "compare", "contrasts"),
)
_ACTORS = (
    ("engineer", "engineers", "technician"), ("teacher", "teachers", "instructor"), ("farmer", "farmers", "grower"),
    ("doctor", "doctors", "physician"), ("sailor", "sailors", "mariner"), ("writer", "writers", "author"),
    ("lawyer", "lawyers", "attorney"), ("merchant", "merchants", "trader"), ("student", "students", "pupil"),
    ("pilot", "pilots", "aviator"),
)  # fmt: skip
_WHEN = (
    ("every morning", "each morning"),
    ("in the winter", "during winter"),
    ("before the festival", "ahead of the festival"),
    ("after the storm", "once the storm is over"),
    ("on Sundays", "every Sunday"),
    ("at night", "by night"),
)

_Fact = tuple[int, int, str, str, int]


def _say(fact: _Fact, rng: random.Random, *, other_words: bool) -> str:
    actor, verb, thing, place, when = fact
    if not other_words:
        return f"The {_ACTORS[actor][0]} {_VERBS[verb][0]} the {thing} of {place} {_WHEN[when][0]}."
    start = _WHEN[when][1]
    form = rng.randrange(3)
    if form == 0:
        sentence = f"{start}, {_ACTORS[actor][1]} {_VERBS[verb][1]} {thing} at {place}."
    elif form == 1:
        sentence = f"{start} a {_ACTORS[actor][2]} {_VERBS[verb][0]} {thing} in the town of {place}."
    else:
        sentence = (
            f"{start}, it is the {_ACTORS[actor][0]} who {_VERBS[verb][2]} one {thing[:-1]} of {place}."
        )
    return sentence[0].upper() + sentence[1:]


def _names(count: int, seed: int, ending: str) -> list[str]:
    """Made-up nouns."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        found["".join(syllables) + ending] = None
    return list(found)


def paraphrased_documents(count: int, seed: int = 0, sentences: int = 12) -> tuple[list[str], list[str]]:
    """`count` documents, each about its own few actors, things and places, and a paraphrase of each."""
    rng = random.Random(seed)
    all_things, all_places = _names(400, 1, "ns"), _names(150, 2, "burg")
    documents, paraphrases = [], []
    for _ in range(count):
        things, places = rng.sample(all_things, 5), rng.sample(all_places, 3)
        actors = rng.sample(range(len(_ACTORS)), 3)
        facts: list[_Fact] = [
            (
                rng.choice(actors),
                rng.randrange(len(_VERBS)),
                rng.choice(things),
                rng.choice(places),
                rng.randrange(len(_WHEN)),
            )
            for _ in range(sentences)
        ]
        documents.append(" ".join(_say(fact, rng, other_words=False) for fact in facts))
        other = rng.sample(facts, len(facts))
        paraphrases.append(" ".join(_say(fact, rng, other_words=True) for fact in other))
    return documents, paraphrases
