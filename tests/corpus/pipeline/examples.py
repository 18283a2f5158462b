"""Stages and inputs for the tests of the driver; a module of its own, so that spawned workers can import it."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import read_view


@dataclass(frozen=True)
class Odd:
    """Removes every second document and doubles the texts of the others."""

    flags: str = ""
    """Folder; where it has a file "die", the first task to take it away kills its process."""
    leave: bool = False
    """That task leaves a folder of temporary files."""

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        yield context.for_each_unit(_odd, self)


def _odd(task: Task, limits: Limits) -> Result:
    folder = Path(task.settings.flags)
    if task.settings.flags and (folder / "die").exists():
        try:
            (folder / "die").unlink()
        except FileNotFoundError:
            pass
        else:
            if task.settings.leave:
                limits.scratch.mkdir(parents=True)
                tempfile.mkdtemp(dir=limits.scratch)
            os.kill(os.getpid(), signal.SIGKILL)
    view = read_view(task.inputs)
    keep = np.arange(len(view)) % 2 == 0
    text = [2 * text for text in view.text.to_pylist()]
    return Result([view.write("odd", keep=keep, reason=["" if k else "odd" for k in keep], text=text)])


@dataclass(frozen=True)
class Total:
    """Counts the bytes of all documents, in two phases, and gives every document the sum."""

    crash: bool = False

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        counts = [context.unit_task(unit, _count, self, output="count-{}.parts") for unit in context.units]
        yield counts
        also = [task.output for task in counts]
        yield [context.unit_task(unit, _total, self, also=also) for unit in context.units]


def _count(task: Task, _: Limits) -> Result:
    import pyarrow as pa

    if task.settings.crash:
        raise ZeroDivisionError("a mistake in a stage")
    view = read_view(task.inputs)
    return Result([pa.table({"bytes": [view.texts.num_bytes]}), pa.table({"documents": [len(view)]})])


def _total(task: Task, _: Limits) -> Result:
    from megatron_b2.corpus.pipeline.checked import read_part

    parts = [path for path in task.inputs if path.suffix == ".parts"]
    total = sum(read_part(path, 0).column("bytes")[0].as_py() for path in parts)
    view = read_view(task.inputs[: -len(parts)], wanted=["odd.reason"])
    keep = np.ones(len(view), bool)
    values = {"sum": [total] * len(view), "said": view.attributes.column("odd.reason")}
    return Result([view.write("total", keep=keep, reason=[""] * len(view), **values)])


def write_documents(folder: Path, *, files: int = 3, documents: int = 2_000) -> None:
    """JSONL files of a few hundred kilobytes."""
    folder.mkdir()
    for number in range(files):
        with (folder / f"{number}.jsonl").open("w") as file:
            for row in range(documents):
                text = f"document {row} of file {number} " * (row % 60)
                file.write(json.dumps({"id": f"{number}-{row}", "text": text, "language": "en"}) + "\n")
