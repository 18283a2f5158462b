// RMSNorm, also with the addition of a residual before it: y = w * s / sqrt(mean(s^2) + eps), s = x + residual.
//
// s is stored rounded to the dtype and normalised from the stored value, so that the backward pass and a
// recomputed forward pass see the same bits. Backward, with rho = 1 / sqrt(mean(s^2) + eps), n = s rho, m = g w:
//   grad_s = rho (m - n mean(m n)) + grad_total,   grad_w = sum over rows of g n.
// rho is made again from s, which is read anyway: no statistic is stored.
//
// Rows of 256, 512 ... 5,120 elements have 8 elements a thread and stay in registers (4,096 = 512 threads x 8,
// 5,120 = 640 x 8); any other row is read twice, by elements if it is not made of whole 128-bit words (N = 1).
#include "common.cuh"

namespace b2 {
namespace {

constexpr int kMaxThreads = 640;
constexpr int kWideThreads = 256;
constexpr int kElements = 8;  // a thread, of a row in registers

// 128-bit words of a row that a thread holds.
template <typename T>
constexpr int kVectors = kElements / kWidth<T>;

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    forward(const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight, T* __restrict__ y,
            T* __restrict__ total, int width, float eps) {
  constexpr int N = kWidth<T>;
  __shared__ float sums[kMaxWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  float s[kVectors<T>][N];
  float square = 0.0f;
#pragma unroll
  for (int k = 0; k < kVectors<T>; ++k) {
    const int64_t at = row + (threadIdx.x + k * blockDim.x) * N;
    load(x + at, s[k]);
    if (residual != nullptr) {
      float r[N];
      load(residual + at, r);
#pragma unroll
      for (int i = 0; i < N; ++i) s[k][i] += r[i];
      const Raw<T, N> rounded = narrow<T, N>(s[k]);
      rounded.store(total + at);
      widen(rounded, s[k]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) square += s[k][i] * s[k][i];
  }
  const float rho = rsqrtf(block_sum(square, sums) / static_cast<float>(width) + eps);
#pragma unroll
  for (int k = 0; k < kVectors<T>; ++k) {
    const int column = (threadIdx.x + k * blockDim.x) * N;
    float w[N];
    load(weight + column, w);
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] *= s[k][i] * rho;
    store(y + row + column, w);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kWideThreads)
    forward_wide(const T* __restrict__ x, const T* __restrict__ residual, const T* __restrict__ weight,
                 T* __restrict__ y, T* total, int width, float eps) {
  __shared__ float sums[kMaxWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
  float square = 0.0f;
  for (int column = threadIdx.x * N; column < width; column += blockDim.x * N) {
    float s[N];
    load(x + row + column, s);
    if (residual != nullptr) {
      float r[N];
      load(residual + row + column, r);
#pragma unroll
      for (int i = 0; i < N; ++i) s[i] += r[i];
      const Raw<T, N> rounded = narrow<T, N>(s);
      rounded.store(total + row + column);
      widen(rounded, s);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) square += s[i] * s[i];
  }
  const float rho = rsqrtf(block_sum(square, sums) / static_cast<float>(width) + eps);
  const T* stored = residual != nullptr ? total : x;
  for (int column = threadIdx.x * N; column < width; column += blockDim.x * N) {
    float s[N], w[N];
    load(stored + row + column, s);  // this thread's own elements
    load(weight + column, w);
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] *= s[i] * rho;
    store(y + row + column, w);
  }
}

// Words of one row that a thread works on: gradient of y, s, gradient of s from elsewhere.
template <typename T>
struct Row {
  Raw<T, kWidth<T>> grad_y[kVectors<T>], total[kVectors<T>], grad_total[kVectors<T>];

  __device__ void load(const T* grad_y_rows, const T* total_rows, const T* grad_total_rows, int64_t row) {
#pragma unroll
    for (int k = 0; k < kVectors<T>; ++k) {
      const int64_t at = row + (threadIdx.x + k * blockDim.x) * kWidth<T>;
      grad_y[k].load(grad_y_rows + at);
      total[k].load(total_rows + at);
      if (grad_total_rows != nullptr) grad_total[k].load(grad_total_rows + at);
    }
  }
};

// What a row's gradient needs beside its elements: rho, and rho^2 mean(m s).
struct Scales {
  float rho, inner;
};

__device__ inline Scales scales_of(float square, float product, int width, float eps, float2 (&sums)[kMaxWarps]) {
  const float2 sum = block_sum(square, product, sums);
  const float rho = rsqrtf(sum.x / static_cast<float>(width) + eps);
  return {rho, rho * rho * (sum.y / static_cast<float>(width))};
}

// Each block takes every gridDim.x-th row; the next row is on its way while this one is reduced. Row b of
// `partial`, fp32 [gridDim.x, width], gets block b's part of the weight's gradient.
template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    backward(const T* __restrict__ grad_y, const T* __restrict__ total, const T* __restrict__ grad_total,
             const T* __restrict__ weight, T* __restrict__ grad_x, float* __restrict__ partial, int64_t rows, int width,
             float eps) {
  constexpr int N = kWidth<T>;
  __shared__ float2 sums[2][kMaxWarps];
  float grad_weight[kVectors<T>][N] = {};
  Raw<T, N> weights[kVectors<T>];
#pragma unroll
  for (int k = 0; k < kVectors<T>; ++k) weights[k].load(weight + (threadIdx.x + k * blockDim.x) * N);
  Row<T> next;
  next.load(grad_y, total, grad_total, static_cast<int64_t>(blockIdx.x) * width);
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    const Row<T> now = next;
    if (row + gridDim.x < rows) next.load(grad_y, total, grad_total, (row + gridDim.x) * width);
    float square = 0.0f, product = 0.0f;
#pragma unroll
    for (int k = 0; k < kVectors<T>; ++k) {
      float g[N], s[N], w[N];
      widen(now.grad_y[k], g);
      widen(now.total[k], s);
      widen(weights[k], w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        square += s[i] * s[i];
        product += g[i] * w[i] * s[i];
      }
    }
    const Scales scale = scales_of(square, product, width, eps, sums[turn]);
#pragma unroll
    for (int k = 0; k < kVectors<T>; ++k) {
      float g[N], s[N], w[N], out[N] = {};
      widen(now.grad_y[k], g);
      widen(now.total[k], s);
      widen(weights[k], w);
      if (grad_total != nullptr) widen(now.grad_total[k], out);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float n = s[i] * scale.rho;
        grad_weight[k][i] += g[i] * n;
        out[i] += scale.rho * (g[i] * w[i] - s[i] * scale.inner);
      }
      store(grad_x + row * width + (threadIdx.x + k * blockDim.x) * N, out);
    }
  }
#pragma unroll
  for (int k = 0; k < kVectors<T>; ++k) {
    store(partial + static_cast<int64_t>(blockIdx.x) * width + (threadIdx.x + k * blockDim.x) * N, grad_weight[k]);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kWideThreads)
    backward_wide(const T* __restrict__ grad_y, const T* __restrict__ total, const T* __restrict__ grad_total,
                  const T* __restrict__ weight, T* __restrict__ grad_x, float* partial, int64_t rows, int width,
                  float eps) {
  __shared__ float2 sums[2][kMaxWarps];
  float* own = partial + static_cast<int64_t>(blockIdx.x) * width;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x, turn ^= 1) {
    const int64_t start = row * width;
    float square = 0.0f, product = 0.0f;
    for (int column = threadIdx.x * N; column < width; column += blockDim.x * N) {
      float g[N], s[N], w[N];
      load(grad_y + start + column, g);
      load(total + start + column, s);
      load(weight + column, w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        square += s[i] * s[i];
        product += g[i] * w[i] * s[i];
      }
    }
    const Scales scale = scales_of(square, product, width, eps, sums[turn]);
    for (int column = threadIdx.x * N; column < width; column += blockDim.x * N) {
      float g[N], s[N], w[N], out[N] = {}, grad_weight[N] = {};
      load(grad_y + start + column, g);
      load(total + start + column, s);
      load(weight + column, w);
      if (grad_total != nullptr) load(grad_total + start + column, out);
      if (row != blockIdx.x) load(own + column, grad_weight);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float n = s[i] * scale.rho;
        grad_weight[i] += g[i] * n;
        out[i] += scale.rho * (g[i] * w[i] - s[i] * scale.inner);
      }
      store(grad_x + start + column, out);
      store(own + column, grad_weight);
    }
  }
}

constexpr int kSumThreads = 256;
constexpr int kSumVectors = 8;
constexpr int kSumLanes = kSumThreads / kSumVectors;

// Sum of `partial`, fp32 [programs, width], over its rows: always in the same order.
template <typename T, int N>
__global__ void __launch_bounds__(kSumThreads)
    sum_rows(const float* __restrict__ partial, T* __restrict__ sum, int64_t programs, int width) {
  __shared__ float parts[kSumLanes][kSumVectors][N];
  const int vector = threadIdx.x % kSumVectors, lane = threadIdx.x / kSumVectors;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * kSumVectors + vector) * N;
  float total[N] = {};
  if (column < width) {
    for (int64_t row = lane; row < programs; row += kSumLanes) {
      float part[N];
      load(partial + row * width + column, part);
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] += part[i];
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) parts[lane][vector][i] = total[i];
  __syncthreads();
  if (lane != 0 || column >= width) return;
  for (int other = 1; other < kSumLanes; ++other) {
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] += parts[other][vector][i];
  }
  store(sum + column, total);
}

// How the rows of a call are worked on.
struct Plan {
  bool supported, words, registers;
  int threads;
};

template <typename T, class... Pointers>
Plan plan_of(int64_t rows, int64_t width, const Pointers*... pointers) {
  Plan plan{};
  plan.supported = rows >= 0 && rows <= kMaxGrid && width > 0 && width <= kMaxGrid / 2;
  plan.words = width % kWidth<T> == 0 && (is_aligned(pointers) && ...);
  plan.registers = plan.words && width % (kWarp * kElements) == 0 && width <= kMaxThreads * kElements;
  const int64_t threads = divide_up(width / (plan.words ? kWidth<T> : 1), kWarp) * kWarp;
  plan.threads = static_cast<int>(threads < kWideThreads ? threads : kWideThreads);
  if (plan.registers) plan.threads = static_cast<int>(width / kElements);
  return plan;
}

}  // namespace
}  // namespace b2

extern "C" int b2_rms_norm_forward(const void* x, const void* residual, const void* weight, void* y, void* total,
                                   std::int64_t rows, std::int64_t width, float eps, int dtype, void* stream) {
  using namespace b2;
  return with_dtype(dtype, [=](auto* tag) -> int {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Plan plan = plan_of<T>(rows, width, x, residual, weight, y, total);
    if (!plan.supported) return B2_INVALID;
    if (rows == 0) return 0;
    const auto *a = static_cast<const T*>(x), *b = static_cast<const T*>(residual);
    const auto* w = static_cast<const T*>(weight);
    auto *out = static_cast<T*>(y), *sum = static_cast<T*>(total);
    const auto grid = static_cast<unsigned>(rows);
    const int n = static_cast<int>(width);
    if (plan.registers) return B2_LAUNCH((forward<T>), grid, plan.threads, stream, a, b, w, out, sum, n, eps);
    if (plan.words) {
      return B2_LAUNCH((forward_wide<T, kWidth<T>>), grid, plan.threads, stream, a, b, w, out, sum, n, eps);
    }
    return B2_LAUNCH((forward_wide<T, 1>), grid, plan.threads, stream, a, b, w, out, sum, n, eps);
  });
}

extern "C" int b2_rms_norm_backward(const void* grad_y, const void* total, const void* grad_total, const void* weight,
                                    void* grad_x, void* grad_weight, void* partial, std::int64_t programs,
                                    std::int64_t rows, std::int64_t width, float eps, int dtype, void* stream) {
  using namespace b2;
  return with_dtype(dtype, [=](auto* tag) -> int {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Plan plan = plan_of<T>(rows, width, grad_y, total, grad_total, weight, grad_x, grad_weight, partial);
    if (!plan.supported || programs < 1 || programs > rows) return B2_INVALID;
    const auto *g = static_cast<const T*>(grad_y), *s = static_cast<const T*>(total);
    const auto *r = static_cast<const T*>(grad_total), *w = static_cast<const T*>(weight);
    auto* out = static_cast<T*>(grad_x);
    auto* parts = static_cast<float*>(partial);
    const auto grid = static_cast<unsigned>(programs);
    auto* sum = static_cast<T*>(grad_weight);
    const int n = static_cast<int>(width);
    int error = 0;
    if (plan.registers) {
      error = B2_LAUNCH((backward<T>), grid, plan.threads, stream, g, s, r, w, out, parts, rows, n, eps);
    } else if (plan.words) {
      error =
          B2_LAUNCH((backward_wide<T, kWidth<T>>), grid, plan.threads, stream, g, s, r, w, out, parts, rows, n, eps);
    } else {
      error = B2_LAUNCH((backward_wide<T, 1>), grid, plan.threads, stream, g, s, r, w, out, parts, rows, n, eps);
    }
    if (error != 0) return error;
    const auto blocks = static_cast<unsigned>(divide_up(width, kSumVectors * (plan.words ? kWidth<T> : 1)));
    if (plan.words) {
      return B2_LAUNCH((sum_rows<T, kWidth<T>>), blocks, kSumThreads, stream, parts, sum, programs, n);
    }
    return B2_LAUNCH((sum_rows<T, 1>), blocks, kSumThreads, stream, parts, sum, programs, n);
  });
}
