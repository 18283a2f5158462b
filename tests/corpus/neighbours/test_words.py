"""Words of texts in many languages against the `regex` library."""

from __future__ import annotations

import regex
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2 import _cpu
from megatron_b2.corpus.neighbours.minhash import words
from tests.corpus.neighbours.languages import reference_words

LETTERS = """
    a Z straße ÉCOLE ё Ж Σ ñ e\u0301 7 ² Ⅷ ٣ हिन्दी كتاب עברית longwordofmorethaneightletters 12345678
    中 国 〇 々 ア か\u3099 ー ﾊﾟ 한 국 葛\U000e0100 𠮷 Ａ ４ ก กำ วั ນ້ຳ སྐ ་ ꀋ
"""
OTHERS = " \n\u3000\u200b.，。_-'+€\x00\u2028\ufffd😀\u0301"
UNITS = [*LETTERS.split(), *OTHERS, "❤\ufe0f"]
TEXTS = st.lists(st.sampled_from(UNITS), max_size=30).map("".join)


def simple_lower(text: str) -> str:
    return "".join("i" if c == "İ" else c.lower() for c in text)


@given(TEXTS)
def test_words_are_those_of_another_library(text: str) -> None:
    assert words(text) == [simple_lower(word) for word in reference_words(text)]


@given(st.text(max_size=40))
def test_words_of_any_text_hold_every_letter_once(text: str) -> None:
    kinds = _cpu.character_kinds()
    letters = regex.findall(r"[\p{L}\p{N}--[ำຳﾞﾟ\u115f\u1160\u3164\uffa0]]", text, regex.V1)
    expected = [c for c in simple_lower("".join(letters)) if kinds[ord(c)]]  # 0: newer than the table
    assert [c for c in "".join(words(text)) if c in set(expected)] == expected


def test_examples() -> None:
    assert words("Hello, World! It's 3.14") == ["hello", "world", "it", "s", "3", "14"]
    assert words("使用Baichuan2模型。") == ["使", "用", "baichuan2", "模", "型"]
    assert words("日本語のテキスト") == list("日本語のテキスト")
    assert words("สวัสดีชาวโลก") == ["ส", "วั", "ส", "ดี", "ช", "า", "ว", "โ", "ล", "ก"]
    assert words("Москва ΑΘΉΝΑ İstanbul") == ["москва", "αθήνα", "istanbul"]
    assert words("") == words(" \n,;\u0301\u200d") == []


def test_format_characters_part_nothing_and_vanish() -> None:
    assert words("soft\u00adhyphen") == ["softhyphen"]
    assert words("کتاب\u200cها") == ["کتابها"]
    assert words("a\u200bb") == ["a", "b"]  # ZERO WIDTH SPACE is there to part words


def test_stacked_letters_stay_together() -> None:
    assert words("ភាសាខ្មែរ") == ["ភា", "សា", "ខ្មែ", "រ"]
    assert words("မြန်မာဘာသာ") == ["မြ", "န်", "မာ", "ဘာ", "သာ"]
    assert words("သတ္တ") == ["သ", "တ္တ"]


@given(st.text("កខគសមរ\u17d2\u17b6\u17c2ကခတနမ\u1039\u103a\u102c\u103c", max_size=20))
def test_no_grapheme_cluster_is_cut(text: str) -> None:
    text = text.lstrip("\u17d2\u17b6\u17c2\u1039\u103a\u102c\u103c")
    boundaries, position = {0}, 0
    for cluster in regex.findall(r"\X", text):
        position += len(cluster)
        boundaries.add(position)
    position = 0
    for word in words(text):
        position += len(word)
        assert position in boundaries
    assert position == len(text)


def test_malformed_bytes_part_words() -> None:
    assert _cpu.words(b"ab\xffcd \xe4\xbd") == ["ab", "cd"]
    assert _cpu.words("你好".encode() + b"\xe4\xbd") == ["你", "好"]
    assert _cpu.words(b"caf\xc3") == ["caf"]
