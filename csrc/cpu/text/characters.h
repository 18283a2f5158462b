// Characters of UTF-8 text: decoding, what kind each one is, simple lower case. Header only.
//
// The kinds are made for text in any language without a dictionary: a word is a run of Letter, Digit, Mark and Format;
// every Han, Kana and Hangul character stands for itself; Cluster scripts are cut at grapheme clusters (words.h).

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace b2::text {

inline constexpr char32_t kLastCharacter = 0x10FFFF;
inline constexpr char32_t kReplacement = 0xFFFD;

// Which character has which kind: tools/unicode_table.py says it and makes the table.
enum class Kind : std::uint8_t {
  Other,        // control, private use, unassigned
  Space,        // between words, not the end of a line
  Newline,      // \n \v \f \r, U+001C..1E, U+0085, U+2028, U+2029
  Punctuation,  // P
  Symbol,       // S: currency, mathematics, emoji, U+FFFD
  Digit,        // Nd and No: 7, ², ①
  Letter,       // of a script that parts words by spaces: Latin, Cyrillic, Arabic, Devanagari, ...
  Mark,         // M: combines with the character before it
  Format,       // invisible inside a word: joiners, soft hyphen, direction marks
  Han,
  Kana,
  Hangul,
  Cluster,      // of a script without spaces between words: Thai, Lao, Khmer, Myanmar, Tibetan, Yi, Javanese, ...
};

// Kinds of the characters first..last; what stands in no range is Kind::Other.
struct KindRange {
  char32_t first, last;
  Kind kind;
};

// Every stride-th character of first..last has the lower case character + delta.
struct LowerRange {
  char32_t first, last;
  std::int32_t stride, delta;
};

}  // namespace b2::text

#include "text/characters_table.h"

namespace b2::text {

// The kinds in blocks of 128 characters, equal blocks once: 30 kB that a text touches little of.
class CharacterTable {
 public:
  CharacterTable() {
    std::vector<std::uint8_t> flat(kLastCharacter + 1);
    for (const KindRange& range : kKindRanges) {
      std::fill(flat.begin() + range.first, flat.begin() + range.last + 1, static_cast<std::uint8_t>(range.kind));
    }
    for (const LowerRange& range : kLowerRanges) {
      for (char32_t c = range.first; c <= range.last; c += static_cast<char32_t>(range.stride)) {
        flat[c] |= kHasLower;
      }
    }
    std::unordered_map<std::string_view, std::uint16_t> seen;
    for (std::size_t block = 0; block < block_.size(); ++block) {
      const std::uint8_t* bytes = flat.data() + block * kBlock;
      const auto [found, is_new] = seen.try_emplace({reinterpret_cast<const char*>(bytes), kBlock},
                                                    static_cast<std::uint16_t>(seen.size()));
      block_[block] = found->second;
      if (is_new) {
        entries_.insert(entries_.end(), bytes, bytes + kBlock);
      }
    }
  }

  Kind kind(char32_t c) const { return static_cast<Kind>(entry(c) & ~kHasLower); }
  bool has_lower(char32_t c) const { return entry(c) & kHasLower; }

 private:
  static constexpr std::size_t kBlock = 128;
  static constexpr std::uint8_t kHasLower = 0x80;

  std::uint8_t entry(char32_t c) const { return entries_[block_[c / kBlock] * kBlock + c % kBlock]; }

  std::array<std::uint16_t, (kLastCharacter + 1) / kBlock> block_{};
  std::vector<std::uint8_t> entries_;
};

inline const CharacterTable kCharacters;

// Kind of a character up to U+10FFFF.
inline Kind kind(char32_t c) { return kCharacters.kind(c); }

// Simple lower case (one character for one); of any script that has cases.
inline char32_t lower(char32_t c) {
  if (c < 0x80) {
    return c - U'A' < 26 ? c | 0x20 : c;
  }
  if (!kCharacters.has_lower(c)) {
    return c;
  }
  const LowerRange* range = std::lower_bound(std::begin(kLowerRanges), std::end(kLowerRanges), c,
                                             [](const LowerRange& r, char32_t value) { return r.last < value; });
  return static_cast<char32_t>(static_cast<std::int32_t>(c) + range->delta);
}

inline bool is_continuation(char byte) { return (static_cast<unsigned char>(byte) & 0xC0) == 0x80; }

// The character at `position` < `end`; moves `position` behind it. A byte that begins no well-formed character
// (overlong forms, surrogates, what a cut leaves over) is one U+FFFD. Reads nothing at or behind `end`.
inline char32_t decode(const char*& position, const char* end) {
  const char* p = position++;
  const auto bits = [p](int i) { return static_cast<char32_t>(static_cast<unsigned char>(p[i])); };
  const char32_t lead = bits(0);
  if (lead < 0x80) {
    return lead;
  }
  const auto available = end - p;
  if (lead < 0xE0) {
    if (lead >= 0xC2 && available >= 2 && is_continuation(p[1])) {
      position = p + 2;
      return (lead & 0x1F) << 6 | (bits(1) & 0x3F);
    }
  } else if (lead < 0xF0) {
    if (available >= 3 && is_continuation(p[1]) && is_continuation(p[2])) {
      const char32_t c = (lead & 0x0F) << 12 | (bits(1) & 0x3F) << 6 | (bits(2) & 0x3F);
      if (c >= 0x800 && (c < 0xD800 || c > 0xDFFF)) {
        position = p + 3;
        return c;
      }
    }
  } else if (available >= 4 && is_continuation(p[1]) && is_continuation(p[2]) && is_continuation(p[3])) {
    const char32_t c = (lead & 0x07) << 18 | (bits(1) & 0x3F) << 12 | (bits(2) & 0x3F) << 6 | (bits(3) & 0x3F);
    if (lead <= 0xF4 && c >= 0x10000 && c <= kLastCharacter) {
      position = p + 4;
      return c;
    }
  }
  return kReplacement;
}

// Appends a character as UTF-8.
inline void encode(char32_t c, std::string& out) {
  const auto add = [&out](char32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (c < 0x80) {
    add(c);
  } else if (c < 0x800) {
    add(0xC0 | c >> 6), add(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    add(0xE0 | c >> 12), add(0x80 | (c >> 6 & 0x3F)), add(0x80 | (c & 0x3F));
  } else {
    add(0xF0 | c >> 18), add(0x80 | (c >> 12 & 0x3F)), add(0x80 | (c >> 6 & 0x3F)), add(0x80 | (c & 0x3F));
  }
}

}  // namespace b2::text
