"""Dense features of documents: a vector each, near for texts that say the same.

Two sources: a sentence-embedding model in ONNX given by path (`OnnxEmbedder`), or our own features where
none is given (`HashedEmbedder`): TF-IDF of hashed words, pairs of words and pieces of words, brought to a
few dimensions by a randomised SVD (latent semantic analysis; Deerwester et al. 1990; Halko et al. 2011,
algorithms 4.4 and 5.1). Both give rows of length 1, so that the inner product of two rows is their cosine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megatron_b2._cpu import hashed_ngrams, sparse_times, transposed_times
from megatron_b2.corpus.models.classifier import missing_library
from megatron_b2.corpus.models.model_file import read_model, write_model
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import InputError
from megatron_b2.files.hashing import hash_file

KIND = "b2-hashed-embedding"
VERSION = 1
OVERSAMPLING = 16
POWER_ITERATIONS = 2
MIN_NORM = 1e-12
MIN_SINGULAR_VALUE = 1e-3
"""Of the largest one: what is smaller is rounding, as squares are sums in float32."""
ROWS_AT_ONCE = 4_096

Precision = Literal["float16", "float32"]


class Embedder(Protocol):
    """Anything that turns texts into vectors."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def embed(self, texts: Texts, *, precision: Precision = "float32") -> np.ndarray:
        """[N, dimension] of `precision`; rows have length 1, those of texts without features are 0."""


@dataclass(frozen=True, kw_only=True)
class HashedOptions:
    """How our own features are trained."""

    dimension: int = 128
    """Length of a vector. At most half as many directions as there are documents are used, and the rest of
    it is 0: with a direction for each document, every two would be orthogonal."""
    bits: int = 18
    """Features are hashed to 2 ** bits columns."""
    min_documents: int = 2
    """Features in fewer documents say nothing about others and get weight 0."""
    max_documents: float = 0.5
    """Features in more than this share of the documents get weight 0."""
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for a value that cannot be."""
        if not 1 <= self.dimension <= 4_096:
            raise InputError(f"dimension = {self.dimension}: must be 1 to 4096")
        if not 8 <= self.bits <= 24:
            raise InputError(f"bits = {self.bits}: must be 8 to 24")
        if self.min_documents < 1:
            raise InputError(f"min_documents = {self.min_documents}: must be 1 or more")
        if not 0 < self.max_documents <= 1:
            raise InputError(f"max_documents = {self.max_documents}: must be above 0, at most 1")


@dataclass(frozen=True)
class _Sparse:
    """Sparse matrix [N, D], row by row."""

    starts: np.ndarray
    """int64 [N + 1]."""
    columns: np.ndarray
    """int32 [values], ascending in a row."""
    values: np.ndarray
    """float32 [values]."""

    def times(self, dense: np.ndarray) -> np.ndarray:
        """float32 [N, k] from float32 [D, k]."""
        return sparse_times(self.starts, self.columns, self.values, dense)

    def transposed_times(self, dense: np.ndarray, num_columns: int) -> np.ndarray:
        """float32 [D, k] from float32 [N, k]."""
        return transposed_times(self.starts, self.columns, self.values, dense, num_columns=num_columns)


def train_hashed(
    batches: Iterable[Texts],
    path: Path,
    options: HashedOptions = HashedOptions(),
    *,
    facts: Mapping[str, Any] | None = None,
) -> HashedEmbedder:
    """Train on a sample of the documents (some ten thousand; all their features are held in memory, about 8
    bytes each) and write `path`. The same texts and options give the same vectors on the same kind of
    processor. From nothing, or from documents that have nothing in common, all vectors are 0.

    Raises InputError for bad options.
    """
    options.check()
    counts = _concatenated([_Sparse(*hashed_ngrams(b.data, b.offsets, bits=options.bits)) for b in batches])
    documents = len(counts.starts) - 1
    width = 1 << options.bits
    frequency = np.bincount(counts.columns, minlength=width)
    kept = (frequency >= options.min_documents) & (frequency <= options.max_documents * documents)
    directions = min(options.dimension, documents // 2, int(kept.sum()))
    idf = np.where(kept, np.log((1 + documents) / (1 + frequency)) + 1, 0).astype(np.float32)
    basis = np.empty((width, 0), np.float32)
    if directions:
        values, vectors = _right_singular_vectors(_weighted(counts, idf), width, directions, options.seed)
        used = int((values > MIN_SINGULAR_VALUE * values[0]).sum())
        # Whitening: no few directions, such as those of style, decide the cosine.
        basis = np.ascontiguousarray(vectors[:, :used] / values[:used])
    arrays = {"idf": idf, "basis": basis}
    everything = {**(facts or {}), "options": asdict(options), "documents": documents}
    write_model(path, kind=KIND, version=VERSION, arrays=arrays, facts=everything)
    return HashedEmbedder(path, verify=False)


class HashedEmbedder:
    """Our own trained features; may be used from several threads at once."""

    def __init__(self, path: Path | str, *, verify: bool = True) -> None:
        """Raises InputError when `path` is no such model or is damaged (`verify` reads the file once)."""
        file = read_model(Path(path), kind=KIND, version=VERSION, verify=verify)
        self.facts = file.facts
        self.sha256 = file.sha256
        self._bits = int(file.facts["options"]["bits"])
        self._dimension = int(file.facts["options"]["dimension"])
        try:
            self._idf, self._basis = file.arrays["idf"], file.arrays["basis"]
        except KeyError as error:
            raise InputError(f"{path}: damaged: no array {error}") from None
        if self._idf.shape != (1 << self._bits,) or self._basis.shape[:1] != self._idf.shape:
            raise InputError(f"{path}: damaged: arrays of {self._idf.shape} and {self._basis.shape}")

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self._dimension

    def embed(self, texts: Texts, *, precision: Precision = "float32") -> np.ndarray:
        """[N, dimension] of `precision`; rows have length 1, those of texts without known features are 0."""
        vectors = np.zeros((len(texts), self.dimension), precision)
        for start in range(0, len(texts), ROWS_AT_ONCE):
            bounds = texts.offsets[start : start + ROWS_AT_ONCE + 1]
            counts = _Sparse(*hashed_ngrams(texts.data, bounds, bits=self._bits))
            rows = _normalised(_weighted(counts, self._idf).times(self._basis))
            vectors[start : start + len(rows), : rows.shape[1]] = rows
        return vectors


class OnnxEmbedder:
    """A sentence-embedding model from a folder, as sentence-transformers exports it: `model.onnx` (or
    `onnx/model.onnx`) and `tokenizer.json`.

    Mean of the last hidden states of a text's tokens, then length 1. Needs onnxruntime (imported when
    used); runs on the CPU with `threads` threads. Longer texts are cut to `max_tokens`.
    """

    def __init__(
        self, folder: Path | str, *, max_tokens: int = 512, batch_size: int = 32, threads: int = 1
    ) -> None:
        """Raises InputError when files are missing or damaged, or the model gives no hidden states [N, T, D];
        OutputError when onnxruntime is not installed."""
        folder = Path(folder)
        path = next((p for p in (folder / "model.onnx", folder / "onnx" / "model.onnx") if p.is_file()), None)
        if path is None:
            raise InputError(f"{folder}: has neither model.onnx nor onnx/model.onnx")
        with missing_library("onnxruntime", "onnxruntime"):
            import onnxruntime
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = threads
        settings.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), settings, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors have no common class
            raise InputError(f"{path}: not an ONNX model that can be run: {error}") from None
        self._path = path
        self._inputs = {entry.name for entry in self._session.get_inputs()}
        known = {"input_ids", "attention_mask", "token_type_ids"}
        if "input_ids" not in self._inputs or not self._inputs <= known:
            raise InputError(
                f"{path}: has the inputs {sorted(self._inputs)}; expected input_ids, perhaps "
                "attention_mask and token_type_ids"
            )
        self._tokenizer = _tokenizer(folder / "tokenizer.json", max_tokens)
        self._batch_size = batch_size
        self._sha256 = hash_file(path).sha256
        self._dimension = int(self._hidden(["text"])[0].shape[2])

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return self._dimension

    @property
    def sha256(self) -> str:
        """Of the model file."""
        return self._sha256

    def embed(self, texts: Texts, *, precision: Precision = "float32") -> np.ndarray:
        """[N, dimension] of `precision`; rows have length 1, those of empty texts are 0."""
        strings = [text.decode(errors="replace") for text in texts]
        result = np.zeros((len(strings), self.dimension), np.float32)
        # Texts of one length together, so that little is padded.
        order = sorted((i for i, text in enumerate(strings) if text.strip()), key=lambda i: -len(strings[i]))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            hidden, mask = self._hidden([strings[i] for i in chosen])
            weight = mask[:, :, None].astype(np.float32)
            result[chosen] = (hidden * weight).sum(axis=1) / np.maximum(weight.sum(axis=1), MIN_NORM)
        return _normalised(result).astype(precision)

    def _hidden(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states [n, T, D] and the mask [n, T] of the tokens that are not padding."""
        encoded = self._tokenizer.encode_batch(texts)
        fields = {
            "input_ids": np.array([entry.ids for entry in encoded], np.int64),
            "attention_mask": np.array([entry.attention_mask for entry in encoded], np.int64),
            "token_type_ids": np.array([entry.type_ids for entry in encoded], np.int64),
        }
        hidden = self._session.run(None, {name: fields[name] for name in self._inputs})[0]
        if hidden.ndim != 3 or hidden.shape[:2] != fields["input_ids"].shape:
            raise InputError(
                f"{self._path}: its first output has the shape {hidden.shape}; expected hidden states "
                "[texts, tokens, dimension]"
            )
        return hidden, fields["attention_mask"]


def _tokenizer(path: Path, max_tokens: int) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        padding = json.loads(path.read_text(encoding="utf-8")).get("padding") or {}
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"{path}: not a tokenizer file: {error}") from None
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(pad_id=padding.get("pad_id", 0), pad_token=padding.get("pad_token", "[PAD]"))
    return tokenizer


def _weighted(counts: _Sparse, idf: np.ndarray) -> _Sparse:
    """Rows of (1 + ln count) x idf, of length 1."""
    values = (1 + np.log(counts.values)) * idf[counts.columns]
    squares = np.concatenate([[0.0], np.cumsum(values.astype(np.float64) ** 2)])
    norms = np.sqrt(np.diff(squares[counts.starts]))
    lengths = np.repeat(np.maximum(norms, MIN_NORM), np.diff(counts.starts))
    return _Sparse(counts.starts, counts.columns, (values / lengths).astype(np.float32))


def _right_singular_vectors(
    matrix: _Sparse, width: int, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The leading singular values [count] of `matrix` and its right singular vectors [width, count]; signs
    fixed, float32. Only the short side is made orthogonal in each power iteration: the long one is costly."""
    rank = min(count + OVERSAMPLING, len(matrix.starts) - 1)
    draw = np.random.default_rng(seed).standard_normal((width, rank)).astype(np.float32)
    across = draw
    for _ in range(POWER_ITERATIONS + 1):
        basis = np.linalg.qr(matrix.times(across))[0]
        across = matrix.transposed_times(np.ascontiguousarray(basis), width)
    squares, turn = np.linalg.eigh((across.T @ across).astype(np.float64))  # ascending
    chosen = slice(-1, -count - 1, -1)
    values = np.sqrt(np.maximum(squares[chosen], MIN_NORM))
    vectors = across @ (turn[:, chosen] / values).astype(np.float32)
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.sign(vectors[largest, np.arange(vectors.shape[1])])
    return values.astype(np.float32), np.ascontiguousarray(vectors * np.where(signs == 0, 1, signs))


def _concatenated(parts: list[_Sparse]) -> _Sparse:
    parts = parts or [_Sparse(np.zeros(1, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))]
    ends = np.cumsum([0, *(len(part.values) for part in parts)])
    starts = [part.starts[:-1] + end for part, end in zip(parts, ends, strict=False)]
    return _Sparse(
        np.concatenate([*starts, ends[-1:]]),
        np.concatenate([part.columns for part in parts]),
        np.concatenate([part.values for part in parts]),
    )


def _normalised(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of (almost) no length become 0."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(norms > MIN_NORM, vectors / np.maximum(norms, MIN_NORM), 0).astype(np.float32)
