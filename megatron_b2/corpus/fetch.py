"""Debian packages to one JSONL file a language, with a manifest: the work of `b2 corpus fetch`.

Two caches make a rerun instant and an interrupted run resumable: the downloaded packages and, per package,
the extracted texts. The output is a pure function of the package files: packages in alphabetical order, files
in path order, exact duplicates dropped after their first appearance.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_b2.corpus.apt import Apt, Candidate, DebFile
from megatron_b2.corpus.extract import EXTRACTOR_VERSION, ExtractedText, extract_files, is_candidate
from megatron_b2.corpus.packages import copyright_licence, declared_licence
from megatron_b2.documents import JsonlWriter
from megatron_b2.errors import InputError
from megatron_b2.files.atomic import write_json
from megatron_b2.files.progress import ProgressBar

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
CACHE_NAME = ".cache"
FILES_A_TASK = 64
MAX_PROBLEMS = 20


@dataclass
class PackageReport:
    """What one package gave."""

    name: str
    version: str
    deb: str
    deb_sha256: str
    deb_bytes: int
    licence: str
    documents: int = 0
    bytes: int = 0
    duplicates: int = 0


@dataclass
class LanguageReport:
    """One output file; `bytes` and `characters` are those of the text."""

    file: str
    documents: int = 0
    bytes: int = 0
    characters: int = 0
    sha256: str = ""


@dataclass
class CorpusManifest:
    """What was fetched and written; the same package files give the same manifest."""

    version: int = MANIFEST_VERSION
    packages: list[PackageReport] = field(default_factory=list)
    languages: dict[str, LanguageReport] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Packages that this system's archive does not have."""
    duplicates: int = 0
    """Texts dropped because the same text came before."""
    unreadable: int = 0
    problems: list[str] = field(default_factory=list)
    """The first 20 files that could not be read."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON value."""
        return asdict(self)


@dataclass(frozen=True)
class _Extraction:
    licence: str
    problems: list[str]
    unreadable: int
    path: Path


def fetch_corpus(
    out: Path, packages: Sequence[str], *, jobs: int, refresh: bool = False, apt: Apt | None = None
) -> CorpusManifest:
    """Fetch `packages`, extract their text and write OUT/<language>.jsonl and OUT/manifest.json.

    jobs: processes that extract. refresh: take newer package versions than those in the cache.
    Records have the keys id, text, language, source (package and version) and licence.
    Raises InputError without apt, without network, or when the archive has none of the packages.
    """
    if not packages:
        raise InputError("no packages to fetch")
    cache = out / CACHE_NAME
    cache.mkdir(parents=True, exist_ok=True)
    apt = apt or Apt(cache)
    names = sorted(set(packages))
    debs = _fetch_debs(apt, names, refresh=refresh)
    manifest = CorpusManifest(missing=[name for name in names if name not in debs])
    extractions: dict[str, _Extraction] = {}
    with ExitStack() as stack:
        tool_box = _Workers(apt, jobs, stack)
        bar = stack.enter_context(
            ProgressBar("extract", total=sum(d.bytes for d in debs.values()), unit="bytes")
        )
        for name, deb in debs.items():
            extractions[name] = _extract_cached(apt, deb, cache / "text", tool_box)
            bar.advance(deb.bytes)
    _write_languages(out, debs, extractions, manifest)
    return manifest


class _Workers:
    """A process pool and a mandoc, each made at first use."""

    def __init__(self, apt: Apt, jobs: int, stack: ExitStack) -> None:
        self._apt = apt
        self._jobs = jobs
        self._stack = stack
        self._mandoc = ""
        self._map: Callable[..., Iterator[tuple[list[ExtractedText], list[str]]]] | None = None

    def extract(self, root: Path, names: Sequence[str]) -> Iterator[tuple[list[ExtractedText], list[str]]]:
        if not self._mandoc and any("/man/" in name for name in names):
            self._mandoc = self._apt.mandoc()
        if self._map is None:
            if self._jobs > 1:
                self._map = self._stack.enter_context(
                    multiprocessing.get_context("spawn").Pool(self._jobs)
                ).imap
            else:
                self._map = map
        chunks = [names[i : i + FILES_A_TASK] for i in range(0, len(names), FILES_A_TASK)]
        return self._map(partial(extract_files, root, mandoc=self._mandoc), chunks)


def _fetch_debs(apt: Apt, names: Sequence[str], *, refresh: bool) -> dict[str, DebFile]:
    """Package files in the order of `names`, from the cache where it has them."""
    debs = apt.cached(names)
    wanted = [name for name in names if refresh or name not in debs]
    if wanted:
        offers = apt.candidates(wanted)
        fresh: list[Candidate] = [
            offer
            for offer in offers.values()
            if offer.package not in debs or debs[offer.package].sha256 != offer.sha256
        ]
        if fresh:
            with ProgressBar("download", total=sum(offer.bytes for offer in fresh), unit="bytes") as bar:
                debs.update(apt.download(fresh, progress=bar.update))
    if not debs:
        raise InputError(
            f"the apt sources of this system have none of the packages {', '.join(names)}; "
            "the sets are made for Debian 12, give others with --packages"
        )
    return {name: debs[name] for name in names if name in debs}


def _extract_cached(apt: Apt, deb: DebFile, folder: Path, workers: _Workers) -> _Extraction:
    """Texts of one package in a cached JSONL file whose first record describes the package."""
    path = folder / f"{deb.package}-{deb.sha256[:16]}-v{EXTRACTOR_VERSION}.jsonl"
    if not path.is_file():
        with apt.unpacked(deb) as root, JsonlWriter(path) as writer:
            every = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
            names = [name for name in every if is_candidate(name)]
            texts: list[ExtractedText] = []
            problems: list[str] = []
            for found, failed in workers.extract(root, names):
                texts += found
                problems += failed
            head = {"licence": _licence(root, deb.package), "unreadable": len(problems)}
            writer.write({**head, "problems": [f"{deb.package}: {p}" for p in problems[:MAX_PROBLEMS]]})
            for text in texts:
                writer.write(asdict(text))
    with path.open(encoding="utf-8") as stream:
        return _Extraction(**json.loads(stream.readline()), path=path)


def _licence(root: Path, package: str) -> str:
    declared = declared_licence(package)
    if declared:
        return declared
    path = root / "usr" / "share" / "doc" / package / "copyright"
    found = copyright_licence(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    return found or f"see usr/share/doc/{package}/copyright"


def _write_languages(
    out: Path, debs: Mapping[str, DebFile], extractions: Mapping[str, _Extraction], manifest: CorpusManifest
) -> None:
    """Merge all extractions into OUT/<language>.jsonl, write the manifest, drop files of an older run."""
    seen: set[bytes] = set()
    old = _previous_files(out)
    with ExitStack() as stack:
        writers: dict[str, JsonlWriter] = {}
        for name, deb in debs.items():
            extraction = extractions[name]
            report = PackageReport(name, deb.version, deb.file, deb.sha256, deb.bytes, extraction.licence)
            manifest.packages.append(report)
            manifest.unreadable += extraction.unreadable
            manifest.problems = (manifest.problems + extraction.problems)[:MAX_PROBLEMS]
            for text in _texts(extraction.path):
                digest = hashlib.blake2b(text.text.encode(), digest_size=16).digest()
                if digest in seen:
                    report.duplicates += 1
                    continue
                seen.add(digest)
                if text.language not in writers:
                    file = f"{text.language}.jsonl"
                    writers[text.language] = stack.enter_context(JsonlWriter(out / file))
                    manifest.languages[text.language] = LanguageReport(file)
                writers[text.language].write(_record(text, report))
                _count(text, report, manifest.languages[text.language])
        for language, writer in writers.items():
            manifest.languages[language].sha256 = writer.sha256
    manifest.duplicates = sum(p.duplicates for p in manifest.packages)
    manifest.languages = dict(sorted(manifest.languages.items(), key=lambda item: (-item[1].bytes, item[0])))
    write_json(out / MANIFEST_NAME, manifest.to_dict())
    for file in old - {language.file for language in manifest.languages.values()}:
        (out / file).unlink(missing_ok=True)


def _texts(path: Path) -> Iterator[ExtractedText]:
    with path.open(encoding="utf-8") as stream:
        next(stream)
        for line in stream:
            yield ExtractedText(**json.loads(line))


def _record(text: ExtractedText, package: PackageReport) -> dict[str, str]:
    part = f"#{text.part}" if text.part else ""
    return {
        "id": f"{package.name}/{text.path}{part}",
        "text": text.text,
        "language": text.language,
        "source": f"{package.name} {package.version}",
        "licence": package.licence,
    }


def _count(text: ExtractedText, package: PackageReport, language: LanguageReport) -> None:
    size = len(text.text.encode())
    package.documents += 1
    package.bytes += size
    language.documents += 1
    language.bytes += size
    language.characters += len(text.text)


def _previous_files(out: Path) -> set[str]:
    """Output files that an earlier run listed in its manifest."""
    path = out / MANIFEST_NAME
    if not path.is_file():
        return set()
    languages = json.loads(path.read_text(encoding="utf-8"))["languages"]
    return {entry["file"] for entry in languages.values() if "/" not in entry["file"]}
