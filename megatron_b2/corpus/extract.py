"""Plain text from the files of a Debian package: HTML, manual pages, docbook, gettext, fortunes, text."""

from __future__ import annotations

import gettext
import gzip
import re
import subprocess
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lxml import etree
from lxml import html as lxml_html

from megatron_b2.corpus.language import UNDETERMINED, detect_language

EXTRACTOR_VERSION = 1
"""Part of the name of cached extractions: raise it when a rule in this module changes."""
MIN_BYTES = 150
MIN_FORTUNE_BYTES = 60
MAX_FILE_BYTES = 64 << 20
MANDOC_OPTIONS = ("-T", "utf8", "-O", "width=1000", "-K", "utf-8")
MANDOC_SECONDS = 30


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BLOCK_TAGS = _words(
    "address article aside blockquote body br caption dd details div dl dt fieldset figcaption figure footer "
    "h1 h2 h3 h4 h5 h6 header hr item li main ol p page para pre section table tbody td th thead title tr ul"
)
_DROPPED_TAGS = _words(
    "aside button footer form head header iframe nav noscript object script select style svg template"
)
_MAIN_CONTENT = (
    './/*[@id="DisplayArea"]',
    ".//main",
    './/*[@role="main"]',
    './/*[@id="content"]',
    './/*[@class="body"]',
)
_SPACES = re.compile(r"[ \t\u00a0]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_ANSI = re.compile("\x1b\\[[0-9;]*m")
_OVERSTRIKE = re.compile(".\x08")
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
            subprocess.SubprocessError,
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


def tidy(text: str) -> str:
    """NFC, no NUL, no spaces at line ends, at most one blank line in a row."""
    text = unicodedata.normalize("NFC", text).replace("\x00", "").replace("\r\n", "\n")
    return _BLANK_LINES.sub("\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()


def _reader_for(name: str, mandoc: str) -> Callable[[bytes], list[str]] | None:
    if _DULL_NAMES.search(name):
        return None
    if _HTML_NAME.search(name):
        return lambda data: [html_text(data)]
    if name.endswith((".page", ".docbook", ".docbook.gz")):
        return lambda data: [_xml_text(data)]
    if _MAN_NAME.search(name):
        return lambda data: _manual_page(data, mandoc)
    if "/games/fortunes/" in name and not name.endswith((".dat", ".u8")):
        return lambda data: [part.strip() for part in re.split(r"(?m)^%\n", _ANSI.sub("", data.decode()))]
    if _TEXT_NAME.search(name):
        return lambda data: [data.decode()]
    return None


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if path.name.endswith(".gz") else data


def html_text(data: bytes) -> str:
    """Main content of an HTML page, one block a line; preformatted text keeps its lines."""
    try:
        document = lxml_html.fromstring(
            data.decode().encode(), parser=lxml_html.HTMLParser(encoding="utf-8", huge_tree=True)
        )
    except UnicodeDecodeError:
        document = lxml_html.fromstring(data)
    for query in _MAIN_CONTENT:
        hits = document.xpath(query)
        if hits and len(hits[0].text_content()) > 200:
            return _block_text(hits[0])
    body = document.find("body") if document.tag == "html" else document
    return _block_text(document if body is None else body)


def _xml_text(data: bytes) -> str:
    parser = etree.XMLParser(recover=True, resolve_entities=False, no_network=True, huge_tree=False)
    root = etree.fromstring(data, parser)
    return "" if root is None else _block_text(root)


def _block_text(root: etree._Element) -> str:
    """Text under `root` without recursion (pages nest deeper than Python's stack)."""
    lines: list[str] = []
    buffer: list[str] = []

    def flush() -> None:
        line = _SPACES.sub(" ", "".join(buffer).replace("\n", " ")).strip()
        buffer.clear()
        if line:
            lines.append(line)

    events = etree.iterwalk(root, events=("start", "end", "comment", "pi"))
    for event, node in events:
        if event == "start":
            tag = _local_name(node)
            if tag in _BLOCK_TAGS:
                flush()
            if tag == "pre":
                lines.extend(line.rstrip() for line in "".join(node.itertext()).strip("\n").split("\n"))
            if tag == "pre" or (tag in _DROPPED_TAGS and node is not root):
                events.skip_subtree()
            elif node.text:
                buffer.append(node.text)
        elif event == "end" and _local_name(node) in _BLOCK_TAGS:
            flush()
        if event != "start" and node.tail and node is not root:
            buffer.append(node.tail)
    flush()
    return "\n".join(lines)


def _local_name(node: etree._Element) -> str:
    return str(node.tag).rpartition("}")[2].lower()


def _manual_page(data: bytes, mandoc: str) -> list[str]:
    if data.startswith(b".so "):
        return []
    done = subprocess.run(
        [mandoc, *MANDOC_OPTIONS], input=data, capture_output=True, timeout=MANDOC_SECONDS, check=False
    )
    text = _OVERSTRIKE.sub("", done.stdout.decode("utf-8", "replace"))
    lines = [_SPACES.sub(" ", line).strip() for line in text.strip("\n").split("\n")]
    return ["\n".join(lines[1:-1])]  # without the running head and foot


def _catalogue(path: Path) -> str:
    """Translations of a gettext catalogue, each once, one a line."""
    with path.open("rb") as stream:
        catalogue = gettext.GNUTranslations(stream)
    entries: dict[object, str] = catalogue._catalog  # type: ignore[attr-defined]
    values = (text for key, text in entries.items() if key and isinstance(text, str) and len(text) >= 6)
    return "\n".join(dict.fromkeys(values))
