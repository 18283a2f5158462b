"""`b2 checkpoint`: list, inspect and verify checkpoints."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, subcommand

from megatron_b2.checkpoint.catalog import RUN_SUBFOLDER, CheckpointInfo, list_checkpoints, resolve_checkpoint
from megatron_b2.checkpoint.manifest import MANIFEST
from megatron_b2.checkpoint.store import CheckpointReader
from megatron_b2.checkpoint.tensor_file import dtype_name
from megatron_b2.checkpoint.weights import MODEL
from megatron_b2.cli.main import run
from megatron_b2.errors import CheckpointError
from megatron_b2.files.atomic import write_json
from megatron_b2.files.progress import ProgressBar, format_bytes
from megatron_b2.training.checkpoints import MILESTONES

HELP = "list, inspect and verify checkpoints"


@dataclass(frozen=True, kw_only=True)
class List:
    """List the checkpoints of a run with step, tokens, size and state (contents are not hashed).

    Example: b2 checkpoint list runs/toy
    """

    path: Positional[Path]
    """Run folder, or the folder that holds step_* folders."""
    json: Path | None = None
    """Write the list as JSON here too; - prints JSON instead of the table."""


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Show what a checkpoint holds: step, model, files, tensors.

    Example: b2 checkpoint inspect runs/toy --tensors
    """

    path: Positional[Path]
    """A step_* folder, or a run or checkpoint folder (its newest checkpoint)."""
    tensors: bool = False
    """List every tensor with type, shape and number of stored pieces."""
    json: Path | None = None
    """Write everything as JSON here too; - prints JSON instead of the table."""


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check the SHA-256 of every file and that every tensor is whole; exit status 1 names what is damaged.

    Example: b2 checkpoint verify runs/toy/checkpoints/step_00001000
    """

    path: Positional[Path]
    """A step_* folder, or a run or checkpoint folder (all its checkpoints)."""
    json: Path | None = None
    """Write the findings as JSON here too; - prints JSON instead of the lines."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0, or 1 when `verify` found damage."""
    command = tyro.cli(
        Annotated[List, subcommand("list")]
        | Annotated[Inspect, subcommand("inspect")]
        | Annotated[Verify, subcommand("verify")],
        prog="b2 checkpoint",
        description=HELP,
        args=argv,
    )
    if isinstance(command, List):
        return _list(command)
    return _inspect(command) if isinstance(command, Inspect) else _verify(command)


def _list(command: List) -> int:
    found = _found(command.path)
    links = sorted((found[0].path.parent / MILESTONES).glob("train_*"))
    names = {link.resolve().name: link.name for link in links}
    rows = [
        {
            "step": info.step,
            "tokens": info.tokens,
            "bytes": info.bytes,
            "path": str(info.path),
            "milestone": names.get(info.path.name),
            "problem": info.problem,
        }
        for info in found
    ]
    if _give_json(command.json, rows):
        return 0
    table = Table(title=f"checkpoints of {command.path}")
    for column in ("step", "tokens", "size"):
        table.add_column(column, justify="right")
    table.add_column("state")
    table.add_column("folder")
    if names:
        table.add_column("milestone")
    for info in found:
        table.add_row(
            f"{info.step:,}",
            f"{info.tokens:,}",
            format_bytes(info.bytes),
            info.problem or "whole",
            info.path.name,
            *([names.get(info.path.name, "")] if names else []),
        )
    Console().print(table)
    return 0


def _inspect(command: Inspect) -> int:
    path = resolve_checkpoint(command.path)
    if path is None:
        raise CheckpointError(f"{command.path}: holds no checkpoint")
    reader = CheckpointReader(path)
    report = _report(reader)
    if _give_json(command.json, report):
        return 0
    console = Console()
    facts = Table(title=str(path), show_header=False)
    for key in ("step", "tokens", "ranks", "parameters", "tensor_bytes", "files"):
        value = report[key]
        text = (
            format_bytes(value) if key == "tensor_bytes" else f"{len(value) if key == 'files' else value:,}"
        )
        facts.add_row(key.replace("_", " "), text)
    for key, value in _flat(reader.meta):
        facts.add_row(key, str(value))
    console.print(facts)
    if command.tensors:
        table = Table("tensor", "type", "shape", "pieces")
        for name, tensor in report["tensors"].items():
            table.add_row(name, tensor["dtype"], str(tensor["shape"]), str(tensor["pieces"]))
        console.print(table)
    return 0


def _verify(command: Verify) -> int:
    one = (command.path / MANIFEST).is_file() or command.path.name.startswith("step_")
    folders = [command.path] if one else [info.path for info in _found(command.path)]
    findings = {str(folder): _problems(folder) for folder in folders}
    damaged = any(findings.values())
    if _give_json(command.json, findings):
        return int(damaged)
    for folder, problems in findings.items():
        print(f"{folder}: {'damaged' if problems else 'whole'}")
        for problem in problems:
            print(f"  {problem}")
    return int(damaged)


def _problems(folder: Path) -> list[str]:
    try:
        reader = CheckpointReader(folder)
    except CheckpointError as error:
        return [str(error)]
    total = sum(record.bytes for record in reader.manifest.files.values())
    with ProgressBar(f"verify {folder.name}", total=total, unit="bytes") as bar:
        return reader.verify(on_bytes=bar.advance)


def _found(path: Path) -> list[CheckpointInfo]:
    found = list_checkpoints(path) or list_checkpoints(path / RUN_SUBFOLDER)
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoints (folders named step_...)")
    return found


def _report(reader: CheckpointReader) -> dict[str, Any]:
    manifest = reader.manifest
    return {
        "path": str(reader.path),
        "step": manifest.step,
        "tokens": manifest.tokens,
        "ranks": manifest.world_size,
        "parameters": sum(prod(t.shape) for name, t in manifest.tensors.items() if name.startswith(MODEL)),
        "tensor_bytes": sum(t.nbytes for t in manifest.tensors.values()),
        "meta": dict(manifest.meta),
        "tensors": {
            name: {"dtype": dtype_name(t.dtype), "shape": list(t.shape), "pieces": len(t.chunks)}
            for name, t in manifest.tensors.items()
        },
        "files": {name: {"bytes": r.bytes, "sha256": r.sha256} for name, r in manifest.files.items()},
    }


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        rows += _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else [(f"{prefix}{key}", item)]
    return rows


def _give_json(path: Path | None, value: Any) -> bool:
    """Write JSON where asked; whether that replaces the human output."""
    if path == Path("-"):
        print(jsonlib.dumps(value, indent=2, ensure_ascii=False))
        return True
    if path is not None:
        write_json(path, value)
    return False


if __name__ == "__main__":
    sys.exit(run(main))
