"""The fastText classifier: what it learns, its files, its errors."""

from __future__ import annotations

import builtins
import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_b2._cpu import join_words
from megatron_b2.corpus.models.classifier import (
    ClassifierOptions,
    TextClassifier,
    train_classifier,
    train_language,
)
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import InputError, OutputError
from tests.corpus.models.languages import chinese_documents, english_documents

SMALL = ClassifierOptions(buckets=1 << 12, epochs=5)
GERMAN = (
    "Der Zug nach Norden fährt heute nicht, und die Reisenden warten auf dem Bahnsteig auf eine Nachricht."
)


def language_examples() -> list[tuple[str, str]]:
    rng = random.Random(0)
    german = GERMAN.split()
    return [
        *(("en", text) for text in english_documents()[:80]),
        *(("zh", text) for text in chinese_documents(80)),
        *(("de", " ".join(rng.choices(german, k=30))) for _ in range(80)),
    ]


def test_languages(tmp_path: Path) -> None:
    report = train_language(language_examples(), tmp_path / "language.bin", SMALL)
    assert report.examples == {"en": 80, "zh": 80, "de": 80}
    model = TextClassifier(tmp_path / "language.bin")
    assert model.labels == ("de", "en", "zh")
    texts = Texts.of(["The value of the expression is returned.", "这些数据已经保存了。", GERMAN, " \n"])
    assert model.best(texts) == ["en", "zh", "de", ""]
    probabilities = model.probabilities(texts)
    assert probabilities.shape == (4, 3)
    np.testing.assert_allclose(probabilities[:3].sum(axis=1), 1, atol=1e-4)
    assert np.isnan(probabilities[3]).all()


def test_same_examples_give_the_same_bytes_and_fasttext_reads_them(tmp_path: Path) -> None:
    import fasttext

    for name in ("a.bin", "b.bin"):
        train_language(language_examples(), tmp_path / name, SMALL)
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()
    ours = TextClassifier(tmp_path / "a.bin")
    other = fasttext.FastText._FastText(model_path=str(tmp_path / "a.bin"))
    text = english_documents()[200]
    texts = Texts.of([text])
    labels, values = other.predict(join_words(texts.data, texts.offsets, max_words=1_000), k=3)
    found = ours.probabilities(texts)[0]
    expected = {
        label.removeprefix("__label__"): value for label, value in zip(labels[0], values[0], strict=True)
    }
    for label, value in zip(ours.labels, found, strict=True):
        assert value == pytest.approx(expected[label], abs=1e-6)


def test_every_vector_starts_from_the_seed(tmp_path: Path) -> None:
    """Forks of fastText that start one thread with memory as they find it give other bytes, or NaN, here."""
    options = ClassifierOptions(buckets=1, word_ngrams=1, min_characters=0, max_characters=0)
    found = set()
    for i in range(6):
        path = tmp_path / f"{i}.bin"
        found.add(
            train_classifier([("a", "x y z q"), ("b", "u v w q")] * 5, path, options, labels="ab").sha256
        )
    assert len(found) == 1


def test_joined_words() -> None:
    texts = Texts.of(["A cat,\n\n__label__x 中文12字 ", "", "one two three"])
    lines = join_words(texts.data, texts.offsets, max_words=20)
    assert lines == ["A cat , ¶ _ label _ x 中 文 00 字 ¶", "", "one two three ¶"]
    assert join_words(texts.data, texts.offsets, max_words=2)[2] == "one two"


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    with pytest.raises(InputError, match=r"no text with words for 'b' \(a: 1, b: 0\)"):
        train_classifier([("a", "x"), ("b", " ")], path, SMALL, labels=["a", "b"])
    with pytest.raises(InputError, match="label 'c' is not one of a, b"):
        train_classifier([("c", "x")], path, SMALL, labels=["a", "b"])
    with pytest.raises(InputError, match="two classes or more"):
        train_classifier([("a", "x")], path, SMALL, labels=["a"])
    with pytest.raises(InputError, match="without white space"):
        train_classifier([("a b", "x")], path, SMALL, labels=["a b", "c"])
    with pytest.raises(InputError, match="two languages or more"):
        train_language([("en", "x")], path)
    with pytest.raises(InputError, match="epochs = 0"):
        train_classifier([], path, ClassifierOptions(epochs=0), labels=["a", "b"])
    with pytest.raises(InputError, match="learning_rate = 0"):
        train_classifier([], path, ClassifierOptions(learning_rate=0), labels=["a", "b"])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no such file"):
        TextClassifier(path)


def test_damaged_files(tmp_path: Path) -> None:
    path, sidecar = tmp_path / "m.bin", tmp_path / "m.bin.json"
    train_classifier([("a", "x y z"), ("b", "u v w")] * 5, path, SMALL, labels=["a", "b"])
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(InputError, match="checksum"):
        TextClassifier(path)
    path.write_bytes(good)
    stored = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**stored, "version": 7}))
    with pytest.raises(InputError, match="version 7"):
        TextClassifier(path)
    sidecar.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        TextClassifier(path)


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *arguments: object, **keywords: object) -> object:
        if name.split(".")[0] == "fasttext":
            raise ModuleNotFoundError("no fasttext", name="fasttext")
        return real(name, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(OutputError, match="fasttext-community"):
        train_classifier([("a", "x"), ("b", "y")], tmp_path / "m", SMALL, labels=["a", "b"])
