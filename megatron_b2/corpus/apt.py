"""Download and unpack Debian packages through apt's own client, without installing anything.

Nothing on the system changes: packages land in the given cache folder, and when the system has no package
lists, they are fetched into that folder too. Works for root and for other users.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_b2.errors import InputError
from megatron_b2.files.atomic import write_json
from megatron_b2.files.hashing import hash_file

POLL_SECONDS = 0.2
NO_APT = (
    "{program} is not on this system, so Debian packages cannot be fetched here. Give your own text instead: "
    "every command that reads documents takes .jsonl, .jsonl.gz, .jsonl.zst, .parquet and .txt files or "
    "folders of "
    'them (a JSONL record is {{"text": "...", "language": "en"}}); see docs/corpus.md'
)


@dataclass(frozen=True)
class DebFile:
    """One downloaded package."""

    package: str
    version: str
    file: str
    """Name inside the cache's `debs` folder."""
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Candidate:
    """One package as the archive offers it."""

    package: str
    version: str
    sha256: str
    bytes: int


class Apt:
    """apt-get, apt-cache and dpkg-deb, keeping everything under `cache`."""

    def __init__(self, cache: Path, *, options: Sequence[str] = ()) -> None:
        """`options` are extra apt arguments, such as a private Dir::Etc::sourcelist."""
        self._cache = cache.resolve()
        self._debs = self._cache / "debs"
        self._options = [*_base_options(), *options]
        self._index_path = self._cache / "debs.json"

    def cached(self, packages: Sequence[str]) -> dict[str, DebFile]:
        """Those of `packages` that were downloaded before and whose file is still whole."""
        if not self._index_path.is_file():
            return {}
        records = json.loads(self._index_path.read_text(encoding="utf-8"))
        found = (DebFile(**records[name]) for name in packages if name in records)
        return {deb.package: deb for deb in found if self._is_whole(deb)}

    def candidates(self, packages: Sequence[str]) -> dict[str, Candidate]:
        """What the archive offers of `packages`; a name it does not know is left out.

        Fetches package lists into the cache when the system knows none of the packages.
        Raises InputError on a system without apt, or when the lists cannot be fetched.
        """
        for program in ("apt-get", "apt-cache", "dpkg-deb"):
            if shutil.which(program) is None:
                raise InputError(NO_APT.format(program=program))
        found = self._show(packages)
        if not found:
            self._use_private_lists()
            found = self._show(packages)
        return found

    def download(self, wanted: Sequence[Candidate], *, progress: Callable[[int], None]) -> dict[str, DebFile]:
        """Download `wanted`, calling `progress` with the bytes so far; raises InputError with apt's own
        reason.

        What arrived before a failure stays in the cache, so that the next call goes on from there.
        """
        with _scratch(self._cache / "partial") as folder:
            command = ["apt-get", *self._options, "-q", "download", *(c.package for c in wanted)]
            code, log = _run_polled(command, folder, progress)
            arrived = self._keep(folder, wanted)
        missing = [c.package for c in wanted if c.package not in arrived]
        if missing:
            raise InputError(
                f"apt-get could not download {', '.join(missing)} (exit code {code}): {_apt_reason(log)}. "
                "Check the "
                "network and the apt sources, then run the same command again: finished packages are kept"
            )
        return arrived

    @contextmanager
    def unpacked(self, deb: DebFile) -> Iterator[Path]:
        """Folder with the unpacked files of `deb`, removed at the end of the block."""
        with _scratch(self._cache / "unpack") as folder:
            self.unpack(deb, folder)
            yield folder

    def unpack(self, deb: DebFile, folder: Path) -> None:
        """Unpack `deb` into `folder`; raises InputError when the file is damaged."""
        done = subprocess.run(
            ["dpkg-deb", "-x", str(self._debs / deb.file), str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InputError(
                f"{self._debs / deb.file}: cannot be unpacked: {done.stderr.strip()}; delete it and rerun"
            )

    def mandoc(self) -> str:
        """Path of a mandoc program: the installed one, or that of the unpacked package of this name."""
        installed = shutil.which("mandoc")
        if installed:
            return installed
        tree = self._cache / "tools" / "mandoc"
        program = tree / "usr" / "bin" / "mandoc"
        if not program.is_file():
            deb = self.cached(["mandoc"]).get("mandoc")
            if deb is None:
                offer = self.candidates(["mandoc"])
                if not offer:
                    raise InputError(
                        "manual pages need mandoc, which the apt sources do not have; install it"
                    )
                deb = self.download(list(offer.values()), progress=lambda _: None)["mandoc"]
            with _scratch(tree.parent / "partial") as folder:
                self.unpack(deb, folder)
                shutil.rmtree(tree, ignore_errors=True)
                folder.rename(tree)
        return str(program)

    def _is_whole(self, deb: DebFile) -> bool:
        path = self._debs / deb.file
        return path.is_file() and path.stat().st_size == deb.bytes and hash_file(path).sha256 == deb.sha256

    def _show(self, packages: Sequence[str]) -> dict[str, Candidate]:
        command = ["apt-cache", *self._options, "--no-all-versions", "show", *packages]
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        found: dict[str, Candidate] = {}
        for stanza in output.split("\n\n"):
            fields = dict(
                line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " "
            )
            if {"Package", "Version", "SHA256", "Size"} <= fields.keys():
                name = fields["Package"]
                found.setdefault(
                    name, Candidate(name, fields["Version"], fields["SHA256"], int(fields["Size"]))
                )
        return found

    def _use_private_lists(self) -> None:
        lists, archives = self._cache / "apt" / "lists", self._cache / "apt" / "cache"
        for folder in (lists / "partial", archives / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        private = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={archives}"]
        self._options = [*self._options, *private]
        command = ["apt-get", *self._options, "-q", "update"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(
                f"this system has no package lists and `{' '.join(command)}` failed: "
                f"{_apt_reason(done.stdout + done.stderr)}. Check the network and the apt sources"
            )

    def _keep(self, folder: Path, wanted: Sequence[Candidate]) -> dict[str, DebFile]:
        """Move whole files to the cache and write them into its index."""
        by_hash = {hash_file(path).sha256: path for path in folder.glob("*.deb")}
        arrived: dict[str, DebFile] = {}
        self._debs.mkdir(parents=True, exist_ok=True)
        for offer in wanted:
            if path := by_hash.get(offer.sha256):
                os.replace(path, self._debs / path.name)
                arrived[offer.package] = DebFile(
                    offer.package, offer.version, path.name, offer.sha256, offer.bytes
                )
        if arrived:
            old = (
                json.loads(self._index_path.read_text(encoding="utf-8")) if self._index_path.is_file() else {}
            )
            index: Mapping[str, object] = {**old, **{name: asdict(deb) for name, deb in arrived.items()}}
            write_json(self._index_path, dict(sorted(index.items())))
        return arrived


def _base_options() -> list[str]:
    """As root apt would drop to the user _apt, who may not write into our folder: stay root instead."""
    return ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []


def _run_polled(command: Sequence[str], folder: Path, progress: Callable[[int], None]) -> tuple[int, str]:
    log = folder / "log.txt"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            progress(sum(path.stat().st_size for path in folder.glob("*.deb")))
    return process.returncode, log.read_text(encoding="utf-8", errors="replace")


def _apt_reason(log: str) -> str:
    lines = [line.removeprefix("E: ") for line in log.splitlines() if line.startswith(("E:", "Err:"))]
    return "; ".join(lines[:3]) or log.strip()[-300:] or "no message"


@contextmanager
def _scratch(base: Path) -> Iterator[Path]:
    """Empty folder beside `base`, named after this process, removed at the end of the block."""
    folder = base.with_name(f"{base.name}-{os.getpid()}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
