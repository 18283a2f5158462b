"""Exact and fast encoding of a SentencePiece BPE model: the ids of SentencePiece, by native code.

The native encoder (csrc/cpu/encode) cuts a text wherever no piece holds the two characters around the cut, which no
merge can cross, and keeps the ids of short chunks. This module reads the model and refuses what the native code
does not do.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

from megatron_b2._cpu import BpeEncoder
from megatron_b2.documents.texts import Texts

_CACHE_BITS = 18
"""2^18 x 64 bytes = 16 MiB of known chunks for each thread (our choice)."""

_Type = sentencepiece_model_pb2.ModelProto.SentencePiece
_RESERVED = frozenset((_Type.UNKNOWN, _Type.CONTROL, _Type.BYTE))


class FastEncoder:
    """Encodes columns of texts; safe to use from several threads, which run at once.

    Ids equal SentencePiece's, also for bytes that are not UTF-8 (each counts as U+FFFD), with the one exception of
    `Tokenizer`: U+2581 in a text is spelled in bytes. User-defined symbols are found first, the longest at each
    place; control pieces never come out.
    """

    def __init__(self, model: bytes) -> None:
        """model: bytes of a SentencePiece model for which `unsupported` is empty; raises ValueError for another."""
        if reason := unsupported(model):
            raise ValueError(reason)
        pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
        texts = [piece.piece for piece in pieces]
        column = Texts.of(texts)
        scores = np.array([piece.score for piece in pieces], np.float32)
        ids = {text: i for i, text in enumerate(texts)}
        self._encoder = BpeEncoder(
            pieces=column.data,
            offsets=column.offsets,
            kinds=np.array([piece.type for piece in pieces], np.uint8),
            ranks=np.unique(-scores, return_inverse=True)[1].astype(np.int32),
            byte_ids=np.array([ids[f"<0x{byte:02X}>"] for byte in range(256)], np.int32),
            cache_bits=_CACHE_BITS,
        )

    def encode(self, texts: Texts, *, last_id: int = -1) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids int32 [T] of the N texts behind each other, and where those of each start, int64 [N + 1].

        last_id: put behind each text; -1 for none.
        """
        return self._encoder.encode(texts.data, texts.offsets, last_id)


def unsupported(model: bytes) -> str:
    """Why `FastEncoder` cannot encode with this SentencePiece model; empty when it can."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
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
    reserved, texts = set(), set()
    for piece in proto.pieces:
        (reserved if piece.type in _RESERVED else texts).add(piece.piece)
        if piece.type == _Type.USER_DEFINED and "\0" in piece.piece:
            return f"the user-defined symbol {piece.piece!r} holds NUL"
    if readable := sorted(piece for piece in reserved if len(piece) == 1 or piece in texts):
        return f"text can call the reserved piece {readable[0]!r}"
    return ""


def control_ids(model: bytes) -> list[int]:
    """Ids of the pieces of a SentencePiece model that stand for no text: control and unknown ones."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    return [i for i, piece in enumerate(pieces) if piece.type in (_Type.UNKNOWN, _Type.CONTROL)]
