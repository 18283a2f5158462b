"""Write csrc/cpu/text/characters_table.h: kinds of characters and lower case, from Python's unicodedata.

    python tools/unicode_table.py            # writes the table
    python tools/unicode_table.py --check    # exit status 1 when the committed table differs

The committed table is that of Unicode 14.0.0 (Python 3.11). Rules, first match wins:

- Newline: where `str.splitlines` breaks. Space: `str.isspace`, and ZERO WIDTH SPACE, which parts words.
- Mark: general category M, and letters that never start a grapheme cluster: SARA AM of Thai and Lao,
  halfwidth voiced sound marks of kana.
- Format: category Cf, and Hangul fillers: invisible inside a word.
- Punctuation: P. Digit: Nd and No. Then by script, for letters and letter-like numbers (and Han radicals):
  Han, Kana, Hangul, Cluster (scripts written without spaces between words), else Letter.
- Symbol: S. Other: control, private use, surrogates, unassigned.
- Planes 2 and 3 are Han as a whole: Unicode reserves them for ideographs.

Python has no Script property; names begin with the script's name, which is what `SCRIPTS` reads.
"""

from __future__ import annotations

import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "csrc" / "cpu" / "text" / "characters_table.h"
SCRIPTS = {
    "Han": (
        "CJK UNIFIED IDEOGRAPH",
        "CJK COMPATIBILITY IDEOGRAPH",
        "CJK RADICAL",
        "KANGXI RADICAL",
        "HANGZHOU NUMERAL",
        "IDEOGRAPHIC ITERATION MARK",
        "IDEOGRAPHIC CLOSING MARK",
        "IDEOGRAPHIC NUMBER ZERO",
        "VERTICAL IDEOGRAPHIC ITERATION MARK",
        "OLD CHINESE ITERATION MARK",
    ),
    "Kana": ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "HENTAIGANA", "VERTICAL KANA", "MASU MARK"),
    "Hangul": ("HANGUL", "HALFWIDTH HANGUL"),
    "Cluster": (
        *("THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ", "TAI LE ", "NEW TAI LUE ", "TAI THAM "),
        *("TAI VIET ", "AHOM ", "BALINESE ", "JAVANESE ", "YI "),
    ),
}
FILLERS = "\u115f\u1160\u3164\uffa0"
EXTENDING_LETTERS = "\u0e33\u0eb3\uff9e\uff9f"
HEADER = """\
// Made by tools/unicode_table.py from Unicode {version}; do not edit. Part of characters.h.

#pragma once

namespace b2::text {{

inline constexpr char kUnicodeVersion[] = "{version}";

"""
WIDTH = 110


def kind(character: str) -> str:
    """Name of the Kind of one character."""
    category = unicodedata.category(character)
    if len(f"a{character}b".splitlines()) == 2:
        return "Newline"
    if character.isspace() or character == "\u200b":
        return "Space"
    if category[0] == "M" or character in EXTENDING_LETTERS:
        return "Mark"
    if category == "Cf" or character in FILLERS:
        return "Format"
    if category[0] == "P":
        return "Punctuation"
    if category in ("Nd", "No"):
        return "Digit"
    if script := script_of(character, category):
        return script
    if category[0] in "LN":
        return "Letter"
    return "Symbol" if category[0] == "S" else "Other"


def script_of(character: str, category: str) -> str | None:
    """Kind by script of a character that may stand in a word of an unspaced script."""
    if ord(character) >> 16 in (2, 3) and ord(character) & 0xFFFF < 0xFFFE:
        return "Han"
    name = unicodedata.name(character, "")
    for script, prefixes in SCRIPTS.items():
        if name.startswith(prefixes):
            is_radical = script == "Han" and "RADICAL" in name
            return script if category[0] in "LN" or is_radical else None
    return None


def lower(character: str) -> str:
    """Simple lower case: one character, as Unicode's UnicodeData.txt has it."""
    mapped = character.lower()
    return mapped if len(mapped) == 1 else mapped[0]


def ranges(value: Callable[[str], str]) -> Iterator[tuple[int, int, str]]:
    """Runs of code points with the same value."""
    for name, run in groupby(range(sys.maxunicode + 1), key=lambda code: value(chr(code))):
        codes = list(run)
        yield codes[0], codes[-1], name


def lower_ranges() -> Iterator[tuple[int, int, int, int]]:
    """Runs (first, last, stride, delta) of characters with a lower case."""
    mapped = [
        (code, ord(lower(chr(code))) - code)
        for code in range(sys.maxunicode + 1)
        if lower(chr(code)) != chr(code)
    ]
    start = 0
    while start < len(mapped):
        first, delta = mapped[start]
        stride = 1
        if start + 1 < len(mapped) and mapped[start + 1] == (first + 2, delta):
            stride = 2
        end = start + 1
        while end < len(mapped) and mapped[end] == (mapped[end - 1][0] + stride, delta):
            end += 1
        yield first, mapped[end - 1][0], stride, delta
        start = end


def table() -> str:
    """Text of the header."""
    kinds = (f"{{0x{a:X}, 0x{b:X}, Kind::{name}}}" for a, b, name in ranges(kind) if name != "Other")
    lowers = (f"{{0x{a:X}, 0x{b:X}, {stride}, {delta}}}" for a, b, stride, delta in lower_ranges())
    return (
        HEADER.format(version=unicodedata.unidata_version)
        + array("KindRange kKindRanges", kinds)
        + array("LowerRange kLowerRanges", lowers)
        + "}  // namespace b2::text\n"
    )


def array(declaration: str, items: Iterable[str]) -> str:
    """A constant array of C++, several items a line."""
    body = textwrap.fill(
        " ".join(f"{item.replace(' ', chr(0))}," for item in items),
        WIDTH,
        initial_indent="    ",
        subsequent_indent="    ",
        break_on_hyphens=False,
    ).replace(chr(0), " ")
    return f"inline constexpr {declaration}[] = {{\n{body}\n}};\n\n"


def main() -> None:
    """Write or check the table."""
    text = table()
    if sys.argv[1:] == ["--check"]:
        sys.exit(TABLE.read_text(encoding="utf-8") != text)
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
