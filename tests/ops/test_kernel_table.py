"""Machine code of every kernel, without a GPU: reading it, the rules it keeps, and that no value gets worse."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_b2.cli import ops as cli
from megatron_b2.cli.main import main
from megatron_b2.errors import InputError
from megatron_b2.testing.kernels import table
from megatron_b2.testing.kernels.ahead_of_time import Case, Compiled, compile_cases
from megatron_b2.testing.kernels.attention import HEAD_DIMS
from megatron_b2.testing.kernels.binary import LIMITS, ctas_per_sm, occupancy, parse_dump, read_binary
from megatron_b2.testing.kernels.cuda_binaries import readable
from megatron_b2.testing.kernels.table import Row, broken_rules, markdown, read_table, triton_rows, worse
from megatron_b2.testing.kernels.variants import variants

has_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
has_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")

GOOD = Compiled(
    kernel="scale", arch="sm_80", constants={}, threads=128, stages=3, shared=0, registers=32, stack=0, spills=0,
    ctas_per_sm=16, occupancy=1.0, accesses={"128": 2}, scalar_accesses=0, bulk_copies=0, dots=0, hmma=0, hgmma=0,
    atomics=0, instructions=40,
)  # fmt: skip

DUMP = """
64bit elf: type=2, abi=7, sm=90a, toolkit=128, flags = 0x5a0d5a
.nv.info.first
	Attribute:	EIATTR_REQNTID
	Value:	0x80 0x2 0x1
0x00000000 0x00000000
Resource usage:
 Function first:
  REG:40 STACK:8 SHARED:0 LOCAL:4 CONSTANT[0]:568 TEXTURE:0 SURFACE:0 SAMPLER:0
	code for sm_90a
		Function : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ; /* 0x0000000402048981 */
        /*0020*/              @P1  LDG.E.U16 R4, desc[UR4][R2.64] ;          /* 0x0000000402048981 */
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.64 [R9], desc[UR4][R2.64] ; /* 0x00 */
        /*0040*/             @!UP0 STG.E desc[UR4][R2.64], R4 ;              /* 0x0000000402048981 */
        /*0050*/                   LDL R4, [R1] ;                            /* 0x0000000402048981 */
        /*0060*/                   STL.64 [R1], R4 ;                         /* 0x0000000402048981 */
        /*0070*/                   REDUX.SUM UR4, R4 ;                       /* 0x0000000402048981 */
        /*0080*/                   REDG.E.ADD.F32 desc[UR4][R2.64], R4 ;     /* 0x0000000402048981 */
        /*0090*/                   ATOMS.ADD RZ, [R4], R5 ;                  /* 0x0000000402048981 */
        /*00a0*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ; /* 0x00 */
        /*00b0*/                   HFMA2.MMA R4, -RZ, RZ, 0, 0 ;             /* 0x0000000402048981 */
        /*00c0*/                   NOP ;                                     /* 0x0000000402048981 */
"""


def test_a_dump_is_read_instruction_by_instruction() -> None:
    (kernel,) = parse_dump(DUMP)
    assert (kernel.name, kernel.arch, kernel.registers, kernel.max_threads) == ("first", "sm_90", 40, 256)
    assert (kernel.stack, kernel.local, kernel.spills) == (8, 4, 2)
    assert kernel.accesses() == {16: 1, 32: 1, 64: 1, 128: 1}
    assert kernel.atomics == 1  # neither REDUX, within a warp, nor ATOMS, in shared memory
    assert (kernel.count("HGMMA"), kernel.count("HMMA")) == (1, 0)
    assert kernel.instructions == 12


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "ctas"),
    [
        ("sm_80", 32, 256, 0, 8),  # by warps
        ("sm_80", 33, 256, 0, 6),  # 40 registers of each thread: 12 warps a scheduler
        ("sm_80", 255, 256, 0, 1),
        ("sm_80", 128, 128, 0, 4),
        ("sm_80", 32, 32, 0, 32),  # by CTAs
        ("sm_80", 16, 64, 80 * 1024, 2),  # with 1 KB reserved for each
        ("sm_80", 16, 64, 82 * 1024, 1),
        ("sm_80", 16, 64, 164 * 1024, 0),
        ("sm_90", 16, 64, 164 * 1024, 1),
        ("sm_90", 255, 384, 0, 0),  # refused: as many warps as a scheduler cannot take
    ],
)
def test_occupancy_follows_the_rules_of_the_toolkit(
    arch: str, registers: int, threads: int, shared: int, ctas: int
) -> None:
    assert ctas_per_sm(arch, registers=registers, threads=threads, shared=shared) == ctas
    share = occupancy(arch, registers=registers, threads=threads, shared=shared)
    assert share == ctas * -(-threads // 32) / 64


def example(name: str) -> Callable[[], None]:
    """Launches of tests/ops/example_kernels.py; imported where Triton's interpreter is off."""

    def run() -> None:
        spec = importlib.util.spec_from_file_location(
            "example_kernels", Path(__file__).parent / "example_kernels.py"
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        n = 5000 if name == "scale, odd size" else 4096
        x = torch.empty(n, dtype=torch.bfloat16, device="meta")
        if name.startswith("scale"):
            module.scale[lambda constants: (-(-n // constants["BLOCK"]),)](
                x, torch.empty_like(x), 2.0, n, BLOCK=1024
            )
        elif name == "total":
            module.total[(1,)](x, torch.empty(1, device="meta"), BLOCK=1024)
        else:
            module.product[(1,)](x, torch.empty_like(x), TILE=64, num_stages=1)

    return run


@has_triton
def test_what_would_be_launched_is_what_is_compiled(tmp_path: Path) -> None:
    names = ("scale", "scale, odd size", "total", "product")
    cases = [Case(name, example(name)) for name in names]
    found = {(row.case, row.kernel.arch): row for row in compile_cases(cases, tmp_path)}
    assert len(found) == 8
    for arch in LIMITS:
        assert found["scale", arch].grid == (4,)
        assert found["scale", arch].kernel.accesses == {"128": 2}
        assert found["scale", arch].kernel.constants == {"BLOCK": "1024"}
        # A length that is no multiple of 16 leaves the masks unknown: one element at a time.
        assert found["scale, odd size", arch].kernel.accesses == {"16": 16}
        assert found["total", arch].kernel.atomics == 1
        assert found["product", arch].kernel.dots == 1
    assert found["product", "sm_80"].kernel.hmma > 0
    assert found["product", "sm_90"].kernel.hgmma > 0

    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = {(row.case, row.kernel.arch): row for row in compile_cases(cases, tmp_path)}
    assert again == found
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}


@has_triton
@has_nvcc
def test_objects_of_nvcc_hold_several_kernels_and_architectures(tmp_path: Path) -> None:
    source = tmp_path / "two.cu"
    source.write_text(
        "template <int N> __global__ void __launch_bounds__(N) turn(float* x) {\n"
        "  __shared__ float s[N];\n  s[threadIdx.x] = x[threadIdx.x];\n  __syncthreads();\n"
        "  x[threadIdx.x] = s[N - 1 - threadIdx.x];\n}\n"
        "__global__ void add(float* x) { atomicAdd(x, 1.f); }\n"
        "template __global__ void turn<256>(float*);\n"
    )
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in (80, 90)]
    subprocess.run(["nvcc", *targets, "-c", source.name, "-o", "two.o"], cwd=tmp_path, check=True)
    kernels = {(readable(code.name), code.arch): code for code in read_binary(tmp_path / "two.o")}
    assert set(kernels) == {(name, arch) for name in ("turn<256>", "add") for arch in LIMITS}
    for arch in LIMITS:
        assert kernels["turn<256>", arch].static_shared == 1024
        assert kernels["turn<256>", arch].max_threads == 256
        assert (kernels["turn<256>", arch].atomics, kernels["add", arch].atomics) == (0, 1)


@has_triton
def test_a_file_without_kernels_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.cubin").write_text("nothing")
    with pytest.raises(InputError, match=r"no kernel in .*no\.cubin"):
        read_binary(tmp_path / "no.cubin")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 1}, "1 spills"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"shared": 163 * 1024 + 1}, "166913 bytes of shared memory"),
        ({"ctas_per_sm": 0}, "does not fit"),
        ({"atomics": 1}, "1 atomics"),
        ({"accesses": {"128": 3, "64": 1}}, "75% of accesses"),
        ({"dots": 1}, "no tensor-core instruction"),
    ],
)
def test_every_rule_can_be_broken(change: dict[str, object], complaint: str) -> None:
    good = Row("swiglu", "7B", 1, 0, (4,), GOOD)
    assert broken_rules(good) == []
    (message,) = broken_rules(replace(good, kernel=replace(GOOD, **change)))
    assert message.startswith("swiglu | 7B | TP 1 | sm_80 | scale 0: ")
    assert complaint in message


@pytest.mark.parametrize(
    ("shape", "change", "complaint"),
    [
        ("head_dim 88", {"spills": 1}, "1 spills"),
        ("head_dim 152 packed", {"stack": 8}, "8 bytes of stack"),
        ("head_dim 104", {"accesses": {"16": 64, "128": 8}}, "64 accesses of 16 bits"),
        ("head_dim 144", {"hmma": 0}, "no tensor-core instruction"),
        ("head_dim 160 packed fp32", {"spills": 2}, "2 spills"),
        ("head_dim 160 packed fp32", {"hmma": 64}, "64 tensor-core instructions, which round fp32 to TF32"),
    ],
)
def test_no_width_and_no_type_of_attention_is_exempt(
    shape: str, change: dict[str, object], complaint: str
) -> None:
    kernel = replace(GOOD, dots=4, hmma=0 if shape.endswith("fp32") else 64, accesses={"32": 8, "128": 8})
    good = Row("causal_attention", shape, 1, 0, (4,), kernel)
    assert broken_rules(good) == []
    (message,) = broken_rules(replace(good, kernel=replace(kernel, **change)))
    assert message.endswith(f"scale 0: {complaint}")


def test_attention_is_in_the_table_in_every_width_and_type() -> None:
    shapes = {v.shape for v in variants() if v.op == "causal_attention"}
    others = {f"head_dim {width}" for width in HEAD_DIMS if width != 128}
    forms = ("", " packed", " packed grouped", " packed fp32")
    assert {x + form for x in ("13B", *others) for form in forms} <= shapes


def test_both_ways_of_the_head_to_its_gradient_are_in_the_table_also_in_fp32() -> None:
    shapes = {v.shape for v in variants() if v.op == "norm_head_loss"}
    assert shapes == {"7B", "13B", "7B kept", "13B kept", "7B fp32", "7B kept fp32"}
    rows = [row for row in read_table() if row.op == "norm_head_loss" and " kept" in row.shape]
    kept = {name for row in rows for name, value in row.kernel.constants.items() if value == "True"}
    assert {"KEEPS", "KEPT", "ADDS", "PROJECTS", "TRANSPOSED"} <= kept


def test_values_of_a_row_are_no_wide_accesses() -> None:
    assert replace(GOOD, accesses={"32": 1, "128": 3}, scalar_accesses=1).wide_share == 1.0
    assert replace(GOOD, accesses={"32": 2, "128": 3}, scalar_accesses=1).wide_share == 0.75
    assert replace(GOOD, accesses={}).wide_share == 1.0


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"registers": 33}, "registers 32 became 33"),
        ({"spills": 1}, "spills 0 became 1"),
        ({"stack": 8}, "stack 0 became 8"),
        ({"shared": 64}, "shared memory 0 became 64"),
        ({"atomics": 1}, "atomics 0 became 1"),
        ({"occupancy": 0.5}, "occupancy 1 became 0.5"),
        ({"accesses": {"64": 1, "128": 1}}, "128-bit share 1 became 0.5"),
    ],
)
def test_the_ratchet_refuses_a_worse_value(change: dict[str, object], complaint: str) -> None:
    before = Row("swiglu", "7B", 1, 0, (4,), GOOD)
    after = replace(before, kernel=replace(GOOD, **change))
    assert worse([before], [before]) == []
    assert worse([after], [before]) == []
    assert worse([before], [after]) == [f"{before.key}: {complaint}"]
    (unknown,) = worse([], [before])
    assert "not in the table" in unknown


def test_no_tensor_core_instruction_may_be_lost() -> None:
    before = Row("causal_attention", "7B", 1, 0, (4,), replace(GOOD, arch="sm_90", hgmma=8))
    after = replace(before, kernel=replace(before.kernel, hgmma=0, hmma=128))
    assert worse([before], [after]) == [f"{before.key}: HGMMA 1 became 0"]


def test_the_table_in_docs_keeps_every_rule() -> None:
    rows = read_table()
    assert [message for row in rows for message in broken_rules(row)] == []
    expected = {(v.op, v.shape, v.tensor_parallel, arch) for v in variants() for arch in LIMITS}
    assert expected <= {(row.op, row.shape, row.tensor_parallel, row.kernel.arch) for row in rows}
    assert len({row.key for row in rows}) == len(rows)


def test_both_files_of_the_table_say_the_same() -> None:
    assert (table.DOCS / "kernels.md").read_text(encoding="utf-8") == markdown(
        read_table(), table.read_versions()
    )


EVERYDAY = (
    "swiglu | 7B | TP 8",
    "rope_split | 7B | TP 1",
    "add_rms_norm | 13B | TP 8",
    "causal_attention | 13B packed grouped | TP 1",
    "norm_head_loss | 7B | TP 8",
)


@has_triton
@pytest.mark.parametrize("arch", LIMITS)
def test_everyday_kernels_are_not_worse_than_the_table(arch: str, request: pytest.FixtureRequest) -> None:
    """sm_90 for the elementwise kernels and the head, sm_80 for attention and the head, to save time."""
    names = EVERYDAY[-2:] if arch == "sm_80" else (*EVERYDAY[:3], EVERYDAY[-1])
    check_against_table([variant.name for variant in variants() if variant.name in names], [arch], request)


@has_triton
@pytest.mark.slow
def test_no_kernel_is_worse_than_the_table(request: pytest.FixtureRequest) -> None:
    check_against_table([variant.name for variant in variants()], list(LIMITS), request)


@has_triton
@has_nvcc
@pytest.mark.slow
def test_no_cuda_kernel_is_worse_than_the_table(request: pytest.FixtureRequest) -> None:
    same_compiler(nvcc=table.nvcc_version())
    assert request.config.cache is not None
    rows = table.cuda_rows(Path(request.config.cache.mkdir("kernels")))
    assert rows
    assert [message for row in rows for message in broken_rules(row)] == []
    assert worse(read_table(), rows) == []


def check_against_table(names: list[str], architectures: list[str], request: pytest.FixtureRequest) -> None:
    same_compiler(triton=table.triton_version())
    assert request.config.cache is not None
    cache = Path(request.config.cache.mkdir("kernels"))
    chosen = [variant for variant in variants() if variant.name in names]
    rows = triton_rows(chosen, cache, architectures=architectures)
    assert {row.op for row in rows} == {variant.op for variant in chosen}
    assert [message for row in rows for message in broken_rules(row)] == []
    assert worse(read_table(), rows) == []


def same_compiler(**present: str) -> None:
    """Another compiler makes other code: the table belongs to one."""
    for name, number in present.items():
        made_with = table.read_versions()[name]
        if made_with != number:
            pytest.skip(f"docs/kernels.json was made with {name} {made_with}, here is {number}")


def test_a_part_of_the_table_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of operations that were not asked for stay, as do those of csrc/cuda without nvcc."""
    compiled: list[str] = []

    def fake_rows(chosen: list[table.Variant], cache: Path, *, workers: int) -> list[Row]:
        compiled.extend(variant.op for variant in chosen)
        return [
            Row(v.op, v.shape, v.tensor_parallel, 0, (1,), replace(GOOD, registers=workers)) for v in chosen
        ]

    cuda_row = Row("swiglu.cu", "cuda", 1, 0, (), replace(GOOD, kernel="forward<__nv_bfloat16, 8>"))
    monkeypatch.setattr(table, "triton_rows", fake_rows)
    monkeypatch.setattr(table, "cuda_rows", lambda cache: [cuda_row])
    monkeypatch.setattr(table, "nvcc_version", lambda: "13.0")
    whole = table.write_table(tmp_path, tmp_path, workers=1)
    assert len(whole) == len(variants()) + 1
    assert read_table(tmp_path / "kernels.json") == whole
    compiled.clear()
    monkeypatch.setattr(table, "nvcc_version", lambda: "")
    part = table.write_table(tmp_path, tmp_path, workers=2, ops=("swiglu",))
    assert set(compiled) == {"swiglu"}
    assert [row.key for row in part] == [row.key for row in whole]
    assert {row.op for row in part if row.kernel.registers == 2} == {"swiglu"}
    assert table.read_versions(tmp_path / "kernels.json")["nvcc"] == "13.0"
    assert (tmp_path / "kernels.md").read_text().count("\n### ") == 7


def test_the_command_without_triton_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with patch.object(cli, "find_spec", lambda name: None):
        assert main(["ops", "table", "--out", str(tmp_path)]) == 2
    assert "b2 ops table compiles with the triton package, which is not installed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
