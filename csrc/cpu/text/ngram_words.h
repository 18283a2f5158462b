// The words that the n-gram model counts, and their numbers.
//
// A line is cut into runs of letters and digits, single Han, kana and Hangul characters, characters of scripts
// without spaces (each with its marks), and runs of one punctuation mark or symbol. Digits become 0; controls,
// joiners and other invisible characters vanish; case stays, since it tells where sentences begin.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "text/characters.h"
#include "text/ngram.h"

namespace b2::ngram {

inline std::uint64_t add_to_hash(std::uint64_t hash, char32_t c) { return (hash ^ c) * 0x100000001b3ULL; }

inline char32_t normal(char32_t c, text::Kind kind) { return kind == text::Kind::Digit ? U'0' : c; }

inline bool is_joined(text::Kind kind) { return kind == text::Kind::Mark || kind == text::Kind::Format; }

inline bool is_lettered(text::Kind kind) {
  return kind == text::Kind::Letter || kind == text::Kind::Digit || is_joined(kind);
}

// Calls on_word(hash, begin, end) for every word of `text` (byte offsets), and on_line(end of its last word) after
// the last word of every line that has one. The hash is never 0.
template <typename OnWord, typename OnLine>
void each_word(std::string_view text, OnWord&& on_word, OnLine&& on_line) {
  using text::Kind;
  const char* const start = text.data();
  const char* const end = start + text.size();
  const char* p = start;
  const char* line_end = nullptr;  // end of the last word of this line
  while (p < end) {
    const char* const begin = p;
    const char32_t first = text::decode(p, end);
    const Kind first_kind = text::kind(first);
    if (first_kind == Kind::Newline) {
      if (line_end != nullptr) {
        on_line(static_cast<std::uint64_t>(line_end - start));
        line_end = nullptr;
      }
      continue;
    }
    if (first_kind == Kind::Space || first_kind == Kind::Format || first < U' ') {
      continue;
    }
    const bool lettered = is_lettered(first_kind);
    const bool repeats = first_kind == Kind::Punctuation || first_kind == Kind::Symbol || first_kind == Kind::Other;
    std::uint64_t hash = add_to_hash(0xcbf29ce484222325ULL, normal(first, first_kind));
    while (p < end) {
      const char* next = p;
      const char32_t c = text::decode(next, end);
      const Kind kind = text::kind(c);
      if (!(lettered ? is_lettered(kind) : repeats ? c == first : is_joined(kind))) {
        break;
      }
      if (kind != Kind::Format && !repeats) {
        hash = add_to_hash(hash, normal(c, kind));
      }
      p = next;
    }
    hash = text::avalanche(hash);
    on_word(hash == 0 ? 1 : hash, static_cast<std::uint64_t>(begin - start), static_cast<std::uint64_t>(p - start));
    line_end = p;
  }
  if (line_end != nullptr) {
    on_line(static_cast<std::uint64_t>(line_end - start));
  }
}

// A word of each_word as the vocabulary writes it.
inline std::string spelling(std::string_view word) {
  const char* p = word.data();
  const char* const end = p + word.size();
  std::string written;
  for (char32_t previous = 0; p < end;) {
    const char32_t c = text::decode(p, end);
    const text::Kind kind = text::kind(c);
    if (kind != text::Kind::Format && (c != previous || is_lettered(kind))) {
      text::encode(normal(c, kind), written);
    }
    previous = c;
  }
  return written;
}

// Numbers of words by their 64-bit hash: an open hash table of (hash, number), hash 0 is empty.
class Vocabulary {
 public:
  Vocabulary(const std::uint64_t* slots, std::uint64_t size) : slots_(slots), size_(size) {}

  Word find(std::uint64_t hash) const {
    for (std::uint64_t i = home(hash, size_);; i = i + 1 == size_ ? 0 : i + 1) {
      if (slots_[2 * i] == hash) {
        return static_cast<Word>(slots_[2 * i + 1]);
      }
      if (slots_[2 * i] == 0) {
        return kUnknown;
      }
    }
  }

 private:
  const std::uint64_t* slots_;
  std::uint64_t size_;
};

// Words in the order of their first appearance, with how often each was seen.
class WordCounter {
 public:
  WordCounter() : slots_(2 * 1024), size_(1024) {}

  std::uint32_t add(std::uint64_t hash, std::string_view word) {
    std::uint64_t i = home(hash, size_);
    for (; slots_[2 * i] != 0; i = i + 1 == size_ ? 0 : i + 1) {
      if (slots_[2 * i] == hash) {
        const auto number = static_cast<std::uint32_t>(slots_[2 * i + 1]);
        ++counts_[number];
        return number;
      }
    }
    if (counts_.size() >= kMaxWords) {
      throw std::runtime_error("more than " + std::to_string(kMaxWords) +
                               " different words; train on a sample of the texts");
    }
    const auto number = static_cast<std::uint32_t>(counts_.size());
    slots_[2 * i] = hash;
    slots_[2 * i + 1] = number;
    counts_.push_back(1);
    hashes_.push_back(hash);
    spellings_.push_back(word.size() <= kMaxWordBytes ? spelling(word) : std::string());
    if (counts_.size() * 3 > size_ * 2) {
      grow();
    }
    return number;
  }

  std::size_t size() const { return counts_.size(); }
  std::uint64_t count(std::uint32_t number) const { return counts_[number]; }
  std::uint64_t hash(std::uint32_t number) const { return hashes_[number]; }
  // Empty for a word that is too long to be one.
  const std::string& spelled(std::uint32_t number) const { return spellings_[number]; }

 private:
  static constexpr std::size_t kMaxWords = 0xfffffff0;
  static constexpr std::size_t kMaxWordBytes = 128;

  void grow() {
    size_ *= 2;
    std::vector<std::uint64_t> slots(2 * size_);
    for (std::uint32_t number = 0; number < counts_.size(); ++number) {
      std::uint64_t i = home(hashes_[number], size_);
      while (slots[2 * i] != 0) {
        i = i + 1 == size_ ? 0 : i + 1;
      }
      slots[2 * i] = hashes_[number];
      slots[2 * i + 1] = number;
    }
    slots_ = std::move(slots);
  }

  std::vector<std::uint64_t> slots_;
  std::uint64_t size_;
  std::vector<std::uint64_t> counts_;
  std::vector<std::uint64_t> hashes_;
  std::vector<std::string> spellings_;
};

}  // namespace b2::ngram
