"""Why one document stayed or went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.report import State
from megatron_b2.corpus.pipeline.view import read_view
from megatron_b2.errors import InputError

SHARED = "duplicates"
"""Column, without the stage's name, that has the same number for all documents that are duplicates."""
MAX_RELATIVES = 20


@dataclass(frozen=True)
class StageSays:
    """What one stage said."""

    name: str
    verdict: str
    values: Mapping[str, Any]
    """Its columns but the verdict."""
    relatives: tuple[str, ...] = ()
    """Ids of the documents in the same cluster of duplicates, the first 20."""
    text: str | None = None
    """The text that it left, where it changed it."""


@dataclass(frozen=True)
class Explanation:
    """Everything that is known of a document."""

    id: str
    unit: str
    row: int
    path: str
    line: int
    stages: tuple[StageSays, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value."""
        return asdict(self)


def explain(work: Path, wanted: str) -> Explanation:
    """Look a document up by its id.

    Raises:
        InputError: there is none of this id, or no finished run.
    """
    state = State.of(work)
    unit, row = _find(state, wanted)
    paths = state.attribute_paths(unit)
    document = read_table(state.unit_path(unit), ["path", "line"]).slice(row, 1).to_pylist()[0]
    stages = []
    for number, (stage, path) in enumerate(paths.items()):
        table = read_table(path)
        values = {
            name.removeprefix(f"{stage}."): table.column(name)[row].as_py()
            for name in table.column_names
            if name not in ("id", f"{stage}.text")
        }
        keep, reason = values.pop("keep"), values.pop("reason")
        if keep is None:
            stages.append(StageSays(stage, "not seen: it had gone before", {}))
            continue
        verdict = "kept" if keep else f"REMOVED: {reason}"
        changed = values["left"] != values["bytes"] and keep
        text = _text(state, unit, row, list(paths.values())[: number + 1]) if changed else None
        relatives = _relatives(state, stage, values, wanted)
        stages.append(StageSays(stage, verdict, values, relatives, text))
    return Explanation(wanted, unit, row, document["path"], document["line"], tuple(stages))


def _find(state: State, wanted: str) -> tuple[str, int]:
    for unit in state.units:
        ids = read_table(state.unit_path(unit), ["id"]).column("id")
        row = pa.compute.index(ids, wanted).as_py()
        if row >= 0:
            return unit, row
    raise InputError(f"{state.work}: no document has the id {wanted!r}")


def _text(state: State, unit: str, row: int, paths: list[Path]) -> str:
    view = read_view([state.unit_path(unit), *paths])
    text: str = view.text[int(np.searchsorted(view.rows, row))].as_py()
    return text


def _relatives(state: State, stage: str, values: Mapping[str, Any], wanted: str) -> tuple[str, ...]:
    if values.get(SHARED) is None:
        return ()
    found: list[str] = []
    for unit in state.units:
        table = read_table(state.attribute_paths(unit)[stage], ["id", f"{stage}.{SHARED}"])
        same = table.filter(pa.compute.equal(table.column(1), values[SHARED]))
        found += [name for name in same.column("id").to_pylist() if name != wanted]
        if len(found) >= MAX_RELATIVES:
            break
    return tuple(found[:MAX_RELATIVES])
