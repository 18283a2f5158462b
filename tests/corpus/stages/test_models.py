"""The stages that take a trained model, a list or an evaluation set by path: quality, language, safety, embed,
decontaminate."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opencc import OpenCC

from megatron_b2.corpus.models.classifier import ClassifierOptions, TextClassifier, train_language
from megatron_b2.corpus.models.perplexity import PerplexityOptions
from megatron_b2.corpus.models.quality import QualityModel, QualityOptions, train_quality
from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.report import State, make_report
from megatron_b2.corpus.pipeline.run import run_pipeline
from megatron_b2.corpus.pipeline.stage import Stage
from megatron_b2.corpus.pipeline.view import read_view
from megatron_b2.corpus.stages.cluster import Cluster
from megatron_b2.corpus.stages.decontaminate import Decontaminate
from megatron_b2.corpus.stages.embed import Embed
from megatron_b2.corpus.stages.language import Language
from megatron_b2.corpus.stages.quality import Quality, _merged
from megatron_b2.corpus.stages.safety import Safety
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import ConfigError, InputError
from tests.corpus.models.languages import chinese_documents, english_documents
from tests.corpus.models.test_embedding import DIMENSION, write_onnx
from tests.corpus.pipeline.inline import Inline

ENGLISH = english_documents()
HELD_OUT = [text for text in ENGLISH[300:] if len(text) > 600][:20]
HARMFUL = [
    "buy the poison and the weapon of {} now, cheap bombs and drugs for {} at night".format(*"ab")
] * 40


def go(folder: Path, documents: Sequence[Mapping[str, str]], **stages: Stage) -> dict[str, dict[str, Any]]:
    """All attributes by id, and the text that is left as "text"."""
    (folder / "in").mkdir(exist_ok=True)
    lines = [json.dumps({"id": str(n), "language": "en"} | dict(d)) for n, d in enumerate(documents)]
    (folder / "in" / "x.jsonl").write_text("\n".join(lines) + "\n")
    inputs, work = Input(paths=(str(folder / "in"),)), folder / "work"
    run_pipeline(inputs, stages, work=work, executor=Inline(folder / "scratch", 0))
    state = State.of(work)
    (unit,) = state.units
    paths = state.attribute_paths(unit)
    rows = {str(row["id"]): row for row in read_table(state.unit_path(unit)).to_pylist()}
    for path in paths.values():
        for row in read_table(path).to_pylist():
            rows[row["id"]] |= row
    view = read_view([state.unit_path(unit), *paths.values()])
    left = dict(zip(view.documents.column("id").to_pylist(), view.text.to_pylist(), strict=True))
    return {name: row | {"text": left.get(name)} for name, row in rows.items()}


@pytest.fixture(scope="module")
def quality(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of English that also knows harmful text."""
    options = QualityOptions(
        language="en",
        perplexity=PerplexityOptions(min_count=1, prune=(0,)),
        classifier=ClassifierOptions(buckets=1 << 16),
    )
    folder = tmp_path_factory.mktemp("models") / "en"
    train_quality(ENGLISH[:300], folder, options, bad={"harmful": HARMFUL})
    return folder


def shuffled(text: str) -> str:
    words = text.split()
    random.Random(0).shuffle(words)
    return " ".join(words)


def test_documents_of_low_quality_go(tmp_path: Path, quality: Path) -> None:
    documents = [{"text": text} for text in HELD_OUT]
    documents += [{"text": shuffled(text)} for text in HELD_OUT]
    documents += [{"text": text, "language": "zh"} for text in chinese_documents(2)]
    documents += [{"text": text, "language": "en-GB"} for text in HELD_OUT[:2]] + [{"text": "\u200b\u200b"}]
    settings = Quality({"en": str(quality)}, paragraph_least=0, sentence_least=0, document_least=0.5)
    rows = go(tmp_path, documents, quality=settings)
    expected = QualityModel(quality).score(Texts.of([d["text"] for d in documents[:40]]))
    scores = np.array([row["quality.score"] for row in rows.values()])
    np.testing.assert_allclose(scores[:40], expected.quality, rtol=1e-6)
    assert scores[40:].tolist() == [0.5, 0.5, *scores[:2].tolist(), 0.5]
    keep = np.array([row["quality.keep"] for row in rows.values()])
    assert (keep == (scores >= 0.5)).all()
    assert keep[:20].mean() > 0.8
    assert keep[20:40].mean() < 0.2
    assert {row["quality.reason"] for row in rows.values()} == {"", "low quality"}
    assert not any(row["quality.cuts"] for row in rows.values())


def test_bad_paragraphs_and_sentences_are_cut(tmp_path: Path, quality: Path) -> None:
    """Against the parts' scores one at a time, and byte for byte."""
    texts = [f"{a}\n\n{shuffled(b)}\n\n{b}" for a, b in zip(HELD_OUT[::2], HELD_OUT[1::2], strict=True)]
    texts[0] = f"é漢 {texts[0]}"
    texts[1] += "\n\nof the of zz to."  # bad, but too short to be judged
    settings = Quality({"en": str(quality)}, document_least=0, paragraph_least=0.4, sentence_least=0.3)
    rows = go(tmp_path, [{"text": text} for text in texts], quality=settings)
    model = QualityModel(quality)
    cut = 0
    for row, text in zip(rows.values(), texts, strict=True):
        stays = np.ones(len(text.encode()), bool)
        for level, least in (("paragraph", 0.4), ("sentence", 0.3)):
            scores, segments, _ = model.score_parts(Texts.of([text]), level)  # type: ignore[arg-type]
            for n, score in enumerate(scores.quality):
                begin, end = segments[n : n + 2]
                if score < least and end - begin >= 60:
                    stays[begin:end] = False
        cut += int((~stays).sum())
        left = np.frombuffer(text.encode(), np.uint8)[stays].tobytes().decode()
        assert row["quality.left"] == stays.sum()
        if stays.any():
            assert row["text"] == left
        else:
            assert row["quality.reason"] == "no good sentence"
    size = sum(len(text.encode()) for text in texts)
    assert 0.1 * size < cut < 0.6 * size


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=8))
def test_ranges_are_united(given: list[tuple[int, int]]) -> None:
    ranges = [(begin, begin + size) for begin, size in given]
    flat = _merged(ranges)
    assert flat == sorted(set(flat))
    covered = {byte for begin, end in zip(flat[::2], flat[1::2], strict=True) for byte in range(begin, end)}
    assert covered == {byte for begin, end in ranges for byte in range(begin, end)}


def test_a_quality_model_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quality\.models\.en: .*none") as error:
        go(tmp_path, [], quality=Quality({"en": "none", "zh": "nothing"}))
    assert len(error.value.problems) == 2


def test_language_by_a_model(tmp_path: Path) -> None:
    model = tmp_path / "languages.bin"
    labelled = [("en", text) for text in ENGLISH[:80]] + [("zh", text) for text in chinese_documents(80)]
    train_language(labelled, model, ClassifierOptions(buckets=1 << 12, max_words=100))
    texts = [*HELD_OUT[:5], *chinese_documents(5, seed=7), "\u200b", "Katze und Hund"]
    documents = [{"text": text, "language": "fr"} for text in texts]
    rows = go(tmp_path, documents, language=Language(keep=("zh",), model=str(model)))
    tags = [row["language.tag"] for row in rows.values()]
    assert tags[:10] == ["en"] * 5 + ["zh"] * 5
    assert tags == [tag or "und" for tag in TextClassifier(model).best(Texts.of(texts))]
    assert [row["language.keep"] for row in rows.values()] == [tag == "zh" for tag in tags]
    rows = go(tmp_path, documents, language=Language(model=str(model), trust_input=True))
    assert {row["language.tag"] for row in rows.values()} == {"fr"}


def test_safety_by_a_classifier(tmp_path: Path, quality: Path) -> None:
    model = quality / "classifier.bin"
    documents = [{"text": text, "source": "web"} for text in [*HELD_OUT, HARMFUL[0]]]
    documents.append({"text": HARMFUL[0], "source": "court records"})
    settings = Safety(classifier=str(model), trusted_sources=("^court",))
    rows = go(tmp_path, documents, safety=settings)
    assert [name for name, row in rows.items() if not row["safety.keep"]] == ["20"]
    assert rows["20"]["safety.reason"] == "classifier"
    column = TextClassifier(model).labels.index("harmful")
    expected = TextClassifier(model).probabilities(Texts.of([d["text"] for d in documents]))[:, column]
    np.testing.assert_allclose([row["safety.harmful"] for row in rows.values()], expected, rtol=1e-6)
    assert rows["21"]["safety.trusted"]


def test_safety_by_word_lists(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("# of a test\nNERVE  gas\n神经毒气 # Chinese\n\nricin\nsarin\n", encoding="utf-8")
    lines = [
        "Nerve  GAS, ricin and Sarin.",
        "神经毒气 ricin SARIN",
        "ricin ricin ricin",
        "nervegas ricins sarin",
    ]
    documents = [{"text": line} for line in [*lines, "online casino, casino bonus, free spins"]]
    rows = go(tmp_path, documents, safety=Safety(word_lists=(str(words),), advertising=False))
    assert [row["safety.listed_words"] for row in rows.values()] == [3, 3, 1, 1, 0]
    assert [row["safety.keep"] for row in rows.values()] == [False, False, True, True, True]
    assert rows["0"]["safety.reason"] == "listed words"
    rows = go(tmp_path, documents, safety=Safety(word_lists=(str(words),)))
    assert [row["safety.keep"] for row in rows.values()] == [False, False, True, True, False]
    words.write_bytes("神经毒气".encode("gb18030"))
    given = Safety(word_lists=(str(words), str(tmp_path / "none.txt")))
    with pytest.raises(ConfigError, match=r"none\.txt cannot be read: No such file") as error:
        go(tmp_path, documents, safety=given)
    assert "words.txt is not UTF-8" in str(error.value)


def test_a_classifier_without_the_class_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "m.bin"
    train_language([("en", ENGLISH[n]) for n in range(9)] + [("zh", "文本")] * 9, model, ClassifierOptions())
    with pytest.raises(ConfigError, match=r"m\.bin has no class 'harmful', only"):
        go(tmp_path, [], safety=Safety(classifier=str(model)))


def test_vectors_of_a_model_by_path(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    table = write_onnx(tmp_path / "model")
    texts = ["the cat sat", "dog", "the cat the cat sat sat", "\t", "dog dog"]
    stages: dict[str, Stage] = {"embed": Embed(model=str(tmp_path / "model")), "cluster": Cluster(clusters=1)}
    rows = go(tmp_path, [{"text": text} for text in texts], **stages)
    vectors = np.array([row["embed.vector"] for row in rows.values()], np.float32)
    assert vectors.shape == (len(rows), DIMENSION)
    dog = table[5] / np.linalg.norm(table[5])
    np.testing.assert_allclose(rows["1"]["embed.vector"], dog, atol=1e-3)
    assert [name for name, row in rows.items() if not row["cluster.keep"]] == ["2", "4"]
    assert (rows["2"]["cluster.duplicates"], rows["4"]["cluster.duplicates"]) == (0, 1)
    # Another model under the same path is another result.
    model = onnx.load(tmp_path / "model" / "model.onnx")
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(-table, "table"))
    onnx.save(model, tmp_path / "model" / "model.onnx")
    again = go(tmp_path, [{"text": text} for text in texts], **stages)
    np.testing.assert_allclose(again["1"]["embed.vector"], -dog, atol=1e-3)
    (tmp_path / "model" / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not an ONNX model"):
        go(tmp_path, [{"text": text} for text in texts], **stages)


ITEMS = {
    "en": "Which river crosses the silver forest behind the old harbour of the northern island every winter?",
    "zh": "下列哪一条河流在每年冬天穿过北方岛屿上古老港口后面的银色森林？",
    "short": "Name the first captain of the wooden ship.",
    "too short": "Who was it?",
}
VARIANTS = {
    "verbatim": lambda text: text,
    "spaced": lambda text: " \n".join(text) if not text.isascii() else text.replace(" ", "  \n\t "),
    "cased": str.upper,
    "in traditional characters": OpenCC("s2t").convert,
    "punctuated": lambda text: text.replace(" the ", " «the» ").replace("，", "").replace("的", "的、"),
}


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_evaluation_items_are_found_however_they_are_written(tmp_path: Path, kind: str) -> None:
    sets = tmp_path / "sets"
    sets.mkdir()
    if kind == "txt":
        for name, text in ITEMS.items():
            (sets / f"{name}.txt").write_text(text, encoding="utf-8")
    else:
        lines = [json.dumps({"id": name, "question": text}) for name, text in ITEMS.items()]
        (sets / "quiz.jsonl").write_text("\n".join(lines) + "\n")
    around = {
        "zh": chinese_documents(2),
        "en": HELD_OUT[:2],
        "short": HELD_OUT[2:4],
        "too short": HELD_OUT[4:6],
    }
    documents = []
    for name, text in ITEMS.items():
        before, behind = around[name]
        documents += [
            {"id": f"{name} {how}", "text": f"{before} {change(text)} {behind}"}
            for how, change in VARIANTS.items()
        ]
        words = text.split() if text.isascii() else list(text)
        part = " ".join(words[: min(12, len(words) - 1)])
        documents.append({"id": f"part of {name}", "text": f"{before} {part} {behind}"})
    documents += [
        {"id": f"clean {n}", "text": text} for n, text in enumerate(HELD_OUT + chinese_documents(9))
    ]
    settings = Decontaminate((str(sets),), text_key="text" if kind == "txt" else "question")
    rows = go(tmp_path, documents, decontaminate=settings)
    found = {name for name, row in rows.items() if not row["decontaminate.keep"]}
    assert found == {f"{name} {how}" for name in ("en", "zh", "short") for how in VARIANTS}
    for name in ("en", "zh", "short"):
        (item,) = rows[f"{name} spaced"]["decontaminate.items"]
        assert item.startswith(f"{name}.txt:" if kind == "txt" else f"quiz.jsonl:{name}")
    assert make_report(tmp_path / "work").facts == {"decontaminate": {"items": 4, "too_short": 1}}


def test_nothing_to_look_for(tmp_path: Path) -> None:
    rows = go(tmp_path, [{"text": HELD_OUT[0]}], decontaminate=Decontaminate())
    assert rows["0"]["decontaminate.keep"]


def test_an_item_of_decomposed_letters(tmp_path: Path) -> None:
    """Documents are in NFC, evaluation sets in whatever form they come."""
    question = "Où est né le célèbre ingénieur qui a créé la première école supérieure près de Besançon ?"
    (tmp_path / "quiz.txt").write_text(unicodedata.normalize("NFD", question), encoding="utf-8")
    documents = [{"id": "planted", "text": f"Une page. {question} Et la suite."}]
    rows = go(tmp_path, documents, decontaminate=Decontaminate((str(tmp_path / "quiz.txt"),)))
    assert not rows["planted"]["decontaminate.keep"]
