// A hash table from texts, which the caller keeps, to numbers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace b2::encode {

class TextMap {
 public:
  // Room for `count` texts, at most half full.
  explicit TextMap(std::size_t count) {
    std::size_t size = 16;
    while (size < 2 * count) size *= 2;
    slots_.resize(size);
  }

  // The number of `text`; if it has none yet, this one from now on.
  std::int32_t add(std::string_view text, std::int32_t number) {
    Slot& slot = slots_[position(text)];
    if (slot.text.data() == nullptr) slot = {text, number};
    return slot.number;
  }

  // The number of `text`, or null.
  const std::int32_t* find(std::string_view text) const {
    const Slot& slot = slots_[position(text)];
    return slot.text.data() != nullptr ? &slot.number : nullptr;
  }

 private:
  struct Slot {
    std::string_view text;
    std::int32_t number = 0;
  };

  // Slot that holds `text`, or the empty one where it would stand. The hash is FNV-1a.
  std::size_t position(std::string_view text) const {
    std::uint64_t hash = 0xCBF29CE484222325u;
    for (const char byte : text) hash = (hash ^ static_cast<std::uint8_t>(byte)) * 0x100000001B3u;
    const std::size_t mask = slots_.size() - 1;
    std::size_t i = (hash ^ hash >> 32) & mask;
    while (slots_[i].text.data() != nullptr && slots_[i].text != text) i = (i + 1) & mask;
    return i;
  }

  std::vector<Slot> slots_;
};

}  // namespace b2::encode
