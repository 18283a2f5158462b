"""Plain text from the files of a Debian package: HTML, manual pages, docbook, gettext, fortunes, text."""

from __future__ import annotations

import gettext
import gzip
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

from megatron_b2.corpus.formats.html import html_text, xml_text
from megatron_b2.corpus.formats.man import man_text
from megatron_b2.corpus.formats.text import UnreadableError, tidy
from megatron_b2.corpus.language import UNDETERMINED, detect_language

EXTRACTOR_VERSION = 1
"""Part of the name of cached extractions: raise it when a rule in this module changes."""
MIN_BYTES = 150
MIN_FORTUNE_BYTES = 60
MAX_FILE_BYTES = 64 << 20

_ANSI = re.compile("\x1b\\[[0-9;]*m")
_HTML_NAME = re.compile(r"\.x?html?(\.[A-Za-z-]+)?(\.gz)?$")
_MAN_NAME = re.compile(r"/man/.*\.[1-9][a-z]*\.gz$")
_TEXT_NAME = re.compile(r"\.(txt|rst|md)(\.gz)?$")
_DULL_NAMES = re.compile(
    r"/(copyright|changelog[^/]*|README[^/]*|NEWS[^/]*|TODO[^/]*|AUTHORS[^/]*|docs)(\.gz)?$"
)


@dataclass(frozen=True)
class ExtractedText:
    """One text of a package file; `part` counts the texts of one file."""

    path: str
    part: int
    language: str
    text: str


def extract_files(root: Path, names: Iterable[str], *, mandoc: str) -> tuple[list[ExtractedText], list[str]]:
    """Texts of the files `names` (relative to `root`), and one message for each file that failed."""
    texts: list[ExtractedText] = []
    problems: list[str] = []
    for name in names:
        try:
            found = extract_file(root / name, mandoc=mandoc)
        except (
            OSError,
            EOFError,
            ValueError,
            RecursionError,
            etree.LxmlError,
            UnreadableError,
        ) as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
            continue
        minimum = MIN_FORTUNE_BYTES if len(found) > 1 else MIN_BYTES
        for part, raw in enumerate(found):
            text = tidy(raw)
            if len(text.encode()) < minimum or text.count("\ufffd") > 0.001 * len(text):
                continue
            language = detect_language(text)
            if language != UNDETERMINED:
                texts.append(ExtractedText(name, part, language, text))
    return texts, problems


def extract_file(path: Path, *, mandoc: str) -> list[str]:
    """Raw texts of one file, none when it is of no known kind; raises OSError, ValueError or LxmlError."""
    name = path.as_posix()
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        return []
    if name.endswith(".mo"):
        return [_catalogue(path)]
    reader = _reader_for(name, mandoc)
    return [] if reader is None else reader(_read(path))


def is_candidate(name: str) -> bool:
    """Whether `extract_file` knows what to do with a file of this name."""
    return name.endswith(".mo") or _reader_for(name, "") is not None


def _reader_for(name: str, mandoc: str) -> Callable[[bytes], list[str]] | None:
    if _DULL_NAMES.search(name):
        return None
    if _HTML_NAME.search(name):
        return lambda data: [html_text(data, clean=False).text]
    if name.endswith((".page", ".docbook", ".docbook.gz")):
        return lambda data: [xml_text(data)]
    if _MAN_NAME.search(name):
        return lambda data: [text for text in [man_text(data, mandoc)] if text]
    if "/games/fortunes/" in name and not name.endswith((".dat", ".u8")):
        return lambda data: [part.strip() for part in re.split(r"(?m)^%\n", _ANSI.sub("", data.decode()))]
    if _TEXT_NAME.search(name):
        return lambda data: [data.decode()]
    return None


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.name.endswith(".gz") else data


def _catalogue(path: Path) -> str:
    """Translations of a gettext catalogue, each once, one a line."""
    with path.open("rb") as stream:
        catalogue = gettext.GNUTranslations(stream)
    entries: dict[object, str] = catalogue._catalog  # type: ignore[attr-defined]
    values = (text for key, text in entries.items() if key and isinstance(text, str) and len(text) >= 6)
    return "\n".join(dict.fromkeys(values))
