"""The CUDA sources of csrc/cuda on the CPU: compiled by g++ with csrc/cuda/cpu/cpu_shim.h, called by ctypes.

The same sources run, one fibre a thread; see the header for what that shows and what it does not. Needs a
checkout, g++ and the CUDA headers, which the triton package carries.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.cuda import extension, matmul

CHECKOUT: Final = Path(__file__).resolve().parents[3]
SOURCES: Final = CHECKOUT / "csrc" / "cuda"
FLAGS: Final[Sequence[str]] = (
    "-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-DB2_CPU",
    "-Wall", "-Werror", "-Wno-attributes", "-Wno-unknown-pragmas",
)  # fmt: skip
"""_FORTIFY_SOURCE stops longjmp between fibres."""

_PROTOTYPE = re.compile(r"^int b2_(\w+)\((.*)\);$", re.MULTILINE)
_TYPES: Final[Mapping[str, Any]] = MappingProxyType(
    {"std::int64_t": ctypes.c_int64, "int": ctypes.c_int, "float": ctypes.c_float, "double": ctypes.c_double}
)


def missing() -> str:
    """Why the sources cannot be compiled for the CPU here; empty if they can."""
    if not SOURCES.is_dir():
        return f"csrc/cuda is not in {CHECKOUT}: needs a checkout"
    if shutil.which("g++") is None:
        return "g++ was not found"
    return "" if _headers() else "the CUDA headers were not found: install the triton package"


def _headers() -> Path | None:
    spec = find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        include = Path(folder) / "backends" / "nvidia" / "include"
        if (include / "cuda_bf16.h").is_file():
            return include
    return None


def prototypes(header: str) -> dict[str, tuple[Any, ...]]:
    """ctypes of the arguments of each function that csrc/cuda/kernels.h declares."""
    found = {}
    for name, arguments in _PROTOTYPE.findall(header):
        types = [argument.strip().rpartition(" ")[0] for argument in arguments.split(",")]
        found[name] = tuple(ctypes.c_void_p if kind.endswith("*") else _TYPES[kind] for kind in types)
    return found


def compile_shim(sources: Sequence[Path], target: Path) -> None:
    """Compile CUDA sources into one CPU library."""
    headers = _headers()
    assert headers is not None, missing()
    with tempfile.TemporaryDirectory(prefix="b2-shim-") as folder:
        include = [f"-I{SOURCES}", f"-I{SOURCES / 'cpu'}", "-isystem", str(headers)]
        objects = [Path(folder) / f"{path.stem}.o" for path in sources]
        compilers = [
            ["g++", *FLAGS, *include, "-c", "-x", "c++", str(path), "-o", str(into)]
            for path, into in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(_run, compilers))
        finished = Path(folder) / "shim.so"
        _run(["g++", "-shared", *map(str, objects), "-o", str(finished)])
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
            partial.write(finished.read_bytes())
        Path(partial.name).replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise InputError(f"g++ cannot compile the CUDA sources for the CPU:\n{done.stderr[:2000]}")


class Shim:
    """The functions of kernels.h on CPU memory."""

    def __init__(self, library: Path, header: str) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.b2_cpu_order.argtypes = (ctypes.c_int, ctypes.c_int64)
        for name, types in prototypes(header).items():
            getattr(self._library, f"b2_{name}").argtypes = types

    def call(self, name: str, *args: int | float) -> int:
        """Run a function, all arguments but the stream; its cudaError_t."""
        code: int = getattr(self._library, f"b2_{name}")(*args, 0)
        return code

    def launch(self, name: str, device: torch.device, *args: Tensor | int | float | None) -> None:
        """As `extension.launch`, on CPU tensors."""
        assert device.type == "cpu", device
        code = self.call(name, *extension.plain(args))
        if code != 0:
            raise RuntimeError(f"{name}: cudaError {code}")

    @contextmanager
    def order(self, *, backwards: bool = False, first_block: int = 0) -> Iterator[None]:
        """Run threads and blocks from the last to the first, or leave out the first blocks of every grid."""
        self._library.b2_cpu_order(int(backwards), first_block)
        try:
            yield
        finally:
            self._library.b2_cpu_order(0, 0)


@cache
def load_shim() -> Shim:
    """The shim of this checkout, compiled if its sources changed (build/cpu_shim of the checkout)."""
    if reason := missing():
        raise InputError(f"the CUDA kernels cannot run on the CPU here: {reason}")
    files = sorted(path for path in SOURCES.rglob("*") if path.is_file())
    text = b"\0".join([repr(FLAGS).encode(), *(path.read_bytes() for path in files)])
    library = CHECKOUT / "build" / "cpu_shim" / f"{hashlib.sha256(text).hexdigest()[:16]}.so"
    if not library.is_file():
        compile_shim(sorted(SOURCES.glob("*.cu")), library)
    return Shim(library, (SOURCES / "kernels.h").read_text(encoding="utf-8"))


@contextmanager
def kernels_on_cpu() -> Iterator[Shim]:
    """Let `megatron_b2.ops.cuda` work on CPU tensors, through the shim; in forked processes as well."""
    shim = load_shim()
    with patch.object(extension, "launch", shim.launch), patch.object(matmul, "product", _product):
        yield shim


def _product(a: Tensor, b: Tensor, *, out: Tensor, adds: bool = False) -> Tensor:
    """As `matmul.product`: torch has no product with a wider result on a CPU."""
    return torch.addmm(out, a.float(), b.float(), beta=float(adds), out=out)
