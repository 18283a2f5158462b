"""Bad text made from good text."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.corpus.models.corrupt import (
    DEFECTS,
    MIN_CUT_PIECES,
    Corruptor,
    misdecode,
    repeat,
    shuffle_words,
    truncate,
    truncate_end,
)
from megatron_b2.errors import InputError

ENGLISH = """The quick brown fox doesn't jump over the lazy dog when it rains in the "deep" forest of words.
Every sentence of this text has enough words that it can be cut somewhere in the middle of it.
Short one."""
CHINESE = "语言模型的困惑度越低，文本就越像训练文本，这是一个简单的道理。\n句子被打乱以后，困惑度会明显升高。"


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=300), st.sampled_from(DEFECTS), st.sampled_from(["en", "zh-Hant"]), st.integers(0, 9))
def test_any_text_gives_the_same_bad_text_again_or_none(
    text: str, defect: str, language: str, seed: int
) -> None:
    made = [Corruptor(language).corrupt(text, defect, random.Random(seed)) for _ in range(2)]  # type: ignore[arg-type]
    assert made[0] == made[1]
    assert made[0] is None or (made[0] != text and made[0].strip())


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_shuffled_lines_have_the_same_words(text: str) -> None:
    shuffled = shuffle_words(text, random.Random(0))
    assert shuffled is not None
    assert shuffled != text
    for before, after in zip(text.split("\n"), shuffled.split("\n"), strict=True):
        assert Counter(before) == Counter(after)
    if text == ENGLISH:
        assert Counter(shuffled.split()) == Counter(text.split())


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
@pytest.mark.parametrize("cut", [truncate, truncate_end])
def test_truncated_text_ends_inside_a_sentence(text: str, cut: object) -> None:
    for seed in range(30):
        fragment = cut(text, random.Random(seed))  # type: ignore[operator]
        assert fragment in text
        assert cut is truncate or text.startswith(fragment)
        end = text.index(fragment) + len(fragment)
        rest = text[end:].split("\n")[0]
        assert len(rest) >= MIN_CUT_PIECES
        assert fragment[-1] not in "。，.,!?\n"


def test_text_that_cannot_be_cut() -> None:
    assert truncate("Too short to cut.\nThis one too.", random.Random(0)) is None


def test_mojibake_is_the_round_trip_it_says() -> None:
    broken = misdecode(ENGLISH, [("utf-8", "latin-1")], random.Random(0))
    assert broken is not None
    assert "doesnâ\x80\x99t" in broken
    assert broken.encode("latin-1").decode() == ENGLISH.replace("'", "’").replace('"deep"', "“deep”")
    wide = misdecode(CHINESE, [("gb18030", "latin-1")], random.Random(0))
    assert wide is not None
    assert wide.encode("latin-1").decode("gb18030") == CHINESE
    assert misdecode("plain ascii", [("utf-8", "cp1252")], random.Random(0)) is None


def test_templates_and_encodings_of_the_test_are_not_those_of_the_training() -> None:
    lines: dict[str, set[str]] = {}
    for half in ("train", "test"):
        corruptor = Corruptor("zh", half)  # type: ignore[arg-type]
        texts = [corruptor.corrupt("字", "template", random.Random(i)) or "" for i in range(50)]
        strip = str.maketrans("", "", "0123456789字")
        lines[half] = {line.translate(strip) for text in texts for line in text.split("\n")}
        assert len(lines[half]) == 18
    assert not lines["train"] & lines["test"]


def test_braces_in_a_text_stay() -> None:
    """Words of the text go into templates as they are."""
    assert "{w}" in (Corruptor("en").corrupt("a{w} b{w} c{n}", "template", random.Random(0)) or "")


def test_repeated_lines() -> None:
    text = repeat(ENGLISH * 3, random.Random(0))
    assert text is not None
    assert max(Counter(text.split("\n")).values()) >= 3


def test_unknown_defect() -> None:
    with pytest.raises(InputError, match="'odd' is unknown"):
        Corruptor("en").corrupt("x", "odd", random.Random(0))  # type: ignore[arg-type]
