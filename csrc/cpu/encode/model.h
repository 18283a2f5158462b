// The tables of a SentencePiece BPE model that encoding reads; immutable, so threads share one.
//
// A symbol is what SentencePiece's merging works on: a piece (its id); a character that is no piece of its own but
// stands in one (numbers from the vocabulary size on); a character that stands in none (~code). In the text a space
// is one byte; the model writes it as U+2581, so that character stands for it in all tables.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "encode/flat_map.h"
#include "encode/ids.h"
#include "encode/text_map.h"

namespace b2::encode {

constexpr std::uint32_t kSpaceMark = 0x2581;

// What two neighbouring symbols become, and when: smaller ranks first, of equal ranks the leftmost.
struct Merge {
  std::int32_t rank;
  std::int32_t symbol;
};

// A space as the model writes it.
inline std::uint32_t as_in_model(std::uint32_t code) { return code == ' ' ? kSpaceMark : code; }

// Reads one character of UTF-8. Returns its bytes, or 0 when none starts here (SentencePiece's own rules: no
// overlong forms, no surrogates, nothing above U+10FFFF).
int read_character(const char* text, const char* end, std::uint32_t& code);

class Model {
 public:
  // Types of pieces, numbered as in sentencepiece_model.proto.
  enum Kind : std::uint8_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };
  // Between two neighbouring ASCII characters: a place to cut, perhaps the start of a user-defined symbol.
  enum Event : std::uint8_t { kCut = 1, kUserSymbol = 2 };

  // kinds, ranks [V]: ranks order the scores, best first, equal for equal scores. byte_ids [256].
  Model(const std::vector<std::string_view>& pieces, const std::uint8_t* kinds, const std::int32_t* ranks,
        const std::int32_t* byte_ids);

  std::int32_t vocab_size() const { return vocab_size_; }
  // Symbol of a character.
  std::int32_t character(std::uint32_t code) const {
    return code < characters_.size() ? characters_[code] : static_cast<std::int32_t>(~code);
  }
  // Character of a symbol that is no piece: it is spelled in bytes.
  std::uint32_t code(std::int32_t symbol) const {
    return symbol < 0 ? ~static_cast<std::uint32_t>(symbol) : spelled_[symbol - vocab_size_];
  }
  // Appends the ids of the bytes of a character.
  void spell(std::uint32_t code, Ids& out) const;
  // Whether a symbol is a merged piece of the type "unused": SentencePiece forms it, then takes it apart.
  bool is_taken_apart(std::int32_t symbol) const {
    return any_unused_ && symbol >= 0 && symbol < vocab_size_ && unused_[symbol];
  }
  // What two neighbours become; null when they do not join.
  const Merge* merge(std::int32_t left, std::int32_t right) const {
    if ((left | right) < 0) return nullptr;
    return merges_.find(static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint32_t>(right));
  }

  // False when no piece has `left` before `right`, so that no merge crosses them. True for all other pairs and, the
  // pairs being hashed, for a few of these.
  bool may_join(std::uint32_t left, std::uint32_t right) const {
    const std::size_t bit = pair_bit(left, right);
    return (pairs_[bit >> 6] >> (bit & 63) & 1) != 0;
  }
  // Events between the ASCII characters text[-1] and text[0], or 0.
  std::uint8_t event(const char* text) const {
    return ascii_events_[static_cast<std::uint8_t>(text[-1])][static_cast<std::uint8_t>(text[0])];
  }

  // Whether a user-defined symbol may start with this character of the text.
  bool may_start_user_symbol(std::uint32_t code) const {
    return code < user_starts_.size() * 64 && (user_starts_[code >> 6] >> (code & 63) & 1) != 0;
  }
  // Bytes of the longest user-defined symbol at the start of the text and its id; 0 when there is none.
  std::size_t match_user_symbol(const char* text, const char* end, std::int32_t& id) const;

 private:
  static constexpr std::int32_t kNone = -1;
  struct Node {
    std::int32_t id = kNone;  // of the user-defined symbol that ends here
    bool leaf = true;
  };

  void add_merges(const std::vector<std::string_view>& pieces, const std::uint8_t* kinds, const std::int32_t* ranks);
  void add_character(std::uint32_t code, std::string_view text, TextMap& symbols);
  void add_pairs(std::vector<std::uint64_t> pairs);
  void add_user_symbols(const std::vector<std::string_view>& pieces, const std::uint8_t* kinds);
  std::size_t pair_bit(std::uint32_t left, std::uint32_t right) const {
    return (left * 0x9E3779B97F4A7C15u + right * 0xD1B54A32D192ED03u) >> pair_shift_;
  }

  std::int32_t vocab_size_;
  std::array<std::int32_t, 256> byte_ids_;
  bool any_unused_ = false;
  std::vector<bool> unused_;
  std::vector<std::int32_t> characters_;
  std::vector<std::uint32_t> spelled_;  // codes of the symbols that are characters only
  FlatMap<Merge> merges_;
  std::vector<std::uint64_t> pairs_;
  int pair_shift_ = 0;
  std::uint8_t ascii_events_[128][128];
  std::vector<std::uint64_t> user_starts_;
  FlatMap<std::int32_t> user_edges_;  // (node, byte) to node
  std::vector<Node> user_nodes_;
};

}  // namespace b2::encode
