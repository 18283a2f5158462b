"""A small real tokenizer for the preprocessing tests."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

SENTENCE = (
    "the quick brown fox jumps over a lazy dog 天地玄黄 宇宙洪荒 日月盈昃 while training models on text"
)
WORDS = SENTENCE.split(" ")


def train_tokenizer(path: Path, *, vocab_size: int) -> Path:
    """SentencePiece BPE with the options of the report, written to `path`."""
    sentences = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 12)) for i in range(1, 400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        character_coverage=0.9999,
        user_defined_symbols=["\n", "\t"],
        pad_id=-1,
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=400)


@pytest.fixture(scope="session")
def other_tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("other") / "tokenizer.model", vocab_size=380)
