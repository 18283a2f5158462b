"""Input of every bad kind through all stages: counted, named, in bounded memory, and the rest is read."""

from __future__ import annotations

import gzip
import json
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from megatron_b2.corpus.formats.reading import SUFFIXES
from megatron_b2.corpus.pipeline.config import ALL_STAGES
from megatron_b2.corpus.pipeline.report import make_report
from megatron_b2.errors import InputError
from tests.corpus.formats.test_pdf import SHOW, by_hand
from tests.corpus.formats.test_warc import response
from tests.corpus.pipeline.inline import run_here
from tests.corpus.prose import prose
from tests.documents.test_streams import gzip_bomb, zstd_bomb


def text_of(seed: str) -> str:
    return prose(random.Random(seed))


def line(name: str, **more: Any) -> bytes:
    return json.dumps({"id": name, "text": text_of(name), **more}).encode() + b"\n"


def lines(bad: bytes) -> bytes:
    """A good record before and one behind."""
    name = str(hash(bad))
    return line(f"before {name}") + bad + b"\n" + line(f"behind {name}")


LONG = b'{"text": "%s"}' % (b"x" * (3 << 20))
HTML = "<html><body><p>%s</p></body></html>"
BAD: dict[str, tuple[str, bytes, int, str]] = {
    # what: name of the file, content, documents that it still gives, message
    "invalid UTF-8": ("x.jsonl", lines(b'{"text": "\xff\xfe"}'), 2, r"x.jsonl:2: not valid UTF-8 at byte 10"),
    "raw NUL": ("x.jsonl", lines(b"\0" * 100), 2, r"x.jsonl:2: not valid JSON"),
    "deep": (
        "x.jsonl",
        lines(b'{"text": "a", "b": ' + b"[" * 200_000),
        2,
        r"x.jsonl:2: not readable as JSON",
    ),
    "deep id": ("x.jsonl", lines(b'{"text": "a", "id": ' + b"[" * 990 + b"]" * 990 + b"}"), 2, "x.jsonl:2: "),
    "surrogate": ("x.jsonl", lines(b'{"text": "\\ud800"}'), 2, "x.jsonl:2: 'text' holds a lone surrogate"),
    "surrogate in url": (
        "x.jsonl",
        lines(b'{"text": "a", "url": "\\ud800"}'),
        2,
        "x.jsonl:2: 'url' holds a lone",
    ),
    "number": (
        "x.jsonl",
        lines(b'{"text": "a", "n": ' + b"9" * 9_000 + b"}"),
        2,
        "x.jsonl:2: not readable as JSON",
    ),
    "long line": ("x.jsonl", lines(LONG), 2, "x.jsonl:2: 3,145,741 bytes are more than a record may have"),
    "long line, gzip": (
        "x.jsonl.gz",
        gzip.compress(lines(LONG)),
        2,
        "x.jsonl.gz:2: 3,145,741 bytes are more",
    ),
    "long row": ("x.parquet", b"long", 1, "x.parquet:2: 3,145,728 bytes are more than a record may have"),
    "no parquet": ("x.parquet", b"PAR1 no", 0, "x.parquet:1: not a readable Parquet file"),
    "bomb.gz": (
        "x.jsonl.gz",
        gzip.compress(line("a")) + gzip_bomb(128 << 20),
        1,
        "x.jsonl.gz:2: .*-fold: a bomb",
    ),
    "bomb.zst": (
        "x.jsonl.zst",
        zstandard.compress(line("a")) + zstd_bomb(8 << 30),
        1,
        "x.jsonl.zst:2: .*a bomb",
    ),
    "bomb.txt": ("x.txt.zst", zstd_bomb(8 << 30), 0, "x.txt.zst:1: .*-fold: a bomb"),
    "cut.gz": (
        "x.jsonl.gz",
        gzip.compress(line("a")) + gzip.compress(line("b"))[:-99],
        1,
        "x.jsonl.gz:2: damaged or",
    ),
    "cut.zst": (
        "x.jsonl.zst",
        zstandard.compress(line("a")) + zstandard.compress(line("b"))[:-9],
        1,
        "zst:2: damaged",
    ),
    "text": ("x.txt", b"fine\n\xe4\xbd", 0, "x.txt:2: not valid UTF-8 at byte 5"),
    "charset": ("x.html", b"<p>" + b"\x81\x8d\xff" * 50, 0, "x.html:1: not text in UTF-8"),
    "no manual page": ("x.1", b"Jan 1 sshd: a rotated log\n", 0, "x.1:1: not a manual page"),
    "no pdf": ("x.pdf", b"%PDF-1.4 no", 0, "x.pdf:1: not a readable PDF file"),
    "bomb in warc": (
        "x.warc.gz",
        b"".join(
            gzip.compress(record)
            for record in (
                response(1, body=(HTML % text_of("1")).encode()),
                response(2, body=gzip_bomb(16 << 20), http=b"Content-Encoding: gzip\r\n"),
                response(3, body=(HTML % text_of("3")).encode()),
            )
        ),
        2,
        r"x.warc.gz:2: record at byte \d+: its [\d,]+ bytes become more than 1,048,576",
    ),
    "broken warc": ("x.warc", b"PK\x03\x04 no", 0, "x.warc:1: record at byte 0: no record begins here"),
}


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    if content == b"long":
        pq.write_table(pa.table({"text": [text_of("row"), "x" * (3 << 20)]}), path)
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("what", BAD)
def test_what_is_bad_is_named_and_the_rest_is_read(tmp_path: Path, what: str) -> None:
    name, content, documents, message = BAD[what]
    write(tmp_path / "in" / name, content)
    run = run_here(tmp_path, stages=("normalize", "exact"))
    report = make_report(tmp_path / "work")
    assert sum(unit.documents for unit in run.units) == documents
    assert report.malformed == 1
    assert re.search(message, report.messages[0])
    with pytest.raises(InputError, match=message):
        run_here(tmp_path, work="stop", stages=("normalize",), on_error="stop")


@pytest.mark.slow
def test_everything_bad_at_once_through_all_stages(tmp_path: Path) -> None:
    for number, (name, content, _, _) in enumerate(BAD.values()):
        folder = tmp_path / "in" / f"{number:02}"
        folder.mkdir(parents=True)
        write(folder / name, content)
    for suffix in SUFFIXES:
        (tmp_path / "in" / f"empty{suffix}").touch()
    odd = [
        {"id": "twice", "text": text_of("one")},
        {"id": "twice", "text": text_of("two")},
        {"id": "nul", "text": text_of("nul").replace(" ", "\0 ", 5)},
        {"id": "only nul", "text": "\0" * 500},
        {"id": "spaces", "text": " \n\t\u3000" * 500},
        {"id": "", "text": text_of("no id")},
        {"id": "controls", "text": "".join(map(chr, range(1, 160))) * 20},
        {"id": "one word", "text": "a" * 100_000},
        {"id": "marks", "text": "e" + "\u0301" * 50_000},
    ]
    (tmp_path / "in" / "odd.jsonl").write_text("".join(json.dumps(record) + "\n" for record in odd))
    run = run_here(tmp_path, unit_mb=64)
    report = make_report(tmp_path / "work")
    # Empty archives and Parquet files are damaged; other empty files have no document, or an empty one.
    assert report.malformed >= len(BAD) - 1
    assert report.total.raw.documents == sum(unit.documents for unit in run.units)
    assert report.total.kept.documents > 0
    parts = (tmp_path / "work" / "documents").glob("*.parquet")
    ids = [name for part in parts for name in pq.read_table(part, columns=["id"])["id"].to_pylist()]
    repeated = len(ids) - len(set(ids))  # "twice", and lines that are in several of the files
    assert repeated > 1
    assert report.total.stages["exact"].reasons == {"the id has occurred before": repeated}
    run_here(tmp_path, work="again", seed=7, unit_mb=64, stages=("normalize", "exact"))
    first, second = (
        json.loads((tmp_path / work / "pipeline.json").read_text()) for work in ("work", "again")
    )
    assert first["units"] == second["units"]
    assert second["files"] == {name: first["files"][name] for name in second["files"]}


def test_nothing_but_empty_files(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.txt", "x.warc", "x.html"):
        write(tmp_path / "in" / name, b"")
    run = run_here(tmp_path, stages=ALL_STAGES)
    assert sum(unit.documents for unit in run.units) == 0
    report = make_report(tmp_path / "work")
    assert (report.malformed, report.empty, report.total.kept.documents) == (0, 2, 0)


def test_the_same_name_in_two_folders(tmp_path: Path) -> None:
    """Documents without an id get one that no other has."""
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        (tmp_path / "in" / folder / "index.html").write_text(HTML % text_of(folder))
        (tmp_path / "in" / folder / "x.jsonl").write_text(json.dumps({"text": text_of(folder + "x")}) + "\n")
    run_here(tmp_path, stages=("exact",))
    report = make_report(tmp_path / "work")
    assert (report.total.raw.documents, report.total.kept.documents) == (4, 4)
    assert list(report.sources) == ["in"]


def test_an_archive_makes_units_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "in" / "x.jsonl.gz"
    write(path, gzip.compress(b"".join(line(str(i)) for i in range(6_000))))
    run = run_here(tmp_path, stages=("exact",))
    assert path.stat().st_size < 3 << 20
    assert len(run.units) >= 4
    assert sum(unit.documents for unit in run.units) == 6_000


MEASURED = """
import resource, sys
from pathlib import Path
from tests.corpus.pipeline.inline import run_here
from tests.corpus.prose import prose
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run = run_here(Path(sys.argv[1]), stages=("normalize", "exact", "heuristics"))
print(sum(unit.documents for unit in run.units), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""


def measured(folder: Path) -> tuple[int, int]:
    """Documents, and MB that a process with 4 GB of address space grew by."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    documents, grown = map(int, done.stdout.split())
    return documents, grown


def sparse(path: Path, size: int) -> None:
    """A line of `size` bytes, and a good one behind it."""
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(size)
        file.seek(size)
        file.write(b'"}\n' + line("good"))


LARGE: dict[str, Callable[[Path], object]] = {
    "a line of 256 MB": lambda folder: sparse(folder / "x.jsonl", 256 << 20),
    "a line of 4 GB in 135 kB": lambda folder: (folder / "x.jsonl.zst").write_bytes(
        zstd_bomb(4 << 30) + zstandard.compress(b"\n" + line("good"))
    ),
}


@pytest.mark.parametrize("what", LARGE)
def test_memory_is_bounded(tmp_path: Path, what: str) -> None:
    (tmp_path / "in").mkdir()
    LARGE[what](tmp_path / "in")
    documents, grown = measured(tmp_path)
    assert documents == (1 if what == "a line of 256 MB" else 0)
    assert grown < 200
    assert make_report(tmp_path / "work").malformed == 1


@pytest.mark.slow
def test_a_line_of_a_gigabyte(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    sparse(tmp_path / "in" / "x.jsonl", 1 << 30)
    documents, grown = measured(tmp_path)
    assert documents == 1
    assert grown < 200
    (message,) = make_report(tmp_path / "work").messages
    assert "x.jsonl:1: 1,073,741,827 bytes are more than a record may have" in message


def test_a_pdf_bomb_costs_its_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_b2.corpus.formats.reading.PDF_MEMORY_BYTES", 128 << 20)
    bomb = zlib.compress(zlib.compress(bytes(256 << 20), 1))
    write(tmp_path / "in" / "a.pdf", by_hand(bomb, filters="/Filter [/FlateDecode /FlateDecode]"))
    write(tmp_path / "in" / "b.pdf", by_hand(SHOW))
    run = run_here(tmp_path, stages=("exact",))
    assert sum(unit.documents for unit in run.units) == 1
    assert "a.pdf:1: PDFium takes more than" in make_report(tmp_path / "work").messages[0]
