"""`b2 corpus train-quality`, `train-perplexity` and `train-language`: the models that pipelines use."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from megatron_b2.corpus.models.classifier import ClassifierOptions
from megatron_b2.corpus.models.perplexity import PerplexityOptions
from megatron_b2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class TrainQuality:
    """Train the models that `quality` scores documents, paragraphs and sentences of one language with.

    Clean text is given; bad text is made from it (words out of order, text cut inside a sentence, wrong
    encodings, page furniture, repetition), and more can be given.

    Example: b2 corpus train-quality --clean corpus/en.jsonl --language en --out models/en
    """

    clean: tuple[str, ...]
    """Files or folders of clean documents: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt."""
    out: Path
    """New folder of the models."""
    language: str
    """BCP 47 tag of the documents, such as en or zh."""
    source: str = ""
    """Take only documents whose source contains this text."""
    most: int = 20_000
    """Documents that are taken, at equal distances."""
    bad: tuple[str, ...] = ()
    """KIND=PATH: documents of a kind of bad text, such as spam=spam.jsonl."""
    text_key: str = "text"
    """Key or column that holds the text."""
    overwrite: bool = False
    """Replace an earlier model."""
    perplexity: PerplexityOptions = field(default_factory=PerplexityOptions)
    classifier: ClassifierOptions = field(default_factory=ClassifierOptions)


@dataclass(frozen=True, kw_only=True)
class TrainPerplexity:
    """Train an n-gram model (interpolated modified Kneser-Ney) on the lines of clean documents.

    Example: b2 corpus train-perplexity --input corpus/en.jsonl --out en.safetensors --arpa en.arpa
    """

    input: tuple[str, ...]
    """Files or folders of documents."""
    out: Path
    """The model."""
    arpa: Path | None = None
    """Also write the model as an ARPA text file, which other programs read."""
    text_key: str = "text"
    """Key or column that holds the text."""
    options: Annotated[PerplexityOptions, tyro.conf.OmitArgPrefixes] = field(
        default_factory=PerplexityOptions
    )


@dataclass(frozen=True, kw_only=True)
class TrainLanguage:
    """Train a classifier of languages on documents that are tagged with theirs.

    Example: b2 corpus train-language --input corpus --out languages.bin
    """

    input: tuple[str, ...]
    """Files or folders of documents with a key or column "language"."""
    out: Path
    """The model; its labels go to a .json beside it."""
    most: int = 5_000
    """Documents of a language that are taken, the first ones."""
    text_key: str = "text"
    """Key or column that holds the text."""
    options: Annotated[ClassifierOptions, tyro.conf.OmitArgPrefixes] = field(
        default_factory=lambda: ClassifierOptions(max_words=200)
    )


def main(command: object) -> int:
    """Run a parsed command."""
    match command:
        case TrainQuality():
            return _quality(command)
        case TrainPerplexity():
            return _perplexity(command)
        case TrainLanguage():
            return _language(command)
    raise AssertionError(f"no such command: {command}")


def _texts(paths: Sequence[Path | str], text_key: str, *, source: str = "") -> Iterator[tuple[str, str]]:
    """(language, text) of documents; says how many could not be read."""
    from megatron_b2.documents import ReadReport, expand_inputs, read_documents

    report = ReadReport()
    for document in read_documents(expand_inputs(paths), text_key=text_key, on_error="skip", report=report):
        if source in document.source:
            yield document.language, document.text
    if report.malformed:
        first = report.messages[0]
        print(f"{report.malformed:,} malformed records left out, the first {first}", file=sys.stderr)


def _quality(command: TrainQuality) -> int:
    from megatron_b2.corpus.models.quality import QualityOptions, train_quality
    from megatron_b2.corpus.pipeline.shuffle import evenly

    bad = {}
    for given in command.bad:
        kind, equals, path = given.partition("=")
        if not (kind and equals and path):
            raise InputError(f"--bad {given!r} is not KIND=PATH, such as spam=spam.jsonl")
        bad[kind] = [text for _, text in _texts([Path(path)], command.text_key)]
    clean = [text for _, text in _texts(command.clean, command.text_key, source=command.source)]
    chosen = [clean[row] for row in evenly(len(clean), command.most)] if clean else []
    options = QualityOptions(
        language=command.language, perplexity=command.perplexity, classifier=command.classifier
    )
    report = train_quality(chosen, command.out, options, bad=bad, overwrite=command.overwrite)
    print(f"{report.clean:,} clean documents; n-gram model of {report.perplexity.words:,} words")
    for label, count in report.classifier.examples.items():
        print(f"  {label:16} {count:,} examples")
    print(f"written: {command.out}; use it as quality.models.{command.language}")
    return 0


def _perplexity(command: TrainPerplexity) -> int:
    from megatron_b2.corpus.models.batches import text_batches
    from megatron_b2.corpus.models.perplexity import train_perplexity

    texts = (text for _, text in _texts(command.input, command.text_key))
    report = train_perplexity(text_batches(texts), command.out, command.options, arpa=command.arpa)
    print(f"{report.tokens:,} words in {report.lines:,} lines, {report.words:,} different ones known")
    for order, summary in enumerate(report.orders, 1):
        note = ", default discounts: too little text" if summary.fallback else ""
        print(f"  {order}-grams: {summary.kept:,} of {summary.seen:,} kept{note}")
    print(f"written: {command.out}")
    return 0


def _language(command: TrainLanguage) -> int:
    from collections import Counter

    from megatron_b2.corpus.models.classifier import train_language

    taken: Counter[str] = Counter()
    examples = []
    for language, text in _texts(command.input, command.text_key):
        taken[language] += 1
        if taken[language] <= command.most:
            examples.append((language, text))
    report = train_language(examples, command.out, command.options)
    for label, count in report.examples.items():
        print(f"  {label:12} {count:,} documents")
    print(f"written: {command.out}; use it as language.model")
    return 0
