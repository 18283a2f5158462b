// Shingles: hashes of every `length` words in a row. A text of fewer words has one shingle of all of them; a text
// without words has none. With a table of characters, a word of one character of three bytes (Han, kana, Hangul) counts
// as the character that the table has for it: texts in traditional and simplified Chinese get the same shingles.

#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "text/characters.h"
#include "text/hashing.h"
#include "text/words.h"

namespace b2::text {

// Turns texts into shingles, one after another, in memory that it keeps.
class Shingler {
 public:
  // `characters` has a character for each one up to U+FFFF, or is null; it must outlive this object.
  explicit Shingler(std::size_t length, const std::uint32_t* characters = nullptr)
      : length_(length), characters_(characters) {}

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
  void word(std::string_view word, const char* limit) {
    if (characters_ != nullptr && word.size() == 3) {
      const char* position = word.data();
      const char32_t c = decode(position, position + 3);
      if (c > 0x7FF && characters_[c] != c) {
        mapped_.clear();
        encode(characters_[c], mapped_);
        words_.push_back(hash_word<0>(mapped_, mapped_.data() + mapped_.size()));
        return;
      }
    }
    words_.push_back(hash_word<0>(word, limit));
  }

 private:
  std::size_t length_;
  const std::uint32_t* characters_;
  std::string mapped_;
  std::vector<std::uint64_t> words_;
  std::vector<std::uint64_t> shingles_;
};

}  // namespace b2::text
