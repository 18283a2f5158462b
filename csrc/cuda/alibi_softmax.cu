// Causal softmax of attention scores with an optional ALiBi bias and packed documents, for attention that keeps its
// scores: rows of [batch, heads, queries, keys]. The queries are the last positions of the keys.
//
//   t = scale * score + slope * (key - position), p = softmax of t over the keys from the document's start to the
//   position, 0 elsewhere. Backward: grad_score = scale * p (g - sum(p g)).
//
// The bias is relative to the diagonal, where it is small. One block a row of any length, any number of heads; keys
// that a row does not see are not read. Rows of whole 128-bit words move in such words, others by elements.
#include "common.cuh"

namespace b2 {
namespace {

constexpr int kThreads = 128;
constexpr float kLog2E = 1.4426950408889634f;

struct Shape {
  unsigned heads, queries;
  int keys;
};

// The keys [first, last] that the row of this block sees, and where the row starts.
struct Span {
  int64_t row;
  int head, first, last;
};

__device__ inline Span span_of(const Shape& shape, const int* starts) {
  const unsigned row = blockIdx.x, query = row % shape.queries, sequence = row / shape.queries;
  Span span;
  span.row = static_cast<int64_t>(row) * shape.keys;
  span.head = static_cast<int>(sequence % shape.heads);
  span.last = shape.keys - static_cast<int>(shape.queries - query);
  const int64_t batch = sequence / shape.heads;
  span.first = starts == nullptr ? 0 : starts[batch * shape.keys + span.last];
  return span;
}

// Zero what lies outside the words that hold [first, last].
template <typename T, int N>
__device__ inline void clear_outside(T* row, const Span& span, int keys) {
  const float zeros[N] = {};
  const int begin = span.first / N * N, end = (span.last / N + 1) * N;
  for (int key = threadIdx.x * N; key < begin; key += kThreads * N) store(row + key, zeros);
  for (int key = end + threadIdx.x * N; key < keys; key += kThreads * N) store(row + key, zeros);
}

// Scores in units of log 2, so that exp2 is enough; -inf for keys that the row does not see.
template <int N>
struct Biased {
  const Span& span;
  float scale, slope;

  __device__ void apply(float (&t)[N], int key) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool seen = key + i >= span.first && key + i <= span.last;
      t[i] = seen ? fmaf(t[i], scale, slope * static_cast<float>(key + i - span.last)) : -INFINITY;
    }
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    forward(const T* __restrict__ scores, const float* __restrict__ slopes, const int* __restrict__ starts,
            T* __restrict__ probs, Shape shape, float scale) {
  __shared__ float tops[kMaxWarps], sums[kMaxWarps];
  const Span span = span_of(shape, starts);
  const Biased<N> biased{span, scale * kLog2E, slopes == nullptr ? 0.0f : slopes[span.head] * kLog2E};
  const int begin = span.first / N * N + threadIdx.x * N;
  float top = -INFINITY, sum = 0.0f;
  for (int key = begin; key <= span.last; key += kThreads * N) {
    float t[N];
    load(scores + span.row + key, t);
    biased.apply(t, key);
    float new_top = top;
#pragma unroll
    for (int i = 0; i < N; ++i) new_top = fmaxf(new_top, t[i]);
    const float base = new_top == -INFINITY ? 0.0f : new_top;
    sum *= exp2f(top - base);
#pragma unroll
    for (int i = 0; i < N; ++i) sum += exp2f(t[i] - base);
    top = new_top;
  }
  const float row_top = block_max(top, tops);
  const float inverse = 1.0f / block_sum(sum == 0.0f ? 0.0f : sum * exp2f(top - row_top), sums);
  for (int key = begin; key <= span.last; key += kThreads * N) {
    float t[N];
    load(scores + span.row + key, t);
    biased.apply(t, key);
#pragma unroll
    for (int i = 0; i < N; ++i) t[i] = exp2f(t[i] - row_top) * inverse;
    store(probs + span.row + key, t);
  }
  clear_outside<T, N>(probs + span.row, span, shape.keys);
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    backward(const T* __restrict__ probs, const T* __restrict__ grad, const int* __restrict__ starts,
             T* __restrict__ grad_scores, Shape shape, float scale) {
  __shared__ float sums[kMaxWarps];
  const Span span = span_of(shape, starts);
  const int begin = span.first / N * N + threadIdx.x * N;
  float inner = 0.0f;
  for (int key = begin; key <= span.last; key += kThreads * N) {
    float p[N], g[N];
    load(probs + span.row + key, p);
    load(grad + span.row + key, g);
#pragma unroll
    for (int i = 0; i < N; ++i) inner += key + i >= span.first && key + i <= span.last ? p[i] * g[i] : 0.0f;
  }
  inner = block_sum(inner, sums);
  for (int key = begin; key <= span.last; key += kThreads * N) {
    float p[N], g[N];
    load(probs + span.row + key, p);
    load(grad + span.row + key, g);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      g[i] = key + i >= span.first && key + i <= span.last ? scale * p[i] * (g[i] - inner) : 0.0f;
    }
    store(grad_scores + span.row + key, g);
  }
  clear_outside<T, N>(grad_scores + span.row, span, shape.keys);
}

bool supports(int64_t batch, int64_t heads, int64_t queries, int64_t keys) {
  return batch >= 0 && heads > 0 && queries > 0 && queries <= keys && keys < (1 << 30) && heads <= kMaxGrid &&
         batch <= kMaxGrid / heads / queries;
}

}  // namespace
}  // namespace b2

extern "C" int b2_alibi_softmax_forward(const void* scores, const void* slopes, const void* starts, void* probs,
                                        std::int64_t batch, std::int64_t heads, std::int64_t queries, std::int64_t keys,
                                        float scale, int dtype, void* stream) {
  using namespace b2;
  return with_dtype(dtype, [=](auto* tag) -> int {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (!supports(batch, heads, queries, keys)) return B2_INVALID;
    if (batch == 0) return 0;
    const auto* in = static_cast<const T*>(scores);
    const auto* slope = static_cast<const float*>(slopes);
    const auto* start = static_cast<const int*>(starts);
    auto* out = static_cast<T*>(probs);
    const Shape shape{static_cast<unsigned>(heads), static_cast<unsigned>(queries), static_cast<int>(keys)};
    const auto grid = static_cast<unsigned>(batch * heads * queries);
    if (keys % kWidth<T> == 0 && is_aligned(scores) && is_aligned(probs)) {
      return B2_LAUNCH((forward<T, kWidth<T>>), grid, kThreads, stream, in, slope, start, out, shape, scale);
    }
    return B2_LAUNCH((forward<T, 1>), grid, kThreads, stream, in, slope, start, out, shape, scale);
  });
}

extern "C" int b2_alibi_softmax_backward(const void* probs, const void* grad, const void* starts, void* grad_scores,
                                         std::int64_t batch, std::int64_t heads, std::int64_t queries,
                                         std::int64_t keys, float scale, int dtype, void* stream) {
  using namespace b2;
  return with_dtype(dtype, [=](auto* tag) -> int {
    using T = std::remove_pointer_t<decltype(tag)>;
    if (!supports(batch, heads, queries, keys)) return B2_INVALID;
    if (batch == 0) return 0;
    const auto *p = static_cast<const T*>(probs), *g = static_cast<const T*>(grad);
    const auto* start = static_cast<const int*>(starts);
    auto* out = static_cast<T*>(grad_scores);
    const Shape shape{static_cast<unsigned>(heads), static_cast<unsigned>(queries), static_cast<int>(keys)};
    const auto grid = static_cast<unsigned>(batch * heads * queries);
    if (keys % kWidth<T> == 0 && is_aligned(probs) && is_aligned(grad) && is_aligned(grad_scores)) {
      return B2_LAUNCH((backward<T, kWidth<T>>), grid, kThreads, stream, p, g, start, out, shape, scale);
    }
    return B2_LAUNCH((backward<T, 1>), grid, kThreads, stream, p, g, start, out, shape, scale);
  });
}
