"""Training: the promised layout and options, sampling, damage, atomic output."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megatron_b2.errors import B2Error, InputError, OutputError
from megatron_b2.tokenizer import load_tokenizer
from megatron_b2.tokenizer.sampling import num_copies, parse_weights, sampling_rates
from megatron_b2.tokenizer.symbols import user_defined_symbols
from megatron_b2.tokenizer.training import (
    MAX_LINE_BYTES,
    TrainOptions,
    choose_alphabet,
    sentencepiece_options,
    train_tokenizer,
    training_lines,
)

from .conftest import VOCAB_SIZE


def test_layout_is_that_of_the_shipped_model(trained: Path) -> None:
    """Read back with SentencePiece's own schema, not our wrapper."""
    proto = sentencepiece_model_pb2.ModelProto.FromString((trained / "tokenizer.model").read_bytes())
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece.Type
    pieces = [piece.piece for piece in proto.pieces]
    types = [piece.type for piece in proto.pieces]
    assert len(pieces) == VOCAB_SIZE
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert types[:3] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    assert (pieces[5], pieces[6]) == ("\n", "\t")
    assert (pieces[195], pieces[196]) == ("<reserved_106>", "<reserved_107>")
    assert [i for i, t in enumerate(types) if t == kind.USER_DEFINED] == list(range(3, 1_089))
    assert pieces[1_089:1_345] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert types[1_089:1_345] == [kind.BYTE] * 256
    assert set(types[1_345:]) == {kind.NORMAL}


def test_options_are_those_of_the_report(trained: Path) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString((trained / "tokenizer.model").read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert trainer.model_type == sentencepiece_model_pb2.TrainerSpec.BPE
    assert trainer.split_digits
    assert trainer.byte_fallback
    assert trainer.allow_whitespace_only_pieces
    assert trainer.max_sentencepiece_length == 32
    assert trainer.character_coverage == pytest.approx(0.9999)
    assert (normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces) == (
        "identity",
        False,
        False,
    )
    assert not [
        p.piece
        for p in proto.pieces
        if any(c.isdigit() for c in p.piece) and p.type == 1 and len(p.piece) > 1
    ]


def test_full_size_options() -> None:
    options = TrainOptions()
    arguments = sentencepiece_options(options, user_defined_symbols(), coverage=0.9999, num_bytes=2 << 30)
    assert (arguments["vocab_size"], len(arguments["user_defined_symbols"])) == (125_696, 1_086)
    assert arguments["train_extremely_large_corpus"] is True
    symbols = user_defined_symbols()
    assert len(set(symbols)) == 1_086
    assert [3 + symbols.index(s) for s in ("\n", "\t", "<reserved_106>", "<reserved_107>")] == [
        5,
        6,
        195,
        196,
    ]


def test_report_names_inputs_and_result(trained: Path, corpus: Path) -> None:
    report = json.loads((trained / "tokenizer_report.json").read_text(encoding="utf-8"))
    assert sorted(path.name for path in trained.iterdir()) == [
        "tokenizer.model",
        "tokenizer.vocab",
        "tokenizer_report.json",
    ]
    assert report["model_sha256"] == hashlib.sha256((trained / "tokenizer.model").read_bytes()).hexdigest()
    assert report["chat_ids"] == {"user": 195, "assistant": 196}
    digests = {Path(entry["file"]).name: entry["sha256"] for entry in report["inputs"]}
    assert digests["en.jsonl"] == hashlib.sha256((corpus / "en.jsonl").read_bytes()).hexdigest()
    assert report["sample"]["en"]["documents"] == 60
    pieces = [
        json.loads(line) for line in (trained / "tokenizer.vocab").read_text(encoding="utf-8").splitlines()
    ]
    assert pieces[5] == "\n"
    assert len(pieces) == VOCAB_SIZE


def test_training_is_deterministic_and_atomic(trained: Path, corpus: Path, tmp_path: Path) -> None:
    options = TrainOptions(vocab_size=VOCAB_SIZE, num_reserved=1_000)
    out = tmp_path / "t"
    report = train_tokenizer([corpus], out, options=options)
    assert report["model_sha256"] == load_tokenizer(trained).fingerprint
    with pytest.raises(OutputError, match="already exists"):
        train_tokenizer([corpus], out, options=options)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:2: not valid JSON"):
        train_tokenizer([tmp_path / "bad.jsonl"], out, options=options, overwrite=True)
    assert load_tokenizer(out).fingerprint == report["model_sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "t"]


def test_small_vocabulary_keeps_the_chat_ids(corpus: Path, tmp_path: Path) -> None:
    report = train_tokenizer([corpus], tmp_path / "t", options=TrainOptions(vocab_size=520))
    assert (report["num_symbols"], report["chat_ids"]) == (194, {"user": 195, "assistant": 196})
    assert report["alphabet"]["limited"]
    assert report["alphabet"]["characters"] == 33  # half of the 67 trained pieces
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.vocab_size == 520
    assert tokenizer.decode(tokenizer.encode("这个模型 \U0001f600")) == "这个模型 \U0001f600"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainOptions(vocab_size=1_400, num_reserved=1_000), "leaves 55 pieces to train.*give 1409 or more"),
        (TrainOptions(vocab_size=8_000, num_reserved=50), "50 reserved symbols: give 108"),
        (TrainOptions(vocab_size=8_000, character_coverage=1.5), "character coverage is 1.5"),
        (TrainOptions(vocab_size=8_000, temperature=0.5), "temperature is 0.5"),
        (
            TrainOptions(vocab_size=8_000, language_weights={"ko": 0.5}),
            "language 'ko' has a weight but is not in",
        ),
        (TrainOptions(vocab_size=60_000), "pieces|could not train"),
    ],
)
def test_impossible_requests(corpus: Path, tmp_path: Path, options: TrainOptions, message: str) -> None:
    with pytest.raises(B2Error, match=message):
        train_tokenizer([corpus], tmp_path / "t", options=options)
    assert list(tmp_path.iterdir()) == []


def test_weights_steer_the_sample(corpus: Path, tmp_path: Path) -> None:
    options = TrainOptions(vocab_size=700, language_weights={"zh": 0.5, "en": 0.5}, max_bytes=100_000, seed=3)
    sample = train_tokenizer([corpus], tmp_path / "t", options=options)["sample"]
    assert sample["es"]["documents"] == sample["ru"]["documents"] == 0
    chinese = sample["zh-Hans"]["bytes"] + sample["zh-Hant"]["bytes"]
    assert sample["zh-Hans"]["bytes"] > 0
    assert chinese == pytest.approx(50_000, rel=0.25)


@given(
    st.dictionaries(
        st.sampled_from(["en", "zh-Hans", "zh-Hant", "de", "ja"]), st.integers(1, 10**12), min_size=1
    ),
    st.floats(1, 5),
    st.one_of(st.none(), st.integers(1, 10**12)),
)
def test_rates_stay_in_the_budget(sizes: dict[str, int], temperature: float, max_bytes: int | None) -> None:
    rates = sampling_rates(sizes, weights={}, temperature=temperature, max_bytes=max_bytes)
    total = sum(rates[lang] * size for lang, size in sizes.items())
    budget = min(max_bytes or sum(sizes.values()), sum(sizes.values()))
    assert total <= budget * (1 + 1e-9)
    if temperature == 1:
        assert total == pytest.approx(budget)


def test_rates_by_hand() -> None:
    sizes = {"en": 600, "zh-Hans": 300, "zh-Hant": 100}
    assert sampling_rates(sizes, weights={}, temperature=1, max_bytes=None) == pytest.approx(
        dict.fromkeys(sizes, 1.0)
    )
    rates = sampling_rates(sizes, weights={"zh": 0.8}, temperature=1, max_bytes=500)
    assert rates == pytest.approx({"en": 1 / 6, "zh-Hans": 1.0, "zh-Hant": 1.0})
    flat = sampling_rates({"a": 900, "b": 100}, weights={}, temperature=2, max_bytes=400)
    assert flat == pytest.approx({"a": 300 / 900, "b": 1.0})
    assert sampling_rates({"a": 10, "b": 990}, weights={"a": 0.9}, temperature=1, max_bytes=None)["a"] == 4.0


def test_copies_are_a_fair_pure_function() -> None:
    copies = [num_copies(1.3, seed=1, index=i) for i in range(5_000)]
    assert set(copies) == {1, 2}
    assert sum(copies) == pytest.approx(6_500, rel=0.03)
    assert copies == [num_copies(1.3, seed=1, index=i) for i in range(5_000)]


@pytest.mark.parametrize(
    "items", [["zh"], ["zh=a"], ["=1"], ["zh=0"], ["zh=1.5"], ["zh=0.6", "en=0.6"], ["a=.1", "a=.1"]]
)
def test_weights_that_make_no_sense(items: list[str]) -> None:
    with pytest.raises(InputError, match="language weight"):
        parse_weights(items)


@given(st.text())
def test_lines_lose_nothing_but_breaks(text: str) -> None:
    kept = "".join(line for line, _ in training_lines(text))
    assert kept == "".join(c for c in text if c not in "\n\t\0\u2581")


def test_long_lines_are_cut_not_skipped() -> None:
    for text in ("字" * 30_000, "word and " * 9_000, "a" * 50_000):
        lines = list(training_lines(text))
        assert "".join(line for line, _ in lines) == text
        assert all(len(line.encode()) <= MAX_LINE_BYTES for line, _ in lines)
        assert [cut for _, cut in lines] == [True] * (len(lines) - 1) + [False]
    assert all(line.endswith(" ") for line, cut in training_lines("word and " * 9_000) if cut)


def test_alphabet() -> None:
    counts = {"b": 9, "a": 90, "c": 1}
    for wanted, most, expected in (
        (0.95, 10, ("ab", 0.99, False)),
        (1.0, 10, ("abc", 1.0, False)),
        (1.0, 2, ("ab", 0.99, True)),
    ):
        alphabet = choose_alphabet(counts, wanted, most)
        assert ("".join(sorted(alphabet.characters)), alphabet.coverage, alphabet.limited) == expected


def test_sentencepiece_reads_the_model_alone(trained: Path) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(trained / "tokenizer.model"))
    assert processor.decode(processor.encode("这个模型 reads\n")) == "这个模型 reads\n"
