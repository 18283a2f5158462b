"""Why a document stayed or went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.report import State
from megatron_b2.corpus.pipeline.run import made_again_by_the_next_run
from megatron_b2.corpus.pipeline.view import read_view
from megatron_b2.errors import InputError

SHARED, FIRST = "duplicates", "first"
"""Columns, without the stage's name: a number that all documents that are duplicates have in common; the
documents of the corpus in which parts of this one occurred before."""
MAX_RELATIVES = 20
MAX_SAME_ID = 20


@dataclass(frozen=True)
class StageSays:
    """What one stage said."""

    name: str
    verdict: str
    values: Mapping[str, Any]
    """Its columns but the verdict."""
    relatives: tuple[str, ...] = ()
    """Ids of the documents in the same cluster of duplicates, or with parts in common, the first 20."""
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


def explain(work: Path, wanted: str) -> tuple[Explanation, ...]:
    """Look documents up by their id: the first 20 that have it, in the order of the corpus.

    Raises:
        InputError: there is none of this id, or no finished run.
        DamagedFileError: a file is damaged; the next run makes it again.
    """
    state = State.of(work)
    with made_again_by_the_next_run(work):
        found = tuple(islice(_find(state, wanted), MAX_SAME_ID))
        if not found:
            raise InputError(f"{state.work}: no document has the id {wanted!r}")
        return tuple(_explain(state, wanted, *place) for place in found)


def _find(state: State, wanted: str) -> Iterator[tuple[int, int]]:
    """Number of the unit and row of each document of an id."""
    for number, unit in enumerate(state.units):
        ids = read_table(state.unit_path(unit), ["id"]).column("id")
        for row in np.flatnonzero(pa.compute.equal(ids, wanted).to_numpy()):
            yield number, int(row)


def _explain(state: State, wanted: str, number: int, row: int) -> Explanation:
    unit = state.units[number]
    paths = state.attribute_paths(unit)
    document = read_table(state.unit_path(unit), ["path", "line"]).slice(row, 1).to_pylist()[0]
    stages = []
    for count, (stage, path) in enumerate(paths.items(), 1):
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
        has_text = f"{stage}.text" in table.column_names and table.column(f"{stage}.text")[row].is_valid
        is_changed = keep and (has_text or values.get("cuts"))
        text = _text(state, unit, row, list(paths.values())[:count]) if is_changed else None
        relatives = _relatives(state, stage, values, state.firsts[number] + row)
        stages.append(StageSays(stage, verdict, values, relatives, text))
    return Explanation(wanted, unit, row, document["path"], document["line"], tuple(stages))


def _text(state: State, unit: str, row: int, paths: list[Path]) -> str:
    view = read_view([state.unit_path(unit), *paths])
    text: str = view.text[int(np.searchsorted(view.rows, row))].as_py()
    return text


def _relatives(state: State, stage: str, values: Mapping[str, Any], document: int) -> tuple[str, ...]:
    """Ids of the other documents of a cluster, or that have parts in common.

    Args:
        values: what the stage says of the document.
        document: its index in the corpus.
    """
    if values.get(SHARED) is None and values.get(FIRST) is None:
        return ()
    found: list[str] = []
    for unit, first in zip(state.units, state.firsts, strict=True):
        column = SHARED if values.get(SHARED) is not None else FIRST
        table = read_table(state.attribute_paths(unit)[stage], ["id", f"{stage}.{column}"])
        related = _related(table.column(1), first, values[column], document)
        found += table.column("id").take(pa.array(np.setdiff1d(related, [document]) - first)).to_pylist()
        if len(found) >= MAX_RELATIVES:
            break
    return tuple(found[:MAX_RELATIVES])


def _related(column: pa.ChunkedArray, first: int, value: Any, document: int) -> np.ndarray:
    """Documents of the unit that begins with the document `first`, by the column of SHARED or FIRST."""
    if not isinstance(value, list):
        return first + np.flatnonzero(pa.compute.equal(column, value).fill_null(False).to_numpy())
    # Where parts of this one occurred before, and in which its own parts occurred again.
    lists = column.combine_chunks()
    again = lists.flatten().to_numpy() == document
    rows = pa.compute.list_parent_indices(lists).to_numpy()[again]
    before = np.array([other for other in value if first <= other < first + len(column)], np.int64)
    return np.union1d(before, first + rows)
