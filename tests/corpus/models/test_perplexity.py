"""The n-gram model against its definition (kneser_ney.py), against KenLM, and its file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2._cpu import NgramModel, NgramTrainer
from megatron_b2.corpus.models.batches import text_batches
from megatron_b2.corpus.models.perplexity import (
    PerplexityModel,
    PerplexityOptions,
    train_perplexity,
    train_token_perplexity,
)
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import InputError
from tests.corpus.models.kneser_ney import UNKNOWN, KneserNey

GOLDEN = Path(__file__).with_name("golden_kenlm.json")
TEXT = """The cat sat on the mat. The dog sat on the log, and the cat saw the dog.
A model of words counts which word follows which words.
统计语言模型计算一个词出现的概率。语言模型在训练文本上计数。
The cat, the dog and the mat: version 12 of 345 stories!!
语言模型的困惑度越低，文本越像训练文本。"""


def columns(sequences: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.array([token for sequence in sequences for token in sequence], np.int32)
    return ids, np.cumsum([0, *map(len, sequences)]).astype(np.int64)


def train_native(
    folder: Path,
    sequences: Sequence[Sequence[int]],
    num_tokens: int,
    prune: list[int],
    memory_bytes: int = 1 << 20,
) -> NgramModel:
    trainer = NgramTrainer(
        order=len(prune),
        prune=prune,
        min_count=1,
        max_words=1,
        memory_bytes=memory_bytes,
        prefix=str(folder / "t"),
    )
    trainer.add_tokens(*columns(sequences))
    arrays = trainer.finish(num_tokens=num_tokens, quantized=False, arpa_path="")["arrays"]
    tables = [arrays[f"order{k}"] for k in range(2, len(prune) + 1)]
    assert not list(folder.glob("t.*run*"))
    return NgramModel(
        unigrams=arrays["unigrams"], tables=tables, codebooks=[], vocabulary=arrays["vocabulary"]
    )


def log10(model: NgramModel, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """By sequence: of its tokens, then of its end."""
    ids, offsets = columns(sequences)
    tokens, ends = model.score_tokens(ids, offsets)
    return [[*tokens[a:b], end] for a, b, end in zip(offsets[:-1], offsets[1:], ends, strict=True)]


@st.composite
def corpora(draw: st.DrawFn) -> tuple[int, list[list[int]], list[int], list[list[int]]]:
    num_tokens = draw(st.integers(1, 10))
    token = st.integers(0, num_tokens - 1)
    sequences = draw(st.lists(st.lists(token, min_size=1, max_size=10), min_size=1, max_size=25))
    order = draw(st.integers(1, 6))
    prune = sorted([0, *draw(st.lists(st.integers(0, 2), min_size=order - 1, max_size=order - 1))])
    queries = draw(st.lists(st.lists(st.integers(0, num_tokens), max_size=8), min_size=1, max_size=4))
    return num_tokens, sequences, prune, queries


@settings(max_examples=60, deadline=None)
@given(corpora())
def test_every_probability_is_that_of_the_definition(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: tuple[int, list[list[int]], list[int], list[list[int]]],
) -> None:
    num_tokens, sequences, prune, queries = corpus
    model = train_native(tmp_path_factory.mktemp("lm"), sequences, num_tokens, prune)
    expected = KneserNey(len(prune), num_tokens, sequences, prune)
    queries = [*queries, *sequences[:2]]
    for query, found in zip(queries, log10(model, queries), strict=True):
        known = [token if token < num_tokens else UNKNOWN for token in query]
        np.testing.assert_allclose(found, expected.log10(known), atol=3e-6)


def zipf_sequences(seed: int, num_tokens: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[int(num_tokens * rng.random() ** 3) for _ in range(rng.randint(1, 30))] for _ in range(count)]


@pytest.mark.parametrize("prune", [[0] * 5, [0, 0, 1, 1, 2]], ids=["all", "pruned"])
def test_with_valid_discounts_and_spilled_runs(tmp_path: Path, prune: list[int]) -> None:
    """Enough text that the discounts come from the counts, and a memory limit that makes many sorted runs."""
    sequences = zipf_sequences(0, 60, 400)
    assert sum(map(len, sequences)) > 5 * 1_024  # runs of 1,024 grams, the least
    spilled = train_native(tmp_path, sequences, 60, prune, memory_bytes=1)
    expected = KneserNey(5, 60, sequences, prune)
    assert any(discounts != (0.5, 1.0, 1.5) for discounts in expected.discounts.values())
    queries = [*sequences[:20], *zipf_sequences(1, 61, 20)]
    found = log10(spilled, queries)
    for query, values in zip(queries, found, strict=True):
        known = [token if token < 60 else UNKNOWN for token in query]
        np.testing.assert_allclose(values, expected.log10(known), atol=3e-6)
    assert found == log10(train_native(tmp_path, sequences, 60, prune), queries)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_probabilities_of_all_words_sum_to_one(tmp_path: Path, order: int) -> None:
    """Over the tokens, the unknown word and the end, after any history, seen or not."""
    num_tokens = 30
    sequences = zipf_sequences(2, num_tokens, 200)
    model = train_native(tmp_path, sequences, num_tokens, [0, 0, 1, 1, 1][:order])
    histories = [[], sequences[0][:3], sequences[1][:6], [num_tokens], [29, 28, 29, 28], [0, num_tokens, 0]]
    for history in histories:
        scores = log10(model, [[*history, token] for token in range(num_tokens + 1)])
        total = sum(10.0 ** values[len(history)] for values in scores)
        total += 10.0 ** log10(model, [history])[0][-1]
        assert total == pytest.approx(1, abs=2e-5)


def golden_queries() -> list[list[str]]:
    return [query.split() for query in json.loads(GOLDEN.read_text(encoding="utf-8"))["queries"]]


def train_text(folder: Path) -> PerplexityModel:
    options = PerplexityOptions(order=4, prune=(0,), min_count=1)
    train_perplexity(text_batches([TEXT]), folder / "lm.safetensors", options, arpa=folder / "lm.arpa")
    return PerplexityModel(folder / "lm.safetensors")


def test_as_kenlm_reads_our_arpa_file(tmp_path: Path) -> None:
    """golden_kenlm.json: what kenlm 0.3.0 said of `lm.arpa` (tools and values are in its header)."""
    model = train_text(tmp_path)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    arpa = (tmp_path / "lm.arpa").read_text(encoding="utf-8")
    assert arpa.splitlines()[1:5] == golden["arpa_counts"]
    for query, expected in zip(golden["queries"], golden["log10"], strict=True):
        found = model.words(query)
        assert [score.word for score in found] == [*query.split(), "</s>"]
        np.testing.assert_allclose([score.log10 for score in found], expected, atol=2e-5)


def test_against_kenlm_itself(tmp_path: Path) -> None:
    kenlm = pytest.importorskip("kenlm", reason="its wheel is built from source; golden values cover it")
    model = train_text(tmp_path)
    other = kenlm.Model(str(tmp_path / "lm.arpa"))
    for query in golden_queries():
        expected = [score for score, _, _ in other.full_scores(" ".join(query))]
        found = [score.log10 for score in model.words(" ".join(query))]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_what_a_word_is(tmp_path: Path) -> None:
    model = train_text(tmp_path)
    words = [score.word for score in model.words("Don't、世界v２.10 ——!!\n\n\u200bไทย\tx\u0301y\x00z😀😀")]
    expected = ["Don", "'", "t", "、", "世", "界", "v２", ".", "10", "——", "!!", "</s>"]
    assert words == [*expected, "ไ", "ท", "ย", "x\u0301y", "z", "😀😀", "</s>"]
    # Digits count as 0, a run of one mark as one; case tells words apart.
    same = [model.words(text)[1].log10 for text in ("version 12", "version 99", "version ９9")]
    assert same[0] == same[1] == same[2]
    assert model.words("stories !")[1].log10 == model.words("stories !!!!")[1].log10
    assert model.words("The")[0].log10 != model.words("the")[0].log10


def test_segments_add_up(tmp_path: Path) -> None:
    """Sums over words, by where a word begins; a line end belongs to the word before it."""
    model = train_text(tmp_path)
    texts = Texts.of(["The cat sat.\n\nA dog, 词 end", "", "x the mat"])
    scores = model.score(texts)
    for i, text in enumerate(("The cat sat.\n\nA dog, 词 end", "", "x the mat")):
        words = model.words(text)
        assert scores.words[i] == len(words)
        assert scores.log10[i] == pytest.approx(sum(word.log10 for word in words), abs=1e-5)
        ends = [word.log10 for word in words if word.word == "</s>"]
        assert (
            scores.end_log10[i] == pytest.approx(ends[-1], abs=1e-6)
            if ends
            else np.isnan(scores.end_log10[i])
        )
    assert scores.unknown.tolist() == [1, 0, 1]  # "end" and "x"; 词 is known
    assert np.isnan(scores.perplexity[1])
    assert scores.perplexity[0] == pytest.approx(10 ** (-scores.log10[0] / scores.words[0]))
    bounds = np.array([0, 4, 5, 12, 14, *range(15, int(texts.offsets[-1]) + 1)], np.int64)
    parts = model.score(texts, bounds)
    assert parts.log10.sum() == pytest.approx(scores.log10.sum(), abs=1e-6)
    assert parts.words.sum() == scores.words.sum()
    assert parts.words[:4].tolist() == [1, 1, 3, 0]  # The | cat | sat . </s> |
    with pytest.raises(InputError, match="sorted"):
        model.score(texts, np.array([5, 1], np.int64))


def test_quantised_model_is_near(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = [f"w{'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}" for i in range(100)]
    text = "\n".join(" ".join(words[int(100 * rng.random() ** 3)] for _ in range(12)) for _ in range(800))
    train_perplexity(text_batches([text]), tmp_path / "full", PerplexityOptions())
    train_perplexity(text_batches([text]), tmp_path / "small", PerplexityOptions(quantize=True))
    assert (tmp_path / "small").stat().st_size < 0.65 * (tmp_path / "full").stat().st_size
    test = Texts.of(text.split("\n")[:50])
    full, small = (
        PerplexityModel(tmp_path / "full").score(test),
        PerplexityModel(tmp_path / "small").score(test),
    )
    np.testing.assert_allclose(small.perplexity, full.perplexity, rtol=0.03)
    assert not np.array_equal(small.log10, full.log10)


def test_same_bytes_twice_and_rare_words_are_unknown(tmp_path: Path) -> None:
    options = PerplexityOptions(order=3, min_count=2)
    for name in ("a", "b"):
        report = train_perplexity(text_batches([TEXT, "", "  \n"]), tmp_path / name, options, facts={"n": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert report.lines == 5
    model = PerplexityModel(tmp_path / "a")
    assert model.order == 3
    assert model.facts["n"] == 1
    assert model.score(Texts.of(["cat stories follows"])).unknown[0] == 2
    few = train_perplexity(text_batches([TEXT]), tmp_path / "few", PerplexityOptions(max_words=4))
    assert few.words == 4


def test_token_models(tmp_path: Path) -> None:
    sequences = zipf_sequences(3, 20, 50)
    options = PerplexityOptions(order=2, prune=(0,))
    batches = [columns(sequences[:25]), columns(sequences[25:])]
    train_token_perplexity(batches, tmp_path / "m", options, num_tokens=20, arpa=tmp_path / "m.arpa")
    model = PerplexityModel(tmp_path / "m")
    tokens, ends = model.score_tokens(*columns([[3, 1, 25, -1]]))
    expected = KneserNey(2, 20, sequences, [0, 0]).log10([3, 1, UNKNOWN, UNKNOWN])
    np.testing.assert_allclose([*tokens, *ends], expected, atol=3e-6)
    assert "\t3 1\n" in (tmp_path / "m.arpa").read_text()
    with pytest.raises(InputError, match="token ids"):
        model.score(Texts.of(["a"]))
    with pytest.raises(InputError, match="token id 20 is outside of the 20"):
        train_token_perplexity([columns([[20]])], tmp_path / "x", num_tokens=20)
    with pytest.raises(InputError, match="negative"):
        train_token_perplexity([columns([[-1]])], tmp_path / "x", num_tokens=20)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (PerplexityOptions(order=0), "order = 0"),
        (PerplexityOptions(order=7), "order = 7"),
        (PerplexityOptions(prune=()), "at least one"),
        (PerplexityOptions(prune=(1,)), "start with 0"),
        (PerplexityOptions(prune=(0, 2, 1)), "never fall"),
        (PerplexityOptions(min_count=0), "min_count = 0"),
        (PerplexityOptions(memory_mb=0), "memory_mb = 0"),
    ],
)
def test_bad_options(tmp_path: Path, options: PerplexityOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_perplexity(text_batches([TEXT]), tmp_path / "m", options)


def test_no_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text"):
        train_perplexity(text_batches(["", " \n\t"]), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(tmp_path: Path) -> None:
    train_text(tmp_path)
    path = tmp_path / "lm.safetensors"
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    cases = {
        "checksum": bytes(flipped),
        "damaged": good[:-50],
        "not a model file": b"\xff" * 100,
        "expected a b2-ngram": good[:200],
        "version 9": good.replace(b'"version": "1"', b'"version": "9"', 1),
        "holds a b2-other": good.replace(b'"b2-ngram"', b'"b2-other"', 1),
    }
    for message, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            PerplexityModel(path)
    with pytest.raises(InputError, match="No such file"):
        PerplexityModel(tmp_path / "none")


def test_other_readers_of_safetensors_see_the_arrays(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    train_text(tmp_path)
    arrays = load_file(tmp_path / "lm.safetensors")
    assert set(arrays) == {"unigrams", "vocabulary", "words", "order2", "order3", "order4"}
    words = arrays["words"].tobytes().decode().split("\n")
    assert words[:3] == ["<unk>", "<s>", "</s>"]
    assert len(words) == len(arrays["unigrams"]) + 1
    assert {"cat", "型", "00", "!"} <= set(words)
