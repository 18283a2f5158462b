"""Exact and fast encoding with a SentencePiece BPE model: the ids of SentencePiece, by native code.

The native encoder (csrc/cpu/encode) cuts a text wherever no piece holds the two characters around the cut,
which no merge can cross, and keeps the ids of short chunks. This module reads the model and says which models
the native code does not take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

from megatron_b2._cpu import BpeEncoder
from megatron_b2.documents.texts import Texts

CACHE_BITS = 17
"""A thread's caches of known chunks take at most 2^17 x 144 bytes = 19 MB (our choice)."""

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece
_SILENT = (_Piece.UNKNOWN, _Piece.CONTROL)


@dataclass(frozen=True)
class Vocabulary:
    """The V pieces of a SentencePiece model."""

    pieces: tuple[str, ...]
    kinds: NDArray[np.uint8]
    """[V]: types as in sentencepiece_model.proto."""
    scores: NDArray[np.float32]
    """[V]"""
    unsupported: str
    """Why `FastEncoder` does not take the model; empty when it does."""

    @classmethod
    def of_model(cls, model: bytes) -> Vocabulary:
        """From the bytes of a SentencePiece model file."""
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        entries = list(proto.pieces)
        pieces = tuple([entry.piece for entry in entries])
        kinds = np.array([entry.type for entry in entries], np.uint8)
        scores = np.array([entry.score for entry in entries], np.float32)
        return cls(pieces, kinds, scores, _unsupported_options(proto) or _unsupported_pieces(pieces, kinds))

    @property
    def silent_ids(self) -> frozenset[int]:
        """Ids that stand for no text: control pieces and the unknown one."""
        return frozenset(np.flatnonzero(np.isin(self.kinds, _SILENT)).tolist())


class FastEncoder:
    """Encodes columns of texts; safe to use from several threads, which run at once.

    Ids equal SentencePiece's, also for bytes that are not UTF-8 (each counts as U+FFFD), with the one
    exception of `Tokenizer`: U+2581 in a text is spelled in bytes. User-defined symbols are found first, the
    longest at each place; control pieces never come out.
    """

    def __init__(self, vocabulary: Vocabulary, *, cache_bits: int = CACHE_BITS) -> None:
        """cache_bits: a thread's caches take at most 2^cache_bits x 144 bytes; 3 to 30.

        Raises ValueError for a vocabulary that is `unsupported`.
        """
        if vocabulary.unsupported:
            raise ValueError(vocabulary.unsupported)
        texts = Texts.of(vocabulary.pieces)
        ids = {vocabulary.pieces[i]: i for i in np.flatnonzero(vocabulary.kinds == _Piece.BYTE).tolist()}
        self._encoder = BpeEncoder(
            pieces=texts.data,
            offsets=texts.offsets,
            kinds=vocabulary.kinds,
            ranks=np.unique(-vocabulary.scores, return_inverse=True)[1].astype(np.int32),
            byte_ids=np.array([ids[f"<0x{byte:02X}>"] for byte in range(256)], np.int32),
            cache_bits=cache_bits,
        )

    def encode(self, texts: Texts, *, last_id: int = -1) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids int32 [T] of the N texts behind each other, and where those of each start, int64 [N + 1].

        last_id: put behind each text; -1 for none.
        """
        return self._encoder.encode(texts.data, texts.offsets, last_id)


def _unsupported_options(proto: Any) -> str:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != sentencepiece_model_pb2.TrainerSpec.BPE:
        kind = sentencepiece_model_pb2.TrainerSpec.ModelType.Name(trainer.model_type)
        return f"the model is of type {kind}, not BPE"
    if not trainer.byte_fallback:
        return "the model has no byte fallback"
    if normalizer.precompiled_charsmap:
        return f"the model normalises text ({normalizer.name or 'unnamed'} rules)"
    if normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces:
        return "the model changes spaces (add_dummy_prefix or remove_extra_whitespaces)"
    if not normalizer.escape_whitespaces:
        return "the model does not write spaces as U+2581"
    return ""


def _unsupported_pieces(pieces: tuple[str, ...], kinds: NDArray[np.uint8]) -> str:
    reserved = {pieces[i] for i in np.flatnonzero(np.isin(kinds, (*_SILENT, _Piece.BYTE))).tolist()}
    if len(set(pieces)) < len(pieces) or any(len(piece) == 1 for piece in reserved):
        return "text can give a reserved piece: one is a single character, or has the name of another piece"
    symbols = [pieces[i] for i in np.flatnonzero(kinds == _Piece.USER_DEFINED).tolist()]
    if broken := [symbol for symbol in symbols if "\0" in symbol]:
        return f"the user-defined symbol {broken[0]!r} holds NUL"
    return ""
