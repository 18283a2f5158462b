"""Build of megatron_b2: the Python package, its C++ extension and, where nvcc is found, its CUDA extension.

No CUDA, Triton or DeepSpeed is needed: without nvcc, or where it fails, the CUDA kernels are left out and
megatron_b2/_cuda.txt says why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent


def read(name: str) -> str:
    """Text of a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(name: str) -> list[str]:
    """The pinned packages of requirements/<name>.txt."""
    lines = (line.strip() for line in read(f"requirements/{name}.txt").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def version() -> str:
    """The version that the package itself states."""
    match = re.search(r'^__version__ = "(.+)"$', read("megatron_b2/__init__.py"), re.MULTILINE)
    assert match is not None, "megatron_b2/__init__.py states no __version__"
    return match[1]


CUDA_MODULE = "megatron_b2._cuda"
CUDA_FLAGS = (
    *("-O3", "-std=c++17", "--threads", "0", "--shared", "-cudart", "static"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "--exclude-libs=ALL"),
    # Machine code for A100/A800 and H100/H800, and PTX for what comes after.
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90,code=sm_90"),
    *("-gencode", "arch=compute_90,code=compute_90"),
)


def find_nvcc() -> Path | None:
    """nvcc of $CUDA_HOME, or of the PATH."""
    home = os.environ.get("CUDA_HOME", "")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    on_path = shutil.which("nvcc")
    candidates += [Path(on_path)] if on_path else []
    return next((path for path in candidates if os.access(path, os.X_OK)), None)


def compile_cuda(target: Path) -> str:
    """Build the CUDA extension; why it was left out, or nothing."""
    nvcc = find_nvcc()
    if nvcc is None:
        return "CUDA's nvcc was not found on PATH or in $CUDA_HOME/bin"
    folder = ROOT / "csrc" / "cuda"
    sources = sorted(str(path) for path in (*folder.glob("*.cu"), *folder.glob("*.cpp")))
    include = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    command = [str(nvcc), *CUDA_FLAGS, *include, "-o", str(target), *sources]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{nvcc} cannot be run: {error}"
    if done.returncode == 0:
        return ""
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()] or lines
    return "\n  ".join([f"{nvcc} failed:", *(errors[:5] or [f"exit code {done.returncode}"])])


class BuildExtensions(build_ext):
    """Builds megatron_b2._cuda with nvcc and never fails for it."""

    def build_extension(self, ext: Extension) -> None:
        """Compile one extension."""
        if ext.name != CUDA_MODULE:
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        reason = compile_cuda(target)
        # In an editable install the module goes to the source tree, and a stale one would stay there.
        folder = ROOT / "megatron_b2" if self.editable_mode or self.inplace else target.parent
        notice = folder / "_cuda.txt"
        notice.unlink(missing_ok=True)
        if reason:
            (folder / target.name).unlink(missing_ok=True)
            text = f"megatron_b2: the CUDA kernels were not built; all else works without them.\n  {reason}\n"
            notice.write_text(text, encoding="utf-8")
            print(text, file=sys.stderr, end="", flush=True)


ParallelCompile("MAX_JOBS", default=2).install()

setup(
    name="megatron_b2",
    version=version(),
    description="The training system of the Baichuan 2 report: exact, tested in every parallel layout",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_b2", "megatron_b2.*"]),
    package_data={
        "megatron_b2": [
            "py.typed",
            "*.pyi",
            "config/presets/*.toml",
            "planner/*.toml",
            "planner/published/*.csv",
            "_cuda.txt",
        ]
    },
    install_requires=requirements("runtime"),
    extras_require={
        "deepspeed": requirements("deepspeed"),
        "triton": requirements("triton"),
        "corpus": requirements("corpus"),
        "dev": [p for name in ("deepspeed", "triton", "corpus", "dev") for p in requirements(name)],
    },
    entry_points={"console_scripts": ["b2=megatron_b2.cli.main:main"]},
    ext_modules=[
        Pybind11Extension(
            "megatron_b2._cpu",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").rglob("*.cpp")),
            include_dirs=["csrc/cpu"],
            depends=[str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").rglob("*.h")],
            cxx_std=17,
            extra_compile_args=["-O3"],
        ),
        # Sources are in compile_cuda; optional, so that setuptools does not miss it.
        Extension(CUDA_MODULE, sources=[], optional=True),
    ],
    cmdclass={"build_ext": BuildExtensions},
)
