"""Files and folders appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_b2.errors import OutputError
from megatron_b2.files.atomic import atomic_file, atomic_folder, write_json


def fill(folder: Path, *, overwrite: bool, fail: bool = False) -> None:
    with atomic_folder(folder, replaces="new.txt" if overwrite else "") as temporary:
        (temporary / "new.txt").write_text("new")
        if fail:
            raise ValueError("stop")


def test_folder(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(ValueError, match="stop"):
        fill(target, overwrite=False, fail=True)
    assert list(target.parent.iterdir()) == []
    fill(target, overwrite=False)
    (target / "old.txt").write_text("old")
    with pytest.raises(OutputError, match="already exists"):
        fill(target, overwrite=False)
    with pytest.raises(ValueError, match="stop"):
        fill(target, overwrite=True, fail=True)
    assert sorted(p.name for p in target.iterdir()) == ["new.txt", "old.txt"]
    fill(target, overwrite=True)
    assert [p.name for p in target.iterdir()] == ["new.txt"]
    assert [p.name for p in target.parent.iterdir()] == ["out"]
    (target / "new.txt").rename(target / "other.txt")
    with pytest.raises(OutputError, match=r"no earlier result \(no new.txt in it\)"):
        fill(target, overwrite=True)
    assert [p.name for p in target.iterdir()] == ["other.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder"):
        fill(tmp_path / "file", overwrite=True)


def test_unwritable_place_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*x\.json"):
        write_json(tmp_path / "file" / "x.json", {})
    with pytest.raises(OutputError, match="cannot write /dev/full/x"), atomic_file(Path("/dev/full/x")):
        pass


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_file(path) as stream:
        stream.write("no bytes")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
