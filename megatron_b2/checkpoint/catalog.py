"""The checkpoints of a run: list them, find the newest good one, prune the old ones."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_b2.checkpoint.files import describe, remove_folder
from megatron_b2.checkpoint.manifest import MANIFEST
from megatron_b2.checkpoint.retention import milestone_steps, which_to_delete
from megatron_b2.checkpoint.store import OLD, CheckpointReader
from megatron_b2.errors import CheckpointError
from megatron_b2.parallel.comm import Comm, SingleComm

RUN_SUBFOLDER = "checkpoints"
"""Where a run folder keeps its checkpoints."""
_STEP = re.compile(rf"step_(\d{{8,}})({re.escape(OLD)})?")


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a list."""

    path: Path
    """Its folder."""
    step: int
    """Optimizer steps taken."""
    tokens: int
    """Input tokens seen (0 when the manifest cannot be read)."""
    bytes: int
    """Size of all its files."""
    problem: str | None
    """Why it cannot be used: unreadable manifest, missing or short files. Contents are not hashed."""


def list_checkpoints(root: Path) -> list[CheckpointInfo]:
    """Every finished checkpoint in `root`, by rising step; a missing folder has none."""
    newest: dict[int, Path] = {}
    for path in sorted(root.iterdir(), reverse=True) if root.is_dir() else ():
        if path.is_dir() and (match := _STEP.fullmatch(path.name)):
            newest[int(match[1])] = path  # reverse order: a whole step_X comes after step_X.old and wins
    return [_info(step, newest[step]) for step in sorted(newest)]


def _info(step: int, path: Path) -> CheckpointInfo:
    try:
        reader = CheckpointReader(path)
    except CheckpointError as error:
        return CheckpointInfo(path=path, step=step, tokens=0, bytes=0, problem=str(error))
    problems = reader.verify(hashes=False)
    size = sum(record.bytes for record in reader.manifest.files.values()) + (path / MANIFEST).stat().st_size
    return CheckpointInfo(
        path=path, step=step, tokens=reader.tokens, bytes=size, problem=problems[0] if problems else None
    )


def latest_checkpoint(root: Path, *, verify: bool = True, comm: Comm | None = None) -> Path | None:
    """The newest whole checkpoint in `root`; None when there are no checkpoints at all.

    With `verify` every file is hashed (the ranks of `comm` share the work and must all call it). A damaged
    checkpoint is logged with the name of the damaged file and the one before it is tried. When there are
    checkpoints and all are damaged, CheckpointError: starting anew in silence would be worse.
    """
    comm = comm or SingleComm()
    mine = list_checkpoints(root) if comm.rank == 0 else []
    candidates: list[CheckpointInfo] = comm.all_gather_object(mine)[0]
    failures: list[str] = []
    for info in reversed(candidates):
        problems = [info.problem] if info.problem else []
        if verify and not problems:
            problems = CheckpointReader(info.path).verify(comm=comm)
        if not problems:
            return info.path
        failures += problems
        if comm.rank == 0:
            logging.getLogger(__name__).warning(
                "checkpoint of step %d is not usable, trying an older one: %s", info.step, "; ".join(problems)
            )
    if failures:
        raise CheckpointError(
            f"{root}: none of its {len(candidates)} checkpoints is whole; move them away to start anew:\n  "
            + "\n  ".join(failures)
        )
    return None


def resolve_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` means: itself, or the newest usable one of a run or checkpoint folder.

    None when `path` is none of these (it may be a Hugging Face folder). Contents are not hashed.
    """
    if (path / MANIFEST).is_file() or _STEP.fullmatch(path.name):
        return path
    return latest_checkpoint(path, verify=False) or latest_checkpoint(path / RUN_SUBFOLDER, verify=False)


def prune_checkpoints(
    root: Path, *, keep_last: int, keep_every: int = 0, milestone_tokens: int = 0
) -> list[Path]:
    """Remove checkpoints that retention does not keep, and return their paths. Call it on one rank.

    Only usable checkpoints count towards `keep_last`, so the last good one is never removed, whatever
    happened to the newer ones. A folder that cannot be removed is logged, not fatal.
    """
    found = list_checkpoints(root)
    good = {info.step: info.tokens for info in found if info.problem is None}
    milestones = milestone_steps(good, every_tokens=milestone_tokens)
    doomed = set(which_to_delete(good, keep_last=keep_last, keep_every=keep_every, milestones=milestones))
    removed: list[Path] = []
    for info in found:
        if info.step in doomed:
            try:
                remove_folder(info.path)
                removed.append(info.path)
            except OSError as error:
                logging.getLogger(__name__).warning("%s not removed: %s", info.path, describe(error))
    return removed
