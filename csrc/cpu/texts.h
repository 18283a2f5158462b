// A column of texts as Arrow stores one (large_string): all bytes behind each other, and where each text starts.

#pragma once

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace b2 {

namespace py = pybind11;

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Offsets = py::array_t<std::int64_t, py::array::c_style>;
using Characters = py::array_t<std::uint32_t, py::array::c_style>;

// The characters that those up to U+FFFF count as, or null if the table is empty.
inline const std::uint32_t* checked_characters(const Characters& characters) {
  if (characters.size() == 0) {
    return nullptr;
  }
  if (characters.ndim() != 1 || characters.size() != 0x10000) {
    throw std::invalid_argument("a table of characters is [65536] or empty");
  }
  if (*std::max_element(characters.data(), characters.data() + characters.size()) > 0x10FFFF) {
    throw std::invalid_argument("a table of characters has characters up to U+10FFFF");
  }
  return characters.data();
}

// Views of arrays that the caller keeps alive; safe to read without the GIL.
class Texts {
 public:
  // bytes uint8 [B], offsets int64 [N + 1], non-decreasing, within B.
  Texts(const Bytes& bytes, const Offsets& offsets)
      : data_(reinterpret_cast<const char*>(bytes.data())), offsets_(offsets.data()), size_(offsets.size() - 1) {
    if (offsets.ndim() != 1 || bytes.ndim() != 1 || size_ < 0) {
      throw std::invalid_argument("texts need bytes [B] and offsets [N + 1]");
    }
    for (std::int64_t i = 0; i < size_; ++i) {
      if (offsets_[i] > offsets_[i + 1]) {
        throw std::invalid_argument("offset " + std::to_string(i + 1) + " of the texts is smaller than the one before");
      }
    }
    if (offsets_[0] < 0 || offsets_[size_] > bytes.size()) {
      throw std::invalid_argument("the offsets of the texts end outside of their " + std::to_string(bytes.size()) +
                                  " bytes");
    }
  }

  std::int64_t size() const { return size_; }
  std::string_view operator[](std::int64_t i) const {
    return {data_ + offsets_[i], static_cast<std::size_t>(offsets_[i + 1] - offsets_[i])};
  }

 private:
  const char* data_;
  const std::int64_t* offsets_;
  std::int64_t size_;
};

}  // namespace b2
