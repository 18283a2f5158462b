// AdamW over lists of tensors in one launch (Loshchilov and Hutter 2019), fp32 moments, decoupled decay:
//   m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2,
//   w = w (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps).
// As torch.optim.AdamW. A bf16 copy of the new parameter is written in the same pass where one is given.
//
// The lists travel as kernel arguments, kTensors at a time. A block works on one chunk of one tensor, which it finds
// by bisection of the chunk counts. Whole 128-bit words are one kernel; what is left of a tensor (numel modulo 8, or
// all of it where a pointer is not aligned) is another one, by elements. All sizes are 64-bit.
#include <cmath>

#include "common.cuh"

namespace b2 {
namespace {

constexpr int kThreads = 256;
constexpr int kRounds = 8;
constexpr int kTensors = 56;

struct Entry {
  B2AdamTensor tensor;
  int64_t begin;        // first element of the tensor to work on
  int64_t first_chunk;  // chunks of the entries before
};

struct List {
  Entry entries[kTensors];
  int count;
};

struct Factors {
  double log_beta1, log_beta2;
  float beta2, one_minus_beta1, one_minus_beta2, learning_rate, keep, eps;
};

static_assert(sizeof(List) + sizeof(Factors) <= 4096, "kernel arguments have 4 KiB");

// Elements of a chunk for `N` elements a thread and round.
template <int N>
constexpr int64_t kChunk = static_cast<int64_t>(kThreads) * kRounds * N;

// Index of the entry that owns a chunk.
__device__ inline int owner_of(const List& list, int64_t chunk) {
  int low = 0, high = list.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (list.entries[middle].first_chunk <= chunk) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <typename P, typename G, int N>
__global__ void __launch_bounds__(kThreads)
    step(const __grid_constant__ List list, const __grid_constant__ Factors factors) {
  const Entry& entry = list.entries[owner_of(list, blockIdx.x)];
  const B2AdamTensor& tensor = entry.tensor;
  // beta^t in double: 1 - 0.999 has 4 correct digits only in fp32.
  __shared__ float corrections[2];
  if (threadIdx.x == 0) {
    const double t = static_cast<double>(*tensor.step);
    corrections[0] = static_cast<float>(static_cast<double>(factors.learning_rate) / -expm1(t * factors.log_beta1));
    corrections[1] = static_cast<float>(1.0 / sqrt(-expm1(t * factors.log_beta2)));
  }
  __syncthreads();
  const float step_size = corrections[0], root_scale = corrections[1];
  const int64_t chunk = static_cast<int64_t>(blockIdx.x) - entry.first_chunk;
  const int64_t start = entry.begin + chunk * kChunk<N> + static_cast<int64_t>(threadIdx.x) * N;
  auto* parameter = static_cast<P*>(tensor.parameter);
  const auto* gradient = static_cast<const G*>(tensor.gradient);
  [[maybe_unused]] auto* copy = static_cast<__nv_bfloat16*>(tensor.copy);
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int64_t at = start + static_cast<int64_t>(round) * kThreads * N;
    if (at + N > tensor.numel) return;
    float w[N], g[N], m[N], v[N];
    load(gradient + at, g);
    load(tensor.exp_avg + at, m);
    load(tensor.exp_avg_sq + at, v);
    load(parameter + at, w);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      m[i] += factors.one_minus_beta1 * (g[i] - m[i]);
      v[i] = factors.beta2 * v[i] + factors.one_minus_beta2 * g[i] * g[i];
      w[i] = w[i] * factors.keep - step_size * __fdividef(m[i], sqrtf(v[i]) * root_scale + factors.eps);
    }
    store(tensor.exp_avg + at, m);
    store(tensor.exp_avg_sq + at, v);
    store(parameter + at, w);
    if constexpr (N != 4) {
      if (copy != nullptr) store(copy + at, w);
    }
  }
}

// One launch of the elements [begin, end) of each tensor; `list` has their entries and is emptied.
template <typename P, typename G, int N>
int flush(List* list, int64_t* chunks, const Factors& factors, void* stream) {
  if (list->count == 0) return 0;
  if (*chunks > kMaxGrid) return B2_INVALID;
  const int error = B2_LAUNCH((step<P, G, N>), static_cast<unsigned>(*chunks), kThreads, stream, *list, factors);
  list->count = 0;
  *chunks = 0;
  return error;
}

// First element that the kernel of whole words leaves to the other one.
template <typename P, typename G, int N>
int64_t whole_words(const B2AdamTensor& t) {
  const bool aligned = is_aligned(t.parameter) && is_aligned(t.gradient) && is_aligned(t.exp_avg) &&
                       is_aligned(t.exp_avg_sq) && is_aligned(t.copy);
  return aligned ? t.numel / N * N : 0;
}

// All tensors with kernel width `N`: of whole words, or, with N = 1, of what is left of words of `Wide` elements.
template <typename P, typename G, int N, int Wide>
int run(const B2AdamTensor* tensors, int64_t count, const Factors& factors, void* stream) {
  List list;
  list.count = 0;
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t whole = whole_words<P, G, Wide>(tensors[i]);
    const int64_t begin = N == 1 ? whole : 0, end = N == 1 ? tensors[i].numel : whole;
    if (begin == end) continue;
    if (list.count == kTensors) {
      if (const int error = flush<P, G, N>(&list, &chunks, factors, stream)) return error;
    }
    list.entries[list.count++] = {tensors[i], begin, chunks};
    chunks += divide_up(end - begin, kChunk<N>);
  }
  return flush<P, G, N>(&list, &chunks, factors, stream);
}

template <typename P, typename G, int Wide>
int run_all(const B2AdamTensor* tensors, int64_t count, const Factors& factors, void* stream) {
  if (const int error = run<P, G, Wide, Wide>(tensors, count, factors, stream)) return error;
  return run<P, G, 1, Wide>(tensors, count, factors, stream);
}

}  // namespace
}  // namespace b2

extern "C" int b2_adamw(const void* table, std::int64_t count, double learning_rate, double beta1, double beta2,
                        double eps, double weight_decay, int parameter_dtype, int gradient_dtype, void* stream) {
  using namespace b2;
  const auto* tensors = static_cast<const B2AdamTensor*>(table);
  const Factors factors{std::log(beta1),
                        std::log(beta2),
                        static_cast<float>(beta2),
                        static_cast<float>(1.0 - beta1),
                        static_cast<float>(1.0 - beta2),
                        static_cast<float>(learning_rate),
                        static_cast<float>(1.0 - learning_rate * weight_decay),
                        static_cast<float>(eps)};
  bool has_copy = false;
  for (int64_t i = 0; i < count; ++i) has_copy |= tensors[i].copy != nullptr;
  return with_dtype(gradient_dtype, [=](auto* tag) -> int {
    using G = std::remove_pointer_t<decltype(tag)>;
    // 8 elements a thread make whole words of 16-bit tensors; 4 are better where all are fp32.
    if constexpr (sizeof(G) == 4) {
      if (parameter_dtype == B2_FLOAT32 && !has_copy) return run_all<float, G, 4>(tensors, count, factors, stream);
    }
    if (parameter_dtype == B2_FLOAT32) return run_all<float, G, 8>(tensors, count, factors, stream);
    if (parameter_dtype != gradient_dtype) return B2_INVALID;
    return run_all<G, G, 8>(tensors, count, factors, stream);
  });
}
