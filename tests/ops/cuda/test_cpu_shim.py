"""The fibre header itself: it must see the mistakes that it is there for."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_b2.testing.kernels import cpu_shim
from megatron_b2.testing.kernels.cpu_shim import compile_shim, prototypes

pytestmark = pytest.mark.skipif(bool(cpu_shim.missing()), reason=cpu_shim.missing())

KERNELS = """
#include "common.cuh"

namespace {

// Neighbours exchange values through shared memory, with or without the barrier between.
template <bool kBarrier>
__global__ void exchange(float* values) {
  __shared__ float box[64];
  box[threadIdx.x] = values[threadIdx.x];
  if (kBarrier) __syncthreads();
  values[threadIdx.x] = box[threadIdx.x ^ 1];
}

__global__ void half_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void half_a_warp(float* values) {
  if (threadIdx.x < 16) values[threadIdx.x] = __shfl_xor_sync(0xffffffffu, values[threadIdx.x], 1);
  __syncthreads();
}

__global__ void sums(const float* values, float* total) {
  __shared__ float parts[b2::kMaxWarps];
  total[threadIdx.x] = b2::block_sum(values[threadIdx.x], parts);
}

}  // namespace

extern "C" int b2_exchange(float* values, int barrier) {
  if (barrier) return B2_LAUNCH((exchange<true>), 1, 64, nullptr, values);
  return B2_LAUNCH((exchange<false>), 1, 64, nullptr, values);
}
extern "C" int b2_half_a_barrier() { return B2_LAUNCH(half_a_barrier, 1, 64, nullptr); }
extern "C" int b2_half_a_warp(float* values) { return B2_LAUNCH(half_a_warp, 1, 64, nullptr, values); }
extern "C" int b2_sums(const float* values, float* total) { return B2_LAUNCH(sums, 1, 96, nullptr, values, total); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shim")
    (folder / "kernels.cu").write_text(KERNELS)
    compile_shim([folder / "kernels.cu"], folder / "kernels.so")
    return folder / "kernels.so"


def exchanged(library: Path, *, barrier: bool, backwards: bool) -> list[float]:
    kernels = ctypes.CDLL(str(library))
    kernels.b2_cpu_order.argtypes = (ctypes.c_int, ctypes.c_int64)
    values = (ctypes.c_float * 64)(*range(64))
    kernels.b2_cpu_order(int(backwards), 0)
    assert kernels.b2_exchange(values, int(barrier)) == 0
    kernels.b2_cpu_order(0, 0)
    return list(values)


def test_a_missing_barrier_gives_other_results_in_the_other_order(library: Path) -> None:
    right = [float(i ^ 1) for i in range(64)]
    assert exchanged(library, barrier=True, backwards=False) == right
    assert exchanged(library, barrier=True, backwards=True) == right
    assert exchanged(library, barrier=False, backwards=False) != exchanged(
        library, barrier=False, backwards=True
    )


def test_reductions_add_all_threads_in_one_order(library: Path) -> None:
    kernels = ctypes.CDLL(str(library))
    values, total = (ctypes.c_float * 96)(*range(96)), (ctypes.c_float * 96)()
    assert kernels.b2_sums(values, total) == 0
    assert set(total) == {float(sum(range(96)))}


@pytest.mark.parametrize(
    ("call", "counts"),
    [
        ("b2_half_a_barrier()", "32 at __syncthreads, 0 at a shuffle, 32 have left"),
        ("b2_half_a_warp((ctypes.c_float * 64)())", "48 at __syncthreads, 16 at a shuffle, 0 have left"),
    ],
)
def test_a_barrier_that_not_all_reach_ends_the_program(library: Path, call: str, counts: str) -> None:
    code = f"import ctypes\nctypes.CDLL({str(library)!r}).{call}\nprint('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-6, "")
    assert done.stderr == f"barrier not reached by all threads: {counts}\n"


def test_prototypes_are_read_from_the_header() -> None:
    found = prototypes(
        "int b2_some(const void* x, std::int64_t n, float eps, double a, int dtype, void* stream);\n"
    )
    pointer = ctypes.c_void_p
    assert found == {
        "some": (pointer, ctypes.c_int64, ctypes.c_float, ctypes.c_double, ctypes.c_int, pointer)
    }
    declared = prototypes((cpu_shim.SOURCES / "kernels.h").read_text())
    assert len(declared) == 9
    bindings = (cpu_shim.SOURCES / "bindings.cpp").read_text()
    assert [name for name in declared if f'define(module, "{name}", b2_{name});' not in bindings] == []
