"""`b2 preprocess` against SentencePiece itself, and against interruptions."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.cli import data as data_command
from megatron_b2.cli import preprocess as preprocess_command
from megatron_b2.cli.main import main as b2
from megatron_b2.config.schema import DataConfig, SourceConfig
from megatron_b2.data import indexed
from megatron_b2.data.blended import BlendedDataset
from megatron_b2.data.indexed import IndexedDataset
from megatron_b2.data.manifest import Counts, read_manifest
from megatron_b2.data.preprocess import preprocess
from megatron_b2.documents.shards import Piece, ScannedFile, plan_shards, scan_file
from megatron_b2.errors import DataError, InputError
from megatron_b2.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def texts(num: int) -> list[str]:
    sentence = "the quick brown fox 天地玄黄 宇宙洪荒 </s> 42 naïve\n\t  spaced 🦊"
    words = sentence.split(" ")
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, size=int(rng.integers(1, 60)))) for _ in range(num)]


def write_jsonl(path: Path, contents: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"text": text, "language": "zh" if i % 3 else "en"}) for i, text in enumerate(contents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def contents(prefix: Path) -> dict[str, str]:
    return {
        suffix: hashlib.sha256(Path(f"{prefix}{suffix}").read_bytes()).hexdigest()
        for suffix in (".bin", ".idx")
    }


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tokens_are_sentencepieces_with_the_end_of_document(tmp_path: Path, tokenizer_path: Path) -> None:
    documents = texts(200)
    source = write_jsonl(tmp_path / "in.jsonl", documents)
    result = preprocess(
        [source], tokenizer=tokenizer_path.parent, output=tmp_path / "out" / "x", target_bytes=2000
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    expected = [[*processor.encode(text), 2] for text in documents]
    dataset = IndexedDataset(tmp_path / "out" / "x")
    assert dataset.dtype == np.uint16
    assert [dataset.document(i).tolist() for i in range(len(dataset))] == expected
    assert files(tmp_path / "out") == ["x.bin", "x.idx", "x.json"]
    manifest = read_manifest(tmp_path / "out" / "x")
    assert manifest == result.manifest
    text_bytes = sum(len(text.encode()) for text in documents)
    assert manifest.tally.total == Counts(
        documents=200, tokens=sum(map(len, expected)), text_bytes=text_bytes
    )
    assert manifest.tally.languages["en"].documents == 67
    assert manifest.tokenizer == hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
    assert manifest.inputs[0].sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (manifest.vocab_size, manifest.dtype, manifest.end_of_document) == (400, "uint16", True)


def test_the_result_does_not_depend_on_workers_or_shards(tmp_path: Path, tokenizer_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / "in" / f"{name}.jsonl", texts(150))
    seen = []
    for i, (workers, target) in enumerate([(1, None), (2, 3000), (1, 700)]):
        output = tmp_path / f"out{i}"
        result = preprocess(
            [tmp_path / "in"], tokenizer=tokenizer_path, output=output, workers=workers, target_bytes=target
        )
        assert result.num_shards == 1 if target is None else result.num_shards > 5
        seen.append((contents(output), result.manifest.tally))
    assert seen[0] == seen[1] == seen[2]


KILLED_RUN = """
import os, signal, sys
from pathlib import Path
from megatron_b2.data.preprocess import preprocess

if __name__ == "__main__":
    source, tokenizer, output, workers, phase, share = sys.argv[1:]

    def progress(name, done, total):
        if name == phase and done >= float(share) * total:
            os.kill(os.getpid(), signal.SIGKILL)

    preprocess([source], tokenizer=Path(tokenizer), output=Path(output), workers=int(workers), target_bytes=3000,
               progress=progress)
"""


@pytest.mark.parametrize(
    ("workers", "phase", "share"), [(1, "encode", 0.4), (2, "encode", 0.4), (1, "join", 0.0)]
)
def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, tokenizer_path: Path, workers: int, phase: str, share: float
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(300))
    preprocess([source], tokenizer=tokenizer_path, output=tmp_path / "whole")
    output, mark = tmp_path / "out" / "x", f"B2_TEST_MARK={uuid.uuid4()}"
    script = tmp_path / "run.py"
    script.write_text(KILLED_RUN)
    killed = subprocess.run(
        [sys.executable, script, source, tokenizer_path, output, str(workers), phase, str(share)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **dict([mark.split("=")])},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while _marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _marked_processes(mark), "workers outlived the main process"
    assert files(tmp_path / "out") == ["x.parts"]
    parts = sorted((tmp_path / "out" / "x.parts").glob("*.tally"))
    assert parts
    torn = parts[0].with_suffix(".bin")
    torn.write_bytes(torn.read_bytes()[:-1])
    result = preprocess([source], tokenizer=tokenizer_path, output=output, target_bytes=3000)
    assert len(parts) - 1 == result.reused_shards > 0
    assert contents(output) == contents(tmp_path / "whole")
    assert files(tmp_path / "out") == ["x.bin", "x.idx", "x.json"]


def _marked_processes(mark: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_all_kinds_of_input_give_the_same_documents(tmp_path: Path, tokenizer_path: Path) -> None:
    documents = texts(30)
    plain = write_jsonl(tmp_path / "in.jsonl", documents)
    gz, zst, parquet = (tmp_path / f"in.{kind}" for kind in ("jsonl.gz", "jsonl.zst", "parquet"))
    gz.write_bytes(gzip.compress(plain.read_bytes()))
    zst.write_bytes(zstandard.compress(plain.read_bytes()))
    pq.write_table(pa.table({"text": documents}), parquet, row_group_size=7)
    for i, text in enumerate(documents):
        path = tmp_path / "txt" / f"{i:03d}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())
    seen = []
    for i, source in enumerate((plain, gz, zst, parquet, tmp_path / "txt")):
        preprocess([source], tokenizer=tokenizer_path, output=tmp_path / f"out{i}")
        seen.append(contents(tmp_path / f"out{i}"))
    assert all(content == seen[0] for content in seen)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_malformed_line_is_named_and_nothing_is_written(
    tmp_path: Path, tokenizer_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = write_jsonl(tmp_path / "in.jsonl", texts(100)).read_text().splitlines()
    lines[70] = '{"text": "no end'
    lines[80] = '{"txt": "wrong key"}'
    lines[85] = '{"text": ""}'
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))
    arguments = ["preprocess", str(source), "--tokenizer", str(tokenizer_path)]
    arguments += ["--output", str(tmp_path / "out" / "x"), "--workers", str(workers)]
    assert b2(arguments) == 2
    assert f"error: {source}:71: not valid JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or files(tmp_path / "out") == []

    with pytest.raises(InputError, match=r"in\.jsonl:71: not valid JSON"):
        preprocess([source], tokenizer=tokenizer_path, output=tmp_path / "small", target_bytes=500)
    assert b2([*arguments, "--on-error", "skip", "--json", str(tmp_path / "summary.json")]) == 0
    captured = capsys.readouterr()
    assert "2 malformed records skipped" in captured.err
    assert f"{source}:81: no key 'text'" in captured.err
    tally = json.loads((tmp_path / "summary.json").read_text())["manifest"]["tally"]
    assert (tally["total"]["documents"], tally["malformed"], tally["empty"]) == (97, 2, 1)

    shards = preprocess(
        [source], tokenizer=tokenizer_path, output=tmp_path / "small", target_bytes=500, on_error="skip"
    )
    assert shards.reused_shards > 0
    assert contents(tmp_path / "small") == contents(tmp_path / "out" / "x")
    assert shards.manifest.tally.malformed_examples == tally["malformed_examples"]
    with pytest.raises(DataError, match="other options"):
        preprocess([source], tokenizer=tokenizer_path, output=tmp_path / "small", target_bytes=500)


def test_existing_output(tmp_path: Path, tokenizer_path: Path, other_tokenizer_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", texts(20)), tmp_path / "x"
    arguments: dict[str, Any] = {"tokenizer": tokenizer_path, "output": output}
    first = preprocess([source], **arguments)
    before = contents(output)
    again = preprocess([source], **arguments)
    assert again.already_done
    assert again.manifest == first.manifest
    for changed in ({"end_of_document": False}, {"tokenizer": other_tokenizer_path}):
        with pytest.raises(DataError, match=r"x\.bin exists and was made from other inputs"):
            preprocess([source], **{**arguments, **changed})
    assert contents(output) == before
    replaced = preprocess([source], **arguments | {"end_of_document": False, "overwrite": True})
    assert replaced.manifest.tally.total.tokens == first.manifest.tally.total.tokens - 20
    assert IndexedDataset(output).num_tokens == replaced.manifest.tally.total.tokens


def test_a_marker_of_another_job_does_not_open_the_way(tmp_path: Path, tokenizer_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", texts(20)), tmp_path / "x"
    first = preprocess([source], tokenizer=tokenizer_path, output=output)
    before = contents(output)
    (tmp_path / "x.parts").mkdir()
    (tmp_path / "x.parts" / "job.json").write_text('{"job": "other"}')
    (tmp_path / "x.parts" / "publishing").write_text('{"job": "other"}')
    with pytest.raises(DataError, match=r"x\.bin exists and was made from other inputs"):
        preprocess([source], tokenizer=tokenizer_path, output=output, end_of_document=False)
    assert contents(output) == before
    (tmp_path / "x.parts" / "publishing").write_text(json.dumps({"job": first.manifest.job}))
    (tmp_path / "x.json").unlink()
    assert not preprocess([source], tokenizer=tokenizer_path, output=output).already_done
    assert contents(output) == before


def test_other_data_of_equal_size_is_other_data(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are sampled, their manifests are not: a change between the samples is seen."""
    monkeypatch.setattr(indexed, "_SAMPLED_BYTES", 2)
    monkeypatch.setattr(indexed, "_SAMPLED_BLOCKS", 2)
    seen = []
    for name, word in (("a", "quick"), ("b", "brown"), ("c", "quick")):
        lines = ["the fox", f"the {word} {word} fox", "the fox"]
        preprocess(
            [write_jsonl(tmp_path / name / "in.jsonl", lines)],
            tokenizer=tokenizer_path,
            output=tmp_path / name / "x",
        )
        sources = (SourceConfig(prefix=str(tmp_path / name / "x")),)
        data = DataConfig(sources=sources, seq_len=2, split=(1, 0, 0))
        seen.append(BlendedDataset.build(data, split="train", seed=0))
    assert len({dataset.sources[0].dataset.fingerprint for dataset in seen}) == 1
    a, b, c = (dataset.fingerprint for dataset in seen)
    assert a == c != b


def test_bad_arguments_write_nothing(tmp_path: Path, tokenizer_path: Path) -> None:
    empty = tmp_path / "in" / "empty.jsonl"
    empty.parent.mkdir()
    empty.write_text('{"text": ""}\n')
    output = tmp_path / "out" / "x"
    for inputs, workers, message in (
        ([tmp_path / "none.jsonl"], 1, "no such file"),
        ([empty], 0, "--workers 0"),
        ([empty], 1, "no document with text"),
    ):
        with pytest.raises(InputError, match=message):
            preprocess(inputs, tokenizer=tokenizer_path, output=output, workers=workers)
    assert not output.parent.exists() or files(output.parent) == []


LIMITED_RUN = """
import resource, signal, sys
from megatron_b2.cli.main import main

if __name__ == "__main__":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    sys.exit(main(sys.argv[1:]))
"""


def test_a_file_that_cannot_be_written_is_one_error(tmp_path: Path, tokenizer_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    source, script = write_jsonl(tmp_path / "in.jsonl", texts(100)), tmp_path / "run.py"
    script.write_text(LIMITED_RUN)
    command = [sys.executable, script, "preprocess", source, "--tokenizer", tokenizer_path]
    command += ["--output", tmp_path / "out" / "x", "--workers", "1"]
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert re.fullmatch(r"error: cannot write .*000000\.bin and .*000000\.idx: File too large\n", run.stderr)
    assert files(tmp_path / "out") == []


def test_a_killed_worker_is_one_error(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(100))

    def kill(phase: str, done: int, total: int) -> None:
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()

    with pytest.raises(DataError, match="a worker process was killed"):
        preprocess(
            [source],
            tokenizer=tokenizer_path,
            output=tmp_path / "x",
            workers=2,
            target_bytes=500,
            progress=kill,
        )
    assert not (tmp_path / "x.parts").exists()


def test_only_one_run_at_a_time(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(20))

    def second(phase: str, done: int, total: int) -> None:
        if phase == "encode":
            preprocess([source], tokenizer=tokenizer_path, output=tmp_path / "x")

    with pytest.raises(DataError, match="another `b2 preprocess` is writing"):
        preprocess([source], tokenizer=tokenizer_path, output=tmp_path / "x", progress=second)


def test_data_of_another_tokenizer_does_not_open(
    tmp_path: Path, tokenizer_path: Path, other_tokenizer_path: Path
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(50))
    preprocess([source], tokenizer=tokenizer_path, output=tmp_path / "x")
    data = DataConfig(sources=(SourceConfig(prefix=str(tmp_path / "x")),), seq_len=16)
    tokenizer = load_tokenizer(tokenizer_path)
    dataset = BlendedDataset.build(data, split="train", seed=0, expected_tokenizer=tokenizer.fingerprint)
    [first] = dataset.sample_batch(np.array([0])).input_ids.tolist()
    assert tokenizer.decode(first)
    with pytest.raises(DataError, match="made with the tokenizer"):
        BlendedDataset.build(
            data, split="train", seed=0, expected_tokenizer=load_tokenizer(other_tokenizer_path).fingerprint
        )
    (tmp_path / "x.json").unlink()
    unknown = BlendedDataset.build(data, split="train", seed=0, expected_tokenizer="0" * 64)
    assert unknown.fingerprint != dataset.fingerprint  # what it was made from is not known any more
    valid = replace(data, split=(0.5, 0.5, 0.0))
    assert BlendedDataset.build(valid, split="valid", seed=0).num_samples > 0


@settings(max_examples=60, deadline=None)
@given(
    lines=st.lists(st.integers(0, 40), max_size=60),
    target=st.integers(1, 120),
    newline_at_end=st.booleans(),
    suffix=st.sampled_from([".jsonl", ".txt"]),
)
def test_pieces_are_whole_lines_that_cover_the_file(
    lines: list[int], target: int, newline_at_end: bool, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("scan") / f"file{suffix}"
    content = b"\n".join(b"x" * length for length in lines) + b"\n" * newline_at_end
    path.write_bytes(content)
    scanned = scan_file(path, target_bytes=target)
    assert scanned.sha256 == hashlib.sha256(content).hexdigest()
    assert scanned.size == len(content)
    end = 0
    for piece in scanned.pieces:
        assert piece.start == end
        assert piece.first_line == content.count(b"\n", 0, piece.start) + 1
        assert piece.start == 0 or content[piece.start - 1 : piece.start] == b"\n"
        end = piece.stop
    assert end == len(content)
    if suffix == ".txt":
        assert len(scanned.pieces) == 1
    assert all(piece.size >= target for piece in scanned.pieces[:-1])


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=40), target=st.integers(1, 100))
def test_shards_keep_order_and_reach_their_size(sizes: list[int], target: int) -> None:
    scanned = [
        ScannedFile(Path(f"{i}.txt"), "", (Piece(Path(f"{i}.txt"), 0, size),)) for i, size in enumerate(sizes)
    ]
    shards = plan_shards(scanned, target_bytes=target)
    assert [piece.path.name for shard in shards for piece in shard] == [file.path.name for file in scanned]
    assert all(sum(piece.size for piece in shard) >= target for shard in shards[:-1])


def test_inspect_and_merge(tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", ["the quick brown fox", "天地"])
    arguments = ["preprocess", str(source), "--tokenizer", str(tokenizer_path), "--workers", "1"]
    assert b2([*arguments, "--output", str(tmp_path / "x")]) == 0
    assert b2([*arguments, "--output", str(tmp_path / "x")]) == 0
    assert "already done" in capsys.readouterr().out
    assert (
        b2(["data", "merge", str(tmp_path / "x"), str(tmp_path / "x"), "--output", str(tmp_path / "xx")]) == 0
    )
    assert b2(["data", "merge", str(tmp_path / "x"), "--output", str(tmp_path / "xx")]) == 2
    facts = tmp_path / "facts.json"
    inspect = ["data", "inspect", str(tmp_path / "xx"), "--tokenizer", str(tokenizer_path)]
    assert b2([*inspect, "--document", "3", "--json", str(facts)]) == 0
    found = json.loads(facts.read_text())
    assert found["documents"] == 4
    assert found["document"]["text"] == "天地"
    assert sum(row["documents"] for row in found["lengths"]) == 4
    assert sum(row["tokens"] for row in found["lengths"]) == found["tokens"]
    assert b2([*inspect, "--document", "4"]) == 2
    assert "document 4 of 4" in capsys.readouterr().err


@pytest.mark.parametrize("module", [preprocess_command, data_command])
def test_help_teaches(module: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert module.HELP
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert "xample" in capsys.readouterr().out or module is data_command


def test_the_megatron_flags_of_the_tool(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", texts(10))
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source)]
    command += [
        "--json-keys",
        "text",
        "--output-prefix",
        str(tmp_path / "x"),
        "--append-eod",
        "--workers",
        "1",
    ]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer_path)]
    subprocess.run(command, check=True, capture_output=True)
    preprocess([source], tokenizer=tokenizer_path, output=tmp_path / "ours")
    assert contents(tmp_path / "x_text_document") == contents(tmp_path / "ours")
