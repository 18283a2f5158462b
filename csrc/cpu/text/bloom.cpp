// A blocked Bloom filter over 128-bit hashes: see megatron_b2/corpus/spans/bloom.py.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

constexpr std::int64_t kBlockWords = 8;  // 512 bits, one line of the cache

using Words = py::array_t<std::uint64_t, py::array::c_style>;
using Block = std::array<std::uint64_t, kBlockWords>;

// The bits of one key in its block: `probes` of them, drawn by a linear congruential generator from the lower half.
Block mask_of(std::uint64_t low, int probes) {
  Block mask{};
  for (int i = 0; i < probes; ++i) {
    mask[low >> 61] |= std::uint64_t{1} << (low >> 55 & 63);
    low = low * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15;
  }
  return mask;
}

std::int64_t checked_blocks(const Words& bits, const Words& hashes, int probes) {
  if (bits.ndim() != 1 || bits.size() == 0 || bits.size() % kBlockWords != 0) {
    throw std::invalid_argument("the bits of a Bloom filter are uint64 [8 B], B > 0, not " +
                                std::to_string(bits.size()) + " words");
  }
  if (hashes.ndim() != 2 || hashes.shape(1) != 2) {
    throw std::invalid_argument("hashes must be uint64 [N, 2]");
  }
  if (probes < 1) {
    throw std::invalid_argument("a Bloom filter needs at least one probe, not " + std::to_string(probes));
  }
  return bits.size() / kBlockWords;
}

std::int64_t block_of(std::uint64_t high, std::int64_t blocks) {
  return static_cast<std::int64_t>(static_cast<unsigned __int128>(high) * static_cast<std::uint64_t>(blocks) >> 64);
}

bool has_all(const std::uint64_t* block, const Block& mask) {
  std::uint64_t missing = 0;
  for (std::int64_t w = 0; w < kBlockWords; ++w) {
    missing |= mask[w] & ~block[w];
  }
  return missing == 0;
}

template <bool insert>
py::array_t<bool> look_up(std::uint64_t* bits, const Words& hashes, std::int64_t blocks, int probes) {
  const std::int64_t count = hashes.shape(0);
  const std::uint64_t* hash = hashes.data();
  py::array_t<bool> found(static_cast<py::ssize_t>(count));
  bool* out = found.mutable_data();
  py::gil_scoped_release release;
  for (std::int64_t i = 0; i < count; ++i) {
    std::uint64_t* const block = bits + kBlockWords * block_of(hash[2 * i], blocks);
    const Block mask = mask_of(hash[2 * i + 1], probes);
    out[i] = has_all(block, mask);
    if constexpr (insert) {
      for (std::int64_t w = 0; w < kBlockWords; ++w) {
        block[w] |= mask[w];
      }
    }
  }
  return found;
}

py::array_t<bool> add(Words bits, const Words& hashes, int probes) {
  const std::int64_t blocks = checked_blocks(bits, hashes, probes);
  return look_up<true>(bits.mutable_data(), hashes, blocks, probes);
}

py::array_t<bool> contains(const Words& bits, const Words& hashes, int probes) {
  const std::int64_t blocks = checked_blocks(bits, hashes, probes);
  return look_up<false>(const_cast<std::uint64_t*>(bits.data()), hashes, blocks, probes);  // not written to
}

}  // namespace

void bind_bloom(py::module_& m) {
  m.def("bloom_add", &add, py::arg("bits").noconvert(), py::arg("hashes").noconvert(), py::kw_only(),
        py::arg("probes"), "Put hashes uint64 [N, 2] into bits uint64 [8 B]; bool [N], whether each was there before.");
  m.def("bloom_contains", &contains, py::arg("bits").noconvert(), py::arg("hashes").noconvert(), py::kw_only(),
        py::arg("probes"), "Whether each of the hashes uint64 [N, 2] seems to be in bits uint64 [8 B].");
}
