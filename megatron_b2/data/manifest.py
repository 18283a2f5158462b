"""`<prefix>.json`, the sidecar of a `.bin`/`.idx` pair: what it holds and how it was made.

Files of other programs have none; they open all the same, only their tokenizer cannot be checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_b2.errors import DataError
from megatron_b2.files.atomic import write_json

FORMAT = "megatron_b2.tokens/1"


@dataclass
class Counts:
    """Documents written, their tokens (end-of-document tokens included) and UTF-8 bytes of text."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0

    def add(self, other: Counts) -> None:
        """Add another count to this one."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes


@dataclass
class Tally:
    """What reading and encoding found; sums over shards with `add`."""

    total: Counts = field(default_factory=Counts)
    languages: dict[str, Counts] = field(default_factory=dict)
    sources: dict[str, Counts] = field(default_factory=dict)
    empty: int = 0
    """Documents without text: skipped."""
    malformed: int = 0
    """Records that could not be read: skipped."""
    malformed_examples: list[str] = field(default_factory=list)
    """First messages, `file:line: reason`."""

    MAX_EXAMPLES = 20

    def count(self, counts: Counts, *, language: str, source: str) -> None:
        """Add documents of one language and source."""
        self.total.add(counts)
        self.languages.setdefault(language, Counts()).add(counts)
        self.sources.setdefault(source, Counts()).add(counts)

    def add(self, other: Tally) -> None:
        """Add what another shard found."""
        self.total.add(other.total)
        for mine, theirs in ((self.languages, other.languages), (self.sources, other.sources)):
            for name, counts in theirs.items():
                mine.setdefault(name, Counts()).add(counts)
        self.empty += other.empty
        self.malformed += other.malformed
        self.malformed_examples = (self.malformed_examples + other.malformed_examples)[: self.MAX_EXAMPLES]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tally:
        """Inverse of `dataclasses.asdict`."""
        groups = {
            name: {key: Counts(**counts) for key, counts in values[name].items()}
            for name in ("languages", "sources")
        }
        return cls(**{**values, **groups, "total": Counts(**values["total"])})


@dataclass(frozen=True)
class InputFile:
    """One input of `b2 preprocess`."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of the sidecar."""

    job: str
    """Fingerprint of inputs, tokenizer and options."""
    tokenizer: str
    """SHA-256 of the tokenizer's model file."""
    vocab_size: int
    dtype: str
    end_of_document: bool
    """Whether each document ends in the end-of-document token."""
    text_key: str
    bin_bytes: int
    idx_bytes: int
    inputs: tuple[InputFile, ...]
    tally: Tally
    format: str = FORMAT


def manifest_path(prefix: Path | str) -> Path:
    """`<prefix>.json`."""
    return Path(f"{prefix}.json")


def write_manifest(prefix: Path | str, manifest: Manifest) -> None:
    """Write the sidecar in one step."""
    write_json(manifest_path(prefix), asdict(manifest))


def read_manifest(prefix: Path | str) -> Manifest | None:
    """The sidecar, or None if there is none. Raises DataError if it is damaged."""
    path = manifest_path(prefix)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise DataError(f"{path}: format {values['format']!r}; this version reads {FORMAT!r}")
        inputs = tuple(InputFile(**entry) for entry in values["inputs"])
        return Manifest(**{**values, "inputs": inputs, "tally": Tally.from_dict(values["tally"])})
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged manifest ({error!r}); make it again or delete it") from error


def origin(prefix: Path | str) -> str | None:
    """SHA-256 of what the data was made from: content of every input, tokenizer, options that count.

    None without a sidecar. It covers every byte at no cost, which sampling a large `.bin` does not.
    """
    manifest = read_manifest(prefix)
    if manifest is None:
        return None
    facts = [manifest.tokenizer, manifest.dtype, manifest.end_of_document, manifest.text_key]
    inputs = [[file.bytes, file.sha256] for file in manifest.inputs]
    return hashlib.sha256(json.dumps([*facts, manifest.tally.malformed, inputs]).encode()).hexdigest()


def check_sizes(prefix: Path | str) -> None:
    """Raise DataError if the sidecar (if any) describes another `.bin` or `.idx`."""
    manifest = read_manifest(prefix)
    if manifest is None:
        return
    for suffix, expected in ((".bin", manifest.bin_bytes), (".idx", manifest.idx_bytes)):
        found = Path(f"{prefix}{suffix}").stat().st_size
        if found != expected:
            raise DataError(
                f"{manifest_path(prefix)} describes a {suffix} of {expected} bytes, but it has {found}: "
                "run `b2 preprocess` again, or delete the manifest"
            )


def check_tokenizer(prefix: Path | str, fingerprint: str) -> None:
    """Raise DataError if the data was made with another tokenizer; no sidecar, no check."""
    manifest = read_manifest(prefix)
    if manifest is not None and manifest.tokenizer != fingerprint:
        raise DataError(
            f"{prefix}: made with the tokenizer {manifest.tokenizer[:12]} (vocabulary "
            f"{manifest.vocab_size}), but this run uses {fingerprint[:12]}: set tokenizer.path to the "
            "one the data was made with, or run `b2 preprocess` again"
        )
