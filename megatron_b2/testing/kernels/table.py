"""The table of kernels, docs/kernels.md and kernels.json: kernel x architecture x model x tensor parallel.

Made from binaries alone (`ahead_of_time`): the same on every machine with the same compilers, so that a test
can refuse a change that makes a value worse.

    python -m megatron_b2.testing.kernels.table
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from megatron_b2.errors import InputError
from megatron_b2.files.atomic import atomic_files
from megatron_b2.testing.kernels.ahead_of_time import ARCHITECTURES, Case, Compiled, compile_cases
from megatron_b2.testing.kernels.binary import LIMITS
from megatron_b2.testing.kernels.cuda_binaries import compile_sources, nvcc_version
from megatron_b2.testing.kernels.variants import SINGLE, TOKENS, Variant, variants

ROOT: Final = Path(__file__).resolve().parents[3]
DOCS: Final = ROOT / "docs"
CACHE: Final = ROOT / "runs" / "kernels"
CUDA: Final = "cuda"
"""In place of the shape of CUDA C++ kernels: their binaries are read, their launches not recorded."""


@dataclass(frozen=True)
class Row:
    """One kernel that one operation launches in one shape."""

    op: str
    shape: str
    tensor_parallel: int
    index: int
    """Counts the differing launches of one kernel by one variant."""
    grid: tuple[int, ...]
    kernel: Compiled

    @property
    def key(self) -> str:
        """What stays the same when the kernel changes."""
        shape = f"{self.shape} | TP {self.tensor_parallel}"
        return f"{self.op} | {shape} | {self.kernel.arch} | {self.kernel.kernel} {self.index}"


def triton_rows(
    chosen: Sequence[Variant],
    cache: Path,
    *,
    architectures: Sequence[str] = ARCHITECTURES,
    workers: int = 1,
) -> list[Row]:
    """Compile what the variants launch; see `compile_cases`."""
    by_name = {variant.name: variant for variant in chosen}
    cases = [Case(variant.name, variant.run) for variant in chosen]
    numbers: Counter[tuple[str, str, str]] = Counter()
    rows = []
    for launched in compile_cases(cases, cache, architectures=architectures, workers=workers):
        variant = by_name[launched.case]
        place = (launched.case, launched.kernel.arch, launched.kernel.kernel)
        rows.append(
            Row(
                variant.op,
                variant.shape,
                variant.tensor_parallel,
                numbers[place],
                launched.grid,
                launched.kernel,
            )
        )
        numbers[place] += 1
    return rows


def cuda_rows(cache: Path) -> list[Row]:
    """The kernels of csrc/cuda; none where there are no sources or no nvcc."""
    return [Row(source, CUDA, 1, 0, (), kernel) for source, kernel in compile_sources(ROOT, cache)]


def triton_version() -> str:
    """Of the installed package, which brings its own ptxas."""
    return version("triton")


def broken_rules(row: Row) -> list[str]:
    """What every kernel must keep, whatever it was before."""
    kernel = row.kernel
    products = kernel.hmma + kernel.hgmma
    rules = {
        f"{kernel.spills} spills": kernel.spills == 0,
        f"{kernel.stack} bytes of stack": kernel.stack == 0,
        f"{kernel.shared} bytes of shared memory": kernel.shared <= LIMITS[kernel.arch].shared_per_cta,
        "does not fit on a multiprocessor": kernel.ctas_per_sm > 0,
        f"{kernel.atomics} atomics on global memory": kernel.atomics == 0,
        "no tensor-core instruction": not kernel.dots or is_single(row) or products > 0,
        f"{products} tensor-core instructions, which round fp32 to TF32": not is_single(row) or products == 0,
        f"{kernel.accesses.get('16', 0)} accesses of 16 bits": not is_narrow(row),
        f"{kernel.wide_share:.0%} of accesses are 128 bits wide": not is_elementwise(row)
        or kernel.wide_share == 1.0,
    }
    return [f"{row.key}: {text}" for text, kept in rules.items() if not kept]


def is_single(row: Row) -> bool:
    """A Triton kernel in fp32."""
    return row.shape.endswith(f" {SINGLE}")


def is_narrow(row: Row) -> bool:
    """Attention that moves single values of 16 bits: the compiler did not see that rows begin on 16 bytes."""
    return row.op == "causal_attention" and "16" in row.kernel.accesses


def is_elementwise(row: Row) -> bool:
    """Kernels whose time is that of moving bytes, in widths that are a multiple of 16 bytes."""
    if row.shape == CUDA:
        name = row.kernel.kernel
        return (
            row.op in ("rms_norm.cu", "swiglu.cu")
            and name.startswith(("forward<", "backward<"))
            and ", 1>" not in name
        )
    return row.op in ("rms_norm", "add_rms_norm", "rope_split", "swiglu")


# Name, value, whether more of it is worse.
_RATCHET: Final[Sequence[tuple[str, Callable[[Compiled], float], bool]]] = (
    ("registers", lambda k: k.registers, True),
    ("spills", lambda k: k.spills, True),
    ("stack", lambda k: k.stack, True),
    ("shared memory", lambda k: k.shared, True),
    ("atomics", lambda k: k.atomics, True),
    ("occupancy", lambda k: k.occupancy, False),
    ("128-bit share", lambda k: k.wide_share, False),
    ("HGMMA", lambda k: float(k.hgmma > 0), False),
)


def worse(before: Iterable[Row], now: Iterable[Row]) -> list[str]:
    """Values of `now` that are worse than in `before`, and kernels that `before` does not know."""
    known = {row.key: row.kernel for row in before}
    found = []
    for row in now:
        if row.key not in known:
            found.append(f"{row.key}: not in the table; make it anew with `b2 ops table`")
            continue
        for name, value, more_is_worse in _RATCHET:
            old, new = value(known[row.key]), value(row.kernel)
            if (new > old) if more_is_worse else (new < old):
                found.append(f"{row.key}: {name} {old:g} became {new:g}")
    return found


def read_table(path: Path = DOCS / "kernels.json") -> list[Row]:
    """The rows of a kernels.json."""
    try:
        return [
            Row(**{**row, "grid": tuple(row["grid"]), "kernel": Compiled(**row["kernel"])})
            for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no table of kernels ({error}); make it with `b2 ops table`") from error


def read_versions(path: Path = DOCS / "kernels.json") -> dict[str, str]:
    """The compilers that made a kernels.json."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["versions"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is no table of kernels ({error}); make it with `b2 ops table`") from error


def write_table(
    docs: Path = DOCS, cache: Path = CACHE, workers: int = 2, ops: tuple[str, ...] = ()
) -> list[Row]:
    """Compile everything and write kernels.md and kernels.json.

    Args:
        docs: folder of both files.
        cache: folder of compiled kernels, safe to delete.
        workers: processes that compile.
        ops: functions to compile ("cuda" for csrc/cuda); the rows of others are taken from the present table,
            also those of csrc/cuda without nvcc. Empty for all.
    """
    chosen = [variant for variant in variants() if not ops or variant.op in ops]
    places = {variant.op: place for place, variant in reversed(list(enumerate(variants())))}
    nvcc = nvcc_version() if not ops or CUDA in ops else ""
    rows = triton_rows(chosen, cache, workers=workers) + (cuda_rows(cache) if nvcc else [])
    present = docs / "kernels.json"
    versions = {"triton": triton_version(), "nvcc": nvcc}
    if present.is_file():
        # What was not compiled now stays as it was.
        made = {variant.op for variant in chosen}
        before = read_table(present)
        rows += [row for row in before if ops and row.shape != CUDA and row.op not in made]
        rows += [row for row in before if not nvcc and row.shape == CUDA]
        versions["nvcc"] = nvcc or read_versions(present)["nvcc"]
    rows.sort(key=lambda row: places.get(row.op, len(places)))
    with atomic_files(docs / "kernels.md", docs / "kernels.json") as (text, data):
        text.write(markdown(rows, versions).encode())
        data.write(_json(rows, versions).encode())
    return rows


def _json(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """One line a row, so that a change of the table can be read."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    return f'{{"versions": {json.dumps(dict(versions))}, "rows": [\n{lines}\n]}}\n'


_HEAD: Final = """# Kernels

Generated by `b2 ops table`; do not edit. Every number is read from machine code made on a machine without a
GPU: the real wrappers ran on `meta` tensors, each launch was specialised and compiled by Triton as it would
be on the GPU. No speed is stated here because none was measured.

{tokens} tokens of bf16 (of fp32 where the shape says so), forward and backward; TP 8 is one rank's share.
Compilers: {versions}.

{legend}
- No kernel has an atomic on global memory: sums have one order, results are the same bits on every run.
"""
_CUDA_NOTE: Final = """
Compiled by nvcc, for the largest CTA that a kernel may have. These are for bf16; those for fp32, fp16 and
widths that are no multiple of 16 bytes are in kernels.json.
"""
LEGEND: Final = """- **regs**: registers of a thread.
- **spills**: loads and stores of registers that did not fit (LDL, STL).
- **shared**: KB a CTA, at most 163 on sm_80 and 227 on sm_90.
- **CTAs**, **occ**: CTAs that fit a multiprocessor, share of its warps that they fill.
- **128-bit**: share of the instructions on global memory that move 16 bytes a thread; single values (the
  statistics of a row) are set aside. **atomics**: on global memory.
- **MMA**: matrix instructions, H for HMMA (16 x 8 x 16 by a warp), HG for HGMMA (64 rows by four)."""
_COLUMNS: Final = (
    "kernel",
    "shapes",
    "arch",
    "constants",
    "warps",
    "stages",
    "regs",
    "spills",
    "shared",
    "CTAs",
    "occ",
    "128-bit",
    "atomics",
    "MMA",
)


def markdown(rows: Sequence[Row], versions: Mapping[str, str]) -> str:
    """kernels.md: one section an operation; shapes that run the same machine code share a line."""
    tools = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    text = _HEAD.format(tokens=f"{TOKENS:,}", versions=tools, legend=LEGEND)
    for title, is_cuda in (("Triton kernels", False), ("CUDA C++ kernels", True)):
        part = [row for row in rows if (row.shape == CUDA) == is_cuda and is_shown(row)]
        text += f"\n## {title}\n" if part else ""
        text += _CUDA_NOTE if part and is_cuda else ""
        for op in dict.fromkeys(row.op for row in part):
            text += f"\n### {op}\n\n" + markdown_table([row for row in part if row.op == op])
    return text


def is_shown(row: Row) -> bool:
    """Of the CUDA C++ kernels, which exist for every dtype and any width: the wide ones for bf16."""
    return row.shape != CUDA or ("bfloat16" in row.kernel.kernel and ", 1>" not in row.kernel.kernel)


def markdown_table(rows: Sequence[Row]) -> str:
    """One line for each piece of machine code, with all the shapes that run it."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        shapes.setdefault(json.dumps(asdict(row.kernel)), []).append(row)
    # A kernel's lines together, the architectures side by side.
    order = {name: place for place, name in enumerate(dict.fromkeys(row.kernel.kernel for row in rows))}
    for same in sorted(shapes.values(), key=lambda same: order[same[0].kernel.kernel]):
        lines.append("| " + " | ".join(_cells(same)) + " |")
    return "\n".join(lines) + "\n"


def _cells(rows: Sequence[Row]) -> list[str]:
    kernel = rows[0].kernel
    mma = " ".join(
        f"{number} {name}" for name, number in (("H", kernel.hmma), ("HG", kernel.hgmma)) if number
    )
    return [
        f"`{kernel.kernel}`",
        _shapes(rows),
        kernel.arch,
        ", ".join(
            f"{name} {value}" for name, value in kernel.constants.items() if value not in ("None", "False")
        ),
        str(kernel.threads // 32),
        str(kernel.stages or ""),
        str(kernel.registers),
        str(kernel.spills) + (f" + {kernel.stack} B" if kernel.stack else ""),
        f"{kernel.shared / 1024:.1f}",
        str(kernel.ctas_per_sm),
        f"{kernel.occupancy:.0%}",
        f"{kernel.wide_share:.0%}" if kernel.accesses else "-",
        str(kernel.atomics),
        mma or "-",
    ]


def _shapes(rows: Sequence[Row]) -> str:
    """ "7B TP 1, 8; 13B TP 1"."""
    sizes: dict[str, list[int]] = {}
    for row in rows:
        of_shape = sizes.setdefault(row.shape, [])
        if row.shape != CUDA and row.tensor_parallel not in of_shape:
            of_shape.append(row.tensor_parallel)
    parts = [f"{shape} TP {', '.join(map(str, found))}" for shape, found in sizes.items() if found]
    return "; ".join(parts)


if __name__ == "__main__":
    import tyro

    for row in tyro.cli(write_table):
        for line in broken_rules(row):
            print(line)
