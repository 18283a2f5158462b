// The ids of short chunks of text: a table of fixed size in which a new chunk displaces an old one.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <string_view>

#include "encode/ids.h"

namespace b2::encode {

// Words: 8 bytes each, for a chunk of up to 8 Words - 2 bytes. Entries: that share one place, a line of 64 bytes.
template <std::size_t Words, std::size_t MaxIds, std::size_t Entries>
class ChunkCache {
 public:
  static constexpr std::size_t kMaxBytes = 8 * Words - 2;
  static constexpr std::size_t kMaxIds = MaxIds;

  // A chunk padded with zeros; its length is the last byte.
  struct Key {
    std::uint64_t words[Words];
  };

  // 2^bits places; the system gives the pages when they are first used.
  explicit ChunkCache(int bits) : shift_(64 - bits), memory_(std::calloc((std::size_t{1} << bits) + 1, sizeof(Place))) {
    if (memory_ == nullptr) throw std::bad_alloc();
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    places_ = reinterpret_cast<Place*>((address + sizeof(Place) - 1) / sizeof(Place) * sizeof(Place));
  }

  // Key of a chunk of 1 to kMaxBytes bytes; `limit` is the end of readable memory.
  static Key key(std::string_view chunk, const char* limit) {
    Key key{};
    if (limit - chunk.data() >= static_cast<std::ptrdiff_t>(sizeof key)) {
      std::memcpy(&key, chunk.data(), sizeof key);
      for (std::size_t i = 0; i < Words; ++i) {
        const std::size_t bytes = chunk.size() > 8 * i ? chunk.size() - 8 * i : 0;
        if (bytes < 8) key.words[i] &= (std::uint64_t{1} << 8 * bytes) - 1;
      }
    } else {
      std::memcpy(&key, chunk.data(), chunk.size());
    }
    key.words[Words - 1] |= static_cast<std::uint64_t>(chunk.size()) << 56;
    return key;
  }

  // Begins to load what `find` will read.
  void fetch(const Key& key) const { __builtin_prefetch(&places_[index(key)]); }

  // Appends the ids of the chunk if they are known.
  bool find(const Key& key, Ids& out) const {
    const Place& place = places_[index(key)];
    std::size_t found = Entries;
    for (std::size_t i = 0; i < Entries; ++i) {
      if (place.entries[i].holds(key)) found = i;
    }
    if (found == Entries) return false;
    const Entry& entry = place.entries[found];
    std::memcpy(out.room(MaxIds), entry.ids, sizeof entry.ids);
    out.advance(entry.words[Words - 1] >> 48 & 0xFF);
    return true;
  }

  // Keeps the `count` ids of a chunk, up to kMaxIds.
  void put(const Key& key, const std::int32_t* ids, std::size_t count) {
    Place& place = places_[index(key)];
    for (std::size_t i = Entries - 1; i > 0; --i) place.entries[i] = place.entries[i - 1];
    std::copy_n(key.words, Words, place.entries[0].words);
    place.entries[0].words[Words - 1] |= static_cast<std::uint64_t>(count) << 48;
    std::copy_n(ids, count, place.entries[0].ids);
  }

 private:
  struct Entry {
    std::uint64_t words[Words];  // the key, with the number of ids in its last byte but one; zero when empty
    std::int32_t ids[MaxIds];

    bool holds(const Key& key) const {
      std::uint64_t differences = (words[Words - 1] ^ key.words[Words - 1]) & ~(std::uint64_t{0xFF} << 48);
      for (std::size_t i = 0; i + 1 < Words; ++i) differences |= words[i] ^ key.words[i];
      return differences == 0;
    }
  };
  struct Place {
    Entry entries[Entries];  // the newest first
  };
  static_assert(sizeof(Place) == 64);
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  std::size_t index(const Key& key) const {
    std::uint64_t mixed = 0;
    for (const std::uint64_t word : key.words) {
      mixed = (mixed ^ word) * 0x9E3779B97F4A7C15u;
      mixed ^= mixed >> 32;
    }
    return mixed * 0xD1B54A32D192ED03u >> shift_;
  }

  int shift_;
  std::unique_ptr<void, Free> memory_;
  Place* places_;  // in `memory_`, at a multiple of their size
};

}  // namespace b2::encode
