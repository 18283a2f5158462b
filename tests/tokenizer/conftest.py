"""One small tokenizer, trained once on text made here, for all tests of this folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_b2.tokenizer import Tokenizer, load_tokenizer
from megatron_b2.tokenizer.training import TrainOptions, train_tokenizer

VOCAB_SIZE = 2_000
WORDS = {
    "en": [
        "the",
        "model",
        "reads",
        "words",
        "and",
        "learns",
        "to",
        "write",
        "text",
        "from",
        "data",
        "that",
        "we",
        "found",
        "on",
        "pages",
        "of",
        "manuals",
        "12",
        "345",
    ],
    "es": [
        "el",
        "modelo",
        "lee",
        "palabras",
        "y",
        "aprende",
        "a",
        "escribir",
        "texto",
        "de",
        "datos",
        "que",
        "hemos",
        "encontrado",
        "en",
        "páginas",
        "año",
        "niño",
    ],
    "zh-Hans": list("这个模型从数据里学习语言并且写出新的文章我们用它来检查分词是不是对的"),
    "zh-Hant": list("這個模型從數據裡學習語言並且寫出新的文章我們用它來檢查分詞是不是對的"),
    "ru": [
        "модель",
        "читает",
        "слова",
        "и",
        "учится",
        "писать",
        "текст",
        "из",
        "данных",
        "которые",
        "мы",
        "нашли",
        "на",
        "страницах",
    ],
}


def make_documents(language: str, count: int, *, seed: int = 0) -> list[str]:
    """Random sentences with marks, digits, indentation and newlines."""
    source = random.Random(f"{language}{seed}")
    glue = "" if language.startswith("zh") else " "
    documents = []
    for _ in range(count):
        lines = [
            glue.join(source.choices(WORDS[language], k=source.randint(3, 25)))
            for _ in range(source.randint(1, 9))
        ]
        marks = source.choices(("。", ".", "!", ",", "", "(a)", "  x = 1;", "：", "\tb"), k=len(lines))
        documents.append("\n".join(line + mark for line, mark in zip(lines, marks, strict=True)))
    return documents


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, language in enumerate(WORDS):
        with (folder / f"{language}.jsonl").open("w", encoding="utf-8") as stream:
            for text in make_documents(language, 60 + 40 * number):
                stream.write(json.dumps({"text": text, "language": language}, ensure_ascii=False) + "\n")
    return folder


@pytest.fixture(scope="session")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "tokenizer"
    train_tokenizer([corpus], out, options=TrainOptions(vocab_size=VOCAB_SIZE, num_reserved=1_000))
    return out


@pytest.fixture(scope="session")
def tokenizer(trained: Path) -> Tokenizer:
    return load_tokenizer(trained)
