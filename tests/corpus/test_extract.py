"""Text extraction from small files of each kind, made here."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import pytest

from megatron_b2.corpus.extract import extract_file, extract_files, is_candidate


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("usr/share/doc/p/a.html", True),
        ("usr/share/doc/p/a.zh-cn.html", True),
        ("usr/share/doc/p/a.html.gz", True),
        ("usr/share/man/ru/man7/a.7.gz", True),
        ("usr/share/games/fortunes/tang", True),
        ("usr/share/games/fortunes/tang.dat", False),
        ("usr/share/locale/de/LC_MESSAGES/a.mo", True),
        ("usr/share/doc/p/copyright", False),
        ("usr/share/doc/p/README.md.gz", False),
        ("usr/share/doc/p/guide.txt.gz", True),
        ("usr/share/doc/p/picture.png", False),
    ],
)
def test_is_candidate(name: str, expected: bool) -> None:
    assert is_candidate(name) is expected


def test_fortunes_are_split_and_stripped_of_colour(tmp_path: Path) -> None:
    path = tmp_path / "usr" / "games" / "fortunes" / "tang"
    path.parent.mkdir(parents=True)
    path.write_text("\x1b[32m静夜思\x1b[m\n床前明月光\n%\n春晓\n春眠不觉晓\n", encoding="utf-8")
    assert extract_file(path, mandoc="") == ["静夜思\n床前明月光", "春晓\n春眠不觉晓"]


def test_gettext_catalogue(tmp_path: Path) -> None:
    """A .mo file made from its specification (gettext manual, "The Format of GNU MO Files")."""
    entries = [
        (b"", b"Content-Type: text/plain; charset=UTF-8\n"),
        (b"Open file", "打开一个文件".encode()),
        (b"No", b"Nein"),
    ]
    start = 28 + 16 * len(entries)
    blob, tables = b"", [b"", b""]
    for column in (0, 1):
        for entry in entries:
            tables[column] += struct.pack("<II", len(entry[column]), start + len(blob))
            blob += entry[column] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(entries), 28, 28 + 8 * len(entries), 0, 0)
    (tmp_path / "a.mo").write_bytes(head + tables[0] + tables[1] + blob)
    assert extract_file(tmp_path / "a.mo", mandoc="") == ["打开一个文件"]


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_manual_page(tmp_path: Path) -> None:
    path = tmp_path / "man" / "man1" / "a.1.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(
        gzip.compress(".TH A 1 2024\n.SH ИМЯ\na \\- программа\n.SH DESCRIPTION\n\\fBbold\\fR text\n".encode())
    )
    text = extract_file(path, mandoc="mandoc")[0]
    assert [line for line in text.split("\n") if line] == ["ИМЯ", "a - программа", "DESCRIPTION", "bold text"]
    path.write_bytes(gzip.compress(b".so man1/b.1\n"))
    assert extract_file(path, mandoc="mandoc") == []


def test_broken_files_are_named_and_short_ones_dropped(tmp_path: Path) -> None:
    good = "The text of this file is long enough to be kept, and it is in English. " * 4
    for name, data in (
        ("a.txt", good.encode()),
        ("b.txt", b"\xff" * 500),
        ("c.txt", b"short"),
        ("d.txt.gz", b"no gz"),
    ):
        (tmp_path / name).write_bytes(data)
    texts, problems = extract_files(tmp_path, ["a.txt", "b.txt", "c.txt", "d.txt.gz"], mandoc="")
    assert [(text.path, text.part, text.language, text.text) for text in texts] == [
        ("a.txt", 0, "en", good.strip())
    ]
    assert [problem.partition(":")[0] for problem in problems] == ["b.txt", "d.txt.gz"]
