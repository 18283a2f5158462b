"""Compression by language: tokens a character, tokens a byte, bytes a token, for any tokenizer file.

The report's Table 2 gives "compression rates" without defining them; we print plain ratios of counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_b2.documents import OnError, ReadReport, read_documents
from megatron_b2.errors import TokenizerError
from megatron_b2.files.atomic import atomic_file
from megatron_b2.files.progress import ProgressBar
from megatron_b2.tokenizer.wrapper import MODEL_NAME

BATCH = 64
Counter = Callable[[Sequence[str]], int]
"""Number of tokens of all texts together, without begin and end tokens."""


@dataclass
class Compression:
    """Counts of one tokenizer on one language."""

    tokens: int = 0
    characters: int = 0
    bytes: int = 0

    def to_dict(self) -> dict[str, float]:
        """Counts and the three ratios (0 where there is nothing to divide by)."""
        return {
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "tokens_per_character": self.tokens / max(self.characters, 1),
            "tokens_per_byte": self.tokens / max(self.bytes, 1),
            "bytes_per_token": self.bytes / max(self.tokens, 1),
        }


@dataclass
class CompressionReport:
    """tokenizer name -> language -> counts; the language "all" is the sum."""

    tokenizers: dict[str, dict[str, Compression]] = field(default_factory=dict)
    vocab_sizes: dict[str, int] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)
    """Documents by language."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value."""
        rows = {n: {lang: c.to_dict() for lang, c in langs.items()} for n, langs in self.tokenizers.items()}
        return {"vocab_sizes": self.vocab_sizes, "documents": self.documents, "tokenizers": rows}


def measure(
    tokenizer_paths: Sequence[Path],
    inputs: Sequence[Path | str],
    *,
    max_bytes: int | None = None,
    threads: int = 1,
    text_key: str = "text",
    on_error: OnError = "stop",
    reading: ReadReport | None = None,
) -> CompressionReport:
    """Count tokens of every tokenizer on the same documents, by language.

    max_bytes: text taken of each language, the first documents in order; none takes all.
    """
    counters = {name: load_counter(path, threads=threads) for name, path in _names(tokenizer_paths).items()}
    report = CompressionReport(vocab_sizes={name: size for name, (_, size) in counters.items()})
    report.tokenizers = {name: {} for name in counters}
    taken: dict[str, int] = {}
    batches: dict[str, list[str]] = {}

    def flush(language: str) -> None:
        texts = batches.pop(language)
        characters, size = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
        for name, (count, _) in counters.items():
            tokens = count(texts)
            for key in (language, "all"):
                entry = report.tokenizers[name].setdefault(key, Compression())
                entry.tokens += tokens
                entry.characters += characters
                entry.bytes += size

    with ProgressBar("measure", unit="bytes") as bar:
        for document in read_documents(inputs, text_key=text_key, on_error=on_error, report=reading):
            language = document.language
            if max_bytes is not None and taken.get(language, 0) >= max_bytes:
                continue
            size = len(document.text.encode())
            taken[language] = taken.get(language, 0) + size
            report.documents[language] = report.documents.get(language, 0) + 1
            batches.setdefault(language, []).append(document.text)
            if len(batches[language]) == BATCH:
                flush(language)
            bar.advance(size)
        for language in list(batches):
            flush(language)
    return report


def load_counter(path: Path, *, threads: int = 1) -> tuple[Counter, int]:
    """Token counter and vocabulary size of a SentencePiece model, a tokenizer.json, or a folder with one of
    them.

    Raises TokenizerError for anything else.
    """
    if path.is_dir():
        found = [path / name for name in (MODEL_NAME, "tokenizer.json") if (path / name).is_file()]
        if not found:
            raise TokenizerError(f"{path}: neither {MODEL_NAME} nor tokenizer.json in this folder")
        path = found[0]
    if not path.is_file():
        raise TokenizerError(f"{path}: no such file")
    return _fast_counter(path) if path.suffix == ".json" else _sentencepiece_counter(path, threads)


def plot(report: CompressionReport, path: Path) -> None:
    """Bars of bytes a token by language, one colour a tokenizer, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    languages = sort_languages(report)
    figure = Figure(figsize=(max(6.0, 0.9 * len(languages) + 2), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / max(len(report.tokenizers), 1)
    for number, (name, rows) in enumerate(report.tokenizers.items()):
        heights = [rows[language].to_dict()["bytes_per_token"] for language in languages]
        places = [i + (number + 0.5) * width - 0.4 for i in range(len(languages))]
        bars = axes.bar(places, heights, width, label=f"{name} ({report.vocab_sizes[name]:,})")
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(languages)), languages)
    axes.set_ylabel("bytes a token (higher is better)")
    axes.set_title("Tokenizer compression")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(path) as stream:
        figure.savefig(stream, format="png", dpi=130)


def sort_languages(report: CompressionReport) -> list[str]:
    """Languages by amount of text, "all" first."""
    rows: Mapping[str, Compression] = next(iter(report.tokenizers.values()), {})
    return sorted(rows, key=lambda language: (language != "all", -rows[language].bytes, language))


def _names(paths: Sequence[Path]) -> dict[str, Path]:
    """A short unique name for each path: folder or file name, with its parents where two are alike."""
    names: dict[str, Path] = {}
    for path in paths:
        parts = path.resolve().parts
        if path.name in (MODEL_NAME, "tokenizer.json"):
            parts = parts[:-1]
        depth = 1
        while (name := "/".join(parts[-depth:])) in names and depth < len(parts):
            depth += 1
        names[name] = path
    return names


def _sentencepiece_counter(path: Path, threads: int) -> tuple[Counter, int]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError as error:
        raise TokenizerError(f"{path}: not a SentencePiece model: {error}") from None
    return lambda texts: sum(
        map(len, processor.encode(list(texts), num_threads=threads))
    ), processor.get_piece_size()


def _fast_counter(path: Path) -> tuple[Counter, int]:
    import tokenizers

    try:
        fast = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TokenizerError(f"{path}: not a Hugging Face tokenizer.json: {error}") from None
    return lambda texts: sum(len(e.ids) for e in fast.encode_batch(list(texts), add_special_tokens=False)), (
        fast.get_vocab_size()
    )
