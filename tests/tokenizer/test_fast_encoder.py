"""The native encoder against SentencePiece itself, on any text and on models made to be awkward."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megatron_b2.cli.main import main as b2
from megatron_b2.documents import JsonlWriter
from megatron_b2.documents.texts import Texts
from megatron_b2.tokenizer import Tokenizer
from megatron_b2.tokenizer.fast_encoder import FastEncoder, Vocabulary
from megatron_b2.tokenizer.training import TrainOptions, train_tokenizer

from .conftest import WORDS, make_documents
from .test_wrapper import TEXTS, look_alike, published_look_alike

ROOT = Path(__file__).resolve().parents[2]
MARK = "\u2581".encode()
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


class Pair:
    """The two encoders of one model. SentencePiece's gets U+2581 in bytes, as `Tokenizer` promises."""

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.fast = FastEncoder(Vocabulary.of_model(model))
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.mark = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in MARK]

    def encode(self, texts: Sequence[bytes]) -> list[list[int]]:
        ids, offsets = self.fast.encode(column(texts))
        assert (ids.dtype, offsets.dtype, offsets[0], offsets[-1]) == (np.int32, np.int64, 0, len(ids))
        return [ids[start:end].tolist() for start, end in pairwise(offsets)]

    def expected(self, texts: Sequence[bytes]) -> list[list[int]]:
        parts = [text.split(MARK) for text in texts]
        encoded = iter(self.processor.encode([part for text in parts for part in text]))
        result = []
        for text in parts:
            ids = list(next(encoded))
            for _ in text[1:]:
                ids += [*self.mark, *next(encoded)]
            result.append(ids)
        return result

    def mismatches(self, texts: Sequence[bytes]) -> list[bytes]:
        triples = zip(texts, self.encode(texts), self.expected(texts), strict=True)
        return [text for text, ours, theirs in triples if ours != theirs]

    def pieces(self, text: str) -> list[str]:
        return [self.processor.id_to_piece(i) for i in self.encode([text.encode()])[0]]


def column(texts: Sequence[bytes]) -> Texts:
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return Texts(np.frombuffer(b"".join(texts), np.uint8), offsets)


def fuzzed(pair: Pair, count: int, *, seed: int) -> list[bytes]:
    """Strings that try what could differ: scripts, symbols, spaces, rare bytes, long runs, broken UTF-8."""
    source = random.Random(seed)
    pieces = [pair.processor.id_to_piece(i).replace("\u2581", " ") for i in range(len(pair.processor))]
    single = [piece for piece in pieces if len(piece) == 1]
    awkward = [
        *("\u2581", " ", "  ", "\n", "\t", "\r\n", "\0", "<s>", "</s>", "<unk>", "<0x41>", "<reserved_1", "<"),
        *("<reserved_106>", "\ufffd", "\ufeff", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301", "﷽"),
        *("한국어", "ไทย", "हिन्दी", "العربية", "ѣ", "𠮷", "\U0010ffff", "12345", "3.14", "，", "…", "//", "a" * 70),
    ]  # fmt: skip
    words = [word for language in WORDS.values() for word in language]

    def some(strings: Sequence[str], most: int) -> list[str]:
        return source.choices(strings, k=source.randint(0, most))

    makers: list[Callable[[], str]] = [
        lambda: "".join(some(pieces, 30)),
        lambda: " ".join(some(words, 30)),
        lambda: "".join(some(single + awkward, 60)),
        lambda: source.choice(pieces + awkward) * source.randint(1, 90),
        lambda: "".join(chr(source.choice(RANGES) + source.randrange(96)) for _ in range(source.randint(0, 40))),
        lambda: "".join(source.choice(source.choice((pieces, awkward, words))) for _ in range(30)),
    ]
    texts = [source.choice(makers)().encode() for _ in range(count)]
    for i in range(0, count, 10):  # every tenth is cut or damaged
        text = bytearray(texts[i])
        for _ in range(source.randint(0, 3)):
            text.insert(source.randint(0, len(text)), source.choice((0x80, 0xC3, 0xE4, 0xF0, 0xFF, 0xED, 0x20)))
        texts[i] = bytes(text[source.randint(0, 2) :])
    return texts


RANGES = (0x20, 0xA0, 0x400, 0x5D0, 0x620, 0x905, 0xE01, 0x3040, 0x4E00, 0x597D, 0xAC00, 0x1F600, 0x20000)
"""First characters of some blocks."""


def hand_made(
    pieces: Sequence[tuple[str, float, int]], *, symbols: Sequence[str] = (), **changes: object
) -> bytes:
    """A byte-fallback BPE model of these (piece, score, type) behind the control pieces and the bytes."""
    proto = sentencepiece_model_pb2.ModelProto()
    head = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((symbol, USER_DEFINED) for symbol in symbols)]
    head += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    for piece, score, kind in [*((piece, 0.0, kind) for piece, kind in head), *pieces]:
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    return look_alike(proto.SerializeToString(), **changes)


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A larger vocabulary from real text: this repository's own."""
    folder = tmp_path_factory.mktemp("repository")
    for path in repository_files():
        (folder / f"{path.relative_to(ROOT)}.txt".replace("/", "_")).write_bytes(path.read_bytes())
    train_tokenizer([folder], folder / "out", options=TrainOptions(vocab_size=8_000, num_reserved=200))
    return Pair((folder / "out" / "tokenizer.model").read_bytes())


def repository_files() -> list[Path]:
    patterns = ("docs/*.md", "megatron_b2/**/*.py", "tests/**/*.py", "csrc/**/*.cpp", "*.md")
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


@pytest.fixture(scope="module", params=["trained", "published", "repository"])
def pair(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Pair:
    if request.param == "repository":
        return request.getfixturevalue("repository")
    return Pair(tokenizer.model_bytes if request.param == "trained" else published_look_alike())


def test_fuzzed_strings(pair: Pair) -> None:
    assert pair.mismatches(fuzzed(pair, 4_000, seed=1)) == []


def test_real_text(repository: Pair) -> None:
    texts = [path.read_bytes() for path in repository_files()]
    texts += ["\n".join(make_documents(language, 20)).encode() for language in WORDS]
    assert sum(map(len, texts)) > 10**6
    assert repository.mismatches(texts) == []


@settings(max_examples=150)
@given(text=TEXTS)
@example(text="<s></s><unk><reserved_106>\u2581 \u2581\0\r\n\t ，")
def test_any_text(pair: Pair, text: str) -> None:
    assert pair.mismatches([text.encode()]) == []


BROKEN = st.sampled_from([b"\xe2\x96\x81", b"\xe2\x96", b"\xe4\xbd", b"\xf0\x9f\x98", b"\n", b" a"])


@settings(max_examples=150)
@given(data=st.lists(st.one_of(st.binary(max_size=8), BROKEN)).map(b"".join))
@example(data=b"\xed\xa0\x80 \xf4\x90\x80\x80 \xc0\xaf \xe2\x96 \xe2\x96\x81 \xf0\x9f\x98")
def test_any_bytes(pair: Pair, data: bytes) -> None:
    assert pair.mismatches([data]) == []


@st.composite
def vocabularies(draw: st.DrawFn) -> list[tuple[str, float, int]]:
    """Any pieces over a few characters: equal scores, unused pieces, symbols in symbols, missing characters."""
    texts = draw(st.lists(st.text("ab\u2581é語", min_size=1, max_size=4), unique=True, max_size=25))
    kinds = st.sampled_from([NORMAL, NORMAL, NORMAL, UNUSED, USER_DEFINED])
    scores = st.sampled_from([0.0, -1.0, -2.0, -2.5, 3.0])
    return [(text, draw(scores), draw(kinds)) for text in texts]


@settings(max_examples=300)
@given(pieces=vocabularies(), texts=st.lists(st.text("abé語 \u2581c"), max_size=6))
def test_any_vocabulary(pieces: list[tuple[str, float, int]], texts: list[str]) -> None:
    data = [text.encode() for text in texts]
    data += [text * 40 for text in data]  # long enough for the queue of pairs
    assert Pair(hand_made(pieces)).mismatches(data) == []


def test_unused_pieces_are_taken_apart_as_they_came_about() -> None:
    pieces = [("a", -9, NORMAL), ("b", -9, NORMAL), ("c", -9, NORMAL), ("d", -9, UNUSED), ("ab", -2, NORMAL)]
    pieces += [("bc", -1, NORMAL), ("abc", -3, UNUSED), ("dbc", -4, NORMAL), ("abcabc", -5, UNUSED)]
    pair = Pair(hand_made(pieces))
    assert pair.pieces("abc") == ["a", "bc"]
    assert pair.pieces("abcabcd") == ["a", "bc", "a", "bc", "<0x64>"]
    texts = [b"abc", b"abcabc", b"aabcc", b"abc abc\xff", b"ab c\xe2\x96\x81abc", b"abbcabc" * 50, b"abcdbc", b"d"]
    assert pair.mismatches(texts) == []


def test_long_runs_of_one_character(pair: Pair) -> None:
    """A million characters that cannot be cut: hours in quadratic time."""
    source = random.Random(0)
    runs = [b" " * 10**6, b"a" * 10**6, "模".encode() * 10**5, b"\n" * 10**5, b"\xff" * 10**5, b"ab" * 10**5]
    runs += [bytes(source.choices(b"thea ", k=10**5)), b"-" * 63, b"-" * 64, b"-" * 65, b"-" * 10**5]
    assert pair.mismatches(runs) == []


def test_user_defined_symbols_come_first_and_the_longest_wins() -> None:
    symbols = ["<a", "<a>", "<a><b", "ab", "b\u2581c", "，", "\n\n", "é", "x y"]
    pieces = ["<a>x", "xa", "a", "b", "x", "\u2581", "bx", "(<", "<"]
    pair = Pair(hand_made([(piece, -float(i), NORMAL) for i, piece in enumerate(pieces)], symbols=symbols))
    assert pair.pieces("<a><b<a>x") == ["<a><b", "<a>", "x"]
    assert pair.pieces("xab，b c\n\né") == ["x", "ab", "，", "b\u2581c", "\n\n", "é"]
    assert pair.pieces("(<a(<") == ["<0x28>", "<a", "(<"]
    texts = ["<" * 99, "<a>" * 99, "<a><a><b>x", "xab" * 30, "b c" * 40, "\n" * 7, "x y", "éa，" * 50]
    source = random.Random(0)
    texts += ["".join(source.choices("<a>bx c，\né(", k=80)) for _ in range(2_000)]
    assert pair.mismatches([text.encode() for text in texts]) == []


@pytest.mark.parametrize("cache_bits", [3, 8])
def test_more_chunks_than_the_caches_hold(repository: Pair, cache_bits: int) -> None:
    small = copy(repository)
    small.fast = FastEncoder(Vocabulary.of_model(repository.model), cache_bits=cache_bits)
    texts = [path.read_bytes() for path in repository_files()[:60]]
    assert small.mismatches(texts + fuzzed(repository, 2_000, seed=2) + texts) == []
    with pytest.raises(ValueError, match="cache_bits is 3 to 30"):
        FastEncoder(Vocabulary.of_model(repository.model), cache_bits=2)


def test_threads_at_once(repository: Pair) -> None:
    batches = [[path.read_bytes() for path in repository_files()[start::8]] for start in range(8)]
    expected = [repository.expected(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert list(pool.map(repository.encode, batches)) == expected


def test_a_column_may_be_a_part_of_another(pair: Pair) -> None:
    texts = [b"the model", b"", "模型".encode(), b"\xff", b" a"]
    whole = column(texts)
    part = Texts(whole.data, whole.offsets[1:5])
    ids, offsets = pair.fast.encode(part, last_id=2)
    assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == [[*row, 2] for row in pair.expected(texts[1:4])]
    ids, offsets = pair.fast.encode(column([]))
    assert (ids.tolist(), offsets.tolist()) == ([], [0])


UNSUPPORTED = {
    "not BPE": {"model_type": 1},
    "no byte fallback": {"byte_fallback": False},
    r"normalises text \(nmt_nfkc rules\)": {"name": "nmt_nfkc", "precompiled_charsmap": b"x"},
    "changes spaces": {"add_dummy_prefix": True},
    r"changes spaces .*remove_extra_whitespaces": {"remove_extra_whitespaces": True},
    r"does not write spaces as U\+2581": {"escape_whitespaces": False},
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_other_models_are_refused(tokenizer: Tokenizer, reason: str) -> None:
    vocabulary = Vocabulary.of_model(look_alike(tokenizer.model_bytes, **UNSUPPORTED[reason]))
    with pytest.raises(ValueError, match=reason):
        FastEncoder(vocabulary)


@pytest.mark.parametrize(
    ("piece", "kind", "reason"),
    [
        ("§", CONTROL, "text can give a reserved piece"),
        ("<s>", NORMAL, "text can give a reserved piece"),
        ("a\0b", USER_DEFINED, r"the user-defined symbol 'a\\x00b' holds NUL"),
    ],
)
def test_vocabularies_that_only_sentencepiece_reads(piece: str, kind: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FastEncoder(Vocabulary.of_model(hand_made([("a", -1, NORMAL), (piece, -2, kind)])))


COLUMN = ["the model 模型\n\t<s>", "", "\u2581 \u2581", "  a\0", "x" * 300]


def test_the_tokenizer_falls_back_to_sentencepiece(tokenizer: Tokenizer) -> None:
    for model, native in ((tokenizer, True), (Tokenizer(look_alike(tokenizer.model_bytes, model_type=1)), False)):
        assert (model.slow_because == "") == native
        ids, offsets = model.encode_column(Texts.of(COLUMN), eos=True)
        expected = [model.encode(text, eos=True) for text in COLUMN]
        assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
        assert [ids[a:b].tolist() for a, b in pairwise(offsets)] == expected
        broken = model.encode_column(column([b"a\xffb"]))[0].tolist()
        assert broken == model.encode("a\ufffdb")


def test_preprocess_says_which_encoder_worked(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with JsonlWriter(tmp_path / "in.jsonl") as writer:
        for text in COLUMN:
            writer.write({"text": text})
    for name, changes, line in (
        ("bpe", {}, "encoder: native"),
        ("unigram", {"model_type": 1}, "encoder: SentencePiece itself, which is slower: the model is of type UNIGRAM"),
    ):
        model = tmp_path / f"{name}.model"
        model.write_bytes(look_alike(tokenizer.model_bytes, **changes))
        output = tmp_path / name
        b2(["preprocess", str(tmp_path / "in.jsonl"), "--tokenizer", str(model), "--output", str(output)])
        assert line in capsys.readouterr().out
        expected = [i for text in COLUMN if text for i in Tokenizer(model.read_bytes()).encode(text, eos=True)]
        assert np.fromfile(f"{output}.bin", np.uint16).tolist() == expected


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """32,000 pieces from the sources and documents of the installed packages."""
    folder = tmp_path_factory.mktemp("large")
    size = 0
    with JsonlWriter(folder / "packages.jsonl") as writer:
        for path in package_files():
            text = path.read_text("utf-8", "ignore")
            writer.write({"text": text})
            size += len(text)
            if size > 20_000_000:
                break
    train_tokenizer([folder], folder / "out", options=TrainOptions(vocab_size=32_000))
    return Pair((folder / "out" / "tokenizer.model").read_bytes())


def package_files() -> list[Path]:
    folder = Path(sysconfig.get_path("purelib"))
    files = (path for suffix in ("md", "rst", "txt", "py") for path in sorted(folder.rglob(f"*.{suffix}")))
    return [path for path in files if path.stat().st_size < 1 << 20]


@pytest.mark.slow
def test_a_hundred_thousand_fuzzed_strings(large: Pair, repository: Pair) -> None:
    for pair in (large, repository):
        for seed in range(10, 15):
            assert pair.mismatches(fuzzed(pair, 10_000, seed=seed)) == []


@pytest.mark.slow
def test_real_text_with_a_large_vocabulary(large: Pair) -> None:
    texts = [path.read_bytes() for path in package_files()[::7]]
    assert sum(map(len, texts)) > 10_000_000
    for start in range(0, len(texts), 200):
        assert large.mismatches(texts[start : start + 200]) == []
