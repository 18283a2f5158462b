// Shingle sets of texts, and the exact Jaccard similarity of pairs of them.

#include "text/shingles.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <functional>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "text/uniform_sort.h"
#include "texts.h"

namespace py = pybind11;

namespace {

using Hashes = py::array_t<std::uint64_t, py::array::c_style>;
using Indices = py::array_t<std::int64_t, py::array::c_style>;

std::size_t checked_length(std::int64_t length) {
  if (length < 1) {
    throw std::invalid_argument("a shingle has at least 1 word, not " + std::to_string(length));
  }
  return static_cast<std::size_t>(length);
}

// The array takes over the memory of `values`.
template <typename T>
py::array_t<T> to_array(std::vector<T>&& values) {
  auto* kept = new std::vector<T>(std::move(values));
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  return py::array_t<T>(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

py::tuple shingle_sets(const b2::Bytes& data, const b2::Offsets& offsets, std::int64_t length,
                       const b2::Characters& characters) {
  const b2::Texts texts(data, offsets);
  b2::text::Shingler shingler(checked_length(length), b2::checked_characters(characters));
  std::vector<std::uint64_t> values;
  std::vector<std::int64_t> starts{0};
  {
    py::gil_scoped_release release;
    std::vector<std::uint64_t> set;
    std::vector<std::uint64_t> scratch;
    std::vector<std::size_t> counts;
    for (std::int64_t i = 0; i < texts.size(); ++i) {
      set = shingler(texts[i]);
      b2::text::uniform_sort(set, scratch, counts, [](std::uint64_t x) { return x; }, std::less<>());
      set.erase(std::unique(set.begin(), set.end()), set.end());
      values.insert(values.end(), set.begin(), set.end());
      starts.push_back(static_cast<std::int64_t>(values.size()));
    }
  }
  return py::make_tuple(to_array(std::move(values)), to_array(std::move(starts)));
}

// |a and b| / |a or b| of two sorted sets; 0 when both are empty.
double jaccard_of(const std::uint64_t* a, const std::uint64_t* a_end, const std::uint64_t* b,
                  const std::uint64_t* b_end) {
  const auto total = (a_end - a) + (b_end - b);
  std::ptrdiff_t common = 0;
  while (a < a_end && b < b_end) {
    const std::uint64_t x = *a;
    const std::uint64_t y = *b;
    common += x == y;
    a += x <= y;
    b += y <= x;
  }
  return total ? static_cast<double>(common) / static_cast<double>(total - common) : 0.0;
}

// Shingle sets of one file or batch, as shingle_sets gives them; the arrays may be memory maps.
struct Sets {
  explicit Sets(const py::handle& pair, std::int64_t first) : first(first) {
    const auto arrays = py::cast<py::tuple>(pair);
    if (arrays.size() != 2 || !py::isinstance<Hashes>(arrays[0]) || !py::isinstance<Indices>(arrays[1])) {
      throw std::invalid_argument("sets are pairs of values uint64 [S] and offsets int64 [M + 1]");
    }
    const auto values_array = py::cast<Hashes>(arrays[0]);
    const auto offsets_array = py::cast<Indices>(arrays[1]);
    values = values_array.data();
    num_values = values_array.size();
    offsets = offsets_array.data();
    size = offsets_array.size() - 1;
    if (size < 0) {
      throw std::invalid_argument("the offsets of sets are [M + 1], not empty");
    }
  }

  const std::uint64_t* values;
  std::int64_t num_values;
  const std::int64_t* offsets;
  std::int64_t size;
  std::int64_t first;  // number of the first set, counted over all batches
};

struct Range {
  const std::uint64_t* begin;
  const std::uint64_t* end;
};

Range set_at(const std::vector<Sets>& batches, std::int64_t number) {
  const auto next = std::upper_bound(batches.begin(), batches.end(), number,
                                     [](std::int64_t n, const Sets& sets) { return n < sets.first; });
  if (number < 0 || next == batches.begin() || number - std::prev(next)->first >= std::prev(next)->size) {
    throw std::out_of_range("there is no set " + std::to_string(number));
  }
  const Sets& sets = *std::prev(next);
  const std::int64_t begin = sets.offsets[number - sets.first];
  const std::int64_t end = sets.offsets[number - sets.first + 1];
  if (begin < 0 || begin > end || end > sets.num_values) {
    throw std::invalid_argument("set " + std::to_string(number) + " leaves its " + std::to_string(sets.num_values) +
                                " shingles");
  }
  return {sets.values + begin, sets.values + end};
}

py::array_t<double> jaccard(const py::list& sets, const Indices& pairs) {
  if (pairs.ndim() != 2 || pairs.shape(1) != 2) {
    throw std::invalid_argument("jaccard needs pairs [E, 2]");
  }
  std::vector<Sets> batches;
  for (const py::handle& batch : sets) {
    batches.emplace_back(batch, batches.empty() ? 0 : batches.back().first + batches.back().size);
  }
  const std::int64_t* pair = pairs.data();
  const std::int64_t count = pairs.shape(0);
  py::array_t<double> result(count);
  double* out = result.mutable_data();
  py::gil_scoped_release release;
  for (std::int64_t e = 0; e < count; ++e) {
    const Range a = set_at(batches, pair[2 * e]);
    const Range b = set_at(batches, pair[2 * e + 1]);
    out[e] = jaccard_of(a.begin, a.end, b.begin, b.end);
  }
  return result;
}

}  // namespace

void bind_shingles(py::module_& m) {
  m.def("shingle_sets", &shingle_sets, py::arg("data").noconvert(), py::arg("offsets").noconvert(), py::kw_only(),
        py::arg("length"), py::arg("characters").noconvert() = b2::Characters(0),
        "Sorted distinct shingles of N texts: uint64 [S] of all behind each other, and int64 [N + 1] where each set "
        "starts. `characters`, uint32 [65536] or empty: the character that a word of one Han, kana or Hangul character "
        "counts as. Releases the GIL.");
  m.def("jaccard", &jaccard, py::arg("sets"), py::arg("pairs").noconvert(),
        "Exact Jaccard similarity, float64 [E], of pairs int64 [E, 2]: numbers of sets, counted over a list of what "
        "shingle_sets returns. Releases the GIL.");
}
