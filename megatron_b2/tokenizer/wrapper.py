"""The tokenizer as the rest of the package sees it: exact round trip, control pieces only on request."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from megatron_b2.documents.texts import Texts
from megatron_b2.errors import TokenizerError
from megatron_b2.tokenizer.fast_encoder import FastEncoder, Vocabulary
from megatron_b2.tokenizer.symbols import ASSISTANT_PIECE, BOS_ID, EOS_ID, UNK_ID, USER_PIECE

MODEL_NAME = "tokenizer.model"
SPACE_MARK = "\u2581"
"""SentencePiece writes a space as this character, so the character itself is spelled in bytes."""
_PROBES = (" a  b ", "\tx\n\n y", "Ａ①ﬁ e\u0301", "\u2581 \u2581", "7  \U0001f600")
_RESERVED = re.compile(r"(?<=<)(?=reserved_\d+>)")


class Tokenizer:
    """A SentencePiece model that round-trips every string; loads the published Baichuan 2 tokenizer
    unchanged.

    Ids equal SentencePiece's own, with one exception: U+2581 in a text is encoded as its three byte pieces,
    because SentencePiece would give back a space. The text "<s>", "</s>" or "<unk>" never becomes a control
    id.
    """

    bos_id: int = BOS_ID
    eos_id: int = EOS_ID
    pad_id: int = UNK_ID

    def __init__(self, model: bytes, *, name: str = MODEL_NAME) -> None:
        """model: bytes of a SentencePiece model file; name: what errors call it.

        Raises TokenizerError when it is not such a file, has another control layout, or cannot round-trip
        text.
        """
        self.name = name
        self.model_bytes = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._processor = _load(model, name)
        self.vocab_size = int(self._processor.get_piece_size())
        self.user_id = self.piece_id(USER_PIECE)
        self.assistant_id = self.piece_id(ASSISTANT_PIECE)
        self._space_mark_ids = self._byte_ids(SPACE_MARK)
        self._vocabulary = Vocabulary.of_model(model)
        self._silent = self._vocabulary.silent_ids
        self._check()

    def encode(
        self, text: str, *, bos: bool = False, eos: bool = False, parse_reserved: bool = True
    ) -> list[int]:
        """Ids of `text`, with the begin and end ids only if asked for.

        parse_reserved: `<reserved_N>` in the text becomes its one id, as in SentencePiece and the published
        chat layout. False spells it out with ordinary pieces: use it for text from a user, who could
        otherwise open a turn of the assistant. Raises TokenizerError for a lone surrogate.
        """
        parts = [text] if parse_reserved else _RESERVED.split(text)
        ids = [BOS_ID] if bos else []
        for part in parts:
            ids += self._encode(part)
        if eos:
            ids.append(EOS_ID)
        return ids

    def encode_batch(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """`encode` of each text, on `threads` C++ threads."""
        plain = [text for text in texts if SPACE_MARK not in text]
        try:
            encoded = iter(self._processor.encode(plain, num_threads=threads))
        except (RuntimeError, TypeError, UnicodeEncodeError) as error:
            raise self._encode_error(plain, error) from None
        return [self._encode(text) if SPACE_MARK in text else next(encoded) for text in texts]

    def encode_column(
        self, texts: Texts, *, eos: bool = False
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """`encode` of each of N texts: ids int32 [T] of all behind each other, and where those of each start,
        int64 [N + 1].

        By native code, or by SentencePiece where `slow_because` says why; the ids are the same. Bytes that
        are not UTF-8 count as U+FFFD. Several threads may call at once.
        """
        if self._fast is not None:
            return self._fast.encode(texts, last_id=EOS_ID if eos else -1)
        encoded = [self._encode(text) + [EOS_ID] * eos for text in texts]
        offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return np.fromiter(chain.from_iterable(encoded), np.int32, int(offsets[-1])), offsets

    @property
    def slow_because(self) -> str:
        """Why `encode_column` cannot use the native encoder for this model; empty when it does."""
        return self._vocabulary.unsupported

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; control ids (begin, end, unknown = padding) are left out, broken bytes give U+FFFD.

        Raises TokenizerError for an id outside the vocabulary.
        """
        numbers = [int(i) for i in ids]
        try:
            return str(self._processor.decode([i for i in numbers if i not in self._silent]))
        except (IndexError, TypeError, OverflowError):
            wrong = next(i for i in numbers if not 0 <= i < self.vocab_size)
            raise TokenizerError(
                f"id {wrong} is outside the vocabulary of {self.name} (0 to {self.vocab_size - 1})"
            ) from None

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary entry of each id, with spaces written as U+2581."""
        return [str(self._processor.id_to_piece(int(i))) for i in ids]

    def piece_id(self, piece: str) -> int | None:
        """Id of a vocabulary entry, None when there is none."""
        found = int(self._processor.piece_to_id(piece))
        return found if self._processor.id_to_piece(found) == piece else None

    @cached_property
    def _fast(self) -> FastEncoder | None:
        return None if self.slow_because else FastEncoder(self._vocabulary)

    def _encode(self, text: str | bytes) -> list[int]:
        mark: Any = SPACE_MARK if isinstance(text, str) else SPACE_MARK.encode()
        try:
            first, *others = text.split(mark)
            ids = list(self._processor.encode(first))
            for part in others:
                ids += self._space_mark_ids
                ids += self._processor.encode(part)
            return ids
        except (RuntimeError, TypeError, UnicodeEncodeError) as error:
            raise self._encode_error([text], error) from None

    def _encode_error(self, texts: Sequence[str | bytes], error: Exception) -> TokenizerError:
        for text in texts:
            for i, character in enumerate(text if isinstance(text, str) else ""):
                if "\ud800" <= character <= "\udfff":
                    return TokenizerError(
                        f"the text has a lone surrogate U+{ord(character):04X} at character {i}, which is "
                        "no Unicode "
                        'text and cannot be encoded; clean it with text.encode("utf-8", "replace").decode()'
                    )
        return TokenizerError(f"{self.name} cannot encode the text: {error}")

    def _byte_ids(self, text: str) -> list[int]:
        """Byte pieces of `text`; the empty list when the model has none."""
        ids = [self.piece_id(f"<0x{byte:02X}>") for byte in text.encode()]
        return [i for i in ids if i is not None]

    def _check(self) -> None:
        found = (self._processor.unk_id(), self._processor.bos_id(), self._processor.eos_id())
        if found != (UNK_ID, BOS_ID, EOS_ID):
            raise TokenizerError(
                f"{self.name}: unknown, begin and end pieces are at ids {found}, not (0, 1, 2); "
                "this package reads tokenizers of the Baichuan 2 layout only"
            )
        for text in _PROBES:
            if self.decode(self.encode(text)) != text:
                raise TokenizerError(
                    f"{self.name}: {text!r} comes back as {self.decode(self.encode(text))!r}. The model "
                    "must be trained "
                    "with byte_fallback, identity normalisation, no dummy prefix and "
                    "remove_extra_whitespaces=false "
                    "(as `b2 tokenizer train` does)"
                )


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Tokenizer from a SentencePiece model file, or from the folder that holds `tokenizer.model`."""
    file = Path(path)
    if file.is_dir():
        file = file / MODEL_NAME
    if not file.is_file():
        raise TokenizerError(
            f"{file}: no such file; give a SentencePiece model or a folder with {MODEL_NAME}"
        )
    return Tokenizer(file.read_bytes(), name=str(file))


def _load(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    if model.startswith(b"version https://git-lfs"):
        raise TokenizerError(
            f"{name}: this is a Git LFS pointer, not the model; run `git lfs pull` where it came from"
        )
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise TokenizerError(f"{name}: not a SentencePiece model: {error}") from None
    if loaded is False:
        raise TokenizerError(f"{name}: not a SentencePiece model")
    return processor
