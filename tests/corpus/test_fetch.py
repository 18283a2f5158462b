"""The whole fetch with the real apt against an archive of three packages made here (no network)."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_b2.cli.corpus import main
from megatron_b2.corpus.apt import Apt
from megatron_b2.corpus.fetch import fetch_corpus
from megatron_b2.documents import read_documents
from megatron_b2.errors import InputError

needs_apt = pytest.mark.skipif(
    not all(map(shutil.which, ("apt-get", "apt-cache", "dpkg-deb"))), reason="not a Debian system"
)
ENGLISH = (
    "This is the text of a page that is in the package, and it is long enough to be kept by the reader. "
)
CHINESE = "这个软件包里有一篇中文的文章，我们用它来检查下载和提取是不是对的，而且它够长，不会被丢掉。" * 2
COPYRIGHT = "Format: x\nUpstream-Name: p\n\nFiles: *\nCopyright: 2024\nLicense: GPL-2+\n text\n\nFiles: b\nLicense: MIT\n"


class Archive:
    """A flat apt archive in a folder, and apt options that make it the only source."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "sources.list"
        folder.mkdir()
        self.source.write_text(f"deb [trusted=yes] file:{folder} ./\n")

    def options(self) -> list[str]:
        """As on a machine without package lists: the lists folder of the system is an empty one."""
        settings = {"sourcelist": self.source, "sourceparts": "/dev/null", "preferencesparts": "/dev/null"}
        options = [f"Dir::Etc::{name}={value}" for name, value in settings.items()]
        options += [f"Dir::State::lists={self.folder / 'none'}", "Acquire::Languages=none"]
        return [word for option in options for word in ("-o", option)]

    def add(self, name: str, version: str, files: Mapping[str, str]) -> Path:
        tree = self.folder / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: test\n"
        for path, text in {"DEBIAN/control": control, **files}.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text, encoding="utf-8")
        deb = self.folder / f"{name}_{version}_all.deb"
        subprocess.run(["dpkg-deb", "--root-owner-group", "-b", tree, deb], check=True, capture_output=True)
        data = deb.read_bytes()
        stanza = f"{control}Filename: ./{deb.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n\n"
        with (self.folder / "Packages").open("a", encoding="utf-8") as stream:
            stream.write(stanza)
        return deb


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    archive = Archive(tmp_path / "archive")
    doc = "usr/share/doc"
    page = f"<html><body><p>{ENGLISH * 3}</p></body></html>"
    archive.add(
        "alpha",
        "1.0",
        {f"{doc}/alpha/a.html": page, f"{doc}/alpha/z.txt": CHINESE, f"{doc}/alpha/copyright": COPYRIGHT},
    )
    archive.add(
        "beta", "2:2.0-1", {f"{doc}/beta/same.txt": ENGLISH * 3, f"{doc}/beta/other.txt": ENGLISH * 5}
    )
    return archive


def fetch(archive: Archive, out: Path, packages: tuple[str, ...], *, jobs: int = 1, refresh: bool = False):
    return fetch_corpus(
        out, packages, jobs=jobs, refresh=refresh, apt=Apt(out / ".cache", options=archive.options())
    )


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.json*"))}


@needs_apt
def test_fetch(archive: Archive, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    manifest = fetch(archive, out, ("beta", "alpha", "gone"))
    records = [json.loads(line) for line in (out / "en.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records == [
        {
            "id": "alpha/usr/share/doc/alpha/a.html",
            "text": (ENGLISH * 3).strip(),
            "language": "en",
            "source": "alpha 1.0",
            "licence": "GPL-2+",
        },
        {
            "id": "beta/usr/share/doc/beta/other.txt",
            "text": (ENGLISH * 5).strip(),
            "language": "en",
            "source": "beta 2:2.0-1",
            "licence": "see usr/share/doc/beta/copyright",
        },
    ]
    assert [d.language for d in read_documents([out])] == ["en", "en", "zh-Hans"]
    assert (manifest.missing, manifest.duplicates, manifest.unreadable) == (["gone"], 1, 0)
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8")) == manifest.to_dict()
    for entry in manifest.languages.values():
        assert entry.sha256 == hashlib.sha256((out / entry.file).read_bytes()).hexdigest()
    debs = {package.name: package for package in manifest.packages}
    assert (
        debs["alpha"].deb_sha256
        == hashlib.sha256((archive.folder / "alpha_1.0_all.deb").read_bytes()).hexdigest()
    )
    assert debs["beta"].duplicates == 1
    before = outputs(out)
    shutil.move(archive.folder, tmp_path / "away")
    fetch(archive, out, ("beta", "alpha"))
    assert outputs(out).keys() == before.keys()
    assert outputs(out)["en.jsonl"] == before["en.jsonl"]


@needs_apt
def test_processes_do_not_change_the_output(archive: Archive, tmp_path: Path) -> None:
    fetch(archive, tmp_path / "one", ("beta", "alpha"))
    fetch(archive, tmp_path / "two", ("alpha", "beta"), jobs=2)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


@needs_apt
def test_damaged_cache_newer_version_and_stale_files(archive: Archive, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    fetch(archive, out, ("alpha",))
    good = outputs(out)
    deb = out / ".cache" / "debs" / "alpha_1.0_all.deb"
    deb.write_bytes(deb.read_bytes()[:-1] + b"?")
    fetch(archive, out, ("alpha",))
    assert outputs(out) == good
    archive.add("alpha", "1.1", {"usr/share/doc/alpha/a.txt": "new " + ENGLISH * 4})
    shutil.rmtree(out / ".cache" / "apt")
    assert fetch(archive, out, ("alpha",)).packages[0].version == "1.0"
    assert fetch(archive, out, ("alpha",), refresh=True).packages[0].version == "1.1"
    assert sorted(outputs(out)) == ["en.jsonl", "manifest.json"]


@needs_apt
def test_a_failed_download_names_the_reason_and_keeps_the_rest(archive: Archive, tmp_path: Path) -> None:
    (archive.folder / "beta_2:2.0-1_all.deb").unlink()
    with pytest.raises(InputError, match=r"could not download beta .*same command again"):
        fetch(archive, tmp_path / "corpus", ("alpha", "beta"))
    assert [p.name for p in (tmp_path / "corpus" / ".cache" / "debs").iterdir()] == ["alpha_1.0_all.deb"]
    assert list((tmp_path / "corpus").glob("*.jsonl")) == []


@needs_apt
def test_unknown_packages_only(archive: Archive, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the packages gone"):
        fetch(archive, tmp_path / "corpus", ("gone",))


def test_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"apt-get is not on this system.*Give your own text"):
        fetch_corpus(tmp_path / "corpus", ("alpha",), jobs=1)


def test_sets_and_stats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sets"]) == 0
    assert "libreoffice-help-zh-cn" in capsys.readouterr().out
    (tmp_path / "a.jsonl").write_text(
        '{"text": "你好", "language": "zh-Hans"}\n{"text": 1}\n', encoding="utf-8"
    )
    (tmp_path / "b.txt").write_text("hello")
    inputs = ["--input", str(tmp_path / "a.jsonl"), f"--input={tmp_path / 'b.txt'}"]
    assert main(["stats", *inputs, "--on-error", "skip", "--json", str(tmp_path / "s.json")]) == 0
    stats = json.loads((tmp_path / "s.json").read_text())
    assert stats["languages"]["zh-Hans"] == {"documents": 1, "characters": 2, "bytes": 6}
    assert (stats["documents"], stats["malformed"]) == (2, 1)
    assert "a.jsonl:2: 'text' is a number" in capsys.readouterr().err
