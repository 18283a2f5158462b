"""The live display of a run: one bar on a terminal, one line an interval elsewhere. Rank 0 only."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from megatron_b2.training.events import Callback, StepEvent
from megatron_b2.training.metrics import Record, TrainRecord, ValidRecord

SMOOTHING = 0.3
"""Weight of the newest interval in the time left (our choice)."""
LOG_COLUMNS = 160
"""Width of tables in a log file."""


def terminal() -> Console:
    """Standard output; in a log file lines may be longer than a terminal's 80 columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else LOG_COLUMNS)


class ProgressDisplay(Callback):
    """Shows loss, tokens/s, MFU, gradient norm and time left; also a metrics sink."""

    def __init__(self, *, total_steps: int, console: Console) -> None:
        self._total_steps = total_steps
        self._console = console
        self._seconds_a_step: float | None = None
        self._bar = Progress(
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("", total=total_steps)
        self._numbers = Text()
        self._live = Live(Group(self._bar, self._numbers), console=console)

    def run_begin(self, event: StepEvent) -> None:
        """Start the bar, on a terminal."""
        self._bar.update(self._task, completed=event.step)
        if self._console.is_terminal:
            self._live.start()

    def step_end(self, event: StepEvent) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=event.step)

    def saved(self, event: StepEvent, path: Path) -> None:
        """Say where the checkpoint is."""
        self._console.print(f"step {event.step}: saved {path}", highlight=False, soft_wrap=True)

    def write(self, records: Sequence[Record]) -> None:
        """Show the newest record of an interval."""
        newest = records[-1]
        if isinstance(newest, ValidRecord):
            self._console.print(_valid_line(newest), highlight=False, soft_wrap=True)
            return
        old = self._seconds_a_step
        new = newest.step_seconds
        self._seconds_a_step = new if old is None else (1 - SMOOTHING) * old + SMOOTHING * new
        left = timedelta(seconds=round(self._seconds_a_step * (self._total_steps - newest.step)))
        numbers = _train_line(newest)
        if self._console.is_terminal:
            self._bar.update(self._task, description=f"left {left}")
            self._numbers.plain = numbers
        else:
            line = f"step {newest.step}/{self._total_steps}  {numbers}  left {left}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        self._live.stop()


def _train_line(record: TrainRecord) -> str:
    mfu = "n/a" if record.mfu is None else f"{100 * record.mfu:.1f}%"
    return (
        f"loss {record.loss:.4f}  ce {record.ce:.4f}  max-z {record.max_z:.1f}  lr {record.lr:.2e}  "
        f"grad {record.grad_norm:.3f}  {record.tokens_per_second:,.0f} tok/s  MFU {mfu}"
    ) + ("  SKIPPED (not finite)" if record.skipped else "")


def _valid_line(record: ValidRecord) -> str:
    return (
        f"step {record.step}: validation loss {record.loss:.4f}  ce {record.ce:.4f}  "
        f"max-z {record.max_z:.1f}  ({record.num_targets:,} tokens, {record.seconds:.1f} s)"
    )
