"""Manual pages, man(7) and mdoc(7), by mandoc."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence

from megatron_b2.corpus.formats.text import UnreadableError
from megatron_b2.errors import InputError

MANDOC_OPTIONS = ("-T", "utf8", "-O", "width=1000", "-K", "utf-8")
SECONDS = 30
MAX_BYTES = 64 << 20
"""Of text of a page."""

_OVERSTRIKE = re.compile(".\x08")
_SPACES = re.compile(r"[ \t\u00a0]+")
_TITLE = re.compile(rb"(?m)^[.'][ \t]*(TH|Dt|Dd)\b")


def installed_mandoc() -> str:
    """Path of the program; raises InputError if there is none."""
    program = shutil.which("mandoc")
    if program is None:
        raise InputError("manual pages need the program mandoc, which is missing: apt-get install mandoc")
    return program


def man_text(data: bytes, mandoc: str = "") -> str:
    """Text of a page, a paragraph a line, without the running head and foot; empty for a link to another.

    Args:
        mandoc: path of the program; the installed one by default.

    Raises:
        InputError: there is no mandoc.
        UnreadableError: it is no manual page, or mandoc gives up on it.
    """
    if data.startswith(b".so "):
        return ""
    if not _TITLE.search(data):
        raise UnreadableError("not a manual page: no .TH, .Dt or .Dd")
    output, code = _run([mandoc or installed_mandoc(), *MANDOC_OPTIONS], data)
    if code == -signal.SIGKILL:
        raise UnreadableError(f"mandoc takes more than {SECONDS} s or gives more than {MAX_BYTES:,} bytes")
    if code < 0:
        raise UnreadableError(f"mandoc was killed by signal {-code}")
    text = _OVERSTRIKE.sub("", output.decode("utf-8", "replace"))
    lines = [_SPACES.sub(" ", line).strip() for line in text.strip("\n").split("\n")]
    return "\n".join(lines[1:-1])


def _run(command: Sequence[str], data: bytes) -> tuple[bytes, int]:
    """Output and exit code; killed if it gives too much or takes too long."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        with subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout is not None
            timer = threading.Timer(SECONDS, process.kill)
            timer.start()
            try:
                output = process.stdout.read(MAX_BYTES + 1)
                if len(output) > MAX_BYTES:
                    process.kill()
                return output, process.wait()
            finally:
                timer.cancel()
