"""Quality of documents, paragraphs and sentences: how much a text looks like the clean text we were given.

Three models trained on the same clean text, joined by one logistic regression for each level: the n-gram
model (perplexity.py), the classifier of clean text against made defects (classifier.py, corrupt.py), and a
few counts that need no model. docs/corpus-models.md has the AUC of each of them, by defect and language.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from megatron_b2._cpu import split_texts
from megatron_b2.corpus.models.batches import text_batches
from megatron_b2.corpus.models.classifier import (
    ClassifierOptions,
    ClassifierReport,
    TextClassifier,
    train_classifier,
)
from megatron_b2.corpus.models.corrupt import DEFECTS, Corruptor
from megatron_b2.corpus.models.logistic import Logistic, fit_logistic
from megatron_b2.corpus.models.perplexity import (
    PerplexityModel,
    PerplexityOptions,
    PerplexityReport,
    train_perplexity,
)
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import InputError
from megatron_b2.files.atomic import atomic_folder, write_json

VERSION = 1
CLEAN = "clean"
Level = Literal["document", "paragraph", "sentence"]
LEVELS: tuple[Level, ...] = get_args(Level)
FEATURES = (
    "classifier",
    "perplexity",
    "order",
    "line_end",
    "unknown",
    "foreign",
    "damage",
    "compression",
    "length",
)
MIN_TEXTS = 20
LEAST_SHARE = 1e-4
MIN_PART = 20
"""Characters of a paragraph or sentence that is trained on."""
_FILES: Mapping[str, str] = MappingProxyType(
    {"perplexity": "perplexity.safetensors", "classifier": "classifier.bin", "quality": "quality.json"}
)
# UTF-8 read in an encoding of one byte a character, and what decoders put for bytes they cannot read.
_DAMAGE = re.compile(
    "[\ufffd\x80-\x9f]|[\u00c2-\u00f4][\x80-\u00bf\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192\u02c6\u02dc"
    "\u2013\u2014\u2018-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122]+"
)


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """How a quality model is trained."""

    language: str
    """BCP 47 tag of the texts: one model a language."""
    perplexity: PerplexityOptions = field(default_factory=PerplexityOptions)
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)
    calibration: float = 0.25
    """Share of the texts that n-gram model and classifier do not see, on which they are joined."""
    parts: int = 2
    """Paragraphs, and sentences, of each document that are trained on beside the document."""
    seed: int = 0

    def check(self) -> None:
        """Raises InputError for a value that cannot be."""
        if not 0 < self.calibration < 1:
            raise InputError(f"calibration = {self.calibration}: must be between 0 and 1")
        if self.parts < 1:
            raise InputError(f"parts = {self.parts}: must be 1 or more")
        if not self.language:
            raise InputError('language = "": give the language of the texts, such as "en" or "zh"')


@dataclass(frozen=True)
class QualityReport:
    """What a quality model was trained on."""

    clean: int
    """Clean documents."""
    perplexity: PerplexityReport
    classifier: ClassifierReport


@dataclass(frozen=True)
class QualityScores:
    """Scores of N texts; a text without words has NaN everywhere."""

    quality: np.ndarray
    """float32 [N]: probability that the text is clean, when half of all texts are."""
    classes: np.ndarray
    """float32 [N, labels]: probabilities of the classifier alone, in the order of `QualityModel.labels`."""
    perplexity: np.ndarray
    """float64 [N]: of the n-gram model."""
    line_end: np.ndarray
    """float64 [N]: log10 probability that the last line ends where it does; low for text cut inside a
    sentence."""


def train_quality(
    clean: Iterable[str],
    folder: Path,
    options: QualityOptions,
    *,
    bad: Mapping[str, Iterable[str]] = MappingProxyType({}),
    overwrite: bool = False,
) -> QualityReport:
    """Train on clean documents of one language and write the three models to `folder`.

    Bad documents are made from the clean ones; `bad` gives more of them, by a name of their kind such as
    "spam". The same texts and options give the same bytes (see `train_classifier`).

    Raises InputError for bad options, fewer than 20 clean documents, or a kind of `bad` without texts;
    OutputError when `folder` is not empty, unless it holds an earlier model and `overwrite`.
    """
    texts, given = _checked(clean, bad, options)
    rng = random.Random(options.seed)
    taught, joined = _split(texts, options.calibration, rng)
    given_halves = {kind: _split(more, options.calibration, rng) for kind, more in given.items()}
    taught_bad = {kind: half[0] for kind, half in given_halves.items()}
    joined_bad = {kind: half[1] for kind, half in given_halves.items()}
    facts = {"language": options.language}
    with atomic_folder(folder, replaces=_FILES["quality"] if overwrite else "") as made:
        model, classifier = made / _FILES["perplexity"], made / _FILES["classifier"]
        perplexity_report = train_perplexity(text_batches(taught), model, options.perplexity, facts=facts)
        examples = [(label, text) for label, _, text in _examples(taught, taught_bad, options, rng)]
        absent = set(DEFECTS) - {label for label, _ in examples}
        if absent:
            raise InputError(
                f"the clean documents are too short, or too few, to make {', '.join(sorted(absent))} text "
                "from them; give longer documents"
            )
        labels = (CLEAN, *DEFECTS, *given)
        classifier_report = train_classifier(
            examples, classifier, options.classifier, labels=labels, facts=facts
        )
        features = _Features(PerplexityModel(model, verify=False), TextClassifier(classifier, verify=False))
        weights = _join(features, labels, _examples(joined, joined_bad, options, rng))
        write_json(
            made / _FILES["quality"],
            {
                "format": "b2-quality",
                "version": VERSION,
                "features": list(FEATURES),
                "weights": {level: weight.to_json() for level, weight in weights.items()},
                "options": asdict(options),
            },
        )
    return QualityReport(len(texts), perplexity_report, classifier_report)


def _checked(
    clean: Iterable[str], bad: Mapping[str, Iterable[str]], options: QualityOptions
) -> tuple[list[str], dict[str, list[str]]]:
    options.check()
    texts, given = list(clean), {kind: list(more) for kind, more in bad.items()}
    if len(texts) < MIN_TEXTS:
        raise InputError(f"{len(texts)} clean documents; a quality model needs {MIN_TEXTS} or more")
    for kind, more in given.items():
        if not more or kind in (CLEAN, *DEFECTS):
            reason = "no documents" if not more else "the name is taken; give another"
            raise InputError(f"bad documents of kind {kind!r}: {reason}")
    return texts, given


class QualityModel:
    """The models of one language."""

    def __init__(self, folder: Path | str, *, verify: bool = True) -> None:
        """Raises InputError when a file is missing or damaged (`verify` reads all files once)."""
        folder = Path(folder)
        path = folder / _FILES["quality"]
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if (stored["format"], stored["version"]) != ("b2-quality", VERSION):
                raise InputError(f"{path}: another format than b2-quality version {VERSION}: train it again")
            weights = {level: Logistic.from_json(stored["weights"][level]) for level in LEVELS}
            self.language: str = stored["options"]["language"]
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}; train-quality makes it") from None
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: damaged ({error}); train the quality model again") from None
        self.perplexity = PerplexityModel(folder / _FILES["perplexity"], verify=verify)
        self.classifier = TextClassifier(folder / _FILES["classifier"], verify=verify)
        self._features = _Features(self.perplexity, self.classifier)
        self._weights = weights

    @property
    def labels(self) -> tuple[str, ...]:
        """Classes of the classifier: "clean", then the defects."""
        return self.classifier.labels

    def score(self, texts: Texts, level: Level = "document") -> QualityScores:
        """Scores of texts that are documents, paragraphs or sentences."""
        values, classes, perplexity, line_end = self._features.of(texts)
        quality = self._weights[level].probabilities(values)[:, 0]
        return QualityScores(quality.astype(np.float32), classes, perplexity, line_end)

    def score_parts(self, texts: Texts, level: Level) -> tuple[QualityScores, np.ndarray, np.ndarray]:
        """Scores of all paragraphs or sentences of `texts`; the bytes where each starts and ends, int64 [S
        + 1]; and which is the first of each text, int64 [N + 1]."""
        segments, firsts = split_texts(texts.data, texts.offsets, paragraphs=level == "paragraph")
        return self.score(Texts(texts.data, segments), level), segments, firsts


class _Features:
    """Features of texts, from the models and by counting; float64 [N, len(FEATURES)], NaN for a text
    without words."""

    def __init__(self, perplexity: PerplexityModel, classifier: TextClassifier) -> None:
        self._perplexity = perplexity
        self._classifier = classifier
        self._clean = classifier.labels.index(CLEAN)

    def of(self, texts: Texts) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Features, probabilities of the classes, perplexities, log10 probabilities of the last line end."""
        scores = self._perplexity.score(texts)
        classes = self._classifier.probabilities(texts)
        clean = np.clip(classes[:, self._clean].astype(np.float64), 1e-6, 1 - 1e-6)
        parts = list(texts)
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.stack(
                [
                    np.log(clean / (1 - clean)),
                    -scores.log10 / scores.words,
                    (scores.log10 - scores.unigram_log10) / scores.words,
                    scores.end_log10,
                    scores.unknown / scores.words,
                    np.log10(LEAST_SHARE + scores.foreign / scores.words),
                    np.log10(LEAST_SHARE + np.array([_damage(part) for part in parts])),
                    np.array([len(zlib.compress(part, 1)) / max(1, len(part)) for part in parts]),
                    np.log(scores.words),
                ],
                axis=1,
            )
        values[scores.words == 0] = np.nan
        return values, classes, scores.perplexity, scores.end_log10


def _damage(text: bytes) -> float:
    """Share of the characters beyond ASCII that a wrong decoding left, from 0 to 1."""
    if text.isascii():
        return 0.0
    characters = text.decode(errors="replace")
    found = sum(len(match) for match in _DAMAGE.findall(characters))
    return found / sum(character > "\x7f" for character in characters)


def _split(texts: Sequence[str], share: float, rng: random.Random) -> tuple[list[str], list[str]]:
    """The texts in two parts, at random; the second has about `share` of them."""
    shuffled = rng.sample(texts, len(texts))
    held = round(len(texts) * share)
    return shuffled[held:], shuffled[:held]


def _join(
    features: _Features, labels: Sequence[str], examples: Iterable[tuple[str, Level, str]]
) -> dict[Level, Logistic]:
    """One logistic regression for each level."""
    by_level: dict[Level, list[tuple[int, str]]] = {level: [] for level in LEVELS}
    for label, level, text in examples:
        by_level[level].append((labels.index(label), text))
    weights = {}
    for level, found in by_level.items():
        if not any(label == 0 for label, _ in found):
            raise InputError(
                f"the clean documents have no {level} of {MIN_PART} characters; give longer ones"
            )
        values = features.of(Texts.of(text for _, text in found))[0]
        classes = np.array([label for label, _ in found], int)
        known = ~np.isnan(values).any(axis=1)
        weights[level] = fit_logistic(values[known], classes[known], len(labels))
    return weights


def _examples(
    texts: Sequence[str],
    given: Mapping[str, Sequence[str]],
    options: QualityOptions,
    rng: random.Random,
) -> Iterator[tuple[str, Level, str]]:
    """(label, level, text): each document and some of its parts, clean and with a defect each, in turn;
    then the bad documents that were given, and their parts."""
    corruptor = Corruptor(options.language)
    turn = 0
    for text in texts:
        for level, part in _parts(text, options.parts, rng):
            yield CLEAN, level, part
            for _ in DEFECTS:  # a short or ASCII text cannot show every defect
                defect = DEFECTS[turn % len(DEFECTS)]
                turn += 1
                changed = corruptor.corrupt(part, defect, rng)
                if changed is not None:
                    yield defect, level, changed
                    break
    for kind, more in given.items():
        for text in more:
            for level, part in _parts(text, options.parts, rng):
                yield kind, level, part


def _parts(text: str, count: int, rng: random.Random) -> Iterator[tuple[Level, str]]:
    yield "document", text
    for level in LEVELS[1:]:
        pieces = split_level(text, level)
        for piece in rng.sample(pieces, min(count, len(pieces))):
            yield level, piece


def split_level(text: str, level: Level) -> list[str]:
    """The paragraphs or sentences of a text that are long enough to be judged; a document is itself."""
    if level == "document":
        return [text]
    document = Texts.of([text])
    bounds, _ = split_texts(document.data, document.offsets, paragraphs=level == "paragraph")
    pieces = (piece.decode().strip() for piece in Texts(document.data, bounds))
    return [piece for piece in pieces if len(piece) >= MIN_PART]
