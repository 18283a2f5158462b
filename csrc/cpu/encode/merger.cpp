#include "encode/merger.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <stdexcept>

namespace b2::encode {

namespace {

constexpr std::int32_t kNever = std::numeric_limits<std::int32_t>::max();
constexpr std::uint32_t kEnd = std::numeric_limits<std::uint32_t>::max();
constexpr std::size_t kShort = 256;  // up to here a scan for the best pair is faster than a queue

}  // namespace

void Merger::encode(std::string_view chunk, Ids& out) {
  symbols_.clear();
  const char* end = chunk.data() + chunk.size();
  std::uint32_t code = 0;
  for (const char* p = chunk.data(); p < end;) {
    p += read_character(p, end, code);
    symbols_.push_back(model_.character(as_in_model(code)));
  }
  if (symbols_.size() <= kShort) {
    merge_short();
  } else {
    merge_long();
  }
  for (const std::int32_t symbol : symbols_) write(symbol, out);
}

// SentencePiece takes an unused piece apart into the two symbols that it met last. These do not depend on the text
// around: until something outside joins in, the characters of a piece merge in one and the same order everywhere.
const Merge* Merger::find_merge(std::int32_t left, std::int32_t right) {
  const Merge* merge = model_.merge(left, right);
  if (merge != nullptr && model_.is_taken_apart(merge->symbol)) parts_[merge->symbol] = {left, right};
  return merge;
}

void Merger::merge_short() {
  std::size_t count = symbols_.size();
  ranks_.resize(count);
  joined_.resize(count);
  const auto find = [&](std::size_t i) {
    const Merge* merge = i + 1 < count ? find_merge(symbols_[i], symbols_[i + 1]) : nullptr;
    ranks_[i] = merge != nullptr ? merge->rank : kNever;
    joined_[i] = merge != nullptr ? merge->symbol : 0;
  };
  for (std::size_t i = 0; i < count; ++i) find(i);
  while (count > 1) {
    std::int32_t least = kNever;
    for (std::size_t i = 0; i < count; ++i) least = std::min(least, ranks_[i]);
    const auto best = static_cast<std::size_t>(std::find(ranks_.begin(), ranks_.end(), least) - ranks_.begin());
    if (least == kNever) break;
    symbols_[best] = joined_[best];
    --count;
    for (auto* values : {&symbols_, &ranks_, &joined_}) {
      std::copy(values->begin() + best + 2, values->begin() + count + 1, values->begin() + best + 1);
    }
    if (best > 0) find(best - 1);
    find(best);
  }
  symbols_.resize(count);
}

void Merger::merge_long() {
  const std::size_t count = symbols_.size();
  if (count >= kEnd) throw std::length_error("a text has 2^32 characters that cannot be cut");
  // Not kept between calls: such a chunk may be a whole text.
  std::vector<std::int32_t> ranks(count), joined(count);
  std::vector<std::uint32_t> next(count), previous(count);
  std::vector<std::uint64_t> queue;  // (rank, position) of pairs, also of some that are gone
  const auto find = [&](std::uint32_t i) {
    const Merge* merge = next[i] != kEnd ? find_merge(symbols_[i], symbols_[next[i]]) : nullptr;
    ranks[i] = merge != nullptr ? merge->rank : kNever;
    if (merge == nullptr) return false;
    joined[i] = merge->symbol;
    queue.push_back(static_cast<std::uint64_t>(merge->rank) << 32 | i);
    return true;
  };
  for (std::uint32_t i = 0; i < count; ++i) {
    next[i] = i + 1 < count ? i + 1 : kEnd;
    previous[i] = i > 0 ? i - 1 : kEnd;
    find(i);
  }
  std::make_heap(queue.begin(), queue.end(), std::greater<>());
  while (!queue.empty()) {
    const auto rank = static_cast<std::int32_t>(queue.front() >> 32);
    const auto left = static_cast<std::uint32_t>(queue.front());
    std::pop_heap(queue.begin(), queue.end(), std::greater<>());
    queue.pop_back();
    if (ranks[left] != rank) continue;
    const std::uint32_t right = next[left];
    symbols_[left] = joined[left];
    ranks[right] = kNever;
    next[left] = next[right];
    if (next[left] != kEnd) previous[next[left]] = left;
    if (previous[left] != kEnd && find(previous[left])) {
      std::push_heap(queue.begin(), queue.end(), std::greater<>());
    }
    if (find(left)) std::push_heap(queue.begin(), queue.end(), std::greater<>());
  }
  std::size_t kept = 0;
  for (std::uint32_t i = 0; i != kEnd; i = next[i]) symbols_[kept++] = symbols_[i];
  symbols_.resize(kept);
}

void Merger::write(std::int32_t symbol, Ids& out) const {
  if (model_.is_taken_apart(symbol)) {
    const auto& [left, right] = parts_.at(symbol);
    write(left, out);
    write(right, out);
  } else if (symbol >= 0 && symbol < model_.vocab_size()) {
    out.push(symbol);
  } else {
    model_.spell(model_.code(symbol), out);
  }
}

}  // namespace b2::encode
