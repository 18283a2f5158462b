"""Tokenized documents on disk, byte for byte in Megatron-LM's `.bin`/`.idx` layout.

`.bin` holds the raw tokens, nothing else. `.idx`, little endian, S sequences in D documents:

| offset         | type       | field                                                            |
|----------------|------------|------------------------------------------------------------------|
| 0              | 9 bytes    | magic `MMIDIDX\\0\\0`                                              |
| 9              | uint64     | version, 1                                                       |
| 17             | uint8      | dtype code (`DTYPE_CODES`)                                       |
| 18             | uint64     | S                                                                |
| 26             | uint64     | D + 1                                                            |
| 34             | int32 S    | length of each sequence in tokens                                |
| 34 + 4S        | int64 S    | byte at which each sequence starts in `.bin`                     |
| 34 + 12S       | int64 D+1  | first sequence of each document; the last entry is S             |
| 34 + 12S + 8D+8| int8 S     | optional modes of multimodal files: accepted, not read           |

`b2 preprocess` writes one sequence a document, the end-of-document token last. Opening costs a few page reads
whatever the size of the files: both are memory-mapped and only their ends are checked.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_b2._cpu import TokenStream
from megatron_b2.errors import DataError
from megatron_b2.files.atomic import atomic_files

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: Mapping[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
UINT16_VOCABULARY = 65_500
"""Vocabularies below this are stored as uint16, as Megatron-LM does."""

_COPY_BYTES = 8 << 20
_SAMPLED_BLOCKS = 16
_SAMPLED_BYTES = 64 << 10


def bin_path(prefix: Path | str) -> Path:
    """`<prefix>.bin`: the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: Path | str) -> Path:
    """`<prefix>.idx`: lengths, pointers, documents."""
    return Path(f"{prefix}.idx")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Smallest token type Megatron-LM would choose: uint16 below 65,500 ids, else int32."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCABULARY else np.dtype("<i4")


def dtype_code(dtype: DTypeLike) -> int:
    """Code of `dtype` in the header. Raises DataError for a type the format does not know."""
    for code, known in DTYPE_CODES.items():
        if known == np.dtype(dtype):
            return code
    known_names = ", ".join(known.name for known in DTYPE_CODES.values())
    raise DataError(f"dtype {np.dtype(dtype).name} cannot be stored in a .bin; use one of {known_names}")


class IndexedDataset:
    """Read-only view of one `.bin`/`.idx` pair.

    Raises DataError, naming the file and the sizes in bytes, when a file is missing, truncated, too long or
    not of this format.
    """

    def __init__(self, prefix: Path | str) -> None:
        self.prefix = Path(prefix)
        for path in (idx_path(prefix), bin_path(prefix)):
            if not path.is_file():
                raise DataError(f"{path}: no such file; a data set is a pair of a .bin and an .idx")
        self._idx = _map_file(idx_path(prefix))
        self._bin = _map_file(bin_path(prefix))
        self.dtype, self.num_sequences, self.num_documents = self._read_header()
        """Type of a token; number of sequences; number of documents (usually the same)."""
        end = HEADER.size
        self.sequence_lengths = self._field(end, "<i4", self.num_sequences)
        """int32 [S], tokens; memory-mapped."""
        end += 4 * self.num_sequences
        self.sequence_pointers = self._field(end, "<i8", self.num_sequences)
        """int64 [S], bytes; memory-mapped."""
        end += 8 * self.num_sequences
        self.document_indices = self._field(end, "<i8", self.num_documents + 1)
        """int64 [D + 1], sequences; memory-mapped."""
        self._check_ends()
        self.num_tokens = self._bin.size // self.dtype.itemsize
        """Tokens of the whole file."""

    def _read_header(self) -> tuple[np.dtype[Any], int, int]:
        path, size = idx_path(self.prefix), self._idx.size
        if size < HEADER.size:
            raise DataError(f"{path}: truncated: expected at least {HEADER.size} bytes, found {size}")
        magic, version, code, num_sequences, num_indices = HEADER.unpack(self._idx[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise DataError(f"{path}: not a Megatron-LM index: it starts with {magic!r} instead of {MAGIC!r}")
        if version != VERSION:
            raise DataError(f"{path}: index version {version}; only version {VERSION} is known")
        if code not in DTYPE_CODES:
            raise DataError(f"{path}: dtype code {code}; known codes are 1 to {len(DTYPE_CODES)}")
        if num_indices == 0:
            raise DataError(f"{path}: 0 document indices; the format has one more than it has documents")
        expected = HEADER.size + 12 * num_sequences + 8 * num_indices
        if size not in (expected, expected + num_sequences):
            state = "truncated" if size < expected else "too long"
            raise DataError(
                f"{path}: {state}: expected {expected} bytes for {num_sequences} sequences and "
                f"{num_indices - 1} documents, found {size}; write it again with `b2 preprocess`"
            )
        return DTYPE_CODES[code], num_sequences, num_indices - 1

    def _field(self, offset: int, dtype: str, count: int) -> NDArray[Any]:
        return np.frombuffer(self._idx, dtype=dtype, count=count, offset=offset)

    def _check_ends(self) -> None:
        path = idx_path(self.prefix)
        first, last = int(self.document_indices[0]), int(self.document_indices[-1])
        if (first, last) != (0, self.num_sequences):
            raise DataError(
                f"{path}: damaged: documents cover the sequences {first} to {last} "
                f"instead of 0 to {self.num_sequences}"
            )
        expected = 0
        if self.num_sequences:
            expected = int(self.sequence_pointers[-1]) + int(self.sequence_lengths[-1]) * self.dtype.itemsize
        if self._bin.size != expected:
            state = "truncated" if self._bin.size < expected else "too long"
            raise DataError(
                f"{bin_path(self.prefix)}: {state}: expected {expected} bytes from {path.name}, "
                f"found {self._bin.size}; write the pair again with `b2 preprocess`"
            )

    def __len__(self) -> int:
        """Number of documents."""
        return self.num_documents

    def document_start(self, document: int) -> int:
        """First token of `document` in the stream of all tokens; that of `num_documents` is its end."""
        sequence = int(self.document_indices[document])
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.sequence_pointers[sequence]) // self.dtype.itemsize

    def document(self, document: int) -> NDArray[Any]:
        """Tokens of one document, [length], of type `dtype`; a view of the mapped file."""
        if not 0 <= document < self.num_documents:
            raise DataError(f"{self.prefix}: document {document} of {self.num_documents}")
        return self.tokens[self.document_start(document) : self.document_start(document + 1)]

    @property
    def tokens(self) -> NDArray[Any]:
        """The stream of all tokens, [num_tokens]; a view of the mapped file."""
        return self._bin.view(self.dtype)

    @cached_property
    def stream(self) -> TokenStream:
        """Native view that cuts samples. Raises DataError if the file does not hold token ids."""
        if self.dtype.kind == "f":
            raise DataError(f"{bin_path(self.prefix)}: holds {self.dtype.name} values, not token ids")
        return TokenStream(
            bin=self._bin,
            idx=self._idx,
            dtype_code=dtype_code(self.dtype),
            num_sequences=self.num_sequences,
            num_documents=self.num_documents,
        )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of both sizes and of 16 evenly spaced blocks of 64 KiB of each file.

        Constant cost, and the same with or without a manifest; files of up to 1 MiB are covered completely.
        """
        digest = hashlib.sha256(f"{self._idx.size} {self._bin.size}".encode())
        for content in (self._idx, self._bin):
            last = max(0, content.size - _SAMPLED_BYTES)
            for start in sorted({last * block // (_SAMPLED_BLOCKS - 1) for block in range(_SAMPLED_BLOCKS)}):
                digest.update(content[start : start + _SAMPLED_BYTES].data)
        return digest.hexdigest()


class IndexedDatasetBuilder:
    """Writes one `.bin`/`.idx` pair; a context manager.

    Both files appear when the block ends well; when it raises, or the process dies, neither does.
    """

    def __init__(self, prefix: Path | str, *, dtype: DTypeLike) -> None:
        self.prefix = Path(prefix)
        self.dtype = np.dtype(dtype)
        self._code = dtype_code(dtype)
        self._lengths: list[NDArray[np.int32]] = []
        self._documents: list[NDArray[np.int64]] = []

    def __enter__(self) -> IndexedDatasetBuilder:
        with ExitStack() as stack:
            pair = atomic_files(bin_path(self.prefix), idx_path(self.prefix))  # an .idx promises a whole .bin
            self._tokens, self._index = stack.enter_context(pair)
            self._files = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            self._write_index()

    def add_document(self, *sequences: Sequence[int] | NDArray[Any]) -> None:
        """One document of one or more sequences of token ids."""
        arrays = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        lengths = np.array([array.size for array in arrays], dtype=np.int64)
        self._append(
            np.concatenate(arrays) if arrays else np.empty(0, np.int64), lengths, np.array([len(arrays)])
        )

    def add_documents(self, tokens: NDArray[Any], lengths: NDArray[Any]) -> None:
        """Many documents of one sequence each: `tokens` [sum of lengths], back to back; `lengths` [n]."""
        self._append(tokens, lengths, np.ones(len(lengths), dtype=np.int64))

    def _append(self, tokens: NDArray[Any], lengths: NDArray[Any], sequences: NDArray[Any]) -> None:
        if int(lengths.sum()) != tokens.size:
            raise DataError(f"{self.prefix}: {tokens.size} tokens for lengths of {int(lengths.sum())}")
        if lengths.size and int(lengths.max()) > np.iinfo(np.int32).max:
            raise DataError(f"{self.prefix}: sequence of {int(lengths.max())} tokens; limit 2^31 - 1")
        self._tokens.write(np.ascontiguousarray(self._checked(tokens)).data)
        self._lengths.append(lengths.astype("<i4"))
        self._documents.append(sequences.astype("<i8"))

    def _checked(self, tokens: NDArray[Any]) -> NDArray[Any]:
        if tokens.dtype == self.dtype or not tokens.size or self.dtype.kind == "f":
            return tokens.astype(self.dtype, copy=False)
        limits = np.iinfo(self.dtype)
        low, high = int(tokens.min()), int(tokens.max())
        if low < limits.min or high > limits.max:
            raise DataError(
                f"{self.prefix}: token ids {low} to {high} do not fit {self.dtype.name} "
                f"({limits.min} to {limits.max})"
            )
        return tokens.astype(self.dtype)

    def _write_index(self) -> None:
        lengths = np.concatenate([np.empty(0, "<i4"), *self._lengths])
        documents = np.concatenate([np.zeros(1, "<i8"), *self._documents]).cumsum(dtype="<i8")
        sizes = lengths.astype("<i8") * self.dtype.itemsize
        self._index.write(HEADER.pack(MAGIC, VERSION, self._code, lengths.size, documents.size))
        for field in (lengths, sizes.cumsum() - sizes, documents):
            self._index.write(field.data)


def merge(prefixes: Sequence[Path | str], output: Path | str) -> None:
    """Concatenate data sets of one dtype into `output`, in the order given; memory stays that of one of them.

    Raises DataError if there is nothing to merge, a part is damaged, or the parts differ in dtype.
    """
    if not prefixes:
        raise DataError(f"{output}: no data sets to merge")
    parts = [IndexedDataset(prefix) for prefix in prefixes]
    dtype = parts[0].dtype
    for part in parts:
        if part.dtype != dtype:
            raise DataError(
                f"{part.prefix}: holds {part.dtype.name}, but {parts[0].prefix} holds {dtype.name}; "
                "data sets of one tokenizer have one type"
            )
    with atomic_files(bin_path(output), idx_path(output)) as (tokens, index):
        for part in parts:
            with bin_path(part.prefix).open("rb") as source:
                shutil.copyfileobj(source, tokens, _COPY_BYTES)
        _write_merged_index(parts, index)


def _write_merged_index(parts: Sequence[IndexedDataset], file: BinaryIO) -> None:
    num_sequences = sum(part.num_sequences for part in parts)
    num_documents = sum(part.num_documents for part in parts)
    file.write(HEADER.pack(MAGIC, VERSION, dtype_code(parts[0].dtype), num_sequences, num_documents + 1))
    for part in parts:
        file.write(part.sequence_lengths.tobytes())
    start = 0
    for part in parts:
        file.write((part.sequence_pointers + start).tobytes())
        start += part.num_tokens * part.dtype.itemsize
    file.write(np.zeros(1, "<i8").tobytes())
    sequence = 0
    for part in parts:
        file.write((part.document_indices[1:] + sequence).tobytes())
        sequence += part.num_sequences


def _map_file(path: Path) -> NDArray[np.uint8]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=np.uint8)  # the system cannot map an empty file
    return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
