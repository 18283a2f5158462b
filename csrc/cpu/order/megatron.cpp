// Index arrays of Megatron-LM's data order, bit for bit: what megatron_b2/data/megatron_order.py builds at start.
//
// Shuffles are those of numpy.random.RandomState, drawn from a copy of its MT19937 state: the same numbers in the
// same order, but typed, without the interpreter lock, and with the swaps of a block fetched ahead of their use
// (a shuffle of a large array is one cache miss after the other). Checked against numpy in tests/data.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// MT19937 of Matsumoto and Nishimura (1998); bounded numbers by masking and rejection, as numpy's legacy generator.
class MersenneTwister {
 public:
  static constexpr int kWords = 624;

  MersenneTwister(const Array<std::uint32_t>& state, int position) : position_(position) {
    if (state.ndim() != 1 || state.size() != kWords || position < 0 || position > kWords) {
      throw std::invalid_argument("the state of MT19937 is uint32 [624] and a position in 0 .. 624");
    }
    std::copy_n(state.data(), kWords, state_.begin());
  }

  std::uint64_t draw(std::uint64_t max) {
    if (max == 0) {
      return 0;
    }
    std::uint64_t mask = max;
    for (int shift = 1; shift < 64; shift *= 2) {
      mask |= mask >> shift;
    }
    std::uint64_t value = 0;
    do {
      value = (max <= 0xffffffffu ? next() : next64()) & mask;
    } while (value > max);
    return value;
  }

  // Fisher-Yates from the end, as RandomState.shuffle.
  template <typename T>
  void shuffle(Array<T>& values) {
    if (values.ndim() != 1) {
      throw std::invalid_argument("only arrays [n] are shuffled");
    }
    T* data = values.mutable_data();
    std::int64_t last = static_cast<std::int64_t>(values.size()) - 1;
    py::gil_scoped_release release;
    constexpr std::int64_t kBlock = 128;
    std::array<std::int64_t, kBlock> partner;
    while (last > 0) {
      const std::int64_t count = std::min(kBlock, last);
      for (std::int64_t k = 0; k < count; ++k) {
        partner[k] = static_cast<std::int64_t>(draw(static_cast<std::uint64_t>(last - k)));
        __builtin_prefetch(data + partner[k], 1);
      }
      for (std::int64_t k = 0; k < count; ++k) {
        std::swap(data[last - k], data[partner[k]]);
      }
      last -= count;
    }
  }

 private:
  std::uint32_t next() {
    if (position_ == kWords) {
      refill();
    }
    std::uint32_t y = state_[position_++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
  }

  std::uint64_t next64() {
    const std::uint64_t high = next();
    return (high << 32) | next();
  }

  void refill() {
    for (int i = 0; i < kWords; ++i) {
      const std::uint32_t y = (state_[i] & 0x80000000u) | (state_[(i + 1) % kWords] & 0x7fffffffu);
      state_[i] = state_[(i + 397) % kWords] ^ (y >> 1) ^ ((y & 1u) != 0 ? 0x9908b0dfu : 0u);
    }
    position_ = 0;
  }

  std::array<std::uint32_t, kWords> state_;
  int position_;
};

// Row i of `rows` is where sample i starts: (entry of `documents`, token inside that document). A sample holds
// seq_len + 1 tokens of the documents laid end to end and shares its last one with the next sample. A sample that
// the documents do not fill ends at their last token, and so do all rows after it.
template <typename Document, typename Row>
void sample_index(const Array<std::int32_t>& lengths, const Array<Document>& documents, std::int64_t seq_len,
                  Array<Row>& rows) {
  if (lengths.ndim() != 1 || documents.ndim() != 1 || rows.ndim() != 2 || rows.shape(1) != 2 || rows.shape(0) < 1) {
    throw std::invalid_argument("lengths [S], documents [D] and rows [N + 1, 2]");
  }
  if (seq_len < 1 || documents.size() < 1) {
    throw std::invalid_argument("at least one token a sample and one document");
  }
  const std::int32_t* length = lengths.data();
  const Document* document = documents.data();
  const auto num_lengths = static_cast<std::int64_t>(lengths.size());
  const auto num_documents = static_cast<std::int64_t>(documents.size());
  const auto num_rows = static_cast<std::int64_t>(rows.shape(0));
  Row* row = rows.mutable_data();

  py::gil_scoped_release release;
  const auto length_of = [&](std::int64_t entry) -> std::int64_t {
    const auto number = static_cast<std::int64_t>(document[entry]);
    if (number < 0 || number >= num_lengths || length[number] < 0) {
      throw std::out_of_range("document " + std::to_string(number) + " of " + std::to_string(num_lengths) +
                              " does not exist or has a negative length");
    }
    return length[number];
  };
  std::int64_t entry = 0;
  std::int64_t first = 0;  // token of the stream that `entry` begins with
  std::int64_t size = length_of(0);
  row[0] = row[1] = 0;
  for (std::int64_t i = 1; i < num_rows; ++i) {
    const std::int64_t token = i * seq_len;  // of the stream
    while (token >= first + size && entry + 1 < num_documents) {
      first += size;
      size = length_of(++entry);
    }
    row[2 * i] = static_cast<Row>(entry);
    row[2 * i + 1] = static_cast<Row>(std::min(token - first, size - 1));
  }
}

// Position by position, the source that is furthest below its share; ties go to the first one. `sources` gets its
// number, `drawn` how often it was taken before. In float64, in this order of operations.
void blend_index(const Array<double>& weights, Array<std::int16_t>& sources, Array<std::int64_t>& drawn) {
  if (weights.ndim() != 1 || weights.size() < 1 || weights.size() > 32767 || sources.ndim() != 1 ||
      drawn.ndim() != 1 || sources.size() != drawn.size()) {
    throw std::invalid_argument("weights [1 .. 32767], sources [N] and drawn [N]");
  }
  const double* weight = weights.data();
  const auto num_sources = static_cast<std::int64_t>(weights.size());
  const auto size = static_cast<std::int64_t>(sources.size());
  std::int16_t* source = sources.mutable_data();
  std::int64_t* before = drawn.mutable_data();

  py::gil_scoped_release release;
  std::vector<double> count(static_cast<std::size_t>(num_sources), 0.0);
  for (std::int64_t i = 0; i < size; ++i) {
    const double total = std::max(static_cast<double>(i), 1.0);
    std::int64_t furthest = 0;
    double largest = weight[0] * total - count[0];
    for (std::int64_t k = 1; k < num_sources; ++k) {
      const double missing = weight[k] * total - count[k];
      if (missing > largest) {
        largest = missing;
        furthest = k;
      }
    }
    source[i] = static_cast<std::int16_t>(furthest);
    before[i] = static_cast<std::int64_t>(count[furthest]);
    count[furthest] += 1.0;
  }
}

template <typename Document, typename Row>
void bind_sample_index(py::module_& m) {
  m.def("megatron_sample_index", &sample_index<Document, Row>, py::kw_only(), py::arg("lengths").noconvert(),
        py::arg("documents").noconvert(), py::arg("seq_len"), py::arg("rows").noconvert(),
        "Fill rows [N + 1, 2], int32 or int64, with where each sample starts: (entry of documents, token in it).");
}

}  // namespace

void bind_order(py::module_& m) {
  py::class_<MersenneTwister>(m, "MersenneTwister", "The generator of numpy.random.RandomState.")
      .def(py::init<const Array<std::uint32_t>&, int>(), py::kw_only(), py::arg("state").noconvert(),
           py::arg("position"), "From RandomState.get_state(): state uint32 [624] and position.")
      .def("draw", &MersenneTwister::draw, py::arg("max"), "A number in 0 .. max, as RandomState.shuffle draws it.")
      .def("shuffle", &MersenneTwister::shuffle<std::int32_t>, py::arg("values").noconvert(),
           "Shuffle [n] in place, as RandomState.shuffle; int32, uint32 or int64.")
      .def("shuffle", &MersenneTwister::shuffle<std::uint32_t>, py::arg("values").noconvert())
      .def("shuffle", &MersenneTwister::shuffle<std::int64_t>, py::arg("values").noconvert());
  bind_sample_index<std::int32_t, std::int32_t>(m);
  bind_sample_index<std::int32_t, std::int64_t>(m);
  bind_sample_index<std::int64_t, std::int64_t>(m);
  m.def("megatron_blend_index", &blend_index, py::kw_only(), py::arg("weights").noconvert(),
        py::arg("sources").noconvert(), py::arg("drawn").noconvert(),
        "Fill sources int16 [N] and drawn int64 [N] from normalised weights float64.");
}
