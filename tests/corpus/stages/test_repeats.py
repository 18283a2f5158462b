"""`exact` against its rule, document by document: no text is lost."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.corpus.pipeline.checked import read_table, write_table
from megatron_b2.corpus.pipeline.stage import Context, Unit, attributes_path
from megatron_b2.corpus.pipeline.tasks import Limits, run_task
from megatron_b2.corpus.pipeline.view import DOCUMENT_SCHEMA
from megatron_b2.corpus.stages.repeats import Exact

BY_ID, BY_TEXT = "the id has occurred before", "the text has occurred before"
Pair = tuple[str, str]
"""Id and text."""


def reasons(units: Sequence[Sequence[Pair]], work: Path) -> tuple[list[str], list[int]]:
    """What `exact` says about the documents of all units: reason and `duplicates`."""
    made: list[Unit] = []
    for number, pairs in enumerate(units):
        rows = [{"id": name, "text": text, "language": "en", "source": "", "path": "", "line": 1, "url": ""} for name, text in pairs]  # fmt: skip
        path = work / "documents" / f"{number}.parquet"
        write_table(path, pa.Table.from_pylist(rows, DOCUMENT_SCHEMA), fingerprint="", facts={})
        made.append(Unit(str(number), path, sum(unit.documents for unit in made), len(pairs)))
    for tasks in Exact().phases(Context(work, tuple(made), "exact", ())):
        for task in tasks:
            run_task(task, Limits(1 << 24, work / "scratch"))
    tables = [read_table(attributes_path(work, "exact", unit.name)) for unit in made]
    columns = pa.concat_tables(tables).select(["exact.reason", "exact.duplicates"])
    return columns.column(0).to_pylist(), columns.column(1).to_pylist()


def by_the_rule(documents: Sequence[Pair]) -> tuple[list[str], list[int]]:
    """An id goes with its first document, a text with the first document that its id has not taken away."""
    ids: dict[str, int] = {}
    texts: dict[str, int] = {}
    said, duplicates = [], []
    for number, (name, text) in enumerate(documents):
        first = ids.setdefault(name, number)
        why = BY_ID if first != number else ""
        if not why:
            first = texts.setdefault(" ".join(text.lower().split()), number)
            why = BY_TEXT if first != number else ""
        said.append(why)
        duplicates.append(first)
    return said, duplicates


def test_a_text_survives_the_document_that_goes_for_its_id(tmp_path: Path) -> None:
    documents = [("1", "alpha text X"), ("1", "beta text Y"), ("2", "beta text Y")]
    assert reasons([documents], tmp_path) == (["", BY_ID, ""], [0, 0, 2])


NAMES = st.sampled_from("123456")
TEXTS = st.sampled_from(["one text", "One  TEXT", "another text", "a third", "a fourth", "a fifth"])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.tuples(NAMES, TEXTS), max_size=6), min_size=1, max_size=3))
def test_every_text_keeps_one_copy_unless_all_go_by_id(units: list[list[Pair]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        said, duplicates = reasons(units, Path(folder))
    documents = [pair for unit in units for pair in unit]
    assert (said, duplicates) == by_the_rule(documents)
    by_text: dict[str, list[str]] = {}
    for (_, text), why in zip(documents, said, strict=True):
        by_text.setdefault(" ".join(text.lower().split()), []).append(why)
    for whys in by_text.values():
        assert whys.count("") == (0 if set(whys) == {BY_ID} else 1)
