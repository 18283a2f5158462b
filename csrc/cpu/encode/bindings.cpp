// Python's view of the encoder.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "encode/encoder.h"
#include "texts.h"

namespace py = pybind11;

namespace b2::encode {

namespace {

using Int32Array = py::array_t<std::int32_t, py::array::c_style>;
using Kinds = py::array_t<std::uint8_t, py::array::c_style>;

Model make_model(const Bytes& data, const Offsets& offsets, const Kinds& kinds, const Int32Array& ranks,
                 const Int32Array& byte_ids) {
  const Texts texts(data, offsets);
  if (kinds.size() != texts.size() || ranks.size() != texts.size() || byte_ids.size() != 256) {
    throw std::invalid_argument("a vocabulary of V pieces has kinds [V], ranks [V] and 256 byte ids");
  }
  std::vector<std::string_view> pieces;
  for (std::int64_t i = 0; i < texts.size(); ++i) pieces.push_back(texts[i]);
  return Model(pieces, kinds.data(), ranks.data(), byte_ids.data());
}

// Threads that call at once take an encoder each; one that is done leaves its encoder, with its cache, to the next.
class EncoderPool {
 public:
  EncoderPool(const Bytes& data, const Offsets& offsets, const Kinds& kinds, const Int32Array& ranks,
              const Int32Array& byte_ids, int cache_bits)
      : model_(make_model(data, offsets, kinds, ranks, byte_ids)), cache_bits_(cache_bits) {
    if (cache_bits < 3 || cache_bits > 30) throw std::invalid_argument("cache_bits is 3 to 30");
  }

  py::tuple encode(const Bytes& data, const Offsets& offsets, std::int32_t last_id) {
    const Texts texts(data, offsets);
    py::array_t<std::int64_t> starts(texts.size() + 1);
    std::int64_t* start = starts.mutable_data();
    const char* limit = reinterpret_cast<const char*>(data.data()) + data.size();
    Ids ids;
    {
      py::gil_scoped_release release;
      std::unique_ptr<Encoder> encoder = take();
      for (std::int64_t i = 0; i < texts.size(); ++i) {
        start[i] = static_cast<std::int64_t>(ids.size());
        encoder->encode(texts[i], limit, ids);
        if (last_id >= 0) ids.push(last_id);
      }
      start[texts.size()] = static_cast<std::int64_t>(ids.size());
      give_back(std::move(encoder));
    }
    return py::make_tuple(as_array(ids), starts);
  }

 private:
  std::unique_ptr<Encoder> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (idle_.empty()) return std::make_unique<Encoder>(model_, cache_bits_);
    std::unique_ptr<Encoder> encoder = std::move(idle_.back());
    idle_.pop_back();
    return encoder;
  }
  void give_back(std::unique_ptr<Encoder> encoder) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(std::move(encoder));
  }
  static Int32Array as_array(Ids& ids) {
    const auto size = static_cast<py::ssize_t>(ids.size());
    if (size == 0) return Int32Array(0);
    Ids::Memory memory = ids.release();
    const std::int32_t* data = memory.get();
    py::capsule owner(memory.release(), [](void* pointer) { std::free(pointer); });
    return Int32Array(size, data, owner);
  }

  const Model model_;
  const int cache_bits_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Encoder>> idle_;
};

}  // namespace

}  // namespace b2::encode

void bind_encoder(py::module_& m) {
  using b2::encode::EncoderPool;
  py::class_<EncoderPool>(m, "BpeEncoder", "Exact and fast encoder of a SentencePiece BPE model; thread-safe.")
      .def(py::init<const b2::Bytes&, const b2::Offsets&, const b2::encode::Kinds&, const b2::encode::Int32Array&,
                    const b2::encode::Int32Array&, int>(),
           py::kw_only(), py::arg("pieces").noconvert(), py::arg("offsets").noconvert(), py::arg("kinds").noconvert(),
           py::arg("ranks").noconvert(), py::arg("byte_ids").noconvert(), py::arg("cache_bits"))
      .def("encode", &EncoderPool::encode, py::arg("data").noconvert(), py::arg("offsets").noconvert(),
           py::arg("last_id") = -1,
           "Ids int32 [T] of N texts behind each other and where each starts, int64 [N + 1]; last_id, if not -1, ends "
           "each text. Releases the GIL.");
}
