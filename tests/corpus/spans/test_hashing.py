"""The hash against published values of MurmurHash3, how it mixes, and what is folded."""

from __future__ import annotations

import random
import struct
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2 import _cpu
from megatron_b2.corpus.spans import fold_text, hash_texts
from megatron_b2.documents.texts import Texts


def test_smhasher_verification_value() -> None:
    """SMHasher hashes keys of 0 to 255 bytes with seeds 256 to 1, then the hashes; 0x6384BA69 is MurmurHash3's."""
    hashes = b"".join(struct.pack("<2Q", *_cpu.murmur3(bytes(range(n)), 256 - n)) for n in range(256))
    assert struct.pack("<2Q", *_cpu.murmur3(hashes, 0))[:4] == struct.pack("<I", 0x6384BA69)


def test_known_values() -> None:
    assert _cpu.murmur3(b"") == (0, 0)
    assert _cpu.murmur3(b"hello") == (0xCBD8A7B341BD9B02, 0x5B1E906A48AE1D19)
    fox = b"The quick brown fox jumps over the lazy dog"
    assert _cpu.murmur3(fox) == (0xE34BBC7BBC071B6C, 0x7A433CA9C49A9347)


@pytest.mark.parametrize("length", [1, 7, 8, 15, 16, 17, 40])
def test_a_changed_bit_changes_half_of_the_hash(length: int) -> None:
    generator = random.Random(length)
    flips = np.zeros(128)
    trials = 0
    for _ in range(60):
        key = bytearray(generator.randbytes(length))
        before = _bits(bytes(key))
        for bit in range(8 * length):
            key[bit // 8] ^= 1 << bit % 8
            flips += before ^ _bits(bytes(key))
            key[bit // 8] ^= 1 << bit % 8
            trials += 1
    # Six standard deviations of a fair coin, over all output bits.
    assert np.abs(flips / trials - 0.5).max() < 6 * 0.5 / trials**0.5


def _bits(key: bytes) -> np.ndarray:
    return np.unpackbits(np.frombuffer(struct.pack("<2Q", *_cpu.murmur3(key)), np.uint8))


def test_no_collision_of_similar_texts() -> None:
    texts = [f"{prefix}{i}" for prefix in ("", "a", "第", "x" * 30) for i in range(100_000)]
    hashes = hash_texts(Texts.of(texts), folded=False)
    assert len(np.unique(hashes, axis=0)) == len(texts)
    assert len(np.unique(hashes[:, 0])) == len(texts)
    # 2^16 buckets by the first bits, as files are parted: chi-square within six deviations of 65,535.
    counts = np.bincount((hashes[:, 0] >> np.uint64(48)).astype(np.int64), minlength=1 << 16)
    expected = len(texts) / (1 << 16)
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 65_535) < 6 * (2 * 65_535) ** 0.5


@given(texts=st.lists(st.text(max_size=40), max_size=6))
def test_columns_hash_as_single_texts(texts: list[str]) -> None:
    raw = hash_texts(Texts.of(texts), folded=False)
    folded = hash_texts(Texts.of(texts), folded=True)
    assert [tuple(pair) for pair in raw.tolist()] == [_cpu.murmur3(text.encode()) for text in texts]
    assert [tuple(p) for p in folded.tolist()] == [_cpu.murmur3(fold_text(text).encode()) for text in texts]


def slow_fold(text: str) -> str:
    def folded(c: str) -> str:
        if c.isspace() or unicodedata.category(c) in ("Cc", "Cf") or c in "\u115f\u1160\u3164\uffa0":
            return ""
        return c.lower()[0]

    return "".join(map(folded, text))


@settings(max_examples=500)
@given(text=st.text(max_size=60))
def test_fold_is_the_slow_one(text: str) -> None:
    assert fold_text(text) == slow_fold(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello,\n\tworld!"),
        ("你好，世界。", "你 好，\n　世界。"),
        ("ÄÖÜ Straße ΩЖ", "äöü straße ωж"),
        ("co\u00adoperate\u200b", "cooperate"),
        ("ȺȾ", "ⱥⱦ"),
    ],
)
def test_equal_when_folded(one: str, other: str) -> None:
    first, second = hash_texts(Texts.of([one, other]), folded=True).tolist()
    assert first == second


@pytest.mark.parametrize(("one", "other"), [("a+b", "a-b"), ("你好。", "你好"), ("1.0", "10"), ("ab", "ac")])
def test_different_when_folded(one: str, other: str) -> None:
    first, second = hash_texts(Texts.of([one, other]), folded=True).tolist()
    assert first != second


def test_fold_keeps_bytes_that_are_no_utf8() -> None:
    assert _cpu.fold_text(b"A \xff\xe4\xb8 B\x80") == b"a\xff\xe4\xb8b\x80"
