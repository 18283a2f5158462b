// The extension megatron_b2._cpu: every source of this folder adds its part.

#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_encoder(py::module_& m);
void bind_order(py::module_& m);
void bind_bloom(py::module_& m);
void bind_signals(py::module_& m);
void bind_spans(py::module_& m);
void bind_candidates(py::module_& m);
void bind_minhash(py::module_& m);
void bind_ngram(py::module_& m);
void bind_ngram_features(py::module_& m);
void bind_shingles(py::module_& m);
void bind_union_find(py::module_& m);
void bind_words(py::module_& m);
void bind_token_stream(py::module_& m);

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Native CPU code of megatron_b2: token files, text, encoding.";
  bind_encoder(m);
  bind_order(m);
  bind_bloom(m);
  bind_signals(m);
  bind_spans(m);
  bind_candidates(m);
  bind_minhash(m);
  bind_ngram(m);
  bind_ngram_features(m);
  bind_shingles(m);
  bind_union_find(m);
  bind_words(m);
  bind_token_stream(m);
}
