// Hashes of texts and of their parts, and the records by which repeated parts are found.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace b2::text {

struct Hash128 {
  std::uint64_t high, low;
};

// MurmurHash3 x64 128 of Austin Appleby with seed 0 in both halves (`high` is its first word): well mixed and fast for
// short and long texts; no defence against somebody who makes collisions on purpose.
Hash128 murmur3(std::string_view bytes, std::uint32_t seed = 0);

// Appends `text` in the form that is compared: without white space, control and format characters, and in small
// letters. Texts that differ only in line breaks, spacing and case are the same.
void fold_text(std::string_view text, std::string& out);

}  // namespace b2::text
