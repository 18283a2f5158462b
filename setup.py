"""Build of megatron_b2: the Python package and its C++ extension (no CUDA, Triton or DeepSpeed needed)."""

from __future__ import annotations

import re
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

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


ParallelCompile("MAX_JOBS", default=2).install()

setup(
    name="megatron_b2",
    version=version(),
    description="The training system of the Baichuan 2 report: exact, tested in every parallel layout",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_b2", "megatron_b2.*"]),
    package_data={"megatron_b2": ["py.typed", "*.pyi", "config/presets/*.toml"]},
    install_requires=requirements("runtime"),
    extras_require={
        "deepspeed": requirements("deepspeed"),
        "dev": requirements("deepspeed") + requirements("dev"),
    },
    entry_points={"console_scripts": ["b2=megatron_b2.cli.main:main"]},
    ext_modules=[
        Pybind11Extension(
            "megatron_b2._cpu",
            sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")),
            cxx_std=17,
            extra_compile_args=["-O3"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
