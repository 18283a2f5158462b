"""What the machine code of a kernel says: registers, spills, shared memory, width of accesses, occupancy.

Reads cubins (Triton) and objects with several kernels and architectures (nvcc), by cuobjdump. Nothing is run.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from megatron_b2.errors import InputError


@dataclass(frozen=True)
class Limits:
    """Resources of one multiprocessor (CUDA C++ programming guide, compute capabilities)."""

    shared_per_cta: int
    """Bytes a CTA may have, dynamic and static."""
    shared: int
    """Bytes in all; each CTA takes RESERVED_SHARED more than it asks for."""
    registers: int = 65_536
    warps: int = 64
    ctas: int = 32


LIMITS: Final[Mapping[str, Limits]] = MappingProxyType(
    {
        "sm_80": Limits(shared_per_cta=163 * 1024, shared=164 * 1024),
        "sm_90": Limits(shared_per_cta=227 * 1024, shared=228 * 1024),
    }
)
RESERVED_SHARED: Final = 1024
WARP_SIZE: Final = 32
REGISTER_UNIT: Final = 256
"""Registers are given to a warp in pieces of this many."""
SHARED_UNIT: Final = 128
"""Bytes of shared memory are given to a CTA in pieces of this many."""
SCHEDULERS: Final = 4
"""Of a multiprocessor; each has its part of the registers."""

GLOBAL_ACCESSES: Final = ("LDG", "STG", "LDGSTS", "LD", "ST")
BULK_ACCESSES: Final = ("UTMALDG", "UTMASTG", "UBLKCP", "UBLKPF")
ATOMICS: Final = ("RED", "REDG", "ATOM", "ATOMG", "UTMAREDG", "UBLKRED")
"""On global memory: what makes the order of a sum depend on timing."""
WIDTHS: Final[Mapping[str, int]] = MappingProxyType(
    {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
)


@dataclass(frozen=True)
class Binary:
    """One kernel for one architecture."""

    name: str
    """As the linker sees it."""
    arch: str
    """sm_80, sm_90 ...; sm_90a is sm_90."""
    registers: int
    """Of a thread."""
    stack: int
    """Bytes of a thread."""
    local: int
    """Bytes of local memory of a thread beside the stack."""
    static_shared: int
    """Bytes of a CTA known to the compiler."""
    max_threads: int
    """Of a CTA, that it was compiled for (.reqntid, __launch_bounds__); 0 where for any number."""
    opcodes: Mapping[str, int]
    """Instructions by full opcode, such as LDG.E.128."""

    def count(self, *bases: str) -> int:
        """Instructions whose opcode begins with one of these names, up to its first dot."""
        return sum(number for opcode, number in self.opcodes.items() if opcode.split(".")[0] in bases)

    @property
    def instructions(self) -> int:
        """All of them, without the padding behind the last."""
        return sum(number for opcode, number in self.opcodes.items() if opcode != "NOP")

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory: registers that did not suffice."""
        return self.count("LDL", "STL")

    @property
    def atomics(self) -> int:
        """Atomics and reductions on global memory."""
        return self.count(*ATOMICS)

    def accesses(self) -> dict[int, int]:
        """Accesses to global memory by their width in bits; bulk copies are not among them."""
        widths: Counter[int] = Counter()
        for opcode, number in self.opcodes.items():
            base, *modifiers = opcode.split(".")
            if base in GLOBAL_ACCESSES:
                widths[next((WIDTHS[word] for word in modifiers if word in WIDTHS), 32)] += number
        return dict(sorted(widths.items()))


def ctas_per_sm(arch: str, *, registers: int, threads: int, shared: int) -> int:
    """CTAs of `threads` threads with `registers` each and `shared` bytes that fit a multiprocessor.

    The rules of cuda_occupancy.h (CUDA toolkit) for compute capabilities 8.0 and 9.0.
    """
    limits = LIMITS[arch]
    warps = -(-threads // WARP_SIZE)
    of_warp = _round_up(registers * WARP_SIZE, REGISTER_UNIT)
    of_cta = _round_up(shared + RESERVED_SHARED, SHARED_UNIT)
    # A launch is refused as if every scheduler had to take as many warps as the fullest.
    fits = of_warp * _round_up(warps, SCHEDULERS) <= limits.registers and shared <= limits.shared_per_cta
    by_registers = limits.registers // SCHEDULERS // of_warp * SCHEDULERS // warps
    return min(by_registers, limits.shared // of_cta, limits.warps // warps, limits.ctas) if fits else 0


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(arch: str, *, registers: int, threads: int, shared: int) -> float:
    """Share of a multiprocessor's warps that can be resident."""
    ctas = ctas_per_sm(arch, registers=registers, threads=threads, shared=shared)
    return ctas * -(-threads // WARP_SIZE) / LIMITS[arch].warps


def tool(name: str) -> Path:
    """cuobjdump, nvdisasm or ptxas of the triton package."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def read_binary(path: Path) -> tuple[Binary, ...]:
    """All kernels of a cubin, object or library, for all its architectures."""
    command = [str(tool("cuobjdump")), "-elf", "-res-usage", "-sass", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    kernels = parse_dump(done.stdout)
    if done.returncode != 0 or not kernels:
        raise InputError(f"cuobjdump finds no kernel in {path}: {done.stderr.strip() or 'no message'}")
    return kernels


@dataclass
class _Reading:
    """A kernel of which not everything has been read."""

    resources: Mapping[str, int] = field(default_factory=dict)
    max_threads: int = 0
    opcodes: Counter[str] = field(default_factory=Counter)


_ARCH = re.compile(r"^arch = sm_(\d+)|elf: .*\bsm=(\d+)")
_RESOURCES = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")
_FUNCTION = re.compile(r"^\s+Function :? ?(\S+?):?$")
_ATTRIBUTES = re.compile(r"^\.nv\.info\.(\S+)$")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)")


def parse_dump(text: str) -> tuple[Binary, ...]:
    """Kernels in the output of `cuobjdump -elf -res-usage -sass`, in order."""
    found: dict[tuple[str, str], _Reading] = {}
    arch, name, attribute = "", "", ""
    for line in _interesting(text):
        if match := _ARCH.search(line):
            arch, name = f"sm_{match[1] or match[2]}", ""
        elif match := _ATTRIBUTES.match(line) or _FUNCTION.match(line):
            name = match[1]
            found.setdefault((arch, name), _Reading())
        elif name and (match := _INSTRUCTION.match(line)):
            found[arch, name].opcodes[match[1]] += 1
        elif name and " REG:" in line:
            found[arch, name].resources = {key: int(value) for key, value in _RESOURCES.findall(line)}
        elif "Attribute:" in line:
            attribute = line.split()[-1]
        elif name and "Value:" in line and attribute in ("EIATTR_REQNTID", "EIATTR_MAX_THREADS"):
            x, y, z = (int(word, 16) for word in line.split()[1:4])
            found[arch, name].max_threads = x * y * z
    return tuple(_binary(arch, name, reading) for (arch, name), reading in found.items() if reading.resources)


def _interesting(text: str) -> Iterator[str]:
    """Lines without the hexadecimal dumps."""
    return (line for line in text.splitlines() if not line.startswith("0x"))


def _binary(arch: str, name: str, reading: _Reading) -> Binary:
    usage = reading.resources
    shared = usage["SHARED"]
    # nvcc counts the reserved KB of sm_90 as part of a kernel's own static memory.
    if arch == "sm_90" and shared >= RESERVED_SHARED:
        shared -= RESERVED_SHARED
    return Binary(
        name=name,
        arch=arch,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        static_shared=shared,
        max_threads=reading.max_threads,
        opcodes=MappingProxyType(dict(reading.opcodes)),
    )
