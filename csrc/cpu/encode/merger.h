// SentencePiece's BPE: again and again the pair of neighbours with the best score becomes one symbol.

#pragma once

#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "encode/ids.h"
#include "encode/model.h"

namespace b2::encode {

// Keeps its memory between calls; one for each thread.
class Merger {
 public:
  explicit Merger(const Model& model) : model_(model) {}

  // Appends the ids of `chunk`, which is valid UTF-8 and holds no user-defined symbol and no U+2581. False, with
  // nothing appended, when an unused piece comes out: how SentencePiece takes it apart depends on the whole text.
  bool encode_chunk(std::string_view chunk, Ids& out);

  // Appends the ids of a whole text, which is valid UTF-8 without U+2581, in one piece as SentencePiece works.
  void encode_whole(std::string_view text, Ids& out);

 private:
  void merge_short();
  void merge_long();
  void write(std::int32_t symbol, Ids& out) const;

  const Model& model_;
  std::vector<std::int32_t> symbols_;  // of the chunk, in order
  std::vector<std::int32_t> ranks_;    // when a symbol joins with the one after it
  std::vector<std::int32_t> joined_;   // what they become
  std::unordered_map<std::int32_t, std::pair<std::int32_t, std::int32_t>> parts_;  // of unused pieces, the latest
};

}  // namespace b2::encode
