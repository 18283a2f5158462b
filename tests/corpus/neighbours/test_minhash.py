"""Shingles, signatures and exact similarity against sets of Python tuples and a second implementation."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2 import _cpu
from megatron_b2.corpus.neighbours.han import simplified
from megatron_b2.corpus.neighbours.minhash import NO_HASH, signatures, words
from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.corpus.neighbours.verify import ShingleSets, verified
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import ConfigError
from tests.corpus.neighbours.languages import ALPHABETS, random_words, written

SETTINGS = NearDuplicates()
LANGUAGES = [*ALPHABETS, "mixed"]
PIECES = ["A", "b", "word ", "anotherlongword ", "é", "Ж", " ", ". ", "中", "文", "か", "7", "x" * 23]
COLUMNS = st.lists(st.lists(st.sampled_from(PIECES), max_size=25).map("".join), min_size=1, max_size=4)
MASK = (1 << 64) - 1


def python_shingles(text: str, ngram: int) -> set[tuple[str, ...]]:
    found = words(text)
    length = min(ngram, len(found))
    return {tuple(found[i : i + length]) for i in range(len(found) - length + 1)} if found else set()


def exact_jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def shingle_sets(texts: Texts, ngram: int) -> list[np.ndarray]:
    values, offsets = _cpu.shingle_sets(texts.data, texts.offsets, length=ngram)
    return [values[begin:end] for begin, end in pairwise(offsets)]


@given(COLUMNS, st.integers(1, 6))
def test_sets_and_jaccard_are_those_of_tuples(column: list[str], ngram: int) -> None:
    texts = Texts.of(column)
    expected = [python_shingles(text, ngram) for text in column]
    for ours, theirs in zip(shingle_sets(texts, ngram), expected, strict=True):
        assert len(ours) == len(theirs)
        assert (ours[1:] > ours[:-1]).all()
    pairs = np.array([(i, j) for i in range(len(column)) for j in range(len(column))])
    sets = _cpu.shingle_sets(texts.data, texts.offsets, length=ngram)
    found = _cpu.jaccard([sets], pairs)
    assert found.tolist() == [exact_jaccard(expected[i], expected[j]) for i, j in pairs]


def test_large_sets_are_sorted_and_distinct() -> None:
    chance = random.Random(0)
    column = [" ".join(random_words("en", 30_000, chance)), "a b " * 30_000, "same " * 1000]
    texts = Texts.of(column)
    for ours, text in zip(shingle_sets(texts, 5), column, strict=True):
        assert len(ours) == len(python_shingles(text, 5))
        assert (ours[1:] > ours[:-1]).all()


def test_a_text_is_read_alone() -> None:
    """What stands before and behind a text in the column, or the end of memory, changes nothing."""
    chance = random.Random(1)
    column = ["".join(chance.choices(PIECES, k=chance.randint(0, 12))) for _ in range(300)]
    together = shingle_sets(Texts.of(column), 2)
    for text, ours in zip(column, together, strict=True):
        assert ours.tolist() == shingle_sets(Texts.of([text]), 2)[0].tolist()
        assert ours.tolist() == shingle_sets(Texts.of([f" {text}~"]), 2)[0].tolist()


def avalanche(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def fold(a: int, b: int) -> int:
    product = a * b
    return (product ^ product >> 64) & MASK


def python_hash(word: bytes) -> int:
    value = 0x9E3779B97F4A7C15 * (len(word) + 1) & MASK
    chunks = [word[i : i + 16] for i in range(0, len(word), 16)]
    for chunk in chunks:
        low, high = (int.from_bytes(chunk[i : i + 8], "little") for i in (0, 8))
        value = fold(value ^ low, 0xE7037ED1A0B428DB ^ high)
    return value


def python_signature(text: str, settings: NearDuplicates) -> list[int]:
    hashes = []
    for shingle in python_shingles(text, settings.ngram):
        value = len(shingle)
        for word in shingle:
            value = (value * 0xD1342543DE82EF95 + python_hash(word.encode())) & MASK
        hashes.append(avalanche(value) >> 32)
    signature = []
    for p in range(settings.permutations):
        drawn = avalanche(settings.seed + (p + 1) * 0x9E3779B97F4A7C15 & MASK)
        multiply, add = drawn >> 32 | 1, drawn & 0xFFFFFFFF
        signature.append(min((x * multiply + add & 0xFFFFFFFF for x in hashes), default=0xFFFFFFFF))
    return signature


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(("bands", "rows"), [(16, 8), (3, 5), (1, 1), (11, 6)])
def test_signatures_are_the_documented_ones(bands: int, rows: int, portable: bool) -> None:
    """The same numbers by Python's integers: so every machine has them, with AVX2 and without."""
    settings = NearDuplicates(bands=bands, rows=rows, seed=7, ngram=3)
    chance = random.Random(2)
    column = ["", "One", "Ein Wort über 8 Bytes: Donaudampfschiffahrt", "中文 Mixed テスト123", "Ж" * 40]
    column += [written(random_words(language, 60, chance)) for language in LANGUAGES]
    texts = Texts.of(column)
    ours = _cpu.minhash_signatures(
        texts.data,
        texts.offsets,
        length=3,
        permutations=settings.permutations,
        seed=7,
        portable=portable,
    )
    assert ours.tolist() == [python_signature(text, settings) for text in column]


def test_a_text_without_words_has_no_signature() -> None:
    found = signatures(Texts.of(["", " .,;", "word"]), SETTINGS)
    assert (found[:2] == NO_HASH).all()
    assert (found[2] != NO_HASH).any()


@pytest.mark.parametrize("language", LANGUAGES)
def test_equal_hashes_estimate_the_jaccard_similarity(language: str) -> None:
    """Over 4,096 permutations the share of equal hashes is binomial: within 5 standard deviations."""
    settings = NearDuplicates(bands=512, rows=8)
    chance = random.Random(3)
    for kept in (0, 60, 150, 270, 300):
        a = random_words(language, 300, chance)
        b = a[:kept] + random_words(language, 300 - kept, chance)
        texts = [written(a), written(b)]
        jaccard = exact_jaccard(*(python_shingles(text, 5) for text in texts))
        one, two = signatures(Texts.of(texts), settings)
        deviation = np.sqrt(jaccard * (1 - jaccard) / settings.permutations)
        assert abs((one == two).mean() - jaccard) <= 5 * deviation


def test_threads_and_slices_give_the_same() -> None:
    chance = random.Random(4)
    lengths = [chance.randint(0, 80) for _ in range(400)]
    column = [written(random_words(chance.choice(LANGUAGES), length, chance)) for length in lengths]
    whole = signatures(Texts.of(column), SETTINGS)
    parts = [Texts.of(column[start : start + 37]) for start in range(0, 400, 37)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda texts: signatures(texts, SETTINGS), parts))
    assert (np.concatenate(found) == whole).all()


def test_case_does_not_matter_however_a_word_is_read() -> None:
    """ASCII words take a fast path, words with other letters another one."""
    for text in ("ABCDEFG", "ABCDEFGH", "ABCDEFGHI", "Éa", "A" * 100, "KELVIN Жук"):
        lower, upper = shingle_sets(Texts.of([text.lower(), text.upper()]), 5)
        assert lower.tolist() == upper.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ngram": 0}, "ngram = 0: must be at least 1"),
        ({"threshold": 0.0}, "threshold = 0.0: must be above 0 and at most 1"),
        ({"bands": 0, "rows": -1}, "2 configuration errors"),
        ({"seed": 1 << 64}, "must be below 2^64"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, int | float], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("^", r"\^")):
        NearDuplicates(**change)  # type: ignore[arg-type]


def test_wrong_arrays_are_refused() -> None:
    texts = Texts.of(["a"])
    with pytest.raises(ValueError, match="at least 1 word"):
        _cpu.shingle_sets(texts.data, texts.offsets, length=0)
    with pytest.raises(ValueError, match="at least 1 permutation"):
        _cpu.minhash_signatures(texts.data, texts.offsets, length=5, permutations=0, seed=0)
    with pytest.raises(ValueError, match="P >= bands x rows"):
        _cpu.band_hashes(np.zeros((1, 127), np.uint32), bands=16, rows=8)
    sets = _cpu.shingle_sets(texts.data, texts.offsets, length=5)
    for number in (-1, 1):
        with pytest.raises(IndexError, match=f"no set {number}"):
            _cpu.jaccard([sets], np.array([[0, number]]))
    with pytest.raises(ValueError, match="leaves its 1 shingles"):
        _cpu.jaccard([(sets[0], np.array([0, 2]))], np.array([[0, 0]]))
    with pytest.raises(ValueError, match="pairs of values uint64"):
        _cpu.jaccard([(sets[0].astype(np.int64), sets[1])], np.array([[0, 0]]))


def test_a_text_in_traditional_and_in_simplified_characters_is_the_same() -> None:
    """OpenCC's whole converter also looks at phrases; this text has none that it treats in another way."""
    simplified = "这个项目从头训练一个大型语言模型，并说明数据的来源和处理的方法。Unicode テスト 한국어"
    traditional = "這個項目從頭訓練一個大型語言模型，並說明數據的來源和處理的方法。Unicode テスト 한국어"
    texts = Texts.of([simplified, traditional])
    first, second = signatures(texts, SETTINGS)
    assert (first == second).all()
    assert jaccard_of(texts, SETTINGS) == 1
    apart = replace(SETTINGS, across_scripts=False)
    assert signatures(texts, apart)[0].tolist() == first.tolist()
    assert jaccard_of(texts, apart) < 0.6


def jaccard_of(texts: Texts, settings: NearDuplicates) -> float:
    """Similarity of two texts."""
    edges = verified(
        np.array([[0, 1]]),
        [ShingleSets.of(texts, np.arange(2), settings)],
        replace(settings, threshold=1e-9),
    )
    return float(edges.jaccard[0])


def test_only_characters_with_a_simplified_form_are_mapped() -> None:
    table = simplified()
    changed = np.flatnonzero(table != np.arange(1 << 16))
    assert changed.min() >= 0x3400
    assert changed.max() <= 0x9FFF
    assert [chr(table[ord(c)]) for c in "漢語学a한が"] == list("汉语学a한が")
    own = table[table < 1 << 16]
    assert (table[own] == own).mean() > 0.9999  # a simplified form is its own


def test_tables_of_characters_are_checked() -> None:
    texts = Texts.of(["x"])
    with pytest.raises(ValueError, match=r"\[65536\] or empty"):
        _cpu.shingle_sets(texts.data, texts.offsets, length=5, characters=np.zeros(3, np.uint32))
    with pytest.raises(ValueError, match=r"U\+10FFFF"):
        _cpu.shingle_sets(
            texts.data, texts.offsets, length=5, characters=np.full(1 << 16, 0x110000, np.uint32)
        )
