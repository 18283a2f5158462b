// Words of a text in any language, without a dictionary.
//
// - Letters, digits and the marks on them, as far as nothing else parts them: one word, in simple lower case.
// - Every Han, kana and Hangul character: one word.
// - Scripts without spaces (Kind::Cluster): one word a grapheme cluster, which here is a letter, the marks behind it,
//   and after a stacking sign (Khmer coeng, Myanmar virama, ...) also the next letter.
// - Marks belong to the word before them; without one they are dropped. Format characters are dropped and part nothing.
// - All else parts words and belongs to none.

#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "text/characters.h"
#include "text/hashing.h"

namespace b2::text {

// Signs after which the next consonant is written below: Myanmar, Khmer, Tai Tham, Balinese, Javanese.
inline bool is_stacker(char32_t c) {
  return c == 0x1039 || c == 0x17D2 || c == 0x1A60 || c == 0x1B44 || c == 0xA9C0;
}

// Calls visitor.ascii(word, limit) for words of ASCII letters and digits in any case, and visitor.word(word, limit) for
// all others, in lower case; the bytes up to `limit` may be read. Views and limits are valid during the call.
template <typename Visitor>
class WordReader {
 public:
  WordReader(std::string_view text, Visitor& visitor)
      : p_(text.data()), end_(text.data() + text.size()), visitor_(visitor) {}

  void run() {
    while (p_ < end_) {
      if (static_cast<unsigned char>(*p_) < 0x80) {
        ascii_block();
      } else {
        other();
      }
    }
  }

 private:
  enum class Open { None, Word, Single, Cluster, Stack };

  static constexpr unsigned kBlock = 64;

  struct Block {
    std::uint64_t word;  // a bit for each byte that is an ASCII letter or digit
    unsigned size;       // bytes before the first one that is not ASCII
  };

  static bool is_ascii_word(char byte) {
    const auto c = static_cast<unsigned char>(byte);
    return static_cast<unsigned char>((c | 0x20) - 'a') < 26 || static_cast<unsigned char>(c - '0') < 10;
  }

  // Bit 7 of every byte that is an ASCII letter or digit. Sums stay below 0x100, so that no byte disturbs the next.
  static std::uint64_t ascii_word(std::uint64_t bytes) {
    constexpr std::uint64_t ones = 0x0101010101010101;
    const std::uint64_t low = bytes & 0x7F * ones;
    const std::uint64_t letter = low | 0x20 * ones;
    const std::uint64_t is_letter = (letter + (0x80 - 'a') * ones) & ~(letter + (0x7F - 'z') * ones);
    const std::uint64_t is_digit = (low + (0x80 - '0') * ones) & ~(low + (0x7F - '9') * ones);
    return (is_letter | is_digit) & ~bytes & 0x80 * ones;
  }

  // Bit 7 of each of eight bytes.
  static std::uint64_t gather(std::uint64_t bytes) { return (bytes >> 7) * 0x0102040810204080 >> 56; }

  // The next bytes, up to 64.
  Block classify() const {
    char copy[kBlock] = {};
    const char* bytes = p_;
    Block block{0, kBlock};
    if (end_ - p_ < kBlock) {
      block.size = static_cast<unsigned>(end_ - p_);
      std::memcpy(copy, p_, block.size);
      bytes = copy;
    }
    std::uint64_t not_ascii = 0;
    for (unsigned i = 0; i < kBlock; i += 8) {
      const std::uint64_t eight = load8(bytes + i);
      block.word |= gather(ascii_word(eight)) << i;
      not_ascii |= gather(eight & 0x8080808080808080) << i;
    }
    if (not_ascii) {
      block.size = static_cast<unsigned>(__builtin_ctzll(not_ascii));
      block.word &= (std::uint64_t{1} << block.size) - 1;
    }
    return block;
  }

  // Words that begin in the ASCII bytes at p_.
  void ascii_block() {
    const Block block = classify();
    const char* base = p_;
    p_ += block.size;
    // Bits where a word begins and where it has ended, in turns.
    for (std::uint64_t edges = block.word ^ block.word << 1; edges;) {
      const auto begin = static_cast<unsigned>(__builtin_ctzll(edges));
      edges &= edges - 1;
      const unsigned end = edges ? static_cast<unsigned>(__builtin_ctzll(edges)) : kBlock;
      edges &= edges - 1;
      if (end == block.size) {
        last_word(base + begin);
        return;
      }
      visitor_.ascii({base + begin, end - begin}, end_);
    }
  }

  // The word from `begin` to p_ and on.
  void last_word(const char* begin) {
    while (p_ < end_ && is_ascii_word(*p_)) {
      ++p_;
    }
    if (p_ < end_ && static_cast<unsigned char>(*p_) >= 0x80) {
      p_ = begin;
      other();  // what follows may belong to the word
    } else {
      visitor_.ascii({begin, static_cast<std::size_t>(p_ - begin)}, end_);
    }
  }

  // Words from p_ on, in any script, to an ASCII character that belongs to none and has another one behind it.
  void other() {
    open_ = Open::None;
    while (p_ < end_) {
      const char* begin = p_;
      const char32_t c = decode(p_, end_);
      const Kind k = kind(c);
      switch (k) {
        case Kind::Letter:
        case Kind::Digit:
          if (open_ != Open::Word) {
            start(begin, Open::Word);
          }
          add(begin, c);
          break;
        case Kind::Mark:
          if (open_ != Open::None) {
            add(begin, c);
            if (open_ == Open::Cluster && is_stacker(c)) {
              open_ = Open::Stack;
            }
          }
          break;
        case Kind::Format:
          if (open_ != Open::None) {
            rewrite(begin);
          }
          break;
        case Kind::Han:
        case Kind::Kana:
        case Kind::Hangul:
          start(begin, Open::Single);
          stop_ = p_;
          break;
        case Kind::Cluster:
          if (open_ != Open::Stack) {
            start(begin, Open::Cluster);
          }
          open_ = Open::Cluster;
          add(begin, c);
          break;
        default:
          finish();
          if (c < 0x80 && p_ < end_ && static_cast<unsigned char>(*p_) < 0x80) {
            return;
          }
      }
    }
    finish();
  }

  void start(const char* begin, Open open) {
    finish();
    begin_ = stop_ = begin;
    open_ = open;
  }

  // Adds the character between `begin` and p_ to the open word. The word stays a view of the text as long as nothing
  // in it changes.
  void add(const char* begin, char32_t c) {
    const char32_t lowered = lower(c);
    if (lowered != c) {
      rewrite(begin);
    }
    if (!rewritten_) {
      stop_ = p_;
    } else if (lowered != c) {
      encode(lowered, buffer_);
    } else {
      buffer_.append(begin, p_);
    }
  }

  // From here on the open word is in buffer_.
  void rewrite(const char* stop) {
    if (!rewritten_) {
      buffer_.assign(begin_, stop);
      rewritten_ = true;
    }
  }

  void finish() {
    if (open_ != Open::None) {
      if (rewritten_) {
        visitor_.word(buffer_, buffer_.data() + buffer_.size());
      } else {
        visitor_.word({begin_, static_cast<std::size_t>(stop_ - begin_)}, end_);
      }
      open_ = Open::None;
      rewritten_ = false;
    }
  }

  const char* p_;
  const char* end_;
  Visitor& visitor_;
  Open open_ = Open::None;
  const char* begin_ = nullptr;
  const char* stop_ = nullptr;
  bool rewritten_ = false;
  std::string buffer_;
};

}  // namespace b2::text
