"""Readers against files written by other libraries, and against damage of every kind."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_b2.documents import Document, JsonlWriter, ReadReport, expand_inputs, read_documents
from megatron_b2.errors import InputError

RECORDS = [
    {"text": "你好，世界", "language": "zh-Hans", "source": "p 1.0", "id": "a"},
    {"text": "line\nbreak \u2028 \x00 tab\t", "language": "en"},
    {"id": 7, "text": "third \U0001f600"},
]
LINES = "".join(json.dumps(record, ensure_ascii=i == 1) + "\n" for i, record in enumerate(RECORDS)).encode()


def texts(*paths: Path, **options: object) -> list[str]:
    return [document.text for document in read_documents(paths, **options)]  # type: ignore[arg-type]


def write(path: Path, data: bytes) -> Path:
    if path.name.endswith(".gz"):
        data = gzip.compress(data)
    elif path.name.endswith(".zst"):
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, LINES)
    report = ReadReport()
    documents = list(read_documents([path], report=report))
    assert documents[0] == Document("你好，世界", "zh-Hans", "p 1.0", "a", str(path), 1)
    assert [(d.text, d.language, d.id, d.line) for d in documents[1:]] == [
        (RECORDS[1]["text"], "en", "", 2),
        (RECORDS[2]["text"], "und", "7", 3),
    ]
    assert (report.documents, report.malformed) == (3, 0)
    assert report.bytes == sum(len(str(record["text"]).encode()) for record in RECORDS)


def test_concatenated_archives_are_one_stream(tmp_path: Path) -> None:
    half = len(LINES) // 2
    for name, pack in (("a.jsonl.gz", gzip.compress), ("b.jsonl.zst", zstandard.ZstdCompressor().compress)):
        (tmp_path / name).write_bytes(pack(LINES[:half]) + pack(LINES[half:]))
        assert texts(tmp_path / name) == [record["text"] for record in RECORDS]


def test_zstd_frame_without_content_size(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zstandard.ZstdCompressor().stream_writer(buffer, closefd=False) as stream:
        stream.write(LINES)
    (tmp_path / "a.jsonl.zst").write_bytes(buffer.getvalue())
    assert texts(tmp_path / "a.jsonl.zst") == [record["text"] for record in RECORDS]


def test_blank_lines_bom_crlf_and_missing_last_newline(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "b"}\n{"text": "c"}')
    assert [(d.text, d.line) for d in read_documents([path])] == [("a", 1), ("b", 4), ("c", 5)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff\xfe"}', "not valid UTF-8 at byte 10 of the line"),
        (b'{"text": "a"', "not valid JSON at column 13"),
        (b"{'text': 1}", "not valid JSON at column 2"),
        (b'["a"]', "the record is a list, not an object"),
        (b'{"body": "a", "id": 1}', "no key 'text' (keys: 'body', 'id')"),
        (b'{"text": null}', "'text' is null, not a string"),
        (b'{"text": 5}', "'text' is a number, not a string"),
        (b'{"text": ["a"]}', "'text' is a list, not a string"),
        (b'{"text": "ab\\ud800"}', "lone surrogate U+D800 at character 2"),
        (b"[" * 100_000, "not readable as JSON"),
        (b'{"text": "a", "n": ' + b"9" * 5_000 + b"}", "not readable as JSON"),
    ],
)
def test_malformed_record(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "x.jsonl.gz", b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(InputError) as error:
        texts(path)
    assert f"{path}:2: " in str(error.value)
    assert reason in str(error.value)
    report = ReadReport()
    assert texts(path, on_error="skip", report=report) == ["one", "two"]
    assert report.malformed == 1
    assert report.messages[0].startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("line", "text", "identifier"),
    [
        (b'{"text": "a", "score": NaN, "other": [-Infinity, 1e999]}', "a", ""),
        (b'{"text": "a", "id": 123456789012345678901234567890}', "a", "123456789012345678901234567890"),
        (b'{"text": "a", "id": 18446744073709551615}', "a", "18446744073709551615"),
        (b'{"text": "a", "id": -1.50}', "a", "-1.5"),
        (b'{"text": "a", "id": [18446744073709551616]}', "a", "[18446744073709551616]"),
        (b'{"text": "first", "text": "last"}', "last", ""),
        (b'{"text": "\\ud83d\\ude00\\u0000", "id": true}', "\U0001f600\0", "True"),
        (b' {"text": "a", "deep": ' + b"[" * 500 + b"]" * 500 + b"} \t", "a", ""),
    ],
)
def test_what_pythons_parser_takes_is_taken(tmp_path: Path, line: bytes, text: str, identifier: str) -> None:
    assert json.loads(line)["text"] == text
    (document,) = read_documents([write(tmp_path / "x.jsonl", line)])
    assert (document.text, document.id) == (text, identifier)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
KEYS = st.sampled_from(["text", "id", "language", "source", "x"])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(record=st.dictionaries(KEYS, VALUES), text=st.text(min_size=1), ascii_only=st.booleans())
def test_any_record_is_read_as_pythons_parser_reads_it(
    tmp_path: Path, record: dict[str, object], text: str, ascii_only: bool
) -> None:
    line = json.dumps({**record, "text": text}, ensure_ascii=ascii_only)
    (document,) = read_documents([write(tmp_path / "x.jsonl", line.encode())])
    expected = json.loads(line)
    assert document.text == expected["text"]
    assert document.id == ("" if expected.get("id") is None else str(expected["id"]))
    language, source = expected.get("language"), expected.get("source")
    assert document.language == (language if isinstance(language, str) and language else "und")
    assert document.source == (source if isinstance(source, str) else "")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_truncated_archive(tmp_path: Path, name: str, share: float) -> None:
    lines = "".join(json.dumps({"text": f"document {i} {hash(str(i))}"}) + "\n" for i in range(2_000))
    path = write(tmp_path / name, lines.encode())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    other = write(tmp_path / "y.jsonl", LINES)
    with pytest.raises(InputError, match=r"x\.jsonl\.\w+:\d+: .*damaged or truncated"):
        texts(path)
    report = ReadReport()
    assert texts(path, other, on_error="skip", report=report)[-3:] == [record["text"] for record in RECORDS]
    assert report.malformed in (1, 2)  # the cut may fall inside a line
    assert "damaged or truncated" in report.messages[-1]


def test_not_an_archive(tmp_path: Path) -> None:
    for name in ("x.jsonl.gz", "x.jsonl.zst"):
        (tmp_path / name).write_bytes(LINES)
        with pytest.raises(InputError, match=f"{name}:1: damaged or truncated archive"):
            texts(tmp_path / name)


def test_messages_are_capped_at_twenty(tmp_path: Path) -> None:
    report = ReadReport()
    assert texts(write(tmp_path / "x.jsonl", b"{\n" * 50), on_error="skip", report=report) == []
    assert (report.malformed, len(report.messages)) == (50, 20)


def test_empty_texts_are_counted_not_yielded(tmp_path: Path) -> None:
    report = ReadReport()
    path = write(tmp_path / "x.jsonl", b'{"text": ""}\n{"text": "a"}\n')
    assert texts(path, report=report) == ["a"]
    assert (report.documents, report.empty, report.malformed) == (1, 1, 0)


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table(
        {
            "text": pa.array(["一", None, "", "x\x00y"], pa.large_string()),
            "id": [1, 2, 3, 4],
            "language": ["zh", "en", "en", None],
            "other": [[1], [], [], []],
        }
    )
    pq.write_table(table, path, row_group_size=2)
    report = ReadReport()
    documents = list(read_documents([path], on_error="skip", report=report))
    assert [(d.text, d.language, d.id, d.line) for d in documents] == [
        ("一", "zh", "1", 1),
        ("x\x00y", "und", "4", 4),
    ]
    assert report.empty == 1
    assert report.messages == [f"{path}:2: 'text' is null, not a string"]


def test_parquet_with_broken_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xff", b"fine"], pa.binary())
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": raw.view(pa.string())}), path)
    report = ReadReport()
    assert texts(path, on_error="skip", report=report) == ["good", "fine"]
    assert "x.parquet:2: not valid UTF-8" in report.messages[0]


def test_unusable_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"x\.parquet:1: not a readable Parquet file"):
        texts(path)
    pq.write_table(pa.table({"body": ["a"], "text2": ["b"]}), path)
    with pytest.raises(InputError, match=r"no column 'text' \(columns: 'body', 'text2'\)"):
        texts(path)
    assert texts(path, text_key="body") == ["a"]
    pq.write_table(pa.table({"text": [1]}), path)
    with pytest.raises(InputError, match="column 'text' is int64, not string"):
        texts(path)
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(InputError, match=r"x\.parquet:1: not a readable"):
        texts(path)


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "x.txt", b"\xef\xbb\xbffirst\nsecond\n")
    assert texts(path) == ["first\nsecond\n"]
    path.write_bytes(b"ok\nbad \xe4\xbd")
    with pytest.raises(InputError, match=r"x\.txt:2: not valid UTF-8 at byte 7"):
        texts(path)


def test_expand_inputs(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/1.txt", "a.parquet", ".cache/x.jsonl", "b/.hidden.txt", "readme.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    relative = [p.relative_to(tmp_path).as_posix() for p in expand_inputs([tmp_path, tmp_path / "a.parquet"])]
    assert relative == ["a.parquet", "b/1.txt", "b/2.jsonl"]
    assert expand_inputs([tmp_path / ".cache"]) == [tmp_path / ".cache" / "x.jsonl"]
    for wrong, message in (
        ("gone.jsonl", "no such file"),
        ("readme.md", "unknown kind of file"),
    ):
        with pytest.raises(InputError, match=message):
            expand_inputs([tmp_path / wrong])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no document file"):
        expand_inputs([tmp_path / "empty"])
    with pytest.raises(InputError, match="no input"):
        expand_inputs([])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(min_size=1), max_size=5), st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst"]))
def test_written_texts_come_back(tmp_path: Path, contents: list[str], suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    with JsonlWriter(path) as writer:
        for text in contents:
            writer.write({"text": text})
    assert texts(path) == contents


def test_writer_is_atomic_and_deterministic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.jsonl.gz"

    def produce(fail: bool) -> None:
        with JsonlWriter(path) as writer:
            writer.write({"text": "a"})
            if fail:
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        produce(fail=True)
    assert list(path.parent.iterdir()) == []
    produce(fail=False)
    first = path.read_bytes()
    produce(fail=False)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["x.jsonl.gz"]
