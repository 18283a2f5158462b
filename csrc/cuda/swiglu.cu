// SwiGLU on the fused projection: out = silu(gate) * up, gate_up [rows, 2 width] with the gate in the first half.
// A thread has one 128-bit word of a row's gate and up, or one element where rows are not made of whole words.
// Rows are on grid dimension x, which has no limit of 65,535.
#include "common.cuh"

namespace b2 {
namespace {

constexpr int kMaxThreads = 128;

__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads)
    forward(const T* __restrict__ gate_up, T* __restrict__ out, int width) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (column >= width) return;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * width + column;
  const T* row = gate_up + 2 * static_cast<int64_t>(blockIdx.x) * width + column;
  float gate[N], up[N];
  load(row, gate);
  load(row + width, up);
#pragma unroll
  for (int i = 0; i < N; ++i) up[i] *= gate[i] * sigmoid(gate[i]);
  store(out + at, up);
}

// d silu(g) / dg = sigmoid(g) (1 + g - silu(g))
template <typename T, int N>
__global__ void __launch_bounds__(kMaxThreads)
    backward(const T* __restrict__ gate_up, const T* __restrict__ grad, T* __restrict__ grad_gate_up, int width) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (column >= width) return;
  const int64_t row = 2 * static_cast<int64_t>(blockIdx.x) * width + column;
  float gate[N], up[N], g[N];
  load(gate_up + row, gate);
  load(gate_up + row + width, up);
  load(grad + static_cast<int64_t>(blockIdx.x) * width + column, g);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float s = sigmoid(gate[i]), silu = gate[i] * s;
    const float grad_gate = g[i] * up[i] * s * (1.0f + gate[i] - silu);
    up[i] = g[i] * silu;
    gate[i] = grad_gate;
  }
  store(grad_gate_up + row, gate);
  store(grad_gate_up + row + width, up);
}

// Blocks along a row and their threads: as few blocks as there can be, evenly filled.
struct Tiles {
  bool supported, words;
  dim3 grid;
  int threads;
};

template <typename T, class... Pointers>
Tiles tiles_of(int64_t rows, int64_t width, const Pointers*... pointers) {
  Tiles tiles{};
  tiles.supported = rows >= 0 && rows <= kMaxGrid && width > 0 && width <= (1 << 22);
  if (!tiles.supported) return tiles;
  tiles.words = width % kWidth<T> == 0 && (is_aligned(pointers) && ...);
  const int64_t words = width / (tiles.words ? kWidth<T> : 1);
  const int64_t threads = divide_up(divide_up(words, divide_up(words, kMaxThreads)), kWarp) * kWarp;
  tiles.grid = dim3(static_cast<unsigned>(rows), static_cast<unsigned>(divide_up(words, threads)));
  tiles.threads = static_cast<int>(threads);
  return tiles;
}

}  // namespace
}  // namespace b2

extern "C" int b2_swiglu_forward(const void* gate_up, void* out, std::int64_t rows, std::int64_t width, int dtype,
                                 void* stream) {
  using namespace b2;
  return with_dtype(dtype, [=](auto* tag) -> int {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Tiles tiles = tiles_of<T>(rows, width, gate_up, out);
    if (!tiles.supported) return B2_INVALID;
    if (rows == 0) return 0;
    const auto* in = static_cast<const T*>(gate_up);
    auto* product = static_cast<T*>(out);
    const int n = static_cast<int>(width);
    if (tiles.words) {
      return B2_LAUNCH((forward<T, kWidth<T>>), tiles.grid, tiles.threads, stream, in, product, n);
    }
    return B2_LAUNCH((forward<T, 1>), tiles.grid, tiles.threads, stream, in, product, n);
  });
}

extern "C" int b2_swiglu_backward(const void* gate_up, const void* grad, void* grad_gate_up, std::int64_t rows,
                                  std::int64_t width, int dtype, void* stream) {
  using namespace b2;
  return with_dtype(dtype, [=](auto* tag) -> int {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Tiles tiles = tiles_of<T>(rows, width, gate_up, grad, grad_gate_up);
    if (!tiles.supported) return B2_INVALID;
    if (rows == 0) return 0;
    const auto *in = static_cast<const T*>(gate_up), *g = static_cast<const T*>(grad);
    auto* out = static_cast<T*>(grad_gate_up);
    const int n = static_cast<int>(width);
    if (tiles.words) {
      return B2_LAUNCH((backward<T, kWidth<T>>), tiles.grid, tiles.threads, stream, in, g, out, n);
    }
    return B2_LAUNCH((backward<T, 1>), tiles.grid, tiles.threads, stream, in, g, out, n);
  });
}
