// Softmax of NormHead over one chunk of vocabulary columns, between the matrix products that torch does.
//
// Given raw products r = x W^T [tokens, columns] and n_v = 1 / ||w_v||, logits are z = n r; they are never stored.
// Forward: (max, sum of exp(z - max), id of the max, logit of the label) of each token, merged into what earlier
// chunks left. Backward: with delta = ce_grad (exp(z - lse) - 1[v is the label]) + z_grad 1[v is the max's id],
// delta n is stored with one rounding, in place if the dtypes are the same, and the column sums of delta z
// (that is <w_v / ||w_v||, gradient of it>, for the projection) are added to fp32 in a fixed order.
#include "common.cuh"

namespace b2 {
namespace {

constexpr int kThreads = 128;
constexpr float kLog2E = 1.4426950408889634f;

// Packed in 16 bytes a token; ids below 2^24 are exact.
struct Statistics {
  float top, sum, index, target;
};

// Sum of exp relative to a common maximum; an empty part has the maximum -inf and the sum 0.
__device__ inline float rescaled(float sum, float top, float new_top) {
  return sum == 0.0f ? 0.0f : sum * exp2f((top - new_top) * kLog2E);
}

// Of equal maxima the lower id stays. NaN never wins; it is in the sum.
__device__ inline bool wins(float top, float index, float other_top, float other_index) {
  return top > other_top || (top == other_top && index < other_index);
}

__device__ inline Statistics merge(const Statistics& a, const Statistics& b) {
  const bool b_wins = wins(b.top, b.index, a.top, a.index);
  Statistics all;
  all.top = b_wins ? b.top : a.top;
  all.index = b_wins ? b.index : a.index;
  all.sum = rescaled(a.sum, a.top, all.top) + rescaled(b.sum, b.top, all.top);
  all.target = a.target + b.target;
  return all;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    statistics(const T* __restrict__ products, const float* __restrict__ inverse_norms,
               const int64_t* __restrict__ labels, float4* __restrict__ table, int columns, int64_t stride,
               int64_t first_column) {
  __shared__ Statistics parts[kThreads / kWarp];
  const T* row = products + static_cast<int64_t>(blockIdx.x) * stride;
  Statistics own{-INFINITY, 0.0f, INFINITY, 0.0f};
  for (int column = threadIdx.x * N; column < columns; column += kThreads * N) {
    float z[N], n[N];
    load(row + column, z);
    load(inverse_norms + column, n);
    float top = own.top, index = own.index;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      z[i] *= n[i];
      if (z[i] > top || index == INFINITY) {
        top = z[i];
        index = static_cast<float>(first_column + column + i);
      }
    }
    own.sum = rescaled(own.sum, own.top, top);
    const float base = top == -INFINITY ? 0.0f : top;
#pragma unroll
    for (int i = 0; i < N; ++i) own.sum += exp2f((z[i] - base) * kLog2E);
    own.top = top;
    own.index = index;
  }
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Statistics other{__shfl_xor_sync(0xffffffffu, own.top, mask), __shfl_xor_sync(0xffffffffu, own.sum, mask),
                           __shfl_xor_sync(0xffffffffu, own.index, mask), 0.0f};
    own = merge(own, other);
  }
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = own;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads / kWarp; ++i) own = merge(own, parts[i]);
  const int64_t label = labels[blockIdx.x] - first_column;
  if (label >= 0 && label < columns) own.target = widen_one(row[label]) * inverse_norms[label];
  const float4 before = table[blockIdx.x];
  own = merge({before.x, before.y, before.z, before.w}, own);
  table[blockIdx.x] = make_float4(own.top, own.sum, own.index, own.target);
}

// Block (x, y) works on kThreads * N columns and every gridDim.y-th token. `tokens_table` has (lse, ce_grad,
// z_grad, id of the max) of each token. Row y of `partial`, fp32 [gridDim.y, columns], gets its column sums.
template <typename In, typename Out, int N>
__global__ void __launch_bounds__(kThreads)
    epilogue(const In* products, const float* __restrict__ inverse_norms, const int64_t* __restrict__ labels,
             const float4* __restrict__ tokens_table, Out* grad, float* __restrict__ partial, int64_t tokens,
             int columns, int64_t stride, int64_t first_column) {
  const int column = (blockIdx.x * kThreads + threadIdx.x) * N;
  if (column >= columns) return;
  float n[N], sums[N] = {};
  load(inverse_norms + column, n);
  for (int64_t token = blockIdx.y; token < tokens; token += gridDim.y) {
    const float4 of = tokens_table[token];
    const int64_t label = labels[token] - first_column - column;
    const int64_t top = static_cast<int64_t>(of.w) - first_column - column;
    float z[N];
    load(products + token * stride + column, z);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      z[i] *= n[i];
      const float p = exp2f((z[i] - of.x) * kLog2E);
      const float delta = of.y * (label == i ? p - 1.0f : p) + (top == i ? of.z : 0.0f);
      sums[i] += delta * z[i];
      z[i] = delta * n[i];
    }
    store(grad + token * stride + column, z);
  }
  store(partial + static_cast<int64_t>(blockIdx.y) * columns + column, sums);
}

// column_sums += sum of the rows of `partial`, in their order.
template <int N>
__global__ void __launch_bounds__(kThreads)
    add_rows(const float* __restrict__ partial, float* __restrict__ column_sums, int64_t rows, int columns) {
  const int column = (blockIdx.x * kThreads + threadIdx.x) * N;
  if (column >= columns) return;
  float total[N];
  load(column_sums + column, total);
  for (int64_t row = 0; row < rows; ++row) {
    float part[N];
    load(partial + row * columns + column, part);
#pragma unroll
    for (int i = 0; i < N; ++i) total[i] += part[i];
  }
  store(column_sums + column, total);
}

bool supports(int64_t tokens, int64_t columns, int64_t stride, int64_t first_column) {
  return tokens >= 0 && tokens <= kMaxGrid && columns > 0 && columns <= stride && first_column >= 0 &&
         first_column + columns <= (1 << 24);
}

template <typename In, typename Out, int N>
int launch_epilogue(const In* products, const float* inverse_norms, const int64_t* labels, const float4* tokens_table,
                    Out* grad, float* partial, float* column_sums, int64_t splits, int64_t tokens, int64_t columns,
                    int64_t stride, int64_t first_column, void* stream) {
  const dim3 grid(static_cast<unsigned>(divide_up(columns, kThreads * N)), static_cast<unsigned>(splits));
  const int error = B2_LAUNCH((epilogue<In, Out, N>), grid, kThreads, stream, products, inverse_norms, labels,
                              tokens_table, grad, partial, tokens, static_cast<int>(columns), stride, first_column);
  if (error != 0) return error;
  const bool wide = columns % 4 == 0 && is_aligned(partial) && is_aligned(column_sums);
  const auto blocks = static_cast<unsigned>(divide_up(columns, kThreads * (wide ? 4 : 1)));
  if (wide) {
    return B2_LAUNCH((add_rows<4>), blocks, kThreads, stream, partial, column_sums, splits, static_cast<int>(columns));
  }
  return B2_LAUNCH((add_rows<1>), blocks, kThreads, stream, partial, column_sums, splits, static_cast<int>(columns));
}

}  // namespace
}  // namespace b2

extern "C" int b2_head_statistics(const void* products, const void* inverse_norms, const void* labels, void* statistics,
                                  std::int64_t tokens, std::int64_t columns, std::int64_t stride,
                                  std::int64_t first_column, int dtype, void* stream) {
  using namespace b2;
  return with_dtype(dtype, [=](auto* tag) -> int {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (!supports(tokens, columns, stride, first_column) || !is_aligned(statistics)) return B2_INVALID;
    if (tokens == 0) return 0;
    const auto* in = static_cast<const T*>(products);
    const auto* n = static_cast<const float*>(inverse_norms);
    const auto* label = static_cast<const int64_t*>(labels);
    auto* out = static_cast<float4*>(statistics);
    const auto grid = static_cast<unsigned>(tokens);
    const int width = static_cast<int>(columns);
    const bool whole = columns % kWidth<T> == 0 && stride % kWidth<T> == 0;
    if (whole && is_aligned(products) && is_aligned(inverse_norms)) {
      return B2_LAUNCH((b2::statistics<T, kWidth<T>>), grid, kThreads, stream, in, n, label, out, width, stride,
                       first_column);
    }
    return B2_LAUNCH((b2::statistics<T, 1>), grid, kThreads, stream, in, n, label, out, width, stride, first_column);
  });
}

extern "C" int b2_head_epilogue(const void* products, const void* inverse_norms, const void* labels,
                                const void* tokens_table, void* grad, void* partial, void* column_sums,
                                std::int64_t splits, std::int64_t tokens, std::int64_t columns, std::int64_t stride,
                                std::int64_t first_column, int dtype, int grad_dtype, void* stream) {
  using namespace b2;
  if (dtype != grad_dtype && dtype != B2_FLOAT32) return B2_INVALID;
  return with_dtype(dtype, [=](auto* tag) -> int {
    using In = std::remove_pointer_t<decltype(tag)>;
    return with_dtype(grad_dtype, [=](auto* grad_tag) -> int {
      using Out = std::remove_pointer_t<decltype(grad_tag)>;
      if constexpr (sizeof(In) == 4 || std::is_same_v<In, Out>) {
        const bool valid = supports(tokens, columns, stride, first_column) && splits > 0 && splits <= 65535;
        if (!valid || !is_aligned(tokens_table)) return B2_INVALID;
        if (tokens == 0) return 0;
        constexpr int N = kWidth<Out>;
        const auto launch = [=](auto width) {
          return launch_epilogue<In, Out, decltype(width)::value>(
              static_cast<const In*>(products), static_cast<const float*>(inverse_norms),
              static_cast<const int64_t*>(labels), static_cast<const float4*>(tokens_table), static_cast<Out*>(grad),
              static_cast<float*>(partial), static_cast<float*>(column_sums), splits, tokens, columns, stride,
              first_column, stream);
        };
        const bool wide = columns % N == 0 && stride % N == 0 && is_aligned(products) && is_aligned(inverse_norms) &&
                          is_aligned(grad) && is_aligned(partial);
        return wide ? launch(std::integral_constant<int, N>()) : launch(std::integral_constant<int, 1>());
      } else {
        return B2_INVALID;
      }
    });
  });
}
