// What all kernels share: 128-bit accesses, conversion with one rounding, reductions in a fixed order.
//
// Every offset into a tensor is 64-bit. Math is fp32. Nothing is added with atomics, so results are the same
// bits at every run.
#pragma once

#ifdef B2_CPU
#include "cpu/cpu_shim.h"
#else
#include <cuda_runtime.h>
// The value is the cudaError_t of the launch.
#define B2_LAUNCH(kernel, grid, size, stream, ...)                                        \
  (kernel<<<(grid), (size), 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace b2 {

using std::int64_t;

constexpr int kWarp = 32;
constexpr int kMaxWarps = 32;
constexpr int64_t kMaxGrid = 0x7fffffff;

// Elements of one 128-bit access.
template <typename T>
constexpr int kWidth = 16 / static_cast<int>(sizeof(T));

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One 128-bit store. nvcc splits a plain one where conversions stand between its parts.
__device__ inline void store_word(uint4* to, const uint4& word) {
#ifdef B2_CPU
  *to = word;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
#endif
}

// Raw bits of `N` consecutive elements: as many 128-bit words as they fill, or one element.
template <typename T, int N>
struct Raw {
  static constexpr int kWords = N * static_cast<int>(sizeof(T)) / 16;
  static_assert(kWords * 16 == N * static_cast<int>(sizeof(T)), "not a whole number of 128-bit words");
  uint4 words[kWords];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) store_word(reinterpret_cast<uint4*>(to) + i, words[i]);
  }
};

template <typename T>
struct Raw<T, 1> {
  T value;
  __device__ void load(const T* from) { value = *from; }
  __device__ void store(T* to) const { *to = value; }
};

__device__ inline float2 widen_pair(unsigned bits, const __half*) {
  __half2 pair;
  memcpy(static_cast<void*>(&pair), &bits, sizeof pair);
  return __half22float2(pair);
}
__device__ inline float2 widen_pair(unsigned bits, const __nv_bfloat16*) {
  __nv_bfloat162 pair;
  memcpy(static_cast<void*>(&pair), &bits, sizeof pair);
  return __bfloat1622float2(pair);
}
__device__ inline unsigned round_pair(float a, float b, const __half*) {
  const __half2 pair = __floats2half2_rn(a, b);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ inline unsigned round_pair(float a, float b, const __nv_bfloat16*) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  unsigned bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
__device__ inline float widen_one(float x) { return x; }
__device__ inline float widen_one(__half x) { return __half2float(x); }
__device__ inline float widen_one(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void round_one(float x, float* to) { *to = x; }
__device__ inline void round_one(float x, __half* to) { *to = __float2half_rn(x); }
__device__ inline void round_one(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

template <typename T, int N>
__device__ inline void widen(const Raw<T, N>& raw, float (&to)[N]) {
  if constexpr (N == 1) {
    to[0] = widen_one(raw.value);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) memcpy(&to[4 * i], &raw.words[i], 16);
  } else {
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      const unsigned bits[4] = {raw.words[i].x, raw.words[i].y, raw.words[i].z, raw.words[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 pair = widen_pair(bits[j], static_cast<const T*>(nullptr));
        to[8 * i + 2 * j] = pair.x;
        to[8 * i + 2 * j + 1] = pair.y;
      }
    }
  }
}

// Round to nearest even.
template <typename T, int N>
__device__ inline Raw<T, N> narrow(const float (&from)[N]) {
  Raw<T, N> raw;
  if constexpr (N == 1) {
    round_one(from[0], &raw.value);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) memcpy(&raw.words[i], &from[4 * i], 16);
  } else {
#pragma unroll
    for (int i = 0; i < N / 8; ++i) {
      unsigned bits[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bits[j] = round_pair(from[8 * i + 2 * j], from[8 * i + 2 * j + 1], static_cast<const T*>(nullptr));
      }
      raw.words[i] = make_uint4(bits[0], bits[1], bits[2], bits[3]);
    }
  }
  return raw;
}

template <typename T, int N>
__device__ inline void load(const T* from, float (&to)[N]) {
  Raw<T, N> raw;
  raw.load(from);
  widen(raw, to);
}

template <typename T, int N>
__device__ inline void store(T* to, const float (&from)[N]) {
  narrow<T, N>(from).store(to);
}

// Sums of two values over the block, for all threads. `sums` is shared memory of its own; a loop alternates
// between two of them, so that one barrier is enough.
__device__ inline float2 block_sum(float a, float b, float2 (&sums)[kMaxWarps]) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    a += __shfl_xor_sync(0xffffffffu, a, mask);
    b += __shfl_xor_sync(0xffffffffu, b, mask);
  }
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = make_float2(a, b);
  __syncthreads();
  float2 total = make_float2(0.0f, 0.0f);
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarp; ++i) {
    total.x += sums[i].x;
    total.y += sums[i].y;
  }
  return total;
}

__device__ inline float block_sum(float a, float (&sums)[kMaxWarps]) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) a += __shfl_xor_sync(0xffffffffu, a, mask);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = a;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < static_cast<int>(blockDim.x) / kWarp; ++i) total += sums[i];
  return total;
}

__device__ inline float block_max(float a, float (&tops)[kMaxWarps]) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, mask));
  if (threadIdx.x % kWarp == 0) tops[threadIdx.x / kWarp] = a;
  __syncthreads();
  float top = tops[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / kWarp; ++i) top = fmaxf(top, tops[i]);
  return top;
}

// For 128-bit accesses; null, an operand that is not there, is.
inline bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

// Calls `body` with a null pointer of the element type that a dtype code of kernels.h names.
template <class Body>
int with_dtype(int dtype, Body body) {
  switch (dtype) {
    case B2_FLOAT32: return body(static_cast<float*>(nullptr));
    case B2_FLOAT16: return body(static_cast<__half*>(nullptr));
    case B2_BFLOAT16: return body(static_cast<__nv_bfloat16*>(nullptr));
    default: return B2_INVALID;
  }
}

}  // namespace b2
