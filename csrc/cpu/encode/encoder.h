// Texts to token ids, exactly as SentencePiece gives them.
//
// A text is cut wherever no piece of the vocabulary holds the two characters around the cut: no merge can cross it, so
// the chunks are encoded apart with the same result. Chunks are words, mostly, and their ids come from a cache.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "encode/chunk_cache.h"
#include "encode/ids.h"
#include "encode/merger.h"
#include "encode/model.h"

namespace b2::encode {

// Has a cache of its own: one for each thread.
class Encoder {
 public:
  // cache_bits: 3 or more; the caches take 2^cache_bits x 144 bytes at most.
  Encoder(const Model& model, int cache_bits)
      : model_(model), merger_(model), short_(cache_bits - 2), words_(cache_bits), phrases_(cache_bits) {}

  // Appends the ids of a text that lies in readable memory up to `limit`.
  //
  // A byte that is no valid UTF-8 counts as U+FFFD, as in SentencePiece. U+2581 is spelled in bytes; SentencePiece
  // would take it for a space.
  void encode(std::string_view text, const char* limit, Ids& out);

 private:
  // A chunk, or, where that is empty, a user-defined symbol.
  struct Item {
    std::string_view chunk;
    std::int32_t user_symbol;
  };

  void encode_part(std::string_view part, const char* limit, Ids& out);
  bool encode_valid(std::string_view part, const char* limit, Ids& out);
  void encode_items(const Item* items, std::size_t count, const char* limit, Ids& out);
  void encode_chunk(std::string_view chunk, const char* limit, Ids& out);
  template <typename Cache>
  void encode_cached(std::string_view chunk, const char* limit, Cache& cache, Ids& out);

  const Model& model_;
  Merger merger_;
  ChunkCache<1, 2, 4> short_;    // chunks of up to 6 bytes
  ChunkCache<2, 4, 2> words_;    // of up to 14
  ChunkCache<5, 6, 1> phrases_;  // of up to 38
};

}  // namespace b2::encode
