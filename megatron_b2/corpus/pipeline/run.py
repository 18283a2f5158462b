"""The driver: stage after stage, phase after phase, only what is not done yet.

It holds no data, only names. If it is killed, the next one finds every finished task by its manifest. A file
that turns out to be damaged when it is read is named, and the task that made it runs again. Of files that are
done a run reads the manifests only.
"""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_b2.corpus.pipeline.checked import (
    DamagedFileError,
    is_manifest,
    manifest_path,
    read_manifest,
    verify_file,
)
from megatron_b2.corpus.pipeline.executor import Executor
from megatron_b2.corpus.pipeline.extract import Input, extract_tasks, scan_tasks, units_of
from megatron_b2.corpus.pipeline.stage import Context, Stage, Unit
from megatron_b2.corpus.pipeline.tasks import Contents, Task, forget, is_done
from megatron_b2.errors import InputError, OutputError
from megatron_b2.files.atomic import write_json
from megatron_b2.files.progress import ProgressBar

STATE = "pipeline.json"
MARKER = ".driver"
"""A folder with this file is a work folder, of which a driver may remove files; who drives has it locked."""
FOLDERS = ("documents", "attributes", "between")
"""Of the outputs of tasks."""
MAX_REPAIRS = 20
"""Damaged files that tasks may meet in a run."""


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
    inputs: Input, stages: Mapping[str, Stage], *, work: Path, executor: Executor, verify: bool = False
) -> Run:
    """Run `stages`, in their order, over the documents of `inputs`.

    Writes WORK/documents, WORK/attributes and WORK/pipeline.json, which lists every file with its SHA-256:
    the same inputs and settings give the same list, whoever ran which task.

    Args:
        verify: read every file that is there first; damaged ones are made again.

    Raises:
        InputError: another driver works in this folder, it is no work folder, or an input is wrong.
        OutputError: the work folder cannot be written.
        TaskCrashError: a task failed for a reason of its own.
    """
    run, repairs = Run(), 0
    _refuse_foreign(work)
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / MARKER).touch()
    except OSError as error:
        raise OutputError(f"{work}: the work folder cannot be written: {error.strerror}") from error
    with _only_driver(work), _empty_scratch(work):
        if verify:
            run.repaired += _forget_damaged(work)
        while True:
            try:
                outputs = _run_once(inputs, stages, work, executor, run)
                break
            except DamagedFileError as error:
                if repairs == MAX_REPAIRS:
                    raise
                repairs += 1
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
    outputs += _run_phase("extract", scans, work, executor, run)
    extracts = extract_tasks(inputs, work, scans)
    outputs += _run_phase("extract", extracts, work, executor, run)
    run.units = units_of(extracts)
    earlier: tuple[str, ...] = ()
    for name, stage in stages.items():
        for tasks in stage.phases(Context(work, run.units, name, earlier)):
            outputs += _run_phase(name, tasks, work, executor, run)
        earlier = (*earlier, name)
    return outputs


def _run_phase(stage: str, tasks: Sequence[Task], work: Path, executor: Executor, run: Run) -> list[Path]:
    started, spent = time.monotonic(), run.times.setdefault(stage, StageTime())
    contents = Contents()
    open_tasks = [task for task in tasks if not is_done(task, contents)]
    if open_tasks:
        (work / STATE).unlink(missing_ok=True)  # until the run ends, the folder may hold results of two
        with ProgressBar(stage, total=len(open_tasks), unit="tasks") as bar:
            for finished in executor.run(open_tasks):
                if finished.error is not None:
                    raise finished.error
                bar.advance(1)
    spent.tasks += len(open_tasks)
    spent.reused += len(tasks) - len(open_tasks)
    spent.seconds += time.monotonic() - started
    return [task.output for task in tasks]


@contextmanager
def made_again_by_the_next_run(work: Path) -> Iterator[None]:
    """Where results are read: a damaged file is named, and the next run will make it again.

    Raises:
        DamagedFileError: the block met one.
        InputError: it did so while a driver was at work.
    """
    try:
        yield
    except DamagedFileError as error:
        try:
            with _only_driver(work):
                forget(error.path)
        except OSError as refused:
            raise OutputError(f"{error}; cannot mark it to be made again: {refused}") from refused
        reason = f"{error.reason}. Give `b2 corpus run` again: it makes the file again"
        raise DamagedFileError(error.path, reason) from error


def _refuse_foreign(work: Path) -> None:
    if work.exists() and not work.is_dir():
        raise InputError(f"{work}: is no folder; give a new or empty one as `work`")
    if work.exists() and not (work / MARKER).exists() and any(work.iterdir()):
        raise InputError(
            f"{work}: is not empty and no work folder of `b2 corpus run`; give a new or empty one as `work`"
        )


@contextmanager
def _only_driver(work: Path) -> Iterator[None]:
    with (work / MARKER).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{work}: another `b2 corpus run` works here; wait for it, or give another folder with --work"
            ) from error
        yield


@contextmanager
def _empty_scratch(work: Path) -> Iterator[None]:
    """Nothing of tasks that were killed stays, neither from before nor from this run."""
    try:
        shutil.rmtree(work / "scratch", ignore_errors=True)
        yield
    finally:
        shutil.rmtree(work / "scratch", ignore_errors=True)


def _files(work: Path) -> list[Path]:
    """All outputs of tasks, sound or not, also of earlier runs: files with a manifest of ours."""
    found = sorted(path for folder in FOLDERS for path in (work / folder).rglob("*.json"))
    return [manifest.with_suffix("") for manifest in found if is_manifest(manifest)]


def _forget_damaged(work: Path) -> list[str]:
    """Compare all outputs with their manifests; what was wrong with which."""
    wrong, files = [], _files(work)
    with ProgressBar("verify", total=len(files), unit="files") as bar:
        for path in files:
            try:
                verify_file(path)
            except DamagedFileError as error:
                wrong.append(str(error))
                forget(path)
            bar.advance(1)
    return wrong


def _remove_others(work: Path, outputs: Sequence[Path]) -> None:
    """Outputs of stages, settings and inputs that are no longer part of the pipeline, and what killed workers
    were writing. A file without a manifest of ours is not ours."""
    wanted = set(outputs)
    for path in _files(work):
        if path not in wanted:
            path.unlink(missing_ok=True)
            manifest_path(path).unlink()
    for folder in FOLDERS:
        for unfinished in list((work / folder).rglob(".*.tmp")):
            unfinished.unlink(missing_ok=True)


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
