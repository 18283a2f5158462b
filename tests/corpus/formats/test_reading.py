"""Every kind of file through one reader: whole and in pieces, plain and compressed; Markdown and manual pages."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_b2.corpus.formats.man import man_text
from megatron_b2.corpus.formats.markdown import markdown_text
from megatron_b2.corpus.formats.reading import SUFFIXES, PieceReader, cut_file, kind_of
from megatron_b2.corpus.formats.text import UnreadableError
from megatron_b2.documents.document import Document, MalformedError
from megatron_b2.documents.shards import Piece
from megatron_b2.documents.streams import ReadLimits
from tests.corpus.formats.test_pdf import SHOW, by_hand

LIMITS = ReadLimits(record_bytes=1 << 16)


def read(path: Path, target_bytes: int = 1 << 30) -> list[Document | MalformedError]:
    file = cut_file(path, target_bytes=target_bytes, text_key="text", limits=LIMITS)
    with PieceReader(text_key="text", limits=LIMITS) as reader:
        return [item for piece in file.pieces for item in reader.read(piece)]


def members(pack: Callable[[bytes], bytes], data: bytes, count: int) -> bytes:
    """`data` cut anywhere into that many members of an archive."""
    size = max(len(data) // count, 1)
    return b"".join(pack(data[i : i + size]) for i in range(0, len(data), size))


PACK: dict[str, Callable[[bytes], bytes]] = {
    "x.jsonl": bytes,
    "x.jsonl.gz": gzip.compress,
    "x.jsonl.zst": zstandard.compress,
    "many.jsonl.gz": lambda data: members(gzip.compress, data, 7),
    "many.jsonl.zst": lambda data: members(zstandard.compress, data, 7),
}


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=300) | st.just("x" * 70_000), max_size=30),
    target=st.sampled_from([1, 100, 1_000, 1 << 30]),
    name=st.sampled_from(sorted(PACK)),
    cut=st.booleans(),
)
def test_pieces_of_json_lines(tmp_path: Path, texts: list[str], target: int, name: str, cut: bool) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    data = PACK[name](lines.encode())
    (tmp_path / name).write_bytes(data[: len(data) * 3 // 4] if cut else data)
    whole = read(tmp_path / name)
    found = read(tmp_path / name, target)
    assert [(type(item), item.line) for item in found] == [(type(item), item.line) for item in whole]
    assert [d.text for d in found if isinstance(d, Document)] == [
        d.text for d in whole if isinstance(d, Document)
    ]
    if not cut:
        assert [d.text for d in whole if isinstance(d, Document)] == [t for t in texts if len(t) < 70_000]
        assert [e.line for e in whole if isinstance(e, MalformedError)] == [
            n for n, t in enumerate(texts, 1) if len(t) == 70_000
        ]


def test_an_archive_is_cut_into_pieces_that_begin_at_its_members(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(5_000))
    for name, restarts in (("x.jsonl.gz", 1), ("many.jsonl.gz", 7), ("many.jsonl.zst", 7)):
        (tmp_path / name).write_bytes(PACK[name](lines))
        file = cut_file(tmp_path / name, target_bytes=1_000, text_key="text", limits=LIMITS)
        assert len(file.pieces) > 50
        assert len({piece.restart for piece in file.pieces}) == restarts


@pytest.mark.parametrize("target", [1, 1 << 30])
def test_damage_between_two_lines_is_seen(tmp_path: Path, target: int) -> None:
    line = b'{"text": "a"}\n'
    for name, pack in (("x.jsonl.gz", gzip.compress), ("x.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(pack(line) + pack(line)[:5])
        first, second = read(tmp_path / name, target)
        assert isinstance(first, Document)
        assert isinstance(second, MalformedError)
        assert (second.line, second.reason[:20]) == (2, "damaged or truncated")


@pytest.mark.parametrize("target", [1, 2_000, 1 << 30])
def test_pieces_of_parquet(tmp_path: Path, target: int) -> None:
    texts = [f"text {i} " * (i % 40) for i in range(500)]
    table = pa.table(
        {"text": texts, "url": [f"https://example.org/{i}" for i in range(500)], "other": [[1]] * 500}
    )
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=50)
    items = read(tmp_path / "x.parquet", target)
    assert [(item.line, item.text, item.url) for item in items if isinstance(item, Document)] == [
        (i + 1, text, f"https://example.org/{i}") for i, text in enumerate(texts)
    ]
    pieces = cut_file(tmp_path / "x.parquet", target_bytes=target, text_key="text", limits=LIMITS).pieces
    assert len(pieces) == {1: 10, 1 << 30: 1}.get(target, len(pieces))


def test_parquet_that_grows_out_of_proportion(tmp_path: Path) -> None:
    """100 kB that are 8 GB of text: a dictionary of one value."""
    text = "a" * 60_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 130_000, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 200_000
    *documents, last = read(tmp_path / "x.parquet")
    assert isinstance(last, MalformedError)
    assert "more than 200-fold: a bomb" in last.reason
    assert sum(len(item.text) for item in documents if isinstance(item, Document)) <= 64 << 20


MAN = b".TH A 1 2024\n.SH NAME\na \\- program\n.SH DESCRIPTION\n\\fBbold\\fR text\n"
FILES = {
    "a.html": ("<body><p>你好</p></body>".encode(), "你好"),
    "a.htm": (b"<body><p>x</p></body>", "x"),
    "a.md": (b"# Title\n\n*text*", "Title\ntext"),
    "a.txt": ("e\u0301 文".encode(), "e\u0301 文"),
    "a.pdf": (by_hand(SHOW), "By hand"),
}


@pytest.mark.parametrize("archive", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_one_document(tmp_path: Path, name: str, archive: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[archive]
    data, text = FILES[name]
    path = tmp_path / (name + archive)
    path.write_bytes(pack(data))
    assert path.name.endswith(SUFFIXES)
    assert read(path) == [Document(text, path=str(path), line=1)]
    path.write_bytes(pack(data + b" " * (1 << 16)))
    (error,) = read(path)
    assert isinstance(error, MalformedError)
    assert "bytes are more than a record may have" in error.reason
    if archive:
        path.write_bytes(pack(data)[:-5])
        (error,) = read(path)
        assert isinstance(error, MalformedError)
        assert "damaged or truncated" in error.reason


def test_kind_of() -> None:
    names = ("a.b.JSONL.gz", "CC-MAIN.warc.wet.gz", "ls.1.gz", "x.HTML")
    assert [kind_of(Path(name)) for name in names] == [".jsonl", ".wet", ".1", ".html"]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("# A\n\npara *one*\ntwo `code`\n\n- x\n- y\n", "A\npara one two code\nx\ny"),
        ("```py\ndef f():\n\n    return 1\n```\n", "def f():\n\n    return 1"),
        ("[link](https://example.org) ![alt](x.png) <b>bold</b> ~~gone~~", "link bold gone"),
        ("| a | b |\n|---|---|\n| 一 | 二 |\n", "a\nb\n一\n二"),
        ("---\ntitle: x\n---\ntext\n", "text"),
        ("a\n\n---\n\nb\n\n---\n", "a\nb"),
        ("a &amp; b &copy; \\*", "a & b © *"),
        ("<div>html <script>no()</script></div>\n\ntext", "html\ntext"),
        ("", ""),
        ("> " * 3_000 + "deep", None),
        ("[" * 20_000, None),
        ("*" * 20_000 + "a", None),
    ],
)  # fmt: skip
def test_markdown(source: str, text: str | None) -> None:
    found = markdown_text(source.encode()).text
    assert text is None or found == text


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_manual_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.1.gz"
    path.write_bytes(gzip.compress(MAN))
    (document,) = read(path)
    assert isinstance(document, Document)
    assert [line for line in document.text.split("\n") if line] == [
        "NAME",
        "a - program",
        "DESCRIPTION",
        "bold text",
    ]
    monkeypatch.setattr("megatron_b2.corpus.formats.man.SECONDS", 0.5)
    with pytest.raises(UnreadableError, match="mandoc takes more than"):
        man_text(MAN + b".while 1 \\{text\n.\\}\n", shutil.which("mandoc") or "")


def test_what_is_no_manual_page(tmp_path: Path) -> None:
    with pytest.raises(UnreadableError, match="not a manual page"):
        man_text(b"Jan 1 00:00:00 host sshd: a rotated log\n", "mandoc")
    assert man_text(b".so man1/b.1\n", "mandoc") == ""


def test_a_file_that_goes_away(tmp_path: Path) -> None:
    with PieceReader(text_key="text", limits=LIMITS) as reader:
        for name in ("x.jsonl", "x.html", "x.warc", "x.parquet"):
            (error,) = reader.read(Piece(tmp_path / name, 0, 10))
            assert isinstance(error, MalformedError)
            assert "No such file" in error.reason or "not a readable" in error.reason
