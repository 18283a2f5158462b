"""Markdown: CommonMark with tables and strikethrough, by markdown-it-py, through HTML."""

from __future__ import annotations

import re

from lxml import html
from markdown_it import MarkdownIt

from megatron_b2.corpus.formats.html import block_text, decode_text
from megatron_b2.corpus.formats.text import Converted

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?\n(---|\.\.\.)[ \t]*\n", re.DOTALL)
MAX_NESTING = 50


def markdown_text(data: bytes) -> Converted:
    """Text of a page, a block a line, code as it is; marks, addresses of links and front matter go.

    Raises:
        UnreadableError: it is no text.
    """
    source = _FRONT_MATTER.sub("", decode_text(data, ()).replace("\r\n", "\n"))
    parser = MarkdownIt("commonmark", {"maxNesting": MAX_NESTING}).enable(["table", "strikethrough"])
    page = parser.render(source)
    return Converted(block_text(html.fromstring(f"<div>{page}</div>")) if page.strip() else "")
