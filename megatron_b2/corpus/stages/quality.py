"""`quality`: how much documents, paragraphs and sentences look like clean text, by models that we train.

A model is made of clean text of one language by `b2 corpus train-quality`. Documents in a language without a
model are kept with the score `unknown`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.models.quality import Level, QualityModel
from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import View, languages_of, read_view
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import ConfigError, InputError
from megatron_b2.files.hashing import hash_file


@dataclass(frozen=True)
class Quality:
    """Score every document; those with low scores go, and bad sentences and paragraphs are cut out of the
    others."""

    models: Mapping[str, str] = field(default_factory=dict)
    """Folder of a quality model by language, such as {en = "models/en", zh = "models/zh"}; a tag that is not
    named takes the model of its primary language."""
    document_least: float = 0.2
    """Documents with a lower score go. A score is the probability of being clean, if half of all were."""
    paragraph_least: float = 0.05
    """Paragraphs with a lower score are cut out; 0 scores no paragraphs."""
    sentence_least: float = 0.02
    """Sentences with a lower score are cut out; 0 scores no sentences."""
    least_part_bytes: int = 60
    """Shorter paragraphs and sentences tell too little and stay."""
    unknown: float = 0.5
    """Score of documents in a language without a model, and of those without words."""

    def __post_init__(self) -> None:
        names = ("document_least", "paragraph_least", "sentence_least", "unknown")
        problems = [
            f"quality.{name} is {getattr(self, name)}: must be from 0 to 1"
            for name in names
            if not 0 <= getattr(self, name) <= 1
        ]
        if problems:
            raise ConfigError(problems)

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """One phase."""
        problems: list[str] = []
        contents: list[tuple[str, ...]] = []
        for language, folder in sorted(self.models.items()):
            try:
                model = QualityModel(folder)
                contents.append((language, model.perplexity.sha256, model.classifier.sha256))
                contents.append((hash_file(Path(folder) / "quality.json").sha256,))
            except InputError as error:
                problems.append(f"quality.models.{language}: {error}")
        if problems:
            raise ConfigError(problems)
        yield context.for_each_unit(_quality, _Models(self, tuple(contents)))


@dataclass(frozen=True)
class _Models:
    settings: Quality
    contents: tuple[tuple[str, ...], ...]
    """SHA-256 of the models, which the result depends on."""


def _quality(task: Task, _: Limits) -> Result:
    settings: Quality = task.settings.settings
    view = read_view(task.inputs, wanted=["language.tag"])
    score = np.full(len(view), settings.unknown, np.float32)
    perplexity = np.full(len(view), np.nan)
    cuts: list[list[int]] = [[] for _ in range(len(view))]
    for language, rows in _by_model(view, settings.models).items():
        model = QualityModel(settings.models[language], verify=False)
        texts = Texts.of_arrow(view.text.take(pa.array(rows)))
        found = model.score(texts)
        known = ~np.isnan(found.quality)
        score[rows[known]] = found.quality[known]
        perplexity[rows] = found.perplexity
        for row, ranges in zip(rows.tolist(), _bad_parts(model, texts, settings), strict=True):
            cuts[row] = ranges
    keep = score >= settings.document_least
    size = np.diff(view.texts.offsets)
    cut = np.array([sum(ranges[1::2]) - sum(ranges[::2]) for ranges in cuts], dtype=np.int64)
    reason = np.where(keep, np.where(cut < size, "", "no good sentence"), "low quality")
    keep &= cut < size
    columns = {"score": score, "perplexity": perplexity, "cuts": pa.array(cuts, pa.list_(pa.int64()))}
    return Result([view.write("quality", keep=keep, reason=reason, **columns)])


def _by_model(view: View, models: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Rows of the view for each model's language."""
    rows: dict[str, list[int]] = {}
    for row, tag in enumerate(languages_of(view)):
        language = tag if tag in models else tag.partition("-")[0]
        if language in models:
            rows.setdefault(language, []).append(row)
    return {language: np.array(found, np.int64) for language, found in rows.items()}


def _bad_parts(model: QualityModel, texts: Texts, settings: Quality) -> list[list[int]]:
    """Byte ranges of bad paragraphs and sentences of each text: begin, end, begin, end, ..."""
    bad: list[list[tuple[int, int]]] = [[] for _ in range(len(texts))]
    levels: tuple[tuple[Level, float], ...] = (
        ("paragraph", settings.paragraph_least),
        ("sentence", settings.sentence_least),
    )
    for level, least in levels:
        if not least:
            continue
        scores, segments, firsts = model.score_parts(texts, level)
        size = np.diff(segments)
        low = np.flatnonzero((scores.quality < least) & (size >= settings.least_part_bytes))
        owners = np.searchsorted(firsts, low, side="right") - 1
        for part, owner in zip(low.tolist(), owners.tolist(), strict=True):
            start = int(texts.offsets[owner])
            bad[owner].append((int(segments[part]) - start, int(segments[part + 1]) - start))
    return [_merged(ranges) for ranges in bad]


def _merged(ranges: list[tuple[int, int]]) -> list[int]:
    """The union of ranges, flat."""
    flat: list[int] = []
    for begin, end in sorted(ranges):
        if flat and begin <= flat[-1]:
            flat[-1] = max(flat[-1], end)
        else:
            flat += [begin, end]
    return flat
