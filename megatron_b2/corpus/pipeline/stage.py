"""What the driver asks of a stage: phases of tasks that end in one table of attributes for each unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_b2.corpus.pipeline.tasks import Function, Task


@dataclass(frozen=True)
class Unit:
    """A table of documents."""

    name: str
    path: Path
    first: int
    """Index of its first document in the whole corpus."""
    documents: int


@dataclass(frozen=True)
class Context:
    """Where a stage finds its inputs and puts its outputs."""

    work: Path
    units: tuple[Unit, ...]
    stage: str
    """Name of the stage itself."""
    earlier: tuple[str, ...]
    """Names of the stages before it, in order."""

    def task(
        self,
        what: str,
        function: Function,
        settings: object,
        inputs: Sequence[Path],
        output: str,
        *,
        version: int = 1,
    ) -> Task:
        """A task whose output is for later phases of the stage only.

        Args:
            what: for the task's name.
            inputs: checked files.
            output: name of a file of the stage's own.
        """
        path = self.work / "between" / self.stage / output
        return Task(f"{self.stage} {what}", function, version, settings, tuple(inputs), path)

    def unit_task(
        self,
        unit: Unit,
        function: Function,
        settings: object,
        *,
        also: Sequence[Path] = (),
        output: str = "",
        version: int = 1,
    ) -> Task:
        """A task that sees a unit through the earlier stages.

        Args:
            also: more input files, behind those that `read_view` takes.
            output: name of a file of the stage's own in which {} is the unit; none for the attributes.
        """
        view = (unit.path, *(attributes_path(self.work, stage, unit.name) for stage in self.earlier))
        name = output.format(unit.name)
        path = self.work / "between" / self.stage / name
        if not output:
            name, path = unit.name, attributes_path(self.work, self.stage, unit.name)
        return Task(f"{self.stage} {name}", function, version, settings, (*view, *also), path)

    def for_each_unit(self, function: Function, settings: object, *, version: int = 1) -> list[Task]:
        """The attributes of every unit, each from its own view."""
        return [self.unit_task(unit, function, settings, version=version) for unit in self.units]


def attributes_path(work: Path, stage: str, unit: str) -> Path:
    """The table of a stage for a unit."""
    return work / "attributes" / stage / f"{unit}.parquet"


class Stage(Protocol):
    """The settings of a stage (a frozen dataclass), and how it works."""

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """Lists of tasks; a list starts when all tasks of the one before it are done."""
