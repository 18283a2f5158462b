"""The quality model on held-out text that Python ships (English) and on text of a small grammar (Chinese)."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_b2.corpus.models.classifier import ClassifierOptions
from megatron_b2.corpus.models.corrupt import DEFECTS, Corruptor, Defect
from megatron_b2.corpus.models.logistic import roc_auc
from megatron_b2.corpus.models.perplexity import PerplexityOptions
from megatron_b2.corpus.models.quality import LEVELS, QualityModel, QualityOptions, split_level, train_quality
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import InputError, OutputError
from tests.corpus.models.languages import chinese_documents, english_documents

DOCUMENTS = {"en": english_documents(), "zh": chinese_documents(400)}
TELL_APART: tuple[Defect, ...] = ("shuffled", "truncated", "mojibake", "template")


def options(language: str) -> QualityOptions:
    return QualityOptions(
        language=language,
        perplexity=PerplexityOptions(min_count=1, prune=(0,)),
        classifier=ClassifierOptions(buckets=1 << 16),
    )


def halves(language: str) -> tuple[list[str], list[str]]:
    """To train on, and a fifth held out."""
    texts = list(DOCUMENTS[language])
    random.Random(0).shuffle(texts)
    return texts[len(texts) // 5 :], texts[: len(texts) // 5]


@pytest.fixture(scope="module", params=["en", "zh"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("quality") / request.param
    train_quality(halves(request.param)[0], folder, options(request.param))
    return request.param, folder


def test_held_out_clean_text_is_told_from_bad_text(trained: tuple[str, Path]) -> None:
    """AUC >= 0.95 for each defect. The real numbers, on a real corpus, are in docs/corpus-models.md."""
    language, folder = trained
    model, test = QualityModel(folder), halves(language)[1]
    clean = model.score(Texts.of(test)).quality
    corruptor, rng = Corruptor(language), random.Random(1)
    for defect in TELL_APART:
        bad = [changed for text in test if (changed := corruptor.corrupt(text, defect, rng))]
        assert len(bad) > 20
        assert roc_auc(clean, model.score(Texts.of(bad)).quality) >= 0.95, (language, defect)


def test_levels(trained: tuple[str, Path]) -> None:
    """Paragraphs and sentences of all texts, with places that say which is whose."""
    language, folder = trained
    model = QualityModel(folder)
    texts = Texts.of([*halves(language)[1][:5], "", halves(language)[1][5]])
    for level in LEVELS[1:]:
        scores, segments, firsts = model.score_parts(texts, level)
        assert len(scores.quality) == len(segments) - 1 == firsts[-1]
        assert firsts[5] == firsts[6]  # the empty text has no part
        assert segments[firsts[3]] == texts.offsets[3]
        part = bytes(texts.data[segments[2] : segments[3]]).decode()
        assert model.score(Texts.of([part]), level).quality[0] == pytest.approx(scores.quality[2], abs=1e-6)
        assert set(split_level(bytes(next(iter(texts))).decode(), level)) <= {
            bytes(piece).decode().strip() for piece in Texts(texts.data, segments)
        }


def test_scores_of_a_text_are_those_of_its_models(trained: tuple[str, Path]) -> None:
    _, folder = trained
    model = QualityModel(folder)
    texts = Texts.of([DOCUMENTS["en"][0], "\n \n", DOCUMENTS["zh"][0]])
    scores = model.score(texts)
    assert model.labels == ("clean", *DEFECTS)
    np.testing.assert_array_equal(scores.perplexity, model.perplexity.score(texts).perplexity)
    np.testing.assert_array_equal(scores.classes, model.classifier.probabilities(texts))
    for values in (scores.quality, scores.perplexity, scores.line_end, scores.classes[:, 0]):
        assert np.isnan(values).tolist() == [False, True, False]
    assert ((scores.quality[[0, 2]] >= 0) & (scores.quality[[0, 2]] <= 1)).all()


def test_given_bad_texts_are_a_class_and_the_same_input_gives_the_same_files(tmp_path: Path) -> None:
    rng = random.Random(0)
    recipes = [
        "Add {} eggs, {} cups of flour and a pinch of salt, then bake the cake at {} degrees."
        for _ in range(60)
    ]
    given = [recipe.format(*(rng.randint(1, 300) for _ in range(3))) for recipe in recipes]
    for name in ("a", "b"):
        train_quality(DOCUMENTS["en"][:120], tmp_path / name, options("en"), bad={"recipe": given[:50]})
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    model = QualityModel(tmp_path / "a")
    assert model.labels[-1] == "recipe"
    assert model.language == "en"
    bad, good = model.score(Texts.of(given[50:])), model.score(Texts.of(DOCUMENTS["en"][120:170]))
    assert roc_auc(good.quality, bad.quality) > 0.95
    assert (bad.classes.argmax(axis=1) == model.labels.index("recipe")).mean() > 0.8


def test_errors(tmp_path: Path) -> None:
    folder, english = tmp_path / "m", DOCUMENTS["en"][:30]
    with pytest.raises(InputError, match="3 clean documents"):
        train_quality(english[:3], folder, options("en"))
    with pytest.raises(InputError, match="'spam': no documents"):
        train_quality(english, folder, options("en"), bad={"spam": []})
    with pytest.raises(InputError, match="'clean': the name is taken"):
        train_quality(english, folder, options("en"), bad={"clean": ["x"]})
    with pytest.raises(InputError, match="too short, or too few, to make truncated text"):
        train_quality(["short text"] * 30, folder, options("en"))
    with pytest.raises(InputError, match="calibration = 1"):
        train_quality(english, folder, QualityOptions(language="en", calibration=1))
    with pytest.raises(InputError, match="language = "):
        train_quality(english, folder, QualityOptions(language=""))
    assert not folder.exists()
    folder.mkdir()
    (folder / "other").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        train_quality(english, folder, options("en"))


def test_damaged_models_are_named(trained: tuple[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained[1], folder)
    stored = json.loads((folder / "quality.json").read_text())
    (folder / "quality.json").write_text(json.dumps({**stored, "version": 0}))
    with pytest.raises(InputError, match=r"quality\.json: another format"):
        QualityModel(folder)
    (folder / "quality.json").write_text(json.dumps({**stored, "weights": {}}))
    with pytest.raises(InputError, match="damaged"):
        QualityModel(folder)
    (folder / "quality.json").unlink()
    with pytest.raises(InputError, match="train-quality makes it"):
        QualityModel(folder)


def test_nothing_but_an_earlier_model_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"no earlier result \(no quality.json in it\)"):
        train_quality(["a text"] * 20, tmp_path, QualityOptions(language="en"), overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
