#include "encode/model.h"

#include <algorithm>
#include <cstring>
#include <string>

namespace b2::encode {

namespace {

constexpr std::string_view kSpaceMarkText = "\xE2\x96\x81";
constexpr int kBitsPerPair = 32;  // of the hashed pairs: one of 32 absent pairs is taken for present
constexpr int kLeastPairBits = 16;

bool continues(char byte) { return (static_cast<std::uint8_t>(byte) & 0xC0) == 0x80; }

// Characters of a piece and where each starts; the last start is the end.
struct Spelling {
  std::vector<std::uint32_t> codes;
  std::vector<std::size_t> starts;

  explicit Spelling(std::string_view piece) {
    const char* end = piece.data() + piece.size();
    std::uint32_t code = 0;
    for (const char* p = piece.data(); p < end; p += read_character(p, end, code)) {
      starts.push_back(static_cast<std::size_t>(p - piece.data()));
      codes.push_back(0);
      read_character(p, end, codes.back());
    }
    starts.push_back(piece.size());
  }
};

// A user-defined symbol as it stands in the text; empty when no text can hold it.
std::string as_in_text(std::string_view piece) {
  if (piece.find(' ') != piece.npos) return {};
  std::string text(piece);
  for (std::size_t at = 0; (at = text.find(kSpaceMarkText, at)) != text.npos;) text.replace(at, 3, " ");
  return text;
}

std::uint64_t join(std::uint32_t left, std::uint32_t right) { return static_cast<std::uint64_t>(left) << 32 | right; }

}  // namespace

int read_character(const char* text, const char* end, std::uint32_t& code) {
  const auto byte = [&](int i) { return static_cast<std::uint32_t>(static_cast<std::uint8_t>(text[i])); };
  const std::ptrdiff_t left = end - text;
  const std::uint32_t first = byte(0);
  if (first < 0x80) {
    code = first;
    return 1;
  }
  if ((first & 0xF0) == 0xE0 && left >= 3 && continues(text[1]) && continues(text[2])) {
    code = (first & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
    return code >= 0x800 && (code < 0xD800 || code > 0xDFFF) ? 3 : 0;
  }
  if ((first & 0xE0) == 0xC0 && left >= 2 && continues(text[1])) {
    code = (first & 0x1F) << 6 | (byte(1) & 0x3F);
    return code >= 0x80 ? 2 : 0;
  }
  if ((first & 0xF8) == 0xF0 && left >= 4 && continues(text[1]) && continues(text[2]) && continues(text[3])) {
    code = (first & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
    return code >= 0x10000 && code <= 0x10FFFF ? 4 : 0;
  }
  return 0;
}

Model::Model(const std::vector<std::string_view>& pieces, const std::uint8_t* kinds, const std::int32_t* ranks,
             const std::int32_t* byte_ids)
    : vocab_size_(static_cast<std::int32_t>(pieces.size())), unused_(pieces.size()) {
  std::copy_n(byte_ids, 256, byte_ids_.begin());
  std::memset(ascii_events_, 0, sizeof ascii_events_);
  add_merges(pieces, kinds, ranks);
  add_user_symbols(pieces, kinds);
}

void Model::add_merges(const std::vector<std::string_view>& pieces, const std::uint8_t* kinds,
                       const std::int32_t* ranks) {
  std::vector<std::int32_t> ids;  // of the pieces that merging can give
  std::vector<Spelling> spellings;
  TextMap symbols(2 * pieces.size());  // pieces, and characters that are none
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    if (kinds[i] != kNormal && kinds[i] != kUnused) continue;
    Spelling spelling(pieces[i]);
    if (kinds[i] == kUnused && spelling.codes.size() == 1) continue;  // spelled in bytes, as if it were no piece
    unused_[i] = kinds[i] == kUnused;
    any_unused_ |= unused_[i];
    symbols.add(pieces[i], static_cast<std::int32_t>(i));
    ids.push_back(static_cast<std::int32_t>(i));
    spellings.push_back(std::move(spelling));
  }
  std::vector<std::pair<std::uint64_t, Merge>> merges;
  std::vector<std::uint64_t> pairs;
  for (std::size_t n = 0; n < ids.size(); ++n) {
    const std::string_view piece = pieces[ids[n]];
    const auto& [codes, starts] = spellings[n];
    for (std::size_t k = 0; k < codes.size(); ++k) {
      add_character(codes[k], piece.substr(starts[k], starts[k + 1] - starts[k]), symbols);
      if (k > 0) pairs.push_back(join(codes[k - 1], codes[k]));
    }
    for (std::size_t k = 1; k < codes.size(); ++k) {
      const std::int32_t* left = symbols.find(piece.substr(0, starts[k]));
      const std::int32_t* right = left != nullptr ? symbols.find(piece.substr(starts[k])) : nullptr;
      if (right == nullptr) continue;
      const auto key = join(static_cast<std::uint32_t>(*left), static_cast<std::uint32_t>(*right));
      merges.push_back({key, Merge{ranks[ids[n]], ids[n]}});
    }
  }
  merges_ = FlatMap<Merge>(merges.size());
  for (const auto& [key, merge] : merges) merges_.set(key, merge);
  add_pairs(std::move(pairs));
}

void Model::add_character(std::uint32_t code, std::string_view text, TextMap& symbols) {
  while (code >= characters_.size()) characters_.push_back(static_cast<std::int32_t>(~characters_.size()));
  if (characters_[code] >= 0) return;
  const std::int32_t next = vocab_size_ + static_cast<std::int32_t>(spelled_.size());
  characters_[code] = symbols.add(text, next);
  if (characters_[code] == next) spelled_.push_back(code);
}

void Model::add_pairs(std::vector<std::uint64_t> distinct) {
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  int bits = kLeastPairBits;
  while ((std::size_t{1} << bits) < kBitsPerPair * distinct.size()) ++bits;
  pair_shift_ = 64 - bits;
  pairs_.assign(std::size_t{1} << (bits - 6), 0);
  for (auto& row : ascii_events_) std::fill(std::begin(row), std::end(row), kCut);
  for (const std::uint64_t pair : distinct) {
    const auto left = static_cast<std::uint32_t>(pair >> 32), right = static_cast<std::uint32_t>(pair);
    const std::size_t bit = pair_bit(left, right);
    pairs_[bit >> 6] |= std::uint64_t{1} << (bit & 63);
    const std::uint32_t first = left == kSpaceMark ? ' ' : left, second = right == kSpaceMark ? ' ' : right;
    if (first < 128 && second < 128) ascii_events_[first][second] = 0;
  }
}

void Model::add_user_symbols(const std::vector<std::string_view>& pieces, const std::uint8_t* kinds) {
  std::vector<std::pair<std::string, std::int32_t>> found;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    std::string text = kinds[i] == kUserDefined ? as_in_text(pieces[i]) : std::string();
    if (text.empty()) continue;
    bytes += text.size();
    found.emplace_back(std::move(text), static_cast<std::int32_t>(i));
  }
  user_edges_ = FlatMap<std::int32_t>(bytes);
  user_nodes_.assign(1, Node{});
  for (const auto& [text, id] : found) {
    std::int32_t node = 0;
    for (const char byte : text) {
      const auto key = join(static_cast<std::uint32_t>(node), static_cast<std::uint8_t>(byte));
      const std::int32_t* next = user_edges_.find(key);
      if (next == nullptr) {
        user_edges_.set(key, static_cast<std::int32_t>(user_nodes_.size()));
        user_nodes_[node].leaf = false;
        node = static_cast<std::int32_t>(user_nodes_.size());
        user_nodes_.push_back({});
      } else {
        node = *next;
      }
    }
    user_nodes_[node].id = id;
    std::uint32_t code = 0;
    read_character(text.data(), text.data() + text.size(), code);
    if (code >= user_starts_.size() * 64) user_starts_.resize(code / 64 + 1);
    user_starts_[code >> 6] |= std::uint64_t{1} << (code & 63);
    for (auto& row : ascii_events_) {
      if (code < 128) row[code] |= kUserSymbol;
    }
  }
}

void Model::spell(std::uint32_t code, Ids& out) const {
  const auto push = [&](std::uint32_t byte) { out.push(byte_ids_[byte]); };
  if (code < 0x80) {
    push(code);
    return;
  }
  if (code < 0x800) {
    push(0xC0 | code >> 6);
  } else if (code < 0x10000) {
    push(0xE0 | code >> 12);
    push(0x80 | (code >> 6 & 0x3F));
  } else {
    push(0xF0 | code >> 18);
    push(0x80 | (code >> 12 & 0x3F));
    push(0x80 | (code >> 6 & 0x3F));
  }
  push(0x80 | (code & 0x3F));
}

std::size_t Model::match_user_symbol(const char* text, const char* end, std::int32_t& id) const {
  std::size_t longest = 0;
  std::int32_t node = 0;
  for (const char* p = text; p < end && !user_nodes_[node].leaf; ++p) {
    const std::int32_t* next =
        user_edges_.find(join(static_cast<std::uint32_t>(node), static_cast<std::uint8_t>(*p)));
    if (next == nullptr) break;
    node = *next;
    if (user_nodes_[node].id != kNone) {
      id = user_nodes_[node].id;
      longest = static_cast<std::size_t>(p - text) + 1;
    }
  }
  return longest;
}

}  // namespace b2::encode
