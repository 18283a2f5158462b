"""Text of HTML pages: the main content that a page names, else what resiliparse takes for it.

Accuracy of the choices is in docs/corpus-pipeline.md, "Inputs".
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

from lxml import etree
from lxml import html as lxml_html

from megatron_b2.corpus.formats.text import Converted, UnreadableError, language_tag

MIN_NAMED_CHARACTERS = 200
"""An element that is named as main content counts as such from here on."""
MAX_EFFORT = 50_000_000
"""Elements times depth, to which the time of resiliparse is proportional: some seconds."""


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
_BLANK_LINES = re.compile(r"\n\s*\n")
_META_CHARSET = re.compile(
    rb"<(?:meta|\?xml)[^>]{0,300}?(?:charset|encoding)\s*=\s*[\"']?\s*([\w.:-]{2,40})", re.IGNORECASE
)
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))


def html_text(data: bytes, charset: str = "", *, clean: bool = True) -> Converted:
    """Main content of a page, one block a line; preformatted text keeps its lines.

    Args:
        charset: what the server said; what the bytes are counts more.
        clean: where the page names no main content, leave out what looks like navigation; False takes the
            whole body, for pages that are known to have none.

    Raises:
        UnreadableError: the bytes are no text in any known charset.
    """
    text = decode_text(data, (charset, _declared(data))).replace("\0", "")
    if not text.strip():
        return Converted("")
    parser = lxml_html.HTMLParser(encoding="utf-8", huge_tree=True)
    try:
        document = lxml_html.fromstring(text.encode("utf-8", "replace"), parser=parser)
    except etree.ParserError:  # nothing but comments
        return Converted("")
    language = language_tag(document.get("lang") or document.get("xml:lang") or "")
    for query in _MAIN_CONTENT:
        hits = document.xpath(query)
        if hits and len(hits[0].text_content()) > MIN_NAMED_CHARACTERS:
            return Converted(block_text(hits[0]), language)
    if clean and _effort(document) <= MAX_EFFORT:
        from resiliparse.extract.html2text import extract_plain_text  # `b2 corpus fetch` does without

        # libxml2 has closed what was left open: a parser of HTML 5 would repeat it in every block.
        closed = lxml_html.tostring(document, encoding="unicode")
        content = extract_plain_text(closed, main_content=True, alt_texts=False, list_bullets=False)
        return Converted(_BLANK_LINES.sub("\n", content), language)
    body = document.find("body") if document.tag == "html" else document
    return Converted(block_text(document if body is None else body), language)


def decode_text(data: bytes, declared: Sequence[str]) -> str:
    """Text of bytes: by their mark, as UTF-8, in the first declared charset that fits, in the likeliest one.

    Raises:
        UnreadableError: none fits.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return data[len(mark) :].decode(name, "replace")
    for name in ("utf-8", *filter(None, declared)):
        try:
            return data.decode("gb18030" if name.lower() in ("gb2312", "gbk") else name)
        except (UnicodeDecodeError, LookupError):
            continue
    from resiliparse.parse.encoding import detect_encoding

    name = detect_encoding(data) or "utf-8"
    try:
        return data.decode(name)
    except (UnicodeDecodeError, LookupError):
        raise UnreadableError(
            f"not text in UTF-8, in what it declares ({', '.join(filter(None, declared)) or 'nothing'}) or "
            f"in {name}, which it looks like"
        ) from None


def xml_text(data: bytes) -> str:
    """Text of DocBook, Mallard and the like."""
    parser = etree.XMLParser(recover=True, resolve_entities=False, no_network=True, huge_tree=False)
    root = etree.fromstring(data, parser)
    return "" if root is None else block_text(root)


def block_text(root: etree._Element) -> str:
    """Text under an element, one block a line, without recursion (pages nest deeper than Python's stack)."""
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


def _effort(root: etree._Element) -> int:
    """Elements times depth."""
    count = depth = deepest = 0
    for event, _ in etree.iterwalk(root, events=("start", "end")):
        depth += 1 if event == "start" else -1
        count += event == "start"
        deepest = max(deepest, depth)
    return count * deepest


def _declared(data: bytes) -> str:
    match = _META_CHARSET.search(data[:4096])
    return match[1].decode("ascii", "ignore") if match else ""
