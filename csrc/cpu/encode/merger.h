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

  // Appends the ids of `chunk`, which is valid UTF-8 and holds no user-defined symbol and no U+2581.
  void encode(std::string_view chunk, Ids& out);

 private:
  void merge_short();
  void merge_long();
  const Merge* find_merge(std::int32_t left, std::int32_t right);
  void write(std::int32_t symbol, Ids& out) const;

  const Model& model_;
  std::vector<std::int32_t> symbols_;  // of the chunk, in order
  std::vector<std::int32_t> ranks_;    // when a symbol joins with the one after it
  std::vector<std::int32_t> joined_;   // what they become
  std::unordered_map<std::int32_t, std::pair<std::int32_t, std::int32_t>> parts_;  // what unused pieces came from
};

}  // namespace b2::encode
