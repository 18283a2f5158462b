"""A progress bar in bytes for work on large files: rate and time left; sparse lines when not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megatron_b2.checkpoint.files import OnBytes

SECONDS_BETWEEN_LINES = 10.0
"""How often a line is printed when there is no terminal to draw a bar on."""


@contextmanager
def byte_progress(label: str, total: int, *, console: Console | None = None) -> Iterator[OnBytes]:
    """Yield a callback that takes the bytes just handled, of `total` in all. Draws on standard error."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _SparseLines(label, total, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


class _SparseLines:
    def __init__(self, label: str, total: int, console: Console) -> None:
        self._label, self._total, self._console = label, total, console
        self._done, self._started = 0, time.monotonic()
        self._printed = self._started

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._printed < SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        rate = self._done / (now - self._started)
        left = max(0, self._total - self._done) / rate
        self._console.print(
            f"{self._label}: {format_bytes(self._done)} of {format_bytes(self._total)}, "
            f"{format_bytes(int(rate))}/s, {left:.0f} s left"
        )


def format_bytes(count: int) -> str:
    """A size in decimal units, such as "27.8 GB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
