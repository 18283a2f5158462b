"""What every converter gives, and how its text is tidied."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

UNDETERMINED = "und"

_BLANK_LINES = re.compile(r"\n{3,}")
_TAG = re.compile(r"([A-Za-z]{2,3})([-_][A-Za-z0-9]{1,8})*")
_TRADITIONAL = frozenset({"hant", "tw", "hk", "mo"})
_PAIRS = (
    "ara:ar cat:ca ces:cs dan:da deu:de ell:el eng:en fas:fa fin:fi fra:fr heb:he hin:hi hun:hu ind:id "
    "ita:it jpn:ja kor:ko nld:nl pol:pl por:pt ron:ro rus:ru spa:es swe:sv tha:th tur:tr ukr:uk vie:vi"
)
_TWO_LETTERS: Mapping[str, str] = MappingProxyType({p[:3]: p[4:] for p in _PAIRS.split()})


class UnreadableError(Exception):
    """A file or record of a known kind gives no text; the message says why."""


@dataclass(frozen=True, slots=True)
class Converted:
    """Text of one page, manual page or file."""

    text: str
    language: str = UNDETERMINED
    """BCP 47 tag where the input names one, as the stages of the pipeline use them."""


def tidy(text: str) -> str:
    """NFC, no NUL, no spaces at line ends, at most one blank line in a row."""
    text = unicodedata.normalize("NFC", text).replace("\x00", "").replace("\r\n", "\n")
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


def language_tag(given: str) -> str:
    """A tag of the pipeline for one of BCP 47 or ISO 639-3: en for en-US, zh-Hans for zh-CN, fr for fra.

    "und" for what is none, and for Chinese of unknown script.
    """
    match = _TAG.fullmatch(given.strip())
    if match is None:
        return UNDETERMINED
    first, *rest = re.split("[-_]", given.strip().lower())
    if first in ("zh", "zho", "cmn"):
        if not rest:
            return UNDETERMINED
        return "zh-Hant" if _TRADITIONAL & set(rest) else "zh-Hans"
    return first if len(first) == 2 else _TWO_LETTERS.get(first, UNDETERMINED)
