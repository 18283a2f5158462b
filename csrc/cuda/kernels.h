// C interface of the CUDA kernels: no torch, no C++ types.
//
// Each function queues work on `stream` (a cudaStream_t) of the current device and returns a cudaError_t as int;
// 0 is success, B2_INVALID arguments that it does not support. `dtype` is one of the codes below. Pointers are
// device memory. Sizes are 64-bit. testing/kernels/cpu_shim.py reads the prototypes below: keep to one line for
// each and to the types that stand here.
#pragma once

#include <cstdint>

#define B2_FLOAT32 0
#define B2_FLOAT16 1
#define B2_BFLOAT16 2
#define B2_INVALID 1  // cudaErrorInvalidValue

// One parameter tensor of b2_adamw; a row of int64 on the Python side.
struct B2AdamTensor {
  void* parameter;
  const void* gradient;
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;         // bf16 copy of the new parameter, or null
  const float* step;  // number of this step, from 1 on
  std::int64_t numel;
};

extern "C" {
// clang-format off
int b2_rms_norm_forward(const void* x, const void* residual, const void* weight, void* y, void* total, std::int64_t rows, std::int64_t width, float eps, int dtype, void* stream);
int b2_rms_norm_backward(const void* grad_y, const void* total, const void* grad_total, const void* weight, void* grad_x, void* grad_weight, void* partial, std::int64_t programs, std::int64_t rows, std::int64_t width, float eps, int dtype, void* stream);
int b2_swiglu_forward(const void* gate_up, void* out, std::int64_t rows, std::int64_t width, int dtype, void* stream);
int b2_swiglu_backward(const void* gate_up, const void* grad, void* grad_gate_up, std::int64_t rows, std::int64_t width, int dtype, void* stream);
int b2_alibi_softmax_forward(const void* scores, const void* slopes, const void* starts, void* probs, std::int64_t batch, std::int64_t heads, std::int64_t queries, std::int64_t keys, float scale, int dtype, void* stream);
int b2_alibi_softmax_backward(const void* probs, const void* grad, const void* starts, void* grad_scores, std::int64_t batch, std::int64_t heads, std::int64_t queries, std::int64_t keys, float scale, int dtype, void* stream);
int b2_head_statistics(const void* products, const void* inverse_norms, const void* labels, void* statistics, std::int64_t tokens, std::int64_t columns, std::int64_t stride, std::int64_t first_column, int dtype, void* stream);
int b2_head_epilogue(const void* products, const void* inverse_norms, const void* labels, const void* tokens_table, void* grad, void* partial, void* column_sums, std::int64_t splits, std::int64_t tokens, std::int64_t columns, std::int64_t stride, std::int64_t first_column, int dtype, int grad_dtype, void* stream);
int b2_adamw(const void* table, std::int64_t count, double learning_rate, double beta1, double beta2, double eps, double weight_decay, int parameter_dtype, int gradient_dtype, void* stream);
// clang-format on
}
