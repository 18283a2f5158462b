"""The wrapper against SentencePiece itself, on any text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from megatron_b2.errors import TokenizerError
from megatron_b2.tokenizer import Tokenizer, load_tokenizer

from .conftest import WORDS, make_documents

FRAGMENTS = st.sampled_from(
    ["\u2581", " ", "  ", "\n", "\t", "\r", "\0", "<s>", "</s>", "<unk>", "<reserved_106>", "<reserved_", "<0x41>", "<",
     "，", "模型", "the", "слова", "e\u0301", "\ufeff", "\u2585", " \u2047 ", "\U0001f468\u200d\U0001f469", "123", "año"]
)  # fmt: skip
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8")),
    st.lists(st.one_of(FRAGMENTS, st.text(st.characters(codec="utf-8"), max_size=3))).map("".join),
)


@settings(max_examples=400)
@given(TEXTS)
@example("\u2581")
@example(" \u2581 \u2581\u2581a")
@example("\ufffe\uffff\U0010ffff\x00\r")
def test_round_trip_and_no_control_ids(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.encode(text, bos=True, eos=True) == [1, *ids, 2]
    assert tokenizer.decode([1, *ids, 2, 0]) == text
    assert tokenizer.encode_batch([text, "a", text], threads=2) == [ids, tokenizer.encode("a"), ids]


@settings(max_examples=200)
@given(TEXTS)
def test_ids_are_those_of_sentencepiece(tokenizer: Tokenizer, text: str) -> None:
    reference = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    if "\u2581" not in text:
        assert tokenizer.encode(text) == reference.encode(text)


@settings(max_examples=200)
@given(TEXTS)
def test_text_of_a_user_cannot_open_a_turn(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, parse_reserved=False)
    assert tokenizer.decode(ids) == text
    assert not any(89 <= i < 1_089 for i in ids)


def test_space_mark_is_spelled_in_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.pieces(tokenizer.encode("\u2581")) == ["<0xE2>", "<0x96>", "<0x81>"]
    assert tokenizer.pieces(tokenizer.encode(" \n\t")) == ["\u2581", "\n", "\t"]


def test_attributes(tokenizer: Tokenizer, trained: Path) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert (tokenizer.user_id, tokenizer.assistant_id) == (195, 196)
    assert tokenizer.encode("<reserved_106>hi") == [195, *tokenizer.encode("hi")]
    assert load_tokenizer(trained / "tokenizer.model").fingerprint == tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 64
    assert tokenizer.piece_id("<reserved_5000>") is None


def test_broken_byte_runs_decode_to_replacement(tokenizer: Tokenizer) -> None:
    first = tokenizer.piece_id("<0xE4>")
    assert first is not None
    assert tokenizer.decode(np.array([first, tokenizer.encode("a")[0]])) == "\ufffda"


@pytest.mark.parametrize("wrong", [-1, 2_000, 10**12])
def test_unknown_id(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(TokenizerError, match=rf"id {wrong} is outside the vocabulary .*0 to 1999"):
        tokenizer.decode([5, wrong])


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_batch(["fine", text])):
        with pytest.raises(TokenizerError, match=r"lone surrogate U\+DC80 at character 2"):
            encode("ab\udc80")


def test_files_that_are_no_model(tmp_path: Path, trained: Path) -> None:
    with pytest.raises(TokenizerError, match="no such file"):
        load_tokenizer(tmp_path)
    model = (trained / "tokenizer.model").read_bytes()
    for data in (b"", b"no model", model[:1_000], b"\0" * 64):
        (tmp_path / "tokenizer.model").write_bytes(data)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(TokenizerError, match="Git LFS pointer"):
        load_tokenizer(tmp_path)


def look_alike(model: bytes, **changes: object) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for name, value in changes.items():
        spec = proto.normalizer_spec if hasattr(proto.normalizer_spec, name) else proto.trainer_spec
        setattr(spec, name, value)
    return bytes(proto.SerializeToString())


def test_a_model_that_loses_text_is_refused(tokenizer: Tokenizer) -> None:
    for changes in ({"add_dummy_prefix": True}, {"remove_extra_whitespaces": True}):
        with pytest.raises(TokenizerError, match=r"comes back as .*identity normalisation, no dummy prefix"):
            Tokenizer(look_alike(tokenizer.model_bytes, **changes))


def published_look_alike() -> bytes:
    """A model laid out as the published one: trained pieces, then pieces appended with falling scores, built by hand."""
    schema = sentencepiece_model_pb2.ModelProto
    kind = schema.SentencePiece.Type
    proto = schema()

    def add(piece: str, score: float, piece_type: int) -> None:
        entry = proto.pieces.add()
        entry.piece, entry.score, entry.type = piece, score, piece_type

    add("<unk>", 0, kind.UNKNOWN)
    add("<s>", 0, kind.CONTROL)
    add("</s>", 0, kind.CONTROL)
    marks = [chr(0x3001), chr(0x3002), "\n", "\t", *(chr(0xFF01 + n) for n in range(82))]
    for symbol in [*marks, *(f"<reserved_{n}>" for n in range(1_000))]:
        add(symbol, 0, kind.USER_DEFINED)
    for byte in range(256):
        add(f"<0x{byte:02X}>", 0, kind.BYTE)
    merges = ["th", "the", "\u2581the", "\u2581\u2581", "模型", "an", "and", "大模型", "er", "\u2581w"]
    characters = [*map(chr, range(33, 127)), *"模型大小的语言", "\u2581"]
    appended = ["语言", "语言模型", "there", "\u2581\u2581\u2581\u2581"]
    for number, piece in enumerate([*merges, *characters, *appended]):
        add(piece, -float(number), kind.NORMAL)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = 2, True, 1_345 + len(merges)
    trainer.allow_whitespace_only_pieces = trainer.split_digits = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = (
        "identity",
        False,
        False,
    )
    return bytes(proto.SerializeToString())


def test_published_layout_loads_unchanged(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(published_look_alike())
    tokenizer = load_tokenizer(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (tokenizer.user_id, tokenizer.assistant_id) == (195, 196)
    assert tokenizer.encode("\n\t") == [5, 6]
    for language in WORDS:
        for text in make_documents(language, 5, seed=1):
            assert tokenizer.encode(text) == reference.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == text
