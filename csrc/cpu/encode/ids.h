// A growing array of token ids that numpy can take over.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

namespace b2::encode {

class Ids {
 public:
  struct Free {
    void operator()(std::int32_t* ids) const { std::free(ids); }
  };
  using Memory = std::unique_ptr<std::int32_t[], Free>;

  std::size_t size() const { return size_; }
  const std::int32_t* data() const { return memory_.get(); }

  // Where the next `count` ids may be written; `advance` then keeps them.
  std::int32_t* room(std::size_t count) {
    if (count > capacity_ - size_) grow(count);
    return memory_.get() + size_;
  }
  void advance(std::size_t count) { size_ += count; }
  void push(std::int32_t id) {
    *room(1) = id;
    ++size_;
  }
  void truncate(std::size_t size) { size_ = size; }

  // The memory; the array is empty after.
  Memory release() {
    size_ = capacity_ = 0;
    return std::move(memory_);
  }

 private:
  void grow(std::size_t count) {
    const std::size_t capacity = size_ + count + (size_ + count) / 2 + 1024;
    void* moved = std::realloc(memory_.get(), capacity * sizeof(std::int32_t));
    if (moved == nullptr) throw std::bad_alloc();
    static_cast<void>(memory_.release());
    memory_.reset(static_cast<std::int32_t*>(moved));
    capacity_ = capacity;
  }

  Memory memory_;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace b2::encode
