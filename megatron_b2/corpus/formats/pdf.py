"""PDF files, by PDFium in a process of its own: what a file does to it costs that file only."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from megatron_b2.corpus.formats.text import UnreadableError

SECONDS = 60
"""For one file."""
LENGTH = struct.Struct("<Q")


class PdfReader:
    """Texts of PDF files, one after the other, in a `with` block.

    The process that reads them has limits of memory and time; if it dies, the file is unreadable and the next
    one gets another process.

    Args:
        max_bytes: most UTF-8 bytes of text that a file may give.
        memory_bytes: address space of the process beyond what the program itself takes.
    """

    def __init__(self, *, max_bytes: int, memory_bytes: int) -> None:
        self._arguments = [str(max_bytes), str(memory_bytes)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def text(self, data: bytes) -> str:
        """Text of the pages in order, an empty line between them; a line of text is a line of the layout.

        Raises:
            UnreadableError: encrypted, damaged, or beyond the limits.
        """
        process = self._running()
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            answer = _ask(process, data)
        finally:
            timer.cancel()
        if answer is None:
            self._stop()
            raise UnreadableError(
                f"PDFium takes more than {SECONDS} s or {self._arguments[1]} bytes for this file, or fails"
            )
        if "error" in answer:
            raise UnreadableError(answer["error"])
        return answer["text"]

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            command = [sys.executable, "-m", "megatron_b2.corpus.formats.pdf_process", *self._arguments]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _ask(process: subprocess.Popen[bytes], data: bytes) -> dict[str, str] | None:
    """Send a file and take the answer; None if the process died."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(LENGTH.pack(len(data)) + data)
        process.stdin.flush()
    except OSError:
        return None
    head = process.stdout.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    size = LENGTH.unpack(head)[0]
    body = process.stdout.read(size)
    return json.loads(body) if len(body) == size else None
