// MinHash signatures, and hashes of their bands for locality-sensitive hashing.
//
// A shingle is cut to 32 bits x; permutation p maps it to h_p(x) = a_p x + b_p mod 2^32, a_p odd, which is a bijection.
// signature[p] = min of h_p over the shingles, so two texts agree at p with a probability near their Jaccard
// similarity (Broder 1997). a_p and b_p come from SplitMix64 of the seed.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "text/hashing.h"
#include "text/shingles.h"
#include "texts.h"

namespace py = pybind11;

namespace {

using Signatures = py::array_t<std::uint32_t, py::array::c_style>;
using Hashes = py::array_t<std::uint64_t, py::array::c_style>;

constexpr std::size_t kLanes = 32;  // permutations at a time: what the vector registers hold
constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

class Permutations {
 public:
  Permutations(std::size_t count, std::uint64_t seed)
      : multiply_((count + kLanes - 1) / kLanes * kLanes), add_(multiply_.size()) {
    for (std::size_t p = 0; p < multiply_.size(); ++p) {
      const std::uint64_t random = b2::text::avalanche(seed + (p + 1) * 0x9E3779B97F4A7C15);
      multiply_[p] = static_cast<std::uint32_t>(random >> 32) | 1;
      add_[p] = static_cast<std::uint32_t>(random);
    }
  }

  std::size_t padded() const { return multiply_.size(); }
  const std::uint32_t* multiply() const { return multiply_.data(); }
  const std::uint32_t* add() const { return add_.data(); }

 private:
  std::vector<std::uint32_t> multiply_;
  std::vector<std::uint32_t> add_;
};

using Minima = void (*)(const std::vector<std::uint64_t>&, const Permutations&, std::uint32_t*);

// out[p] = min over shingles of permutation p, for all p. Compiled for AVX-512, for AVX2 and without; the arithmetic is
// that of integers, so all give the same.
__attribute__((always_inline)) inline void minima(const std::vector<std::uint64_t>& shingles,
                                                  const Permutations& permutations, std::uint32_t* out) {
  for (std::size_t p = 0; p < permutations.padded(); p += kLanes) {
    std::uint32_t multiply[kLanes];
    std::uint32_t add[kLanes];
    std::uint32_t least[kLanes];
    for (std::size_t k = 0; k < kLanes; ++k) {
      multiply[k] = permutations.multiply()[p + k];
      add[k] = permutations.add()[p + k];
      least[k] = kNone;
    }
    for (const std::uint64_t shingle : shingles) {
      const auto x = static_cast<std::uint32_t>(shingle >> 32);
      for (std::size_t k = 0; k < kLanes; ++k) {
        least[k] = std::min(least[k], x * multiply[k] + add[k]);
      }
    }
    std::copy_n(least, kLanes, out + p);
  }
}

void minima_portable(const std::vector<std::uint64_t>& shingles, const Permutations& permutations, std::uint32_t* out) {
  minima(shingles, permutations, out);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void minima_avx2(const std::vector<std::uint64_t>& shingles,
                                                 const Permutations& permutations, std::uint32_t* out) {
  minima(shingles, permutations, out);
}

__attribute__((target("avx512f,prefer-vector-width=512"))) void minima_avx512(
    const std::vector<std::uint64_t>& shingles, const Permutations& permutations, std::uint32_t* out) {
  minima(shingles, permutations, out);
}

Minima fastest_minima() {
  if (__builtin_cpu_supports("avx512f")) {
    return minima_avx512;
  }
  return __builtin_cpu_supports("avx2") ? minima_avx2 : minima_portable;
}
#else
Minima fastest_minima() { return minima_portable; }
#endif

Signatures minhash_signatures(const b2::Bytes& data, const b2::Offsets& offsets, std::int64_t length,
                              std::int64_t permutations, std::uint64_t seed, const b2::Characters& characters,
                              bool portable) {
  if (length < 1 || permutations < 1) {
    throw std::invalid_argument("a signature needs shingles of at least 1 word and at least 1 permutation, not " +
                                std::to_string(length) + " and " + std::to_string(permutations));
  }
  const b2::Texts texts(data, offsets);
  const std::uint32_t* table = b2::checked_characters(characters);
  Signatures signatures({texts.size(), permutations});
  std::uint32_t* out = signatures.mutable_data();
  py::gil_scoped_release release;
  const Permutations all(static_cast<std::size_t>(permutations), seed);
  const Minima minima_of = portable ? minima_portable : fastest_minima();
  b2::text::Shingler shingler(static_cast<std::size_t>(length), table);
  std::vector<std::uint32_t> padded(all.padded());
  for (std::int64_t i = 0; i < texts.size(); ++i) {
    minima_of(shingler(texts[i]), all, padded.data());
    out = std::copy_n(padded.data(), permutations, out);
  }
  return signatures;
}

Hashes band_hashes(const Signatures& signatures, std::int64_t bands, std::int64_t rows) {
  if (signatures.ndim() != 2 || bands < 1 || rows < 1 || bands > signatures.shape(1) / rows) {
    throw std::invalid_argument(std::to_string(bands) + " bands of " + std::to_string(rows) +
                                " rows need signatures [N, P] with P >= bands x rows");
  }
  const std::int64_t documents = signatures.shape(0);
  const std::int64_t stride = signatures.shape(1);
  Hashes hashes({bands, documents});
  const std::uint32_t* signature = signatures.data();
  std::uint64_t* out = hashes.mutable_data();
  py::gil_scoped_release release;
  for (std::int64_t i = 0; i < documents; ++i, signature += stride) {
    for (std::int64_t band = 0; band < bands; ++band) {
      std::uint64_t hash = static_cast<std::uint64_t>(band) + 1;
      for (std::int64_t row = 0; row < rows; ++row) {
        hash = b2::text::avalanche(hash + signature[band * rows + row] * 0x9E3779B97F4A7C15);
      }
      out[band * documents + i] = hash;
    }
  }
  return hashes;
}

}  // namespace

void bind_minhash(py::module_& m) {
  m.def("minhash_signatures", &minhash_signatures, py::arg("data").noconvert(), py::arg("offsets").noconvert(),
        py::kw_only(), py::arg("length"), py::arg("permutations"), py::arg("seed"),
        py::arg("characters").noconvert() = b2::Characters(0), py::arg("portable") = false,
        "MinHash signatures uint32 [N, permutations] of N texts by shingles of `length` words; a text without words "
        "has 0xFFFFFFFF everywhere. `characters`: see shingle_sets. `portable` leaves AVX-512 and AVX2 unused; the "
        "result is the same. Releases the GIL.");
  m.def("band_hashes", &band_hashes, py::arg("signatures").noconvert(), py::kw_only(), py::arg("bands"),
        py::arg("rows"),
        "Hashes uint64 [bands, N] of signatures[:, band * rows : (band + 1) * rows]. Releases the GIL.");
}
