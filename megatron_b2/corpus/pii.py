"""Personal data in texts: found, reported with kind and place, replaced by placeholders.

| kind | what | checks |
|---|---|---|
| email | user@example.org | a domain with a top-level name that is no ending of pictures |
| ip | IPv4 and IPv6 | public addresses (`ipaddress.is_global`); no numbers of versions and sections |
| phone | Chinese mobile numbers, E.164 with + | 11 digits from 13 to 19; a country, 8 to 15 digits |
| cn_id | Chinese resident identity numbers | province, date, ISO 7064 MOD 11-2 check character (GB 11643) |
| card | payment cards, 13 to 19 digits | issuer's first digits, length, Luhn (ISO/IEC 7812) |
| iban | bank accounts | country, length, mod 97 (ISO 13616) |

Cheap vectorised tests over all bytes find the few places at which a pattern is tried at all. Names and
addresses of people need a model and are not looked for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from enum import IntEnum
from types import MappingProxyType
from typing import Final

import numpy as np

from megatron_b2.documents.texts import Texts


class Kind(IntEnum):
    """What a span is."""

    EMAIL = 0
    IP = 1
    PHONE = 2
    CN_ID = 3
    CARD = 4
    IBAN = 5


PLACEHOLDERS: Final[Mapping[Kind, str]] = MappingProxyType({kind: f"<{kind.name}>" for kind in Kind})
"""What stands for each kind; plain text, no control token (our choice)."""


@dataclass(frozen=True)
class PiiSpans:
    """Personal data in N texts."""

    ranges: np.ndarray
    """int64 [M, 2]: bytes begin, end of a text; the ranges of a text ascend and do not overlap."""
    firsts: np.ndarray
    """int64 [N + 1]: the first range of each text, and M."""
    kinds: np.ndarray
    """uint8 [M] of Kind."""

    def counts(self) -> np.ndarray:
        """int64 [N, kinds]: how many of each kind a text has."""
        texts = np.repeat(np.arange(len(self.firsts) - 1), np.diff(self.firsts))
        counts = np.zeros((len(self.firsts) - 1, len(Kind)), np.int64)
        np.add.at(counts, (texts, self.kinds), 1)
        return counts


def find_pii(texts: Texts) -> PiiSpans:
    """All personal data in N texts."""
    ranges: list[tuple[int, int]] = []
    kinds: list[Kind] = []
    firsts = np.zeros(len(texts) + 1, np.int64)
    for first, last in _blocks(texts.offsets):
        begin, end = int(texts.offsets[first]), int(texts.offsets[last])
        block = _Block(texts.data[begin:end], texts.offsets[first : last + 1] - begin)
        for row, low, high, kind in block.find():
            ranges.append((low, high))
            kinds.append(kind)
            firsts[first + row + 1] += 1
    return PiiSpans(np.array(ranges, np.int64).reshape(-1, 2), np.cumsum(firsts), np.array(kinds, np.uint8))


def replace_pii(texts: Texts, spans: PiiSpans, placeholders: Mapping[Kind, str] = PLACEHOLDERS) -> Texts:
    """N texts in which placeholders stand for the spans, in new memory."""
    words = {kind: placeholders[kind].encode() for kind in Kind}
    data = texts.data.tobytes()
    pieces: list[bytes] = []
    offsets = np.zeros(len(texts) + 1, np.int64)
    size = 0
    for row in range(len(texts)):
        start, end = int(texts.offsets[row]), int(texts.offsets[row + 1])
        position = start
        for index in range(int(spans.firsts[row]), int(spans.firsts[row + 1])):
            low, high = (start + int(bound) for bound in spans.ranges[index])
            pieces += [data[position:low], words[Kind(int(spans.kinds[index]))]]
            size += low - position + len(pieces[-1])
            position = high
        pieces.append(data[position:end])
        size += end - position
        offsets[row + 1] = size
    return Texts(np.frombuffer(b"".join(pieces), np.uint8), offsets)


_BLOCK_BYTES: Final = 4 << 20


def _blocks(offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of texts of about _BLOCK_BYTES."""
    first = 0
    while first < len(offsets) - 1:
        last = int(np.searchsorted(offsets, offsets[first] + _BLOCK_BYTES, side="right")) - 1
        last = max(last, first + 1)
        yield first, last
        first = last


_WORD: Final = re.compile(rb"[0-9A-Za-z_]")
_JOIN: Final = re.compile(rb"[.:\-]")
_DOT: Final = re.compile(rb"\.")
_GROUP: Final = re.compile(rb"[0-9][ \-]")
_LOCAL: Final = re.compile(rb"[A-Za-z0-9](?:[A-Za-z0-9._%+\-]{0,62}[A-Za-z0-9_+\-])?\Z")
_DOMAIN: Final = re.compile(
    rb"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?\.){1,8}([A-Za-z]{2,24})(?![A-Za-z0-9\-])"
)
_PICTURES: Final = frozenset(
    (b"png", b"jpg", b"jpeg", b"gif", b"svg", b"webp", b"bmp", b"ico", b"css", b"js")
)
_IPV4: Final = re.compile(rb"[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z_]|[.\-][0-9A-Za-z])")
_NUMBERED: Final = re.compile(  # before the number of a version or a section: § and 第 too
    rb"(?:(?i:\bv|version|release|section|chapter|\bver\.)|\xc2\xa7|\xe7\xac\xac)(?:[ \t:=]|\xc2\xa0)?\Z"
)
# What stands behind the number of a section: a period, or a capital or Chinese character.
_LISTED: Final = re.compile(rb"\.(?:[ \t]|\xc2\xa0)|(?:[ \t]|\xc2\xa0)+[A-Z\xe4-\xe9]")
_IPV6: Final = re.compile(rb"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![0-9A-Za-z_:])")
_CN_MOBILE: Final = re.compile(
    rb"(?:86[ \-]?)?1[3-9][0-9][ \-]?[0-9]{4}[ \-]?[0-9]{4}(?![0-9A-Za-z_]|[.\-][0-9])"
)
_COUNTRY = (  # ITU-T E.164, assigned codes
    rb"(?:1|2(?:0|1[12368]|[2346][0-9]|5[0-8]|7|9[01789])|3(?:[0-469]|5[0-9]|7[0-9]|8[0-35-79])"
    rb"|4(?:[013-9]|2[013])|5(?:0[0-9]|[1-8]|9[0-9])|6(?:[0-6]|7[02-9]|8[0-35-9]|9[0-2])|7"
    rb"|8(?:0[08]|[1246]|5[02356]|7[08]|8[0-3689])|9(?:[0-58]|6[0-8]|7[0-79]|9[2-68]))"
)
_E164: Final = re.compile(
    rb"\+"
    + _COUNTRY
    + rb"[ .\-]?(?:\([0-9]{1,4}\)[ .\-]?)?[0-9]{1,14}(?:[ .\-][0-9]{1,14}){0,6}(?![0-9A-Za-z_]|[.\-][0-9])"
)
_CN_ID: Final = re.compile(rb"[1-9][0-9]{16}[0-9Xx](?![0-9A-Za-z_])")
_CARD: Final = re.compile(
    rb"(?:[0-9]{13,19}|[0-9]{4}([ \-])[0-9]{4}\1[0-9]{4}\1[0-9]{1,4}(?:\1[0-9]{1,3})?"
    rb"|3[47][0-9]{2}([ \-])[0-9]{6}\2[0-9]{5})(?![0-9A-Za-z_]|[ .\-][0-9])"
)
_ISSUER: Final = re.compile(  # with the lengths each of them gives
    r"(?:4(?:.{12}|.{15}|.{18})|(?:5[1-5]|2[2-7]).{14}|3[47].{13}|3(?:0[0-5]|[689].).{11}|35.{14}"
    r"|6(?:011|4[4-9].|5..).{12}|62.{14,17})"
)
_IBAN: Final = re.compile(
    rb"[A-Z]{2}[0-9]{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)(?![0-9A-Za-z_])"
)
_IBAN_LENGTHS: Final[Mapping[str, int]] = MappingProxyType(
    {
        country: int(length)
        for country, length in re.findall(
            r"([A-Z]{2})(\d\d)",
            "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27"
            " DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28"
            " IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22"
            " MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24"
            " SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30",
        )
    }
)
_PROVINCES: Final = frozenset(
    (
        *range(11, 16),
        *range(21, 24),
        *range(31, 38),
        *range(41, 47),
        *range(50, 55),
        *range(61, 66),
        71,
        81,
        82,
        83,
    )
)


def is_luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the Luhn formula."""
    doubled = [int(d) for d in str.translate(digits[-2::-2], str.maketrans("0123456789", "0246813579"))]
    return (sum(doubled) + sum(int(d) for d in digits[::-2])) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether an IBAN without spaces has its country's length and the right check digits."""
    if _IBAN_LENGTHS.get(text[:2]) != len(text):
        return False
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def is_cn_id(text: str) -> bool:
    """Whether 18 characters are a resident identity number: province, day of birth, check character."""
    try:
        date(int(text[6:10]), int(text[10:12]), int(text[12:14]))
    except ValueError:
        return False
    rest = sum(int(digit) * 2 ** (17 - i) for i, digit in enumerate(text[:17])) % 11
    return (
        int(text[:2]) in _PROVINCES
        and 1800 <= int(text[6:10]) <= 2100
        and text[17].upper() == "10X98765432"[rest]
    )


def is_public_ip(text: str) -> bool:
    """Whether an address is well-formed and public."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


@dataclass(frozen=True)
class _Found:
    begin: int
    end: int
    kind: Kind


class _Block:
    """Some texts, searched together. Positions are bytes of the block; no span crosses the end of a text."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self._array = data
        self._data = data.tobytes()
        self._offsets = offsets

    def find(self) -> Iterator[tuple[int, int, int, Kind]]:
        """(text, begin, end, kind) of all spans in order; of those that overlap the first, then the
        longest."""
        found = [
            *self._search(np.flatnonzero(self._array == ord("@")), self._email),
            *self._search(self._dotted_quads(), self._ipv4),
            *self._search(self._hex_groups(), self._ipv6),
            *self._search(self._long_numbers(), self._number),
            *self._search(np.flatnonzero(self._array == ord("+")), self._e164),
            *self._search(self._iban_starts(), self._iban),
        ]
        found.sort(key=lambda span: (span.begin, -span.end, -span.kind))
        position = 0
        for span in found:
            if span.begin >= position:
                position = span.end
                row = int(np.searchsorted(self._offsets, span.begin, side="right")) - 1
                start = int(self._offsets[row])
                yield row, span.begin - start, span.end - start, span.kind

    def _search(self, places: np.ndarray, look: Callable[[int, int, int], _Found | None]) -> Iterator[_Found]:
        """What `look(place, begin of its text, end of its text)` finds at places."""
        rows = np.searchsorted(self._offsets, places, side="right") - 1
        begins, ends = self._offsets[rows], self._offsets[rows + 1]
        for place, begin, end in zip(places.tolist(), begins.tolist(), ends.tolist(), strict=True):
            if found := look(place, begin, end):
                yield found

    def _digits(self) -> np.ndarray:
        return (self._array >= ord("0")) & (self._array <= ord("9"))

    def _starts(self, is_in: np.ndarray) -> np.ndarray:
        """First positions of the runs of true values; a run ends with its text."""
        follows = np.concatenate([[False], is_in[:-1]])
        follows[self._offsets[:-1][np.diff(self._offsets) > 0]] = False
        return np.flatnonzero(is_in & ~follows)

    def _dotted_quads(self) -> np.ndarray:
        """Dots with digits on both sides and two more such dots within 8 bytes: the digit run before each."""
        digits = self._digits()
        dots = 1 + np.flatnonzero((self._array[1:-1] == ord(".")) & digits[:-2] & digits[2:])
        first = dots[:-2][(dots[2:] - dots[:-2] <= 8) & (dots[1:-1] - dots[:-2] <= 4)]
        starts = self._starts(digits)
        return np.unique(starts[np.searchsorted(starts, first) - 1]) if len(first) else first

    def _hex_groups(self) -> np.ndarray:
        """Where a group of a public IPv6 address may start: 2 or 3, three bytes more, a colon, a digit or a
        colon."""
        colons = np.flatnonzero(self._array == ord(":"))
        colons = colons[colons >= 4]
        leads = self._array[colons - 4]
        return colons[(leads == ord("2")) | (leads == ord("3"))] - 4

    def _long_numbers(self) -> np.ndarray:
        """Runs of digits from which on 11 digits stand within 15 bytes."""
        digits = self._digits()
        places = np.flatnonzero(digits)
        dense = places[:-10][places[10:] - places[:-10] <= 14]
        return np.intersect1d(dense, self._starts(digits), assume_unique=True)

    def _iban_starts(self) -> np.ndarray:
        """Two capitals and two digits."""
        digits = self._digits()
        capitals = (self._array >= ord("A")) & (self._array <= ord("Z"))
        return np.flatnonzero(capitals[:-3] & capitals[1:-2] & digits[2:-1] & digits[3:])

    def _follows(self, pattern: re.Pattern[bytes], place: int, begin: int) -> bool:
        """Whether the byte before a place, in its text, matches."""
        return place > begin and pattern.match(self._data, place - 1, place) is not None

    def _starts_line(self, place: int, begin: int) -> bool:
        before = self._data[max(begin, place - 40) : place].rstrip(b" \t")
        return not before or before.endswith(b"\n")

    def _email(self, at: int, begin: int, end: int) -> _Found | None:
        local = _LOCAL.search(self._data, max(begin, at - 64), at)
        domain = _DOMAIN.match(self._data, at + 1, end)
        if local is None or domain is None or domain[1].lower() in _PICTURES:
            return None
        return _Found(local.start(), domain.end(), Kind.EMAIL)

    def _ipv4(self, place: int, begin: int, end: int) -> _Found | None:
        match = _IPV4.match(self._data, place, end)
        if (
            match is None
            or self._follows(_WORD, place, begin)
            or self._follows(_JOIN, place, begin)
            or _NUMBERED.search(self._data, max(begin, place - 10), place)
            or (_LISTED.match(self._data, match.end(), end) and self._starts_line(place, begin))
            or not is_public_ip(match[0].decode())
        ):
            return None
        return _Found(place, match.end(), Kind.IP)

    def _ipv6(self, place: int, begin: int, end: int) -> _Found | None:
        match = _IPV6.match(self._data, place, end)
        if match is None or self._follows(_WORD, place, begin) or self._follows(_JOIN, place, begin):
            return None
        text = match[0].decode().rstrip(":")
        return _Found(place, place + len(text), Kind.IP) if is_public_ip(text) else None

    def _number(self, place: int, begin: int, end: int) -> _Found | None:
        if self._follows(_WORD, place, begin) or self._follows(_DOT, place, begin):
            return None
        if (match := _CN_ID.match(self._data, place, end)) and is_cn_id(match[0].decode()):
            return _Found(place, match.end(), Kind.CN_ID)
        if (match := _CARD.match(self._data, place, end)) and self._is_card(match[0], place, begin):
            return _Found(place, match.end(), Kind.CARD)
        if match := _CN_MOBILE.match(self._data, place, end):
            return _Found(place, match.end(), Kind.PHONE)
        return None

    def _is_card(self, text: bytes, place: int, begin: int) -> bool:
        digits = re.sub(rb"[ \-]", b"", text).decode()
        is_part = place - begin >= 2 and _GROUP.match(self._data, place - 2, place) is not None
        return not is_part and len(set(digits)) > 1 and bool(_ISSUER.fullmatch(digits)) and is_luhn(digits)

    def _e164(self, place: int, begin: int, end: int) -> _Found | None:
        match = _E164.match(self._data, place, end)
        if match is None or self._follows(_WORD, place, begin):
            return None
        digits = sum(byte in b"0123456789" for byte in match[0])
        return _Found(place, match.end(), Kind.PHONE) if 8 <= digits <= 15 else None

    def _iban(self, place: int, begin: int, end: int) -> _Found | None:
        match = _IBAN.match(self._data, place, end)
        if match is None or self._follows(_WORD, place, begin):
            return None
        return (
            _Found(place, match.end(), Kind.IBAN) if is_iban(match[0].replace(b" ", b"").decode()) else None
        )
