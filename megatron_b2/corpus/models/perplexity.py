"""Perplexity: our interpolated modified Kneser-Ney n-gram model, trained and queried in native code.

How surprising a text is to a model of clean text is the quality signal of CCNet (Wenzek et al. 2020).
Training and lookup are in csrc/cpu/text/ngram*; the formulas are those of Chen & Goodman, TR-10-98 (1998).
What a word is, and why, is told in docs/corpus-models.md.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_b2._cpu import NgramModel, NgramTrainer
from megatron_b2.corpus.models.model_file import read_model, write_model
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import B2Error, InputError, OutputError

KIND = "b2-ngram"
VERSION = 1
MAX_ORDER = 6
RESERVED_WORDS = 3
"""<unk>, <s> and </s> have the numbers 0 to 2."""


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """How an n-gram model is trained."""

    order: int = 5
    """Words of the longest n-gram: 1 to 6."""
    prune: tuple[int, ...] = (0, 0, 1)
    """Of each order, n-grams that occur at most this often are dropped; the last number holds for higher
    orders too, numbers past the order are not used. Starts with 0 and never falls. (0,) keeps all; the
    default drops n-grams of three words and more that occur once."""
    min_count: int = 2
    """Words that occur less often are the unknown word (training on texts only)."""
    max_words: int = 2_000_000
    """Only the most frequent words are known (training on texts only)."""
    quantize: bool = False
    """8-bit probabilities: half the file, perplexities that differ by about one percent."""
    memory_mb: int = 2_048
    """Megabytes for the sort, which continues in temporary files beside the model. Beside the sort, training
    needs about 50 bytes for each n-gram that is kept."""

    def thresholds(self) -> list[int]:
        """Pruning threshold of every order; raises InputError for options that do not go together."""
        if not 1 <= self.order <= MAX_ORDER:
            raise InputError(f"order = {self.order}: must be 1 to {MAX_ORDER}")
        if not self.prune:
            raise InputError("prune = (): give at least one number, such as 0")
        full = [*self.prune, *[self.prune[-1]] * self.order][: self.order]
        if full[0] != 0 or full != sorted(full):
            raise InputError(f"prune = {self.prune}: must start with 0 and never fall")
        for name in ("min_count", "max_words", "memory_mb"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: must be 1 or more")
        return full


@dataclass(frozen=True)
class OrderSummary:
    """N-grams of one order."""

    seen: int
    """Different n-grams in the training text."""
    kept: int
    """Of them, in the model."""
    discounts: tuple[float, float, float]
    """D1, D2, D3+ of Chen & Goodman's equation 26."""
    fallback: bool
    """The counts of counts gave no valid discounts (too little text): they are 0.5, 1 and 1.5."""


@dataclass(frozen=True)
class PerplexityReport:
    """What a model was trained on, and what became of it."""

    tokens: int
    """Words, line ends not counted."""
    lines: int
    """Lines with words."""
    words: int
    """Known words."""
    orders: tuple[OrderSummary, ...]


@dataclass(frozen=True)
class Scores:
    """Scores of M segments. An empty segment (no word begins in it) has 0 words and perplexity NaN."""

    log10: np.ndarray
    """float64 [M]: sum of the log10 probabilities of the words and line ends."""
    unigram_log10: np.ndarray
    """float64 [M]: the same by the unigrams of the model alone. The difference says how much the order of the
    words helps, whatever the words are."""
    words: np.ndarray
    """int64 [M]: words and line ends."""
    unknown: np.ndarray
    """int64 [M]: words that the model does not know."""
    foreign: np.ndarray
    """int64 [M]: those of them with a character beyond ASCII."""
    end_log10: np.ndarray
    """float64 [M]: log10 probability that the last line of the segment ends where it does; NaN when no line
    ends in the segment."""

    @property
    def perplexity(self) -> np.ndarray:
        """float64 [M]: 10 ** (-log10 / words)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.power(10.0, -self.log10 / self.words)

    @property
    def ln(self) -> np.ndarray:
        """float64 [M]: the sum in natural logarithms (nats)."""
        return self.log10 * np.log(10.0)


@dataclass(frozen=True)
class WordScore:
    """One word of a text, for a person to look at."""

    word: str
    """As it stands in the text; "</s>" for the end of a line."""
    log10: float


def train_perplexity(
    batches: Iterable[Texts],
    path: Path,
    options: PerplexityOptions = PerplexityOptions(),
    *,
    facts: Mapping[str, Any] | None = None,
    arpa: Path | None = None,
) -> PerplexityReport:
    """Train on the lines of texts (read once) and write the model to `path`.

    `facts` are kept in the file, e.g. {"language": "en"}. `arpa` also writes the model as an ARPA text
    file, which KenLM, SRILM and others read. The same texts and options give the same bytes.

    Raises InputError for bad options or when no text has a word, OutputError when the disk refuses.
    """
    return _train(batches, path, options, num_tokens=0, facts=facts, arpa=arpa)


def train_token_perplexity(
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    path: Path,
    options: PerplexityOptions = PerplexityOptions(),
    *,
    num_tokens: int,
    facts: Mapping[str, Any] | None = None,
    arpa: Path | None = None,
) -> PerplexityReport:
    """Train on token ids, e.g. of SentencePiece: pairs of ids int32 [T] in [0, num_tokens) and offsets
    int64 [n + 1], where each row is a sequence. As `train_perplexity`; a token of the ARPA file is its
    decimal id."""
    if num_tokens < 1:
        raise InputError(f"num_tokens = {num_tokens}: must be 1 or more")
    return _train(batches, path, options, num_tokens=num_tokens, facts=facts, arpa=arpa)


def _train(
    batches: Iterable[Texts] | Iterable[tuple[np.ndarray, np.ndarray]],
    path: Path,
    options: PerplexityOptions,
    *,
    num_tokens: int,
    facts: Mapping[str, Any] | None,
    arpa: Path | None,
) -> PerplexityReport:
    thresholds = options.thresholds()
    with _native_errors(), _scratch(path, arpa) as folder:
        trainer = NgramTrainer(
            order=options.order,
            prune=thresholds,
            min_count=options.min_count,
            max_words=options.max_words,
            memory_bytes=options.memory_mb << 20,
            prefix=str(folder / "ngram"),
        )
        for batch in batches:
            if isinstance(batch, Texts):
                trainer.add_texts(batch.data, batch.offsets)
            else:
                trainer.add_tokens(*batch)
        written = str(folder / "arpa") if arpa else ""
        result = trainer.finish(num_tokens=num_tokens, quantized=options.quantize, arpa_path=written)
        orders = tuple(OrderSummary(seen, kept, tuple(d), fell) for seen, kept, d, fell in result["orders"])
        words = len(result["arrays"]["unigrams"]) - RESERVED_WORDS
        report = PerplexityReport(result["tokens"], result["sequences"], words, orders)
        everything = {
            **(facts or {}),
            "num_tokens": num_tokens,
            "options": asdict(options),
            "report": asdict(report),
        }
        write_model(path, kind=KIND, version=VERSION, arrays=result["arrays"], facts=everything)
        if arpa:
            (folder / "arpa").replace(arpa)
    return report


class PerplexityModel:
    """A trained model, mapped into memory; may be used from several threads at once."""

    def __init__(self, path: Path | str, *, verify: bool = True) -> None:
        """Raises InputError when `path` is no such model or is damaged (`verify` reads the file once)."""
        file = read_model(Path(path), kind=KIND, version=VERSION, verify=verify)
        self.facts = file.facts
        self.sha256 = file.sha256
        arrays, order = file.arrays, int(file.facts["options"]["order"])
        try:
            self._native = NgramModel(
                unigrams=arrays["unigrams"],
                tables=[arrays[f"order{k}"] for k in range(2, order + 1)],
                codebooks=[arrays[f"codebook{k}"] for k in range(2, order + 1) if f"codebook{k}" in arrays],
                vocabulary=arrays["vocabulary"],
            )
        except (KeyError, ValueError) as error:
            raise InputError(f"{path}: damaged n-gram model: {error}") from None
        self._path = path
        self._reads_texts = not file.facts["num_tokens"]

    @property
    def order(self) -> int:
        """Words of the longest n-gram."""
        return int(self._native.order)

    def score(self, texts: Texts, segments: np.ndarray | None = None) -> Scores:
        """Scores of the segments of `texts`; without `segments`, of each text.

        `segments` int64 [M + 1], sorted: segment i is bytes [segments[i], segments[i + 1]) of `texts.data`,
        such as the sentences or paragraphs of all texts. A word counts where it begins, the end of a line
        where its last word ends. Each line is a sequence: a sentence is scored after the earlier sentences
        of its line. Releases the GIL.
        """
        self._needs(texts=True)
        bounds = texts.offsets if segments is None else segments
        try:
            return Scores(*self._native.score_texts(texts.data, texts.offsets, bounds))
        except ValueError as error:
            raise InputError(str(error)) from None

    def words(self, text: str) -> list[WordScore]:
        """Log10 probability of every word and line end of one text."""
        self._needs(texts=True)
        texts = Texts.of([text])
        bounds, log10 = self._native.score_words(texts.data, texts.offsets)
        raw = texts.data.tobytes()
        return [
            WordScore(raw[begin:end].decode(errors="replace") if end > begin else "</s>", float(value))
            for (begin, end), value in zip(bounds, log10, strict=True)
        ]

    def score_tokens(self, ids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For a model of token ids: log10 probability of each token, float32 [T], and of each row's end,
        float32 [n]. ids int32 [T], offsets int64 [n + 1]; a token outside of any row has NaN. Releases the
        GIL."""
        self._needs(texts=False)
        try:
            return self._native.score_tokens(ids, offsets)
        except ValueError as error:
            raise InputError(str(error)) from None

    def _needs(self, *, texts: bool) -> None:
        if texts != self._reads_texts:
            raise InputError(f"{self._path}: was trained on {'token ids' if texts else 'texts'}; score those")


@contextlib.contextmanager
def _scratch(path: Path, arpa: Path | None) -> Iterator[Path]:
    """A folder for temporary files on the disk of the outputs."""
    for folder in [path.parent, *([arpa.parent] if arpa else [])]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {folder}: {error.strerror}") from None
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=(arpa or path).parent) as name:
        yield Path(name)


@contextlib.contextmanager
def _native_errors() -> Iterator[None]:
    """What the native trainer raises, as errors for the user."""
    try:
        yield
    except B2Error:
        raise
    except ValueError as error:
        raise InputError(str(error)) from None
    except RuntimeError as error:
        raise OutputError(str(error)) from None
