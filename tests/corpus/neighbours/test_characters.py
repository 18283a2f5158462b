"""Kinds and lower case of all 1,114,112 characters against unicodedata and the `regex` library."""

from __future__ import annotations

import codecs
import sys
import unicodedata
from collections import Counter
from types import ModuleType

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2 import _cpu
from tests.scripts import load_script

KINDS = (
    *("Other", "Space", "Newline", "Punctuation", "Symbol", "Digit", "Letter", "Mark", "Format"),
    *("Han", "Kana", "Hangul", "Cluster"),
)
SCRIPTS = {
    "Han": ["Han"],
    "Kana": ["Hiragana", "Katakana"],
    "Hangul": ["Hangul"],
    "Cluster": [
        *("Thai", "Lao", "Khmer", "Myanmar", "Tibetan", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet"),
        *("Ahom", "Balinese", "Javanese", "Yi"),
    ],
}
ALSO_OURS = {"Han": "〆", "Kana": "〱〲〳〴〵〼ーｰ", "Hangul": "", "Cluster": "ꧏ"}
"""Marks of repetition and length that Unicode gives to several scripts."""
SURROGATES = range(0xD800, 0xE000)
EVERY = [chr(code) for code in range(sys.maxunicode + 1) if code not in SURROGATES]
SAME_UNICODE = unicodedata.unidata_version == _cpu.UNICODE_VERSION


@pytest.fixture(scope="module")
def kinds() -> dict[str, str]:
    codes = _cpu.character_kinds()
    return {character: KINDS[codes[ord(character)]] for character in EVERY}


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    return load_script("unicode_table")


@pytest.mark.skipif(not SAME_UNICODE, reason=f"the table is of Unicode {_cpu.UNICODE_VERSION}")
def test_the_committed_table_is_what_the_script_writes(maker: ModuleType) -> None:
    assert maker.TABLE.read_text(encoding="utf-8") == maker.table()


@pytest.mark.skipif(not SAME_UNICODE, reason=f"the table is of Unicode {_cpu.UNICODE_VERSION}")
def test_kinds_agree_with_general_categories(kinds: dict[str, str]) -> None:
    allowed = {
        "Space": {"Zs", "Cc", "Cf"},
        "Newline": {"Cc", "Zl", "Zp"},
        "Punctuation": {"Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po"},
        "Symbol": {"Sm", "Sc", "Sk", "So"},
        "Digit": {"Nd", "No"},
        "Letter": {"Lu", "Ll", "Lt", "Lm", "Lo", "Nl"},
        "Mark": {"Mn", "Mc", "Me", "Lo", "Lm"},
        "Format": {"Cf", "Lo"},
        "Han": {"Lo", "Lm", "Nl", "So", "Cn"},
        "Kana": {"Lo", "Lm"},
        "Hangul": {"Lo"},
        "Cluster": {"Lo", "Lm"},
        "Other": {"Cc", "Cn", "Co"},
    }
    seen = Counter((kind, unicodedata.category(character)) for character, kind in kinds.items())
    assert {pair for pair in seen if pair[1] not in allowed[pair[0]]} == set()
    # Every character of these categories has the one kind, but for the exceptions that the script names.
    assert sum(seen[kind, c] for kind in KINDS if kind != "Punctuation" for c in allowed["Punctuation"]) == 0
    assert sum(seen[kind, "Nd"] for kind in KINDS if kind != "Digit") == 0
    assert sum(seen[kind, c] for kind in KINDS if kind != "Mark" for c in ("Mn", "Mc", "Me")) == 0
    assert (seen["Mark", "Lo"], seen["Format", "Lo"], seen["Space", "Cf"]) == (2, 4, 1)


def test_spaces_and_line_ends_are_those_of_str(kinds: dict[str, str]) -> None:
    spaces = {character for character in EVERY if character.isspace()}
    newlines = {character for character in EVERY if len(f"a{character}b".splitlines()) == 2}
    assert {c for c, kind in kinds.items() if kind == "Newline"} == newlines
    assert {c for c, kind in kinds.items() if kind == "Space"} == spaces - newlines | {"\u200b"}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_scripts_agree_with_another_library(kinds: dict[str, str], kind: str) -> None:
    script = regex.compile("[" + "".join(rf"\p{{Script={name}}}" for name in SCRIPTS[kind]) + "]")
    known = [c for c in EVERY if unicodedata.category(c) != "Cn"]
    inside = {c for c in known if script.match(c)}
    ours = {c for c in known if kinds[c] == kind}
    assert "".join(sorted(ours - inside)) == ALSO_OURS[kind]
    others = {kinds[c] for c in inside - ours}
    assert others <= {"Mark", "Punctuation", "Symbol", "Digit", "Format"}


def test_unassigned_ideographs_are_han(kinds: dict[str, str]) -> None:
    assert kinds["\U0002fffd"] == kinds["\U00033479"] == "Han"
    assert kinds["\U0002ffff"] == kinds["\U00040000"] == "Other"


def test_lower_case_is_that_of_str() -> None:
    lowered = _cpu.lower("".join(EVERY).encode()).decode()
    wrong = [
        c
        for c, low in zip(EVERY, lowered, strict=True)
        if unicodedata.category(c) != "Cn" and low != c.lower()
    ]
    assert wrong == ["İ"]  # str.lower() makes it two characters; the simple lower case is i
    assert _cpu.lower("İ".encode()) == b"i"


def one_for_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("one_for_each_byte", one_for_each_byte)
TRICKY = st.lists(st.sampled_from(b"aZ\xc0\xc2\xe0\xe4\xed\xf0\xf4\xf5\xff\x80\x8f\x90\x9f\xa0\xbb\xbf"))


@given(TRICKY.map(bytes) | st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_malformed_bytes_become_replacement_characters_one_by_one(data: bytes) -> None:
    expected = data.decode("utf-8", "one_for_each_byte")
    lowered = "".join("i" if c == "İ" else c.lower() for c in expected)
    assert _cpu.lower(data).decode() == lowered
