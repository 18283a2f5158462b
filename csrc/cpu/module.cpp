// The extension megatron_b2._cpu: every source of this folder adds its part.

#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_token_stream(py::module_& m);

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU code of megatron_b2: token files, text, encoding.";
  bind_token_stream(m);
}
