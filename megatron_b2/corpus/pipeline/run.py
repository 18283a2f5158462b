"""The driver: stage after stage, phase after phase, only what is not done yet.

It holds no data, only names. If it is killed, the next one finds every finished task by its manifest. A
damaged file is named, and the task that made it runs again.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_b2.corpus.pipeline.checked import DamagedFileError, manifest_path, read_manifest
from megatron_b2.corpus.pipeline.executor import Executor
from megatron_b2.corpus.pipeline.extract import Input, extract_tasks, scan_tasks, units_of
from megatron_b2.corpus.pipeline.stage import Context, Stage, Unit
from megatron_b2.corpus.pipeline.tasks import Contents, Task, forget, is_done
from megatron_b2.errors import InputError
from megatron_b2.files.atomic import write_json
from megatron_b2.files.progress import ProgressBar

STATE = "pipeline.json"
MAX_REPAIRS = 20


@dataclass
class StageTime:
    """What a stage took in this run."""

    tasks: int = 0
    """Tasks that ran."""
    reused: int = 0
    """Tasks that were done already."""
    seconds: float = 0.0


@dataclass
class Run:
    """What a run of the pipeline did."""

    units: tuple[Unit, ...] = ()
    times: dict[str, StageTime] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    """Damaged files that were made again: "path: what was wrong"."""


def run_pipeline(
    inputs: Input, stages: Mapping[str, Stage], *, work: Path, executor: Executor
) -> Run:
    """Run `stages`, in their order, over the documents of `inputs`.

    Writes WORK/documents, WORK/attributes and WORK/pipeline.json, which lists every file with its SHA-256:
    the same inputs and settings give the same list, whoever ran which task.

    Raises:
        InputError: another driver works in this folder, or an input is wrong.
        TaskCrashError: a task failed for a reason of its own.
    """
    run = Run()
    with _only_driver(work):
        while True:
            try:
                outputs = _run_once(inputs, stages, work, executor, run)
                break
            except DamagedFileError as error:
                if len(run.repaired) == MAX_REPAIRS:
                    raise
                run.repaired.append(str(error))
                forget(error.path)
        _remove_others(work, outputs)
        _write_state(work, stages, run.units, outputs)
    return run


def _run_once(
    inputs: Input, stages: Mapping[str, Stage], work: Path, executor: Executor, run: Run
) -> list[Path]:
    """All outputs, in order; tasks that are done are not run."""
    outputs: list[Path] = []
    scans = scan_tasks(inputs, work)
    outputs += _run_phase("extract", scans, executor, run)
    extracts = extract_tasks(inputs, work, scans)
    outputs += _run_phase("extract", extracts, executor, run)
    run.units = units_of(extracts)
    earlier: tuple[str, ...] = ()
    for name, stage in stages.items():
        for tasks in stage.phases(Context(work, run.units, name, earlier)):
            outputs += _run_phase(name, tasks, executor, run)
        earlier = (*earlier, name)
    return outputs


def _run_phase(stage: str, tasks: Sequence[Task], executor: Executor, run: Run) -> list[Path]:
    started, spent = time.monotonic(), run.times.setdefault(stage, StageTime())
    contents = Contents()
    open_tasks = [task for task in tasks if not is_done(task, contents)]
    with ProgressBar(stage, total=len(tasks), unit="tasks") as bar:
        bar.advance(len(tasks) - len(open_tasks))
        for finished in executor.run(open_tasks) if open_tasks else ():
            if finished.error is not None:
                raise finished.error
            bar.advance(1)
    spent.tasks += len(open_tasks)
    spent.reused += len(tasks) - len(open_tasks)
    spent.seconds += time.monotonic() - started
    return [task.output for task in tasks]


@contextmanager
def _only_driver(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".driver").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{work}: another `b2 corpus run` works here; wait for it, or give another folder with --work"
            ) from error
        yield


def _remove_others(work: Path, outputs: Sequence[Path]) -> None:
    """Outputs of stages, settings and inputs that are no longer part of the pipeline."""
    wanted = {*outputs, *(manifest_path(path) for path in outputs)}
    for folder in ("documents", "attributes", "between"):
        for path in (work / folder).rglob("*"):
            if path.is_file() and path not in wanted:
                path.unlink()


def _write_state(
    work: Path, stages: Mapping[str, Stage], units: Sequence[Unit], outputs: Sequence[Path]
) -> None:
    files = {}
    for path in outputs:
        manifest = read_manifest(path)
        assert manifest is not None
        files[str(path.relative_to(work))] = manifest.sha256
    rows = [{"name": unit.name, "first": unit.first, "documents": unit.documents} for unit in units]
    write_json(work / STATE, {"stages": list(stages), "units": rows, "files": files})
