"""The process that reads PDF files: `python -m megatron_b2.corpus.formats.pdf_process MAX_BYTES MEMORY`.

Files come on the standard input and texts go to the standard output, each behind its length.
"""

from __future__ import annotations

import json
import resource
import sys

import psutil
import pypdfium2 as pdfium  # type: ignore[import-untyped]

from megatron_b2.corpus.formats.pdf import LENGTH

HYPHEN = "\ufffe"
"""PDFium's sign for a hyphen at the end of a line, whose word it has joined."""


def main(max_bytes: int, memory_bytes: int) -> None:
    """Serve until the input ends."""
    limit = psutil.Process().memory_info().vms + memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while head := sys.stdin.buffer.read(LENGTH.size):
        data = sys.stdin.buffer.read(LENGTH.unpack(head)[0])
        answer = json.dumps(_answer(data, max_bytes)).encode()
        sys.stdout.buffer.write(LENGTH.pack(len(answer)) + answer)
        sys.stdout.buffer.flush()


def _answer(data: bytes, max_bytes: int) -> dict[str, str]:
    try:
        return {"text": pdf_text(data, max_bytes)}
    except pdfium.PdfiumError as error:
        if "password" in str(error).lower():
            return {"error": "encrypted: it opens with a password only"}
        return {"error": f"not a readable PDF file: {error}"}
    except (ValueError, MemoryError) as error:
        return {"error": str(error) or "it takes too much memory"}


def pdf_text(data: bytes, max_bytes: int) -> str:
    """Text of the pages; raises PdfiumError, or ValueError if it is more than `max_bytes` of UTF-8."""
    pages, size = [], 0
    document = pdfium.PdfDocument(data)
    try:
        for page in document:
            text_page = page.get_textpage()
            text = text_page.get_text_range().replace(HYPHEN, "")
            text_page.close()
            page.close()
            size += len(text.encode("utf-8", "replace"))
            if size > max_bytes:
                raise ValueError(f"the text has more than {max_bytes:,} bytes")
            pages.append(text)
    finally:
        document.close()
    return "\n\n".join(pages)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
