"""`b2 tokenizer` from end to end."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_b2.cli.repeated import gather_repeated
from megatron_b2.cli.tokenizer import main
from megatron_b2.errors import TokenizerError
from megatron_b2.tokenizer import Tokenizer, load_tokenizer
from megatron_b2.tokenizer.compression import measure

ROOT = Path(__file__).resolve().parents[2]


def test_train_report_export(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, hf = tmp_path / "t", tmp_path / "hf"
    weights = ["--language-weight", "zh=0.5", "--language-weight", "en=0.2"]
    assert main(["train", "--input", str(corpus), "--out", str(out), "--vocab-size", "1000", *weights]) == 0
    assert "chat ids 195 and 196" in capsys.readouterr().out
    report = json.loads((out / "tokenizer_report.json").read_text(encoding="utf-8"))
    assert report["options"]["language_weights"] == {"zh": 0.5, "en": 0.2}
    assert main(["export-hf", "--tokenizer", str(out), "--out", str(hf)]) == 0
    arguments = ["--tokenizer", str(out), str(hf / "tokenizer.json"), "--input", str(corpus)]
    assert (
        main(["report", *arguments, "--json", str(tmp_path / "r.json"), "--png", str(tmp_path / "r.png")])
        == 0
    )
    numbers = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert numbers["vocab_sizes"] == {"t": 1_000, "hf": 1_000}
    assert numbers["tokenizers"]["t"] == numbers["tokenizers"]["hf"]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_report_counts_by_hand(tokenizer: Tokenizer, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"text": "这个模型", "language": "zh"}\n{"text": "the model", "language": "en"}\n', "utf-8"
    )
    rows = measure([trained], [tmp_path / "a.jsonl"]).to_dict()["tokenizers"]["tokenizer"]
    tokens = len(tokenizer.encode("这个模型"))
    assert rows["zh"] == {
        "tokens": tokens,
        "characters": 4,
        "bytes": 12,
        "tokens_per_character": tokens / 4,
        "tokens_per_byte": tokens / 12,
        "bytes_per_token": 12 / tokens,
    }
    assert rows["all"]["tokens"] == tokens + len(tokenizer.encode("the model"))


def test_report_needs_a_tokenizer(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"not a Hugging Face tokenizer\.json"):
        measure([tmp_path], [corpus])
    with pytest.raises(TokenizerError, match=r"neither tokenizer\.model nor"):
        measure([corpus], [corpus])


def test_encode_and_decode(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " the 模型\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["encode", "--tokenizer", str(trained), "--bos"]) == 0
    ids = capsys.readouterr().out.split()
    assert list(map(int, ids)) == load_tokenizer(trained).encode(text, bos=True)
    assert main(["decode", "--tokenizer", str(trained), "--ids", *ids]) == 0
    assert capsys.readouterr().out == text
    assert main(["encode", "--tokenizer", str(trained), "--text", "\n", "--pieces"]) == 0
    assert capsys.readouterr().out == "5\t'\\n'\n"


def test_script_runs_from_anywhere(tmp_path: Path, trained: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "tools" / "train_tokenizer.py"),
        "--input",
        "gone",
        "--out",
        str(tmp_path / "t"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: gone: no such file or folder\n")


def test_repeated_flags_keep_all_values() -> None:
    arguments = ["run", "--input", "a", "b", "--n", "1", "--input=c", "-v"]
    assert gather_repeated(arguments, ("--input",)) == ["run", "--n", "1", "-v", "--input", "a", "b", "c"]
