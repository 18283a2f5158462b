// Python module megatron_b2._cuda: the functions of kernels.h without their prefix.
//
// Pointers and streams are integers (Tensor.data_ptr(), Stream.cuda_stream), so that nothing here depends on torch.
// Each function takes the device index first and raises RuntimeError with what is missing. Importing needs no GPU and
// no driver.

#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace py = pybind11;

namespace {

std::string version_of(int number) {
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

// What a user can do about an error.
std::string advice(cudaError_t error) {
  int driver = 0;
  switch (error) {
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
      if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        return "no NVIDIA driver was found. These kernels run on an NVIDIA GPU only";
      }
      if (driver < CUDART_VERSION) {
        return "the driver supports CUDA " + version_of(driver) + ", but these kernels were built with CUDA " +
               version_of(CUDART_VERSION) + ". Update the driver, or rebuild with an older nvcc";
      }
      return "there is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it";
    case cudaErrorNoKernelImageForDevice:
      return "the kernels are built for compute capability 8.0 and newer, and this GPU is older";
    case cudaErrorInvalidValue:
      return "sizes, strides, dtypes or alignment are not supported";
    default:
      return cudaGetErrorString(error);
  }
}

void check(int code, const char* name) {
  if (code == 0) return;
  const auto error = static_cast<cudaError_t>(code);
  throw std::runtime_error("megatron_b2._cuda." + std::string(name) + ": " + advice(error) + " (cudaError " +
                           std::to_string(code) + ", " + cudaGetErrorName(error) + ")");
}

// Makes a device current while a kernel is launched.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* name) {
    check(cudaGetDevice(&before_), name);
    if (device != before_) check(cudaSetDevice(device), name);
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class T>
struct Argument {
  using type = T;
  static T value(T x) { return x; }
};
template <class T>
struct Argument<T*> {
  using type = std::uintptr_t;
  static T* value(std::uintptr_t address) { return reinterpret_cast<T*>(address); }
};

template <class... Args>
void define(py::module_& module, const char* name, int (*function)(Args...)) {
  module.def(name, [name, function](int device, typename Argument<Args>::type... args) {
    const DeviceGuard guard(device, name);
    check(function(Argument<Args>::value(args)...), name);
  });
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of csrc/cuda; see megatron_b2.ops.cuda for functions on tensors.";
  module.attr("cuda_version") = version_of(CUDART_VERSION);
  define(module, "rms_norm_forward", b2_rms_norm_forward);
  define(module, "rms_norm_backward", b2_rms_norm_backward);
  define(module, "swiglu_forward", b2_swiglu_forward);
  define(module, "swiglu_backward", b2_swiglu_backward);
  define(module, "alibi_softmax_forward", b2_alibi_softmax_forward);
  define(module, "alibi_softmax_backward", b2_alibi_softmax_backward);
  define(module, "head_statistics", b2_head_statistics);
  define(module, "head_epilogue", b2_head_epilogue);
  define(module, "adamw", b2_adamw);
}
