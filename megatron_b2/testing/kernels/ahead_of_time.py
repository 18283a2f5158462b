"""Machine code of Triton kernels for GPUs that are not here.

The real wrapper of an operation runs on `meta` tensors in a forked process. Every launch is recorded instead
of done, with Triton's own specialisation of the arguments (types, ones, multiples of 16), compiled for the
wanted architecture by the compiler and ptxas of the triton package, and read back from the binary. So what is
read is what would be launched: same tiles, same constants, same alignment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final
from unittest.mock import patch

import torch.distributed as dist

from megatron_b2.files.atomic import write_json
from megatron_b2.ops.triton import target
from megatron_b2.testing.fork import run_ranks
from megatron_b2.testing.kernels import binary
from megatron_b2.testing.kernels.binary import Binary, ctas_per_sm, occupancy, read_binary

ARCHITECTURES: Final = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Case:
    """Something that launches kernels."""

    name: str
    run: Callable[[], object]
    """Called once for each architecture where Triton launches nothing; works on `meta` tensors."""


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture as it would be launched."""

    kernel: str
    arch: str
    constants: Mapping[str, str]
    """Arguments declared as compile-time constants by name, as text."""
    threads: int
    """Of a CTA."""
    stages: int
    shared: int
    """Bytes of a CTA, dynamic and static."""
    registers: int
    stack: int
    spills: int
    """Loads and stores of registers that did not fit."""
    ctas_per_sm: int
    occupancy: float
    accesses: Mapping[str, int]
    """Instructions on global memory by width in bits."""
    scalar_accesses: int
    """Loads and stores of one value by a whole program (a row's statistics), which cannot be wide."""
    bulk_copies: int
    """By the tensor memory accelerator."""
    dots: int
    """Matrix products in the kernel's source, after inlining."""
    hmma: int
    hgmma: int
    atomics: int
    instructions: int

    @property
    def wide_share(self) -> float:
        """Share of 128-bit instructions on global memory, scalars set aside; 1 where there are none."""
        wide = self.accesses.get("128", 0)
        narrow = max(0, sum(self.accesses.values()) - wide - self.scalar_accesses)
        return wide / (wide + narrow) if wide + narrow else 1.0


@dataclass(frozen=True)
class Launched:
    """One launch of a case."""

    case: str
    grid: tuple[int, ...]
    kernel: Compiled


@dataclass(frozen=True)
class _Launch:
    """What Triton would compile."""

    case: str
    kernel: Any
    """The JITFunction."""
    grid: tuple[int, ...]
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: Any
    target: Any

    def source(self) -> Any:
        from triton.compiler import ASTSource

        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)


def compile_cases(
    cases: Sequence[Case],
    cache: Path,
    *,
    architectures: Sequence[str] = ARCHITECTURES,
    workers: int = 1,
    timeout: float = 3600.0,
) -> list[Launched]:
    """Compile everything the cases launch.

    Args:
        cases: what to run; no kernel module may have been imported with the interpreter on.
        cache: folder for compiled kernels and what was read from them; made if missing, safe to delete.
        architectures: names of `ARCHITECTURES`.
        workers: processes that compile.
        timeout: seconds for all of it.

    Returns:
        Every launch in the order of cases, one architecture after the other; equal launches of a case once.
    """
    cache.mkdir(parents=True, exist_ok=True)
    parts = run_ranks(workers, _work, cases, cache, architectures, timeout=timeout)
    return sorted_by_turn(parts)


def sorted_by_turn(parts: list[list[tuple[int, Launched]]]) -> list[Launched]:
    """The workers' results in the order of recording."""
    return [
        launched
        for _, launched in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
    ]


def _work(cases: Sequence[Case], cache: Path, architectures: Sequence[str]) -> list[tuple[int, Launched]]:
    """Body of one worker: record everything, compile every n-th kernel."""
    import triton

    triton.knobs.cache.dir = str(cache / "triton")
    rank, size = dist.get_rank(), dist.get_world_size()
    shares: dict[str, int] = {}
    launches = [launch for arch in architectures for launch in _record(cases, arch)]
    results = []
    for turn, (key, launch) in enumerate(_unique(launches)):
        # The first launch that needs a kernel decides who compiles it.
        if shares.setdefault(key, len(shares)) % size == rank:
            compiled = _compile(launch, cache / f"{key}.json")
            results.append((turn, Launched(launch.case, launch.grid, compiled)))
    return results


def _unique(launches: Sequence[_Launch]) -> Iterator[tuple[str, _Launch]]:
    seen = set()
    for launch in launches:
        key = _key(launch)
        if (launch.case, key, launch.grid) not in seen:
            seen.add((launch.case, key, launch.grid))
            yield key, launch


def _record(cases: Sequence[Case], arch: str) -> list[_Launch]:
    """Run the cases with launches taken down instead of done."""
    launches = []
    with _recording(arch) as recorded:
        for case in cases:
            case.run()
            launches += [_Launch(case.name, *found) for found in recorded]
            recorded.clear()
    return launches


@contextmanager
def _recording(arch: str) -> Iterator[list[Any]]:
    """Triton believes that a GPU of `arch` is there, and hands over its launches."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    recorded: list[Any] = []
    gpu = GPUTarget("cuda", int(arch.removeprefix("sm_")), binary.WARP_SIZE)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # The compiler state of a kernel is kept by device: one device for each architecture.
        _, _, _, backend, binder = self.device_caches[gpu.arch]
        options["debug"] = False
        bound, specialization, _ = binder(*args, **options)
        parsed, signature, constants, attributes = self._pack_args(
            backend, options, bound, specialization, options
        )
        grid = tuple(int(size) for size in (grid(bound) if callable(grid) else grid))
        recorded.append((self, grid, signature, constants, attributes, parsed, gpu))

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return gpu

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", run))
        stack.enter_context(patch.object(target, "arch_of", lambda device: arch))
        driver.set_active(Driver())
        yield recorded


def _key(launch: _Launch) -> str:
    """Changes with the kernel's source, its arguments, the compiler and the reader."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    variables = get_cache_invalidating_env_vars()
    compiler = get_cache_key(launch.source(), make_backend(launch.target), launch.options, variables)
    readers = [Path(file).read_bytes() for file in (__file__, binary.__file__)]
    return hashlib.sha256(b"".join([compiler.encode(), *readers])).hexdigest()[:32]


def _compile(launch: _Launch, report: Path) -> Compiled:
    """Compile and read, or take what was read before."""
    import triton

    if report.is_file():
        return Compiled(**json.loads(report.read_text()))
    options = dict(vars(launch.options))
    done = triton.compile(launch.source(), target=launch.target, options=options)
    with TemporaryDirectory(prefix="b2-cubin-") as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(done.asm["cubin"])
        (code,) = read_binary(cubin)
    parameters = launch.kernel.params
    declared = {path: parameters[path[0]] for path in launch.constants if parameters[path[0]].is_constexpr}
    compiled = describe(
        code,
        kernel=launch.kernel.__name__,
        constants={found.name: _text(launch.constants[path]) for path, found in declared.items()},
        stages=done.metadata.num_stages,
        dynamic_shared=done.metadata.shared,
        intermediate=done.asm["ttir"],
    )
    write_json(report, asdict(compiled))
    return compiled


def _text(constant: object) -> str:
    """A compile-time argument; functions and types by their name."""
    return str(getattr(constant, "__name__", constant))


def describe(
    code: Binary,
    *,
    kernel: str,
    constants: Mapping[str, str],
    dynamic_shared: int,
    threads: int = 0,
    stages: int = 0,
    intermediate: str = "",
) -> Compiled:
    """What a binary says of itself.

    Args:
        code: the binary.
        kernel: its name for people.
        constants: compile-time arguments.
        dynamic_shared: bytes that a launch asks for.
        threads: of a CTA, where the binary does not say.
        stages: of the pipelined loops.
        intermediate: Triton's first IR, from which products and scalar accesses are counted.
    """
    shape = {
        "registers": code.registers,
        "threads": code.max_threads or threads,
        "shared": dynamic_shared + code.static_shared,
    }
    lines = [line.strip() for line in intermediate.splitlines()]
    scalars = [
        line for line in lines if ("tt.load " in line or "tt.store " in line) and "tensor<" not in line
    ]
    return Compiled(
        kernel=kernel,
        arch=code.arch,
        constants=constants,
        stages=stages,
        stack=code.stack + code.local,
        spills=code.spills,
        ctas_per_sm=ctas_per_sm(code.arch, **shape),
        occupancy=occupancy(code.arch, **shape),
        accesses={str(width): number for width, number in code.accesses().items()},
        scalar_accesses=len(scalars),
        bulk_copies=code.count(*binary.BULK_ACCESSES),
        dots=sum("tt.dot" in line for line in lines),
        hmma=code.count("HMMA"),
        hgmma=code.count("HGMMA"),
        atomics=code.atomics,
        instructions=code.instructions,
        **shape,
    )
