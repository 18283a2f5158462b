"""From raw documents to two steps of training by the commands alone, on a corpus of some hundred documents."""

from __future__ import annotations

import json
import random
import re
import tomllib
from pathlib import Path

import pytest

from megatron_b2.cli.main import main
from tests.corpus.models.languages import chinese_documents, english_documents

ITEM = "Which river crosses the silver forest behind the old harbour of the northern island every winter?"
HARMFUL = "buy the poison and the weapon now, cheap bombs and drugs at night"
MODELS = ("--perplexity.min-count", "1", "--perplexity.prune", "0", "--classifier.buckets", "65536")
PIPELINE = """
work = "work"

[input]
paths = ["raw"]
unit_mb = 1

[language]
model = "models/languages.bin"
keep = ["en", "zh"]

[heuristics.rules]
fineweb_short_lines = false
fineweb_punctuated_lines = false

[quality]
models = { en = "models/en" }
document_least = 0.05
paragraph_least = 0
sentence_least = 0

[safety]
classifier = "models/en/classifier.bin"
word_lists = ["words.txt"]

[embed]
dimension = 16

[decontaminate]
paths = ["eval.jsonl"]
"""


def jsonl(path: Path, texts: list[str], **more: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"id": f"{path.stem}-{n}", "text": text, **more} for n, text in enumerate(texts)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def b2(*arguments: str) -> None:
    assert main(list(arguments)) == 0, arguments


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw text with planted defects, and models trained by the commands."""
    folder = tmp_path_factory.mktemp("corpus")
    english, chinese = english_documents(), chinese_documents(200)
    clean, raw = english[:200], english[200:320]
    shuffled = [
        " ".join(random.Random(n).sample(text.split(), len(text.split()))) for n, text in enumerate(raw[:9])
    ]
    jsonl(folder / "clean" / "en.jsonl", clean, language="en")
    jsonl(folder / "clean" / "zh.jsonl", chinese[:100], language="zh")
    jsonl(folder / "bad" / "harmful.jsonl", [HARMFUL] * 40)
    jsonl(folder / "raw" / "a-good.jsonl", raw, source="web")
    jsonl(folder / "raw" / "b-shuffled.jsonl", shuffled, source="web")
    jsonl(folder / "raw" / "c-chinese.jsonl", chinese[100:160], source="forum")
    jsonl(folder / "raw" / "d-copies.jsonl", [text.upper() for text in raw[20:25]])
    jsonl(folder / "raw" / "e-item.jsonl", [f"{english[330]}\n\n{ITEM}\n\n{english[331]}"])
    jsonl(folder / "raw" / "f-words.jsonl", [f"{english[332]} {english[333]} {'Sarin, ricin. Soman! ' * 9}"])
    jsonl(folder / "eval.jsonl", [ITEM, "Who?"])
    (folder / "words.txt").write_text("ricin\nsarin  # a comment\nsoman\n")
    (folder / "pipeline.toml").write_text(PIPELINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        b2(
            "corpus",
            "train-quality",
            "--clean",
            "clean/en.jsonl",
            "--language",
            "en",
            "--out",
            "models/en",
            *MODELS,
            "--bad",
            "harmful=bad",
        )
        b2(
            "corpus",
            "train-language",
            "--input",
            "clean",
            "--out",
            "models/languages.bin",
            "--buckets",
            "4096",
        )
        b2(
            "corpus",
            "train-perplexity",
            "--input",
            "clean/zh.jsonl",
            "--out",
            "zh.ngram",
            "--arpa",
            "zh.arpa",
        )
        b2("corpus", "run", "pipeline.toml", "--execution.workers", "2")
        b2("corpus", "report", "work", "--out", "report")
    return folder


@pytest.fixture(autouse=True)
def inside(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(corpus)


def test_models_of_the_commands() -> None:
    known = json.loads(Path("models/en/quality.json").read_text())
    assert known["options"]["language"] == "en"
    assert Path("models/languages.bin.json").exists()
    orders = re.findall(r"^ngram (\d)=(\d+)$", Path("zh.arpa").read_text(), re.MULTILINE)
    assert [int(order) for order, _ in orders] == [1, 2, 3, 4, 5]


def test_every_defect_is_found_by_its_stage() -> None:
    report = json.loads(Path("report/report.json").read_text())
    removed = {name: stage["reasons"] for name, stage in report["total"]["stages"].items()}
    assert removed["exact"] == {"the text has occurred before": 5}
    assert removed["quality"]["low quality"] >= 8
    assert removed["safety"] == {"listed words": 1}
    assert removed["decontaminate"] == {"has evaluation item eval.jsonl:eval-0": 1}
    assert report["facts"] == {"decontaminate": {"items": 2, "too_short": 1}}
    assert report["total"]["kept"]["documents"] > 100
    assert set(report["languages"]) == {"en", "zh"}


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_do_not_change_a_byte(workers: int) -> None:
    """Through all stages, with models, in processes of their own."""
    b2("corpus", "run", "pipeline.toml", "--work", f"work{workers}", "--execution.workers", str(workers))
    assert Path(f"work{workers}/pipeline.json").read_text() == Path("work/pipeline.json").read_text()


def test_what_is_kept_trains_a_model() -> None:
    b2("corpus", "mix", "work", "--out", "mixed", "--workers", "1", "--where", '"quality.score" > 0.3')
    b2("tokenizer", "train", "--input", "mixed", "--out", "tokenizer", "--vocab-size", "700")
    blend = tomllib.loads(Path("mixed/blend.toml").read_text())["data"]["sources"]
    assert sum(source["weight"] for source in blend) == pytest.approx(1, abs=1e-5)
    for source in blend:
        name = Path(source["prefix"]).name
        b2(
            "preprocess",
            f"mixed/{name}",
            "--tokenizer",
            "tokenizer",
            "--output",
            source["prefix"],
            "--workers",
            "1",
        )
    Path("run.toml").write_text(
        'extends = ["preset:toy", "mixed/blend.toml"]\n[tokenizer]\npath = "tokenizer"\n'
    )
    size = "--model.hidden-size 32 --model.ffn-hidden-size 48 --model.num-layers 1 --model.num-heads 2 --model.vocab-size 700"
    steps = "--train.steps 2 --train.log-interval 1 --train.eval-interval 0 --data.split 1 0 0 --data.seq-len 64 --optim.warmup-steps 1"
    b2("pretrain", "run.toml", *size.split(), *steps.split(), "--output-dir", "run")
    steps_done = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [(step["step"], step["tokens"]) for step in steps_done] == [(1, 512), (2, 1024)]
    assert all(0 < step["loss"] < 8 for step in steps_done)
