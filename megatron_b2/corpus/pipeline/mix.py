"""The end of a pipeline: what is kept, as files that `b2 preprocess` reads, and the blend of their groups."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import polars as pl
import pyarrow as pa

from megatron_b2.config.encode import toml_value
from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.report import State
from megatron_b2.corpus.pipeline.run import made_again_by_the_next_run
from megatron_b2.corpus.pipeline.view import languages_of, read_view
from megatron_b2.documents import JsonlWriter
from megatron_b2.errors import InputError
from megatron_b2.files.atomic import atomic_file, atomic_folder, write_json
from megatron_b2.files.progress import ProgressBar

GROUP, WEIGHT = "weights.group", "weights.weight"
SUMMARY = "mix.json"
"""In the folder of a mix: what it was made of, and the mark of one."""


@dataclass
class Group:
    """Documents of one language and one weight: a source of the blend."""

    language: str
    weight: float
    """Sampling weight of a byte of it, relative to other groups."""
    documents: int = 0
    bytes: int = 0
    """UTF-8 bytes of text."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 by name, in the order of the corpus."""


@dataclass(frozen=True)
class _Piece:
    """What one unit gave to a group."""

    group: str
    language: str
    weight: float
    documents: int
    bytes: int
    file: str
    sha256: str


def mix(
    work: Path,
    out: Path,
    *,
    where: str = "",
    least_bytes: int = 0,
    workers: int = 1,
    overwrite: bool = False,
) -> dict[str, Group]:
    """Write OUT/<group>/<unit>.jsonl.zst, OUT/blend.toml and OUT/mix.json; nothing if it fails.

    Args:
        work: folder of a finished run.
        where: SQL condition on the attributes in double quotes, such as '"quality.score" > 0.2', that
            documents must meet beside having been kept by every stage.
        least_bytes: a smaller group joins that of its language whose weight is nearest.
        workers: processes.
        overwrite: replace an earlier mix, and nothing else.

    Returns:
        The groups by name; without the stage `weights` all have the weight 1 and there is one a language.

    Raises:
        InputError: the condition does not parse, or names a column that no stage wrote.
        OutputError: OUT is something else than an earlier mix, or is one and is not to be replaced.
        DamagedFileError: a file of the run is damaged; the next run makes it again.
    """
    state = State.of(work)
    groups: dict[str, Group] = {}
    replaces = SUMMARY if overwrite else ""
    with made_again_by_the_next_run(work), atomic_folder(out, replaces=replaces) as folder:
        _check_condition(state, where)
        task = partial(_mix_unit, state, folder, where)
        with (
            multiprocessing.get_context("spawn").Pool(workers) as pool,
            ProgressBar("mix", total=len(state.units), unit="units") as bar,
        ):
            for pieces in pool.imap(task, state.units):
                bar.advance(1)
                for piece in pieces:
                    group = groups.setdefault(piece.group, Group(piece.language, piece.weight))
                    group.documents += piece.documents
                    group.bytes += piece.bytes
                    group.files[piece.file] = piece.sha256
        _join_small(groups, folder, least_bytes)
        groups = dict(sorted(groups.items()))
        write_blend(folder / "blend.toml", groups, out)
        summary = {name: asdict(group) for name, group in groups.items()}
        write_json(folder / SUMMARY, {"where": where, "stages": state.stages, "groups": summary})
    return groups


def _join_small(groups: dict[str, Group], folder: Path, least_bytes: int) -> None:
    """Move the files of small groups, the smallest first, to the nearest group of their language, if it has
    another."""
    for name in sorted(groups, key=lambda name: (groups[name].bytes, name)):
        small = groups[name]
        others = [key for key in groups if key != name and groups[key].language == small.language]
        if small.bytes >= least_bytes or not others:
            continue
        nearest = min(others, key=lambda key: (abs(math.log(groups[key].weight / small.weight)), key))
        joined = groups[nearest]
        for file, sha256 in small.files.items():
            moved = f"{nearest}/{file.replace('/', '.')}"
            (folder / file).rename(folder / moved)
            joined.files[moved] = sha256
        joined.documents += small.documents
        joined.bytes += small.bytes
        (folder / name).rmdir()
        del groups[name]


def _check_condition(state: State, where: str) -> None:
    if not where:
        return
    if not state.units:
        raise InputError(f"{state.work}: the corpus is empty")
    attributes = _attributes(state, state.units[0])
    try:
        attributes.lazy().filter(pl.sql_expr(where)).collect()
    except pl.exceptions.PolarsError as error:
        known = ", ".join(f'"{name}"' for name in attributes.columns)
        reason = str(error).splitlines()[0].partition("; valid columns")[0]
        raise InputError(f"--where {where!r}: {reason}; columns are {known}") from error


def _attributes(state: State, unit: str) -> pl.DataFrame:
    """Attributes of all documents of a unit, with their row."""
    tables: list[pa.Table] = []
    for stage, path in state.attribute_paths(unit).items():
        table = read_table(path)
        tables.append(table.drop_columns(["id", *({f"{stage}.text"} & set(table.column_names))]))
    columns: dict[str, Any] = {}
    for table in tables:
        columns |= dict(zip(table.column_names, table.columns, strict=True))
    frame = pl.from_arrow(pa.table(columns))
    assert isinstance(frame, pl.DataFrame)
    return frame.with_row_index("row")


def _mix_unit(state: State, folder: Path, where: str, unit: str) -> list[_Piece]:
    paths = [state.unit_path(unit), *state.attribute_paths(unit).values()]
    view = read_view(paths, wanted=[GROUP, WEIGHT, "language.tag"])
    chosen = np.arange(len(view))
    if where:
        rows = _attributes(state, unit).filter(pl.sql_expr(where)).get_column("row").to_numpy()
        chosen = np.flatnonzero(np.isin(view.rows, rows))
    known = view.attributes.column_names
    tags = pa.array(languages_of(view), pa.string())
    columns = {
        "id": view.documents.column("id"),
        "text": view.text,
        "language": tags,
        "source": view.documents.column("source"),
        "url": view.documents.column("url"),
        "group": view.attributes.column(GROUP) if GROUP in known else tags,
        "weight": view.attributes.column(WEIGHT) if WEIGHT in known else pa.array(np.ones(len(view))),
    }
    documents: Sequence[Mapping[str, Any]] = pa.table(columns).take(pa.array(chosen)).to_pylist()
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for document in documents:
        groups.setdefault(folder_of(document["group"]), []).append(document)
    return [_write_group(folder, name, unit, groups[name]) for name in sorted(groups)]


def folder_of(group: str) -> str:
    """Name of a folder for a group, another one for every group; percent-encoded where it has to be."""
    name = quote(group, safe="") or "%"
    return f"%2E{name[1:]}" if name.startswith(".") else name


def _write_group(folder: Path, name: str, unit: str, documents: Sequence[Mapping[str, Any]]) -> _Piece:
    file = f"{name}/{unit}.jsonl.zst"
    size = 0
    (folder / name).mkdir(exist_ok=True)
    with JsonlWriter(folder / file) as writer:
        for document in documents:
            writer.write({key: document[key] for key in ("id", "text", "language", "source", "url")})
            size += len(document["text"].encode())
    first = documents[0]
    return _Piece(name, first["language"], first["weight"], len(documents), size, file, writer.sha256)


def write_blend(path: Path, groups: Mapping[str, Group], out: Path) -> None:
    """[[data.sources]] for a run: a group's share is its bytes times its weight.

    Args:
        out: the folder of the mix, for the commands that the file names.
    """
    total = sum(group.bytes * group.weight for group in groups.values())
    with atomic_file(path) as file:
        file.write("".join(_blend_lines(groups, total, out)).encode())


def _blend_lines(groups: Mapping[str, Group], total: float, out: Path) -> Iterator[str]:
    yield "# Made by `b2 corpus mix`. Tokenize each group, then give this file to a run by extends:\n"
    for name in groups:
        yield f"#   b2 preprocess {out / name} --tokenizer TOKENIZER --output tokens/{name}\n"
    for name, group in groups.items():
        share = group.bytes * group.weight / max(total, 1e-9)
        yield f"\n[[data.sources]]\nprefix = {toml_value(f'tokens/{name}')}\nweight = {toml_value(share)}\n"
