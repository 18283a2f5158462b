"""Inputs by folder, pattern and URL: fsspec's memory file system, and a server of HTTP."""

from __future__ import annotations

import functools
import gzip
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_b2.documents import read_documents
from megatron_b2.documents.shards import scan_file
from megatron_b2.documents.storage import expand_inputs, input_path, list_inputs, version_of
from megatron_b2.errors import InputError

NAMES = ("b/2.jsonl", "b/1.txt", "b/c/0.jsonl.gz", "a.jsonl", ".cache/x.jsonl", "b/.hidden.txt", "readme.md")


def content(name: str) -> bytes:
    data = f'{{"text": "{name}"}}\n'.encode() if ".jsonl" in name else name.encode()
    return gzip.compress(data) if name.endswith(".gz") else data


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_bytes(content(name))
    return tmp_path / "root"


@pytest.fixture
def memory() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for name in NAMES:
        system.pipe(f"/bucket/root/{name}", content(name))
    yield "memory://bucket/root"
    system.rm("/bucket", recursive=True)


@pytest.fixture
def server(local: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(local.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/root"
        running.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", ["root/a.jsonl", "root/b/1.txt", "root/b/2.jsonl", "root/b/c/0.jsonl.gz"]),
        ("/*.jsonl", ["root/a.jsonl"]),
        ("/b/*", ["b/1.txt", "b/2.jsonl", "b/c/0.jsonl.gz"]),
        ("/**/*.jsonl*", ["root/a.jsonl", "root/b/2.jsonl", "root/b/c/0.jsonl.gz"]),
        ("/[ab]*/[0-9].jsonl", ["root/b/2.jsonl"]),
        ("/a.jsonl", ["a.jsonl"]),
    ],
)
def test_names(local: Path, memory: str, pattern: str, expected: list[str]) -> None:
    for root in (str(local), memory):
        found = list_inputs([root + pattern])
        assert sorted(file.name for file in found) == expected
        assert {file.group for file in found} == {expected[0].partition("/")[0] if "/" in expected[0] else ""}
        texts = [document.text for document in read_documents([root + pattern])]
        assert sorted(texts) == sorted(str(file.path).rpartition("root/")[2] for file in found)


def test_a_relative_pattern(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(local)
    assert [(file.group, file.name) for file in list_inputs(["b/*.jsonl", "*.jsonl"])] == [
        ("b", "b/2.jsonl"),
        ("", "a.jsonl"),
    ]


def test_names_are_unique(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "data" / "x.txt").write_text("a")
    found = list_inputs(
        [tmp_path / "one" / "data", tmp_path / "two" / "data", tmp_path / "one" / "data" / "x.txt"]
    )
    assert [file.name for file in found] == ["data/x.txt", str(tmp_path / "two" / "data" / "x.txt")]


def test_http(server: str) -> None:
    urls = [f"{server}/a.jsonl", f"{server}/b/c/0.jsonl.gz", f"{server}/b/1.txt"]
    assert [d.text for d in read_documents(urls)] == ["a.jsonl", "b/c/0.jsonl.gz", "b/1.txt"]
    assert [d.path for d in read_documents(urls)] == urls
    path = input_path(urls[1])
    assert scan_file(path, target_bytes=1).size == len(content("b/c/0.jsonl.gz"))
    assert version_of(path).startswith(f"{scan_file(path, target_bytes=1).size} ")
    assert [str(file) for file in expand_inputs([f"{server}/b/*.txt"])] == [urls[2]]
    with pytest.raises(InputError, match=r"no such file or folder|cannot be listed"):
        expand_inputs([f"{server}/gone.jsonl"])


def test_parquet_by_url() -> None:
    with fsspec.open("memory://bucket/x.parquet", "wb") as stream:
        pq.write_table(pa.table({"text": ["a", "b"], "url": ["u", None]}), stream)
    found = list(read_documents(["memory://bucket/x.parquet"]))
    assert [(d.text, d.url, d.path) for d in found] == [
        ("a", "u", "memory://bucket/x.parquet"),
        ("b", "", "memory://bucket/x.parquet"),
    ]


def test_errors(memory: str) -> None:
    for url, message in (
        (f"{memory}/gone", "no such file or folder"),
        (f"{memory}/readme.md", "unknown kind of file"),
        (f"{memory}/.cache/none*", "no such file or folder"),
        ("nonsense://x/y.jsonl", "nonsense://x/y.jsonl: cannot be opened"),
        ("http://127.0.0.1:9/x.jsonl", "cannot be listed"),
    ):
        with pytest.raises(InputError, match=message):
            expand_inputs([url])


def test_a_network_error_is_no_skipped_record(server: str, local: Path) -> None:
    url = f"{server}/a.jsonl"
    (path,) = expand_inputs([url])
    (local / "a.jsonl").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        scan_file(path, target_bytes=1)
