"""A linear text classifier over words, word n-grams and character n-grams: fastText, trained by us.

Used for quality (quality.py) and for languages. The method is Joulin et al. 2017, "Bag of Tricks for
Efficient Text Classification". Words are those of the n-gram model (docs/corpus-models.md): every Han
character is a word, so word n-grams are character n-grams in Chinese. The library is imported when it is
needed.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from megatron_b2._cpu import join_words
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import InputError, OutputError
from megatron_b2.files.atomic import atomic_files
from megatron_b2.files.hashing import hash_file

VERSION = 1
LABEL = "__label__"


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """How a classifier is trained. The defaults are our choice."""

    dimension: int = 16
    """Length of the vector of a feature."""
    epochs: int = 8
    learning_rate: float = 0.5
    """At the start; falls linearly to 0."""
    word_ngrams: int = 3
    """Longest n-gram of words (of characters, in Chinese)."""
    min_characters: int = 3
    max_characters: int = 5
    """Shortest and longest n-grams of the characters of a word, whose ends count as characters; 0 and 0:
    none."""
    buckets: int = 1 << 19
    """Hash buckets of all n-grams."""
    min_count: int = 3
    """Rarer words have no vector of their own, only those of their characters."""
    max_words: int = 1_000
    """Words of a text that are looked at, from its start."""
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for a value that cannot be."""
        low = {
            "dimension": 1,
            "epochs": 1,
            "word_ngrams": 1,
            "min_characters": 0,
            "buckets": 1,
            "min_count": 1,
        }
        for name, least in {**low, "max_words": 1, "max_characters": self.min_characters}.items():
            if getattr(self, name) < least:
                raise InputError(f"{name} = {getattr(self, name)}: must be {least} or more")
        if not 0 < self.learning_rate <= 10:
            raise InputError(f"learning_rate = {self.learning_rate}: must be above 0, at most 10")


@dataclass(frozen=True)
class ClassifierReport:
    """What a classifier was trained on."""

    examples: Mapping[str, int]
    """Texts by label."""
    sha256: str
    """Of the model file."""


def train_classifier(
    examples: Iterable[tuple[str, str]],
    path: Path,
    options: ClassifierOptions = ClassifierOptions(),
    *,
    labels: Iterable[str],
    facts: Mapping[str, Any] | None = None,
) -> ClassifierReport:
    """Train on pairs (label, text) and write `path` (fastText's own format) and `path`.json (labels,
    options, facts, checksum).

    One thread, and the examples in an order drawn from `options.seed`: the same examples give the same
    bytes on the same kind of processor. A text without words is left out.

    Raises InputError for bad options, a label that is not among `labels`, and a label without any text.
    """
    options.check()
    wanted = list(dict.fromkeys(labels))
    _check_labels(wanted)
    lines, counts = _lines_of(examples, wanted, options)
    empty = [label for label in wanted if not counts[label]]
    if empty:
        raise InputError(
            f"no text with words for {', '.join(map(repr, empty))} "
            f"({', '.join(f'{label}: {counts[label]:,}' for label in wanted)}); every class needs some"
        )
    random.Random(options.seed).shuffle(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        source, result = Path(folder) / "examples.txt", Path(folder) / "model.bin"
        source.write_text("".join(lines), encoding="utf-8")
        model = _fit(source, options)
        model.save_model(str(result))
        digest = hash_file(result).sha256
        sidecar = {
            "format": "b2-fasttext",
            "version": VERSION,
            "sha256": digest,
            "labels": wanted,
            "examples": dict(counts),
            "options": asdict(options),
            "facts": dict(facts or {}),
        }
        with atomic_files(path, _sidecar(path)) as (binary, description):
            binary.write(result.read_bytes())
            description.write((json.dumps(sidecar, ensure_ascii=False, indent=2) + "\n").encode())
    return ClassifierReport(dict(counts), digest)


def _fit(source: Path, options: ClassifierOptions) -> Any:
    """A fastText model of the labelled lines in `source`."""
    return _fasttext().train_supervised(
        input=str(source),
        dim=options.dimension,
        epoch=options.epochs,
        lr=options.learning_rate,
        wordNgrams=options.word_ngrams,
        minn=options.min_characters,
        maxn=options.max_characters,
        bucket=options.buckets,
        minCount=options.min_count,
        loss="softmax",
        thread=1,
        seed=options.seed,
        verbose=0,
    )


def train_language(
    examples: Iterable[tuple[str, str]],
    path: Path,
    options: ClassifierOptions = ClassifierOptions(max_words=200),
) -> ClassifierReport:
    """Train a language classifier on pairs (language tag, text); the languages are those that occur.

    Raises InputError when there are fewer than two languages.
    """
    pairs = list(examples)
    languages = sorted({language for language, _ in pairs})
    if len(languages) < 2:
        raise InputError(f"a language classifier needs two languages or more; the texts have {languages}")
    return train_classifier(pairs, path, options, labels=languages, facts={"task": "language"})


class TextClassifier:
    """A trained classifier."""

    def __init__(self, path: Path | str, *, verify: bool = True) -> None:
        """Raises InputError when `path` or `path`.json is missing or damaged (`verify` compares the
        checksum)."""
        path = Path(path)
        sidecar = _read_sidecar(path)
        if verify and hashlib.sha256(path.read_bytes()).hexdigest() != sidecar["sha256"]:
            raise InputError(f"{path}: damaged (its checksum differs); copy or train it again")
        self.labels: tuple[str, ...] = tuple(sidecar["labels"])
        """Classes, in the order of the columns of `probabilities`."""
        self.facts: Mapping[str, Any] = sidecar["facts"]
        self.sha256: str = sidecar["sha256"]
        self._max_words = int(sidecar["options"]["max_words"])
        try:
            self._model = _fasttext().FastText._FastText(model_path=str(path))
        except ValueError as error:
            raise InputError(f"{path}: not a fastText model: {error}") from None

    def probabilities(self, texts: Texts) -> np.ndarray:
        """Probability of each class for each text, float32 [N, labels]; rows sum to 1. A text without words
        has NaN.

        Paragraphs and sentences are texts too: `Texts(texts.data, offsets_of_sentences)`.
        """
        lines = join_words(texts.data, texts.offsets, max_words=self._max_words)
        result = np.full((len(lines), len(self.labels)), np.nan, np.float32)
        column = {LABEL + label: i for i, label in enumerate(self.labels)}
        rows = [i for i, line in enumerate(lines) if line]
        found, values = self._model.predict([lines[i] for i in rows], k=-1) if rows else ([], [])
        for row, names, probabilities in zip(rows, found, values, strict=True):
            result[row, [column[name] for name in names]] = probabilities
        return result

    def best(self, texts: Texts) -> list[str]:
        """The most probable class of each text; "" for a text without words."""
        probabilities = self.probabilities(texts)
        return ["" if np.isnan(row[0]) else self.labels[int(row.argmax())] for row in probabilities]


def _lines_of(
    examples: Iterable[tuple[str, str]], labels: list[str], options: ClassifierOptions
) -> tuple[list[str], Counter[str]]:
    counts: Counter[str] = Counter()
    lines: list[str] = []
    for batch in _batches(examples):
        texts = Texts.of(text for _, text in batch)
        joined = join_words(texts.data, texts.offsets, max_words=options.max_words)
        for (label, _), line in zip(batch, joined, strict=True):
            if label not in labels:
                raise InputError(f"label {label!r} is not one of {', '.join(labels)}")
            if line:
                lines.append(f"{LABEL}{label} {line}\n")
                counts[label] += 1
    return lines, counts


def _batches(examples: Iterable[tuple[str, str]], size: int = 1_024) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    for example in examples:
        batch.append(example)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_labels(labels: list[str]) -> None:
    if len(labels) < 2:
        raise InputError(f"a classifier needs two classes or more, not {labels}")
    for label in labels:
        if not label or any(character.isspace() for character in label):
            raise InputError(f"label {label!r}: must be a word without white space")


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_sidecar(path: Path) -> dict[str, Any]:
    for file in (path, _sidecar(path)):
        if not file.is_file():
            raise InputError(
                f"{file}: no such file; train-quality and train-language write {path.name} and its .json"
            )
    try:
        sidecar = json.loads(_sidecar(path).read_text(encoding="utf-8"))
        version = sidecar["version"] if sidecar["format"] == "b2-fasttext" else None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{_sidecar(path)}: damaged; train the classifier again") from None
    if version != VERSION:
        raise InputError(
            f"{path}: version {version} of a classifier; this program reads {VERSION}: train it again"
        )
    return dict(sidecar)


def _fasttext() -> ModuleType:
    with missing_library("fasttext", "fasttext-community"):
        import fasttext
        import fasttext.FastText
    return fasttext


@contextmanager
def missing_library(name: str, package: str) -> Iterator[None]:
    """Turns a failed import inside the block into an error that names the package to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != name:
            raise
        raise OutputError(
            f"{name} is not installed; install {package} (pip install megatron_b2[corpus])"
        ) from None
