"""The build: machine code of every source, an extension that imports without a driver, setup.py without nvcc."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from setuptools import Distribution, Extension

from megatron_b2.testing.kernels import cuda_binaries
from megatron_b2.testing.kernels.ahead_of_time import Compiled
from megatron_b2.testing.kernels.cpu_shim import CHECKOUT, SOURCES

needs_nvcc = pytest.mark.skipif(not cuda_binaries.nvcc_version(), reason="CUDA's nvcc was not found on PATH")
ELEMENTWISE = ("rms_norm.cu", "swiglu.cu", "adamw.cu")


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Sequence[tuple[str, Compiled]]:
    """Source and kernel; compiled once and kept, as for docs/kernels.md."""
    assert request.config.cache is not None
    return cuda_binaries.compile_sources(CHECKOUT, Path(request.config.cache.mkdir("kernels")))


@needs_nvcc
def test_every_source_compiles_for_both_architectures_without_spills(
    kernels: Sequence[tuple[str, Compiled]],
) -> None:
    for source in sorted(path.name for path in SOURCES.glob("*.cu")):
        found = [kernel for name, kernel in kernels if name == source]
        assert {kernel.arch for kernel in found} == {"sm_80", "sm_90"}, source
        assert [kernel for kernel in found if kernel.spills or kernel.stack] == [], source


@needs_nvcc
def test_no_atomics(kernels: Sequence[tuple[str, Compiled]]) -> None:
    assert [kernel for _, kernel in kernels if kernel.atomics] == []


@needs_nvcc
def test_elementwise_kernels_have_128_bit_accesses_only(kernels: Sequence[tuple[str, Compiled]]) -> None:
    """But for those by elements (template argument 1), which take what is not made of whole words, and the one
    load of the step count that each block of AdamW does."""
    checked = 0
    for source, kernel in kernels:
        if source in ELEMENTWISE and not kernel.kernel.endswith((" 1>", "Li1EEE")):
            narrow = {width: count for width, count in kernel.accesses.items() if width != "128"}
            assert narrow == ({} if source != "adamw.cu" else {"32": 1}), (source, kernel.kernel, kernel.arch)
            checked += 1
    assert checked >= 2 * (5 * 3 + 2 * 3 + 6)


@needs_nvcc
@pytest.mark.skipif(find_spec("megatron_b2._cuda") is None, reason="megatron_b2._cuda was not built")
def test_extension_imports_without_a_driver_and_a_call_says_what_is_missing() -> None:
    code = (
        "import sys, megatron_b2._cuda as kernels\n"
        "assert 'torch' not in sys.modules\n"
        "print('imported', kernels.cuda_version)\n"
        "kernels.swiglu_forward(0, 0, 0, 1, 8, 0, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("imported "), done.stderr
    if "cudaErrorInvalidValue" in done.stderr or done.returncode == 0:
        pytest.skip("there is a driver here")
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "RuntimeError: megatron_b2._cuda.swiglu_forward: no NVIDIA driver was found. These kernels run on an NVIDIA "
        "GPU only (cudaError 35, cudaErrorInsufficientDriver)"
    )


@pytest.fixture(scope="module")
def setup() -> Mapping[str, Any]:
    """Names of setup.py."""
    with patch("setuptools.setup"):
        return runpy.run_path(str(CHECKOUT / "setup.py"))


def build(setup: Mapping[str, Any], folder: Path) -> str:
    """What a build of the CUDA extension alone leaves as a notice."""
    command = setup["BuildExtensions"](
        Distribution({"ext_modules": [Extension(setup["CUDA_MODULE"], [], optional=True)]})
    )
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    notice = folder / "lib" / "megatron_b2" / "_cuda.txt"
    return notice.read_text() if notice.exists() else ""


def fake_nvcc(folder: Path, script: str) -> Path:
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return nvcc


def test_without_nvcc_there_is_one_notice(
    setup: Mapping[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    notice = build(setup, tmp_path)
    assert notice == (
        "megatron_b2: the CUDA kernels were not built; all else works without them.\n"
        "  CUDA's nvcc was not found on PATH or in $CUDA_HOME/bin\n"
    )
    assert capfd.readouterr().err.count(notice) == 1


def test_an_nvcc_that_fails_breaks_nothing(
    setup: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = fake_nvcc(
        tmp_path, "echo 'In file included from x' >&2; echo 'x.cu(3): error: no such arch' >&2; exit 2"
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert build(setup, tmp_path) == (
        "megatron_b2: the CUDA kernels were not built; all else works without them.\n"
        f"  {nvcc} failed:\n  x.cu(3): error: no such arch\n"
    )
    nvcc.write_text("not a program")
    assert "cannot be run" in build(setup, tmp_path)


def test_a_build_removes_the_notice_and_one_that_fails_the_old_module(
    setup: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module of older sources must not stay where the new ones do not compile."""
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    writes = 'while [ "$1" != -o ]; do shift; done; echo module > "$2"'
    nvcc = fake_nvcc(tmp_path, writes)
    folder = tmp_path / "lib" / "megatron_b2"
    assert build(setup, tmp_path) == ""
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert "exit code 1" in build(setup, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["_cuda.txt"]
