// A hash table from 64-bit keys to small values for tables that are built once and then only read.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace b2::encode {

template <typename Value>
class FlatMap {
 public:
  // Room for `count` entries, at most half full.
  explicit FlatMap(std::size_t count = 0) {
    while ((std::size_t{1} << bits_) < 2 * count) ++bits_;
    slots_.resize(std::size_t{1} << bits_);
  }

  // Sets the value of `key`; no key is kEmpty.
  void set(std::uint64_t key, Value value) {
    Slot& slot = slots_[position(key)];
    slot.key = key;
    slot.value = value;
  }

  // The value of `key`, or null.
  const Value* find(std::uint64_t key) const {
    const Slot& slot = slots_[position(key)];
    return slot.key == key ? &slot.value : nullptr;
  }

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  struct Slot {
    std::uint64_t key = kEmpty;
    Value value{};
  };

  // Slot that holds `key`, or the empty one where it would stand.
  std::size_t position(std::uint64_t key) const {
    const std::size_t mask = slots_.size() - 1;
    std::size_t i = (key * 0x9E3779B97F4A7C15u) >> (64 - bits_);
    while (slots_[i].key != key && slots_[i].key != kEmpty) i = (i + 1) & mask;
    return i;
  }

  int bits_ = 4;
  std::vector<Slot> slots_;
};

}  // namespace b2::encode
