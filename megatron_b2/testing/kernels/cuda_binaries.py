"""Machine code of the CUDA C++ kernels of csrc/cuda, where nvcc is installed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from megatron_b2.errors import InputError
from megatron_b2.files.atomic import write_json
from megatron_b2.testing.kernels import ahead_of_time, binary
from megatron_b2.testing.kernels.ahead_of_time import ARCHITECTURES, Compiled, describe
from megatron_b2.testing.kernels.binary import read_binary

FLAGS: Final = ("-O3", "-std=c++17")
DEFAULT_THREADS: Final = 1024
"""Assumed of a kernel without __launch_bounds__: the most that may be launched."""


def nvcc_version() -> str:
    """Such as "13.0.88"; empty where nvcc is not installed."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return ""
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    match = re.search(r"\bV(\d+[.\d]*)", done.stdout)
    return match[1] if match else "unknown"


def compile_sources(root: Path, cache: Path) -> list[tuple[str, Compiled]]:
    """Source file and kernel, for every kernel and architecture of root/csrc/cuda; none without nvcc."""
    sources = sorted((root / "csrc" / "cuda").glob("*.cu"))
    compiler = nvcc_version()
    if not compiler:
        return []
    cache.mkdir(parents=True, exist_ok=True)
    return [(source.name, kernel) for source in sources for kernel in _compile(source, cache, compiler)]


def _compile(source: Path, cache: Path, compiler: str) -> list[Compiled]:
    """Compile one file and read it, or take what was read before."""
    parts = [source, *sorted(source.parent.glob("*.cuh")), *sorted(source.parent.glob("*.h"))]
    parts += [Path(module.__file__) for module in (binary, ahead_of_time) if module.__file__]
    digest = hashlib.sha256(compiler.encode())
    for part in (*parts, Path(__file__)):
        digest.update(part.read_bytes())
    report = cache / f"{source.stem}-{digest.hexdigest()[:32]}.json"
    if report.is_file():
        return [Compiled(**kernel) for kernel in json.loads(report.read_text())]
    with TemporaryDirectory(prefix="b2-nvcc-") as folder:
        out = Path(folder) / "kernels.o"
        numbers = [arch.removeprefix("sm_") for arch in ARCHITECTURES]
        targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
        command = ["nvcc", *FLAGS, *targets, "-c", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise InputError(f"nvcc cannot compile {source}:\n{done.stderr.strip()}")
        codes = read_binary(out)
    found = [
        describe(code, kernel=readable(code.name), constants={}, dynamic_shared=0, threads=DEFAULT_THREADS)
        for code in codes
    ]
    found.sort(key=lambda kernel: (kernel.kernel, kernel.arch))
    write_json(report, [asdict(kernel) for kernel in found])
    return found


def readable(symbol: str) -> str:
    """ "rows<__nv_bfloat16, 8>" from a mangled symbol; the symbol itself without c++filt (binutils)."""
    tool = shutil.which("c++filt")
    if tool is None:
        return symbol
    done = subprocess.run([tool, symbol], capture_output=True, text=True, check=True)
    name = done.stdout.strip().removeprefix("void ").replace("(anonymous namespace)::", "")
    depth, end = 0, len(name)
    for place, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            end = place
            break
    return re.sub(r"\b(\w+::)+", "", name[:end]).replace("|", "/")
