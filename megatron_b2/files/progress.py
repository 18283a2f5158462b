"""A progress bar with rate and time left on a terminal, and a sparse line elsewhere."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

QUIET_INTERVAL = 15.0


class ProgressBar:
    """Progress of one long piece of work, in `unit` ("bytes" are shown as kB, MB, GB), on stderr.

    On a terminal a rich bar; otherwise one line every 15 seconds, so that short work prints nothing.
    `advance` and `update` may be called from several threads.
    """

    def __init__(self, title: str, *, total: float | None = None, unit: str = "items") -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._done = 0.0
        self._lock = threading.Lock()
        self._started = self._last = time.monotonic()
        console = Console(stderr=True)
        self._bar = _rich_bar(console, unit) if console.is_terminal else None
        self._console = console
        self._task = self._bar.add_task(title, total=total) if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, amount: float) -> None:
        """Add `amount` units."""
        with self._lock:
            self._show(self._done + amount)

    def update(self, done: float) -> None:
        """Set the amount done so far."""
        with self._lock:
            self._show(done)

    def _show(self, done: float) -> None:
        self._done = done
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done)
            return
        now = time.monotonic()
        if now - self._last >= QUIET_INTERVAL:
            self._last = now
            self._console.print(f"{self._title}: {self._line(now)}", highlight=False, soft_wrap=True)

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._started, 1e-9)
        text = _amount(self._done, self._unit)
        if self._total:
            left = max(self._total - self._done, 0.0) / max(rate, 1e-9)
            text += f" of {_amount(self._total, self._unit)}, {left:,.0f} s left"
        return f"{text}, {_amount(rate, self._unit)}/s"


class _RateColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        done = _amount(task.completed, self._unit)
        return Text(f"{done} {_amount(rate, self._unit)}/s" if rate else done)


def _rich_bar(console: Console, unit: str) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), _RateColumn(unit), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)


def _amount(value: float, unit: str) -> str:
    return format_bytes(round(value)) if unit == "bytes" else f"{value:,.0f} {unit}"


def format_bytes(count: int) -> str:
    """A size in decimal units, such as "27.8 GB"."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
