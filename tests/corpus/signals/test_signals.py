"""The fused native pass against small documents computed by hand, and against a slow reference in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2 import _cpu
from megatron_b2.corpus.signals import SIGNALS, measure_signals, to_arrow
from megatron_b2.documents.texts import Texts
from tests.corpus.signals import reference as ref

ALPHABET = (
    ref.HAN + ref.KANA + ref.HANGUL + ref.THAI + ref.THAI_MARKS + ref.FORMATS + ref.SPACES + ref.CONTROLS + ref.NEWLINES
    + ref.PUNCTUATION + ref.SYMBOLS + ref.LETTERS + ref.DIGITS + ref.MARKS
)  # fmt: skip
# Pieces that make the signals move; single characters alone would hardly ever spell one of them.
PIECES = (
    "the", "Be", "to", "of", "and", "THAT", "have", "with", "JavaScript", "javascripts", "lorem", "Ipsum", "lorem ipsum",
    "terms of use", "privacy policy", "Cookie Policy", "uses cookies", "use of cookies", "use", "cookies", "http://a.b",
    "HTTPS://", "www.a.de", "xwww.a", "/www.b", "...", "……", ". ", "! ", "。", "\n", "\n\n", "\n", " ", " ", " ", "- ",
    "• ", "# ", "{x}", "Ã©", "â€™", "锟斤拷", "的", "世界", "a", "b", "a b c d e", "the the", "\r\n", "Dr. ", "1.", "“好”",
    "x" * 999, "y" * 12, "中" * 16, "\ufffd", "한국", "กิข", "é", "e\u0301", "ſ", "7", "²",
)  # fmt: skip

texts = st.one_of(
    st.text(alphabet=ALPHABET, max_size=60),
    st.lists(st.sampled_from(PIECES), max_size=60).map("".join),
    st.lists(st.sampled_from(PIECES), max_size=60).map(" ".join),
    st.lists(st.sampled_from(("a", "bc", "d")), max_size=60).map(" ".join),
)


def measured(*documents: str) -> np.ndarray:
    return measure_signals(Texts.of(documents))


def row(document: str) -> dict[str, float]:
    (values,) = measured(document)
    return {signal.name: values[signal.name].item() for signal in SIGNALS}


def test_columns_are_those_of_the_native_table() -> None:
    table = measured("a")
    assert table.dtype.names == tuple(signal.name for signal in SIGNALS)
    kinds = {"count": np.dtype(np.int64), "share": np.dtype(np.float32)}
    assert [table.dtype[signal.name] for signal in SIGNALS] == [kinds[signal.kind] for signal in SIGNALS]
    assert len({signal.meaning for signal in SIGNALS} | {""}) == len(SIGNALS) + 1
    assert len(SIGNALS) >= 40


@settings(max_examples=1000)
@given(text=texts)
def test_every_signal_equals_the_reference(text: str) -> None:
    expected = ref.signals(text)
    found = row(text)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


@settings(max_examples=50)
@given(documents=st.lists(texts, max_size=8))
def test_documents_do_not_see_each_other(documents: list[str]) -> None:
    together = measured(*documents)
    assert [list(values) for values in together] == [list(measured(d)[0]) for d in documents]


def test_english_by_hand() -> None:
    text = "The cat sat with the dog.\nThe cat sat with the dog.\n\n- And 3 birds...\n"
    values = row(text)
    assert values["bytes"] == values["characters"] == 70
    assert (values["lines"], values["paragraphs"], values["sentences"], values["words"]) == (3, 2, 3, 15)
    assert values["stop_words"] == 3  # the, with, and
    assert values["mean_word_length"] == pytest.approx((2 * 19 + 9) / 15)
    assert values["alphabetic_words"] == pytest.approx(14 / 16)  # "3" is not, and "-" counts as a word
    assert values["bullet_lines"] == values["ellipsis_lines"] == pytest.approx(1 / 3)
    assert values["ellipses_per_word"] == pytest.approx(1 / 15)
    assert values["duplicate_lines"] == pytest.approx(1 / 3)
    assert values["duplicate_line_characters"] == pytest.approx(25 / (25 + 25 + 16))
    assert values["duplicate_paragraphs"] == 0
    # "with the" and "the dog", "the cat" and "cat sat" and "sat with" occur twice; "with the" is among the longest.
    assert values["top_2_gram"] == pytest.approx(2 * 7 / 47)
    assert values["duplicate_5_grams"] == pytest.approx(19 / 47)
    assert values["duplicate_7_grams"] == 0
    assert values["terminal_lines"] == pytest.approx(2 / 3)
    assert values["c4_characters"] == pytest.approx(50 / 66)
    assert values["c4_sentences"] == 2
    assert values["punctuated_lines"] == values["short_lines"] == 1
    assert values["newlines_per_word"] == pytest.approx(4 / 15)


def test_chinese_by_hand() -> None:
    text = "世界是美好的。我们在这里！\n「真的吗？」他问……\n这是第 2 段，没有标点\n"
    values = row(text)
    assert (values["lines"], values["paragraphs"], values["sentences"]) == (3, 3, 5)
    assert values["words"] == 11 + 5 + 9
    assert values["cjk_characters"] == 24
    assert values["stop_words_zh"] == 5  # 是 的 在 这 有
    assert (
        values["mean_word_length"] == 1
    )  # of "2": Han characters are words, but have no length worth measuring
    assert values["terminal_lines"] == pytest.approx(1 / 3)
    assert values["punctuated_lines"] == pytest.approx(2 / 3)
    assert values["ellipsis_lines"] == pytest.approx(1 / 3)
    assert values["short_lines"] == 1
    assert values["few_word_lines"] == 0
    assert values["han"] == pytest.approx(24 / (13 + 10 + 10))


def test_width_of_short_lines() -> None:
    """30 Latin letters are short, 31 are not; 15 Han characters are short, 16 are not."""
    assert [row(line)["short_lines"] for line in ("a" * 30, "a" * 31, "中" * 15, "中" * 16)] == [1, 0, 1, 0]


def test_overlapping_repeats_count_once() -> None:
    values = row("a a a a a a a a")
    assert values["top_2_gram"] == values["top_4_gram"] == 1
    assert values["duplicate_5_grams"] == pytest.approx(7 / 8)
    assert values["duplicate_7_grams"] == pytest.approx(7 / 8)
    assert values["duplicate_8_grams"] == 0


def test_paragraphs_of_a_text_without_blank_lines_are_its_lines() -> None:
    values = row("one two\nthree four\none two\n")
    assert values["paragraphs"] == 3
    assert values["duplicate_paragraphs"] == values["duplicate_lines"] == pytest.approx(1 / 3)
    assert row("one two\nthree four\none two\n\nx")["paragraphs"] == 2


@pytest.mark.parametrize("text", ["", " ", "\n", "\n \n\t", "\r\n\r\n"])
def test_nothing_but_white_space(text: str) -> None:
    values = row(text)
    white = {"bytes", "characters", "white_space"}
    assert all(value == 0 for name, value in values.items() if name not in white)
    assert values["white_space"] == (1 if text else 0)


def test_bytes_that_are_no_utf8() -> None:
    data = b"ab\xff\xfe c\xe4\xb8\xd0\x96 \xed\xa0\x80."
    (values,) = _cpu.signals(np.frombuffer(data, np.uint8), np.array([0, len(data)], np.int64))
    decoded = data.decode(errors="replace")
    assert values["bytes"] == len(data)
    assert values["replacement_characters"] == 7  # a byte each; Python makes one of E4 B8
    assert decoded.count("\ufffd") == 6
    assert values["words"] == 3


def test_every_length_and_position_in_the_buffer() -> None:
    """Words and lines at the very end of the memory are read as anywhere else."""
    text = "Words of många längder 世界 abcdefghijklmnop qrstu."
    encoded = text.encode()
    for end in range(len(encoded) + 1):
        piece = encoded[:end].decode(errors="ignore")
        assert row(piece)["words"] == ref.signals(piece.replace("ä", "é").replace("å", "é"))["words"]


def test_a_huge_document_has_bounded_repetition() -> None:
    """Behind 2^20 words repetition is not looked for; everything else is."""
    unique = " ".join(f"w{i}" for i in range(1 << 20))
    values = row(unique + " w1 w2 w3 w4 w5 w6 w1 w2 w3 w4 w5 w6")
    assert values["words"] == (1 << 20) + 12
    assert values["duplicate_5_grams"] == 0
    assert row("w1 w2 w3 w4 w5 w6 w1 w2 w3 w4 w5 w6 " + unique)["duplicate_5_grams"] > 0


def test_bad_offsets_are_an_error() -> None:
    data = np.zeros(4, np.uint8)
    with pytest.raises(ValueError, match="offset 2 of the texts is smaller"):
        _cpu.signals(data, np.array([0, 3, 2], np.int64))
    with pytest.raises(ValueError, match="end outside of their 4 bytes"):
        _cpu.signals(data, np.array([0, 5], np.int64))


def test_arrow_columns() -> None:
    table = to_arrow(measured("a b", "世界。"))
    assert table.column_names == [signal.name for signal in SIGNALS]
    assert table.column("cjk_characters").to_pylist() == [0, 2]
