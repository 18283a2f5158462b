"""Train the report's tokenizer: SentencePiece BPE with the options of section 2.3 and the shipped model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from megatron_b2.documents import Document, OnError, ReadReport, expand_inputs, read_documents
from megatron_b2.errors import InputError, TokenizerError
from megatron_b2.files.atomic import atomic_folder, write_json
from megatron_b2.files.hashing import hash_file
from megatron_b2.files.progress import ProgressBar
from megatron_b2.tokenizer.sampling import num_copies, sampling_rates, uniform
from megatron_b2.tokenizer.symbols import (
    BOS_ID,
    EOS_ID,
    FULL_VOCAB_SIZE,
    NUM_BYTES,
    NUM_CONTROL,
    UNK_ID,
    default_num_reserved,
    user_defined_symbols,
)
from megatron_b2.tokenizer.wrapper import MODEL_NAME, Tokenizer

REPORT_NAME = "tokenizer_report.json"
VOCAB_NAME = "tokenizer.vocab"
MAX_LINE_BYTES = 12_282
"""Longest training line, as in the shipped model; longer ones are cut, not skipped as SentencePiece would."""
LARGE_CORPUS_BYTES = 1 << 30
COUNTED_BYTES = 64 << 20
"""Text whose characters are counted for the coverage limit."""
MAX_ALPHABET_SHARE = 0.5
"""Most of the trained pieces that single characters may take (our choice); binds small vocabularies."""
CHECKED_DOCUMENTS = 200
MIN_TRAINED = 64
_LINE_BREAKS = re.compile("[\n\t\0\u2581]")
_CUT = re.compile("[ ,.;:!?，。；：！？、]")
_TRAIN = """
import json, sys, sentencepiece
sentencepiece.SentencePieceTrainer.train(**json.load(open(sys.argv[1], encoding="utf-8")))
"""
_MERGED = re.compile(r"merges=(\d+)")


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What to train; the defaults give the shipped size."""

    vocab_size: int = FULL_VOCAB_SIZE
    num_reserved: int | None = None
    """Symbols <reserved_N>: 108 to 1,000; none means 1,000, or 108 for vocabularies under 4,096."""
    character_coverage: float = 0.9999
    """Share of the text's characters that get a piece (report section 2.3); the rest is spelled in bytes."""
    language_weights: Mapping[str, float] = field(default_factory=dict)
    temperature: float = 1.0
    max_bytes: int | None = None
    seed: int = 0
    threads: int = 1
    text_key: str = "text"
    on_error: OnError = "stop"


@dataclass(frozen=True)
class Alphabet:
    """Characters that get a piece of their own."""

    characters: frozenset[str]
    coverage: float
    """Share of the text that they make up."""
    limited: bool
    """Whether a small vocabulary left out some that the wanted coverage would have taken."""


@dataclass
class _Sample:
    """The training text, on disk, and what is known about it."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    lines: int = 0
    cut_lines: int = 0
    characters: Counter[str] = field(default_factory=Counter)
    checked: list[str] = field(default_factory=list)


def train_tokenizer(
    inputs: Sequence[Path | str], out: Path, *, options: TrainOptions | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Train on the documents of `inputs` and make the folder `out`; returns the content of
    tokenizer_report.json.

    Reads the input twice: to count bytes by language, then to sample. SentencePiece itself runs in a child
    process, so that its memory is returned and its failure is one error. Raises InputError or
    TokenizerError, and then `out` is as before.
    """
    options = options or TrainOptions()
    symbols, trained = _plan(options)
    started = time.monotonic()
    with atomic_folder(out, replaces=REPORT_NAME if overwrite else "") as folder:
        files = expand_inputs(inputs)
        reading = ReadReport()
        sizes = _count_languages(files, options, reading)
        rates = sampling_rates(
            sizes,
            weights=options.language_weights,
            temperature=options.temperature,
            max_bytes=options.max_bytes,
        )
        sample = _write_sample(folder / "sample.txt", files, options, rates, sum(sizes.values()))
        wanted, most = options.character_coverage, int(trained * MAX_ALPHABET_SHARE)
        counts = {c: count for c, count in sample.characters.items() if c not in symbols}
        alphabet = choose_alphabet(counts, wanted, most)
        if alphabet.limited:
            _break_lines(folder / "sample.txt", alphabet.characters)
        arguments = sentencepiece_options(
            options, symbols, coverage=1.0 if alphabet.limited else wanted, num_bytes=sample.bytes.total()
        )
        sampled = time.monotonic()
        _run_sentencepiece(folder, arguments, merges=trained - len(alphabet.characters))
        (folder / "sample.txt").unlink()
        tokenizer = Tokenizer((folder / MODEL_NAME).read_bytes(), name="the trained model")
        _check_trained(tokenizer, symbols, options.vocab_size, sample.checked)
        _write_vocab(folder / VOCAB_NAME, tokenizer)
        report = {
            "model_sha256": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "num_symbols": len(symbols),
            "chat_ids": {"user": tokenizer.user_id, "assistant": tokenizer.assistant_id},
            "options": asdict(options),
            "sentencepiece": {k: v for k, v in arguments.items() if k != "user_defined_symbols"},
            "inputs": _describe(files),
            "reading": asdict(reading),
            "sample": _describe_sample(sample, rates),
            "alphabet": {
                "characters": len(alphabet.characters),
                "coverage": alphabet.coverage,
                "limited": alphabet.limited,
            },
            "lines": {"total": sample.lines, "cut": sample.cut_lines},
            "seconds": {"sample": round(sampled - started, 2), "train": round(time.monotonic() - sampled, 2)},
        }
        write_json(folder / REPORT_NAME, report)
    return report


def _plan(options: TrainOptions) -> tuple[list[str], int]:
    """User-defined symbols and the number of pieces to train; raises TokenizerError for impossible sizes."""
    reserved = options.num_reserved
    symbols = user_defined_symbols(default_num_reserved(options.vocab_size) if reserved is None else reserved)
    trained = options.vocab_size - NUM_CONTROL - len(symbols) - NUM_BYTES
    if trained < MIN_TRAINED:
        raise TokenizerError(
            f"vocabulary size {options.vocab_size} leaves {trained} pieces to train beside {NUM_CONTROL} "
            "control pieces, "
            f"{len(symbols)} symbols and {NUM_BYTES} bytes; give "
            f"{options.vocab_size - trained + MIN_TRAINED} or more, "
            "or fewer reserved symbols"
        )
    if not 0.98 <= options.character_coverage <= 1:
        raise TokenizerError(f"character coverage is {options.character_coverage:g}; give 0.98 to 1")
    return symbols, trained


def sentencepiece_options(
    options: TrainOptions, symbols: Sequence[str], *, coverage: float, num_bytes: int
) -> dict[str, Any]:
    """Arguments of SentencePieceTrainer (report section 2.3 and the shipped model's own specification)."""
    return {
        "input": "sample.txt",
        "model_prefix": "tokenizer",
        "model_type": "bpe",
        "vocab_size": options.vocab_size,
        "character_coverage": coverage,
        "user_defined_symbols": list(symbols),
        "split_digits": True,
        "byte_fallback": True,
        "max_sentencepiece_length": 32,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "unk_id": UNK_ID,
        "bos_id": BOS_ID,
        "eos_id": EOS_ID,
        "pad_id": -1,
        "max_sentence_length": MAX_LINE_BYTES,
        "input_sentence_size": 0,
        "shuffle_input_sentence": False,
        "train_extremely_large_corpus": num_bytes > LARGE_CORPUS_BYTES,
        "num_threads": options.threads,
    }


def training_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Lines of a document as SentencePiece can learn from them, and whether the line was cut.

    A line ends at a newline or tab (each a symbol of its own, which no merge crosses), at NUL and at U+2581
    (which the tokenizer spells in bytes). Lines above MAX_LINE_BYTES are cut after a space or a mark where
    there is one.
    """
    for line in _LINE_BREAKS.split(text):
        while len(line) * 4 > MAX_LINE_BYTES and len(line.encode()) > MAX_LINE_BYTES:
            head = line.encode()[:MAX_LINE_BYTES].decode("utf-8", "ignore")
            cuts = [match.end() for match in _CUT.finditer(head, len(head) // 2)]
            end = cuts[-1] if cuts else len(head)
            yield line[:end], True
            line = line[end:]
        if line:
            yield line, False


def _documents(files: Sequence[Path], options: TrainOptions, report: ReadReport) -> Iterator[Document]:
    return read_documents(files, text_key=options.text_key, on_error=options.on_error, report=report)


def _count_languages(files: Sequence[Path], options: TrainOptions, report: ReadReport) -> Counter[str]:
    sizes: Counter[str] = Counter()
    with ProgressBar("count", unit="bytes") as bar:
        for document in _documents(files, options, report):
            size = len(document.text.encode())
            sizes[document.language] += size
            bar.advance(size)
    return sizes


def _write_sample(
    path: Path, files: Sequence[Path], options: TrainOptions, rates: Mapping[str, float], total: int
) -> _Sample:
    sample = _Sample()
    counted = min(1.0, COUNTED_BYTES / total)
    with path.open("wb") as stream, ProgressBar("sample", total=total, unit="bytes") as bar:
        for index, document in enumerate(_documents(files, options, ReadReport())):
            bar.advance(len(document.text.encode()))
            copies = num_copies(rates[document.language], seed=options.seed, index=index)
            if not copies:
                continue
            if uniform(options.seed + 1, index) < counted:
                for _ in range(copies):
                    sample.characters.update(document.text)
            if len(sample.checked) < CHECKED_DOCUMENTS:
                sample.checked.append(document.text[:2_000])
            _write_lines(stream, document, copies, sample)
    if not sample.lines:
        raise InputError("the sample has no text: raise --max-bytes")
    return sample


def _write_lines(stream: BinaryIO, document: Document, copies: int, sample: _Sample) -> None:
    lines = list(training_lines(document.text))
    data = "".join(line + "\n" for line, _ in lines).encode()
    for _ in range(copies):
        stream.write(data)
    sample.documents[document.language] += copies
    sample.bytes[document.language] += len(data) * copies
    sample.lines += len(lines) * copies
    sample.cut_lines += sum(cut for _, cut in lines) * copies


def choose_alphabet(characters: Mapping[str, int], wanted: float, max_characters: int) -> Alphabet:
    """The most frequent characters: those that cover `wanted` of the text, `max_characters` at most."""
    ranked = sorted(characters.items(), key=lambda item: (-item[1], item[0]))
    total = sum(characters.values())
    covered, number = 0, 0
    while number < len(ranked) and covered < wanted * total:
        if number == max_characters:
            return Alphabet(frozenset(c for c, _ in ranked[:number]), covered / total, limited=True)
        covered += ranked[number][1]
        number += 1
    return Alphabet(frozenset(c for c, _ in ranked[:number]), covered / max(total, 1), limited=False)


def _break_lines(path: Path, characters: frozenset[str]) -> None:
    """End the lines of the sample at every other character: it is spelled in bytes, which no merge crosses.

    The same as a lower character coverage, but exact, and below SentencePiece's smallest (0.98).
    """
    others = re.compile(f"[^{re.escape(''.join(sorted(characters)))}]+")
    kept = path.with_suffix(".kept")
    with (
        path.open(encoding="utf-8", newline="\n") as lines,
        kept.open("w", encoding="utf-8", newline="\n") as out,
    ):
        for line in lines:
            out.writelines(part + "\n" for part in others.split(line.removesuffix("\n")) if part)
    kept.replace(path)


def _run_sentencepiece(folder: Path, arguments: Mapping[str, Any], *, merges: int) -> None:
    """Train in a child process inside `folder`, following its log."""
    options = folder / "options.json"
    options.write_text(json.dumps(arguments), encoding="utf-8")
    command = [sys.executable, "-c", _TRAIN, options.name]
    last: list[str] = []
    with (
        subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child,
        ProgressBar("merges", total=merges, unit="merges") as bar,
    ):
        assert child.stderr is not None
        try:
            for raw in child.stderr:
                line = raw.decode("utf-8", "replace").strip()
                if match := _MERGED.search(line):
                    bar.update(int(match[1]))
                elif line:
                    last = [*last[-4:], line]
        except BaseException:
            child.kill()
            raise
    options.unlink()
    if child.returncode:
        raise TokenizerError(_failure(child.returncode, last, int(arguments["vocab_size"])))


def _failure(code: int, last: Sequence[str], vocab_size: int) -> str:
    if code < 0:
        return f"SentencePiece was ended by signal {-code}" + (
            ", probably for lack of memory (it needs 6 bytes a byte of text): give --max-bytes"
            if code == -9
            else ""
        )
    reason = next(
        (line for line in reversed(last) if "Error" in line or "INTERNAL" in line), last[-1] if last else ""
    )
    return f"SentencePiece could not train {vocab_size} pieces on this text: {reason}"


def _check_trained(
    tokenizer: Tokenizer, symbols: Sequence[str], vocab_size: int, texts: Sequence[str]
) -> None:
    """The trained model has the promised size and layout, and round-trips documents of the sample."""
    if tokenizer.vocab_size != vocab_size:
        raise TokenizerError(
            f"this text gives {tokenizer.vocab_size} pieces only; ask for a vocabulary of that size or "
            "give more text"
        )
    first_byte = NUM_CONTROL + len(symbols)
    head = tokenizer.pieces(range(NUM_CONTROL, first_byte + NUM_BYTES))
    assert head == [*symbols, *(f"<0x{byte:02X}>" for byte in range(NUM_BYTES))], (
        "unexpected vocabulary layout"
    )
    encoded = tokenizer.encode_batch(texts)
    assert all(tokenizer.decode(ids) == text for text, ids in zip(texts, encoded, strict=True)), (
        "no round trip"
    )


def _write_vocab(path: Path, tokenizer: Tokenizer) -> None:
    """One JSON string a line, line number = id: SentencePiece's own listing breaks at the newline piece."""
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    path.write_text(
        "".join(json.dumps(piece, ensure_ascii=False) + "\n" for piece in pieces), encoding="utf-8"
    )


def _describe_sample(sample: _Sample, rates: Mapping[str, float]) -> dict[str, dict[str, float]]:
    return {
        language: {
            "documents": sample.documents[language],
            "bytes": sample.bytes[language],
            "copies": round(rates[language], 6),
        }
        for language in sorted(rates)
    }


def _describe(files: Sequence[Path]) -> list[dict[str, Any]]:
    return [{"file": str(file), **asdict(hash_file(file))} for file in files]
