// Shingles: hashes of every `length` words in a row. A text of fewer words has one shingle of all of them; a text
// without words has none.

#pragma once

#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

#include "text/hashing.h"
#include "text/words.h"

namespace b2::text {

// Turns texts into shingles, one after another, in memory that it keeps.
class Shingler {
 public:
  explicit Shingler(std::size_t length) : length_(length) {}

  // Shingles of `text` in order, with repeats; valid until the next call.
  const std::vector<std::uint64_t>& operator()(std::string_view text) {
    words_.clear();
    WordReader(text, *this).run();
    shingles_.clear();
    if (words_.empty()) {
      return shingles_;
    }
    const std::size_t length = std::min(length_, words_.size());
    shingles_.resize(words_.size() - length + 1);
    for (std::size_t i = 0; i < shingles_.size(); ++i) {
      shingles_[i] = hash_words(words_.data() + i, length);
    }
    return shingles_;
  }

  void ascii(std::string_view word, const char* limit) { words_.push_back(hash_word<0x20>(word, limit)); }
  void word(std::string_view word, const char* limit) { words_.push_back(hash_word<0>(word, limit)); }

 private:
  std::size_t length_;
  std::vector<std::uint64_t> words_;
  std::vector<std::uint64_t> shingles_;
};

}  // namespace b2::text
