// 64-bit hashes of words and of sequences of words. Fixed for good: signatures on disk depend on them.

#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace b2::text {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "hashes read text in little-endian words");

inline std::uint64_t load8(const char* p) {
  std::uint64_t value;
  std::memcpy(&value, p, 8);
  return value;
}

// High and low half of the 128-bit product, folded.
inline std::uint64_t fold(std::uint64_t a, std::uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<std::uint64_t>(product) ^ static_cast<std::uint64_t>(product >> 64);
}

// Bijection of 64 bits: a changed bit changes every bit with a chance near one half (Stafford's variant 13 of the
// MurmurHash3 finalizer, the one of SplitMix64).
inline std::uint64_t avalanche(std::uint64_t x) {
  x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
  x = (x ^ x >> 27) * 0x94D049BB133111EB;
  return x ^ x >> 31;
}

// kFirstBytes[8 + n] keeps the first n bytes of a word of memory, for n from -8 to 16.
inline constexpr auto kFirstBytes = [] {
  std::array<std::uint64_t, 25> masks{};
  for (std::size_t n = 1; n <= 16; ++n) {
    masks[8 + n] = n < 8 ? (std::uint64_t{1} << 8 * n) - 1 : ~std::uint64_t{0};
  }
  return masks;
}();

// Hash of `word`, of 1 byte or more, every byte first joined with the bits of `also` (0x20 lower-cases ASCII letters
// and leaves digits as they are). Loads of 16 bytes may go behind the word, never behind `limit`.
template <std::uint8_t also>
inline std::uint64_t hash_word(std::string_view word, const char* limit) {
  constexpr std::uint64_t bits = also * 0x0101010101010101;
  constexpr std::uint64_t other = 0xE7037ED1A0B428DB;
  const char* p = word.data();
  std::size_t left = word.size();
  std::uint64_t hash = 0x9E3779B97F4A7C15 * (left + 1);
  for (; left > 16; left -= 16, p += 16) {
    hash = fold(hash ^ (load8(p) | bits), other ^ (load8(p + 8) | bits));
  }
  char tail[16] = {};
  if (limit - p < 16) {
    std::memcpy(tail, p, left);
    p = tail;
  }
  return fold(hash ^ ((load8(p) | bits) & kFirstBytes[8 + left]), other ^ ((load8(p + 8) | bits) & kFirstBytes[left]));
}

// Hash of `count` >= 1 words in order.
inline std::uint64_t hash_words(const std::uint64_t* words, std::size_t count) {
  std::uint64_t hash = count;
  for (std::size_t i = 0; i < count; ++i) {
    hash = hash * 0xD1342543DE82EF95 + words[i];
  }
  return avalanche(hash);
}

}  // namespace b2::text
