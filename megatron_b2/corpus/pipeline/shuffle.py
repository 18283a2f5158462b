"""Rows of tables to where they belong: to the unit of a document, or to a part by a hash."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.pipeline.checked import read_part
from megatron_b2.corpus.pipeline.stage import Unit

MIX = np.uint64(0x9E3779B97F4A7C15)


def by_unit(table: pa.Table, column: str, units: Sequence[Unit]) -> list[pa.Table]:
    """The rows of each unit, by the index of a document of the corpus in `column`; sorted by it."""
    table = table.sort_by(column)
    index = table.column(column).to_numpy()
    bounds = np.searchsorted(index, [unit.first for unit in units])
    ends = [*bounds[1:], len(index)]
    return [table.slice(begin, end - begin) for begin, end in zip(bounds, ends, strict=True)]


def by_hash(table: pa.Table, column: str, parts: int) -> list[pa.Table]:
    """The rows in `parts` tables by a hash of an integer column; the order of rows stays."""
    key = table.column(column).to_numpy().astype(np.uint64) * MIX
    part = ((key >> np.uint64(32)) * np.uint64(parts)) >> np.uint64(32)
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(parts + 1))
    sorted_rows = table.take(pa.array(order))
    return [sorted_rows.slice(begin, end - begin) for begin, end in pairwise(bounds)]


def evenly(count: int, wanted: int) -> np.ndarray:
    """`wanted` of `count` rows, or all if there are no more, at equal distances."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def gather(paths: Sequence[Path], part: int) -> pa.Table:
    """One part of several parts files, behind each other."""
    return pa.concat_tables([read_part(path, part) for path in paths])
