"""The funnel: what each stage removed of the raw corpus, by language and by source."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.pipeline.checked import read_manifest, read_table
from megatron_b2.corpus.pipeline.run import STATE, made_again_by_the_next_run
from megatron_b2.corpus.pipeline.stage import attributes_path
from megatron_b2.errors import InputError

TOP_REASONS = 8


@dataclass
class Amount:
    """Documents and UTF-8 bytes of text."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        """Count more."""
        self.documents += documents
        self.bytes += size


@dataclass
class StageReport:
    """What one stage took away."""

    removed: Amount = field(default_factory=Amount)
    """Whole documents, and the bytes of these and of what it cut out of others."""
    cut: int = 0
    """Of the bytes, those cut out of documents that stay; negative if texts became longer."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Documents by reason."""


@dataclass
class Funnel:
    """From raw to kept; raw = removed by all stages + kept, in documents and in bytes."""

    raw: Amount = field(default_factory=Amount)
    stages: dict[str, StageReport] = field(default_factory=dict)
    kept: Amount = field(default_factory=Amount)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value, with shares of the raw bytes and documents in percent."""
        rows = {
            name: {
                **_shares(stage.removed, self.raw),
                "cut_bytes": stage.cut,
                "reasons": dict(stage.reasons.most_common(TOP_REASONS)),
            }
            for name, stage in self.stages.items()
        }
        return {"raw": _shares(self.raw, self.raw), "stages": rows, "kept": _shares(self.kept, self.raw)}


def _shares(part: Amount, whole: Amount) -> dict[str, float]:
    return {
        "documents": part.documents,
        "bytes": part.bytes,
        "percent_of_documents": 100 * part.documents / max(whole.documents, 1),
        "percent_of_bytes": 100 * part.bytes / max(whole.bytes, 1),
    }


@dataclass
class Report:
    """Everything that `b2 corpus report` shows."""

    total: Funnel = field(default_factory=Funnel)
    languages: dict[str, Funnel] = field(default_factory=dict)
    sources: dict[str, Funnel] = field(default_factory=dict)
    malformed: int = 0
    """Input records that could not be read."""
    empty: int = 0
    """Input records without text."""
    messages: list[str] = field(default_factory=list)
    """The first of the malformed records as "file:line: reason"."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What stages say about themselves, by stage: evaluation items of `decontaminate`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value."""
        return {
            "total": self.total.to_dict(),
            "languages": {name: funnel.to_dict() for name, funnel in self.languages.items()},
            "sources": {name: funnel.to_dict() for name, funnel in self.sources.items()},
            "input": {"malformed": self.malformed, "empty": self.empty, "messages": self.messages},
            "facts": self.facts,
        }

    def fact_lines(self) -> list[str]:
        """What was wrong with the input; one line for each stage that counts something beside documents."""
        counts = {"input": {"malformed": self.malformed, "empty": self.empty}, **self.facts}
        return [
            f"{stage}: {', '.join(f'{name} = {value}' for name, value in facts.items())}"
            for stage, facts in counts.items()
        ]


@dataclass(frozen=True)
class State:
    """What a finished run left in a work folder."""

    work: Path
    stages: tuple[str, ...]
    units: tuple[str, ...]
    firsts: tuple[int, ...]
    """Index in the whole corpus of the first document of each unit."""

    @classmethod
    def of(cls, work: Path) -> State:
        """Raises InputError if there is none."""
        path = work / STATE
        try:
            plain = json.loads(path.read_bytes())
            units = plain["units"]
            names, firsts = (tuple(unit[key] for unit in units) for key in ("name", "first"))
            return cls(work, tuple(plain["stages"]), names, firsts)
        except FileNotFoundError as error:
            raise InputError(f"{path} is missing: `b2 corpus run` did not end in this folder yet") from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged; give `b2 corpus run` again: it writes the file") from error

    def unit_path(self, unit: str) -> Path:
        """The documents of a unit."""
        return self.work / "documents" / f"{unit}.parquet"

    def attribute_paths(self, unit: str) -> dict[str, Path]:
        """The attributes of a unit by stage."""
        return {stage: attributes_path(self.work, stage, unit) for stage in self.stages}


def make_report(work: Path) -> Report:
    """Read the verdicts of a finished run.

    Raises:
        DamagedFileError: a file is damaged; the next run makes it again.
        InputError: there is no finished run.
    """
    state, report = State.of(work), Report()
    for unit in state.units:
        with made_again_by_the_next_run(work):
            _count_unit(state, unit, report)
        manifest = read_manifest(state.unit_path(unit))
        if manifest is not None:
            report.malformed += manifest.facts["malformed"]
            report.empty += manifest.facts["empty"]
            report.messages = (report.messages + manifest.facts["messages"])[:20]
        for stage, path in state.attribute_paths(unit).items():
            if (manifest := read_manifest(path)) is not None and manifest.facts:
                report.facts[stage] = dict(manifest.facts)
    for funnels in (report.languages, report.sources):
        order = sorted(funnels.items(), key=lambda item: (-item[1].raw.bytes, item[0]))
        funnels.clear()
        funnels.update(order)
    return report


def _count_unit(state: State, unit: str, report: Report) -> None:
    documents = read_table(state.unit_path(unit), ["text", "language", "source"])
    size = np.asarray(pa.compute.binary_length(documents.column("text")), dtype=np.int64)
    tables = {stage: read_table(path) for stage, path in state.attribute_paths(unit).items()}
    language = documents.column("language")
    if "language" in tables:
        tag = tables["language"].column("language.tag").cast(pa.string())  # of null where there are no rows
        language = pa.compute.coalesce(tag, language)
    for kind, column in (("", None), ("languages", language), ("sources", documents.column("source"))):
        for name, rows in _groups(column, len(size)):
            funnel = report.total if not kind else getattr(report, kind).setdefault(name, Funnel())
            _count(funnel, rows, size, tables)


def _groups(column: pa.ChunkedArray | None, height: int) -> Iterator[tuple[str, np.ndarray]]:
    """Values and the rows that have each."""
    if column is None:
        yield "", np.arange(height)
        return
    encoded = column.combine_chunks().dictionary_encode()
    index = np.asarray(encoded.indices)
    for number, name in enumerate(encoded.dictionary.to_pylist()):
        yield name or "(none)", np.flatnonzero(index == number)


def _count(funnel: Funnel, rows: np.ndarray, size: np.ndarray, tables: Mapping[str, pa.Table]) -> None:
    funnel.raw.add(len(rows), int(size[rows].sum()))
    alive, now = rows, size
    for name, table in tables.items():
        stage = funnel.stages.setdefault(name, StageReport())
        keep = np.asarray(pa.compute.fill_null(table.column(f"{name}.keep"), False))
        left = np.asarray(pa.compute.fill_null(table.column(f"{name}.left"), 0), dtype=np.int64)
        gone, alive = alive[~keep[alive]], alive[keep[alive]]
        cut = int((now[alive] - left[alive]).sum())
        stage.removed.add(len(gone), int(now[gone].sum()) + cut)
        stage.cut += cut
        stage.reasons.update(table.column(f"{name}.reason").take(pa.array(gone)).to_pylist())
        now = left
    funnel.kept.add(len(alive), int(now[alive].sum()))
