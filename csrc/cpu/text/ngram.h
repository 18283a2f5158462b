// N-gram language model: keys, tables and the lookup of probabilities (docs/corpus-models.md).
//
// An n-gram is known by a 64-bit key of its word ids; a table per order maps keys to log10 probability and log10
// back-off weight, as in the "probing" model of Heafield, "KenLM: Faster and Smaller Language Model Queries"
// (2011). Two n-grams of one model never share a key (training checks it); an n-gram that was never seen matches
// by chance with a probability below 1e-12.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "text/hashing.h"

namespace b2::ngram {

using Word = std::uint32_t;
using Key = std::uint64_t;

constexpr Word kUnknown = 0;
constexpr Word kBegin = 1;
constexpr Word kEnd = 2;
constexpr Word kFirstWord = 3;
constexpr int kMaxOrder = 6;

// Key of the n-gram that is `word` in front of the n-gram of `key`; of `word` alone when `key` is 0. Never 0.
inline Key extend(Key key, Word word) {
  const Key extended = text::avalanche((key + word + 1) * 0x9e3779b97f4a7c15ULL);
  return extended == 0 ? 1 : extended;
}

// First slot that a key may be in, out of `slots`.
inline std::uint64_t home(Key key, std::uint64_t slots) {
  return static_cast<std::uint64_t>((static_cast<unsigned __int128>(key) * slots) >> 64);
}

struct Weights {
  float log_probability;
  float log_backoff;
};

// Open addressing with linear probing; key 0 is an empty slot. At least one slot is empty, so every search ends.
class FloatTable {
 public:
  struct Slot {
    Key key;
    Weights weights;
  };
  static constexpr int kWordsPerSlot = 2;

  FloatTable(const std::uint64_t* data, std::uint64_t slots, const float*)
      : slots_(reinterpret_cast<const Slot*>(data)), size_(slots) {}

  void prefetch(Key key) const { __builtin_prefetch(slots_ + home(key, size_)); }
  bool find(Key key, Weights& weights) const {
    for (std::uint64_t i = home(key, size_);; i = i + 1 == size_ ? 0 : i + 1) {
      if (slots_[i].key == key) {
        weights = slots_[i].weights;
        return true;
      }
      if (slots_[i].key == 0) {
        return false;
      }
    }
  }

 private:
  const Slot* slots_;
  std::uint64_t size_;
};

// The same in 8 bytes a slot: 48 bits of the key (its place gives the others), and an 8-bit code each for
// probability and back-off; 0 is an empty slot.
class QuantizedTable {
 public:
  static constexpr int kWordsPerSlot = 1;
  static constexpr int kCodes = 256;

  QuantizedTable(const std::uint64_t* data, std::uint64_t slots, const float* codebook)
      : slots_(data), size_(slots), codebook_(codebook) {}

  static std::uint64_t check(Key key) {
    const std::uint64_t bits = key << 16;
    return bits == 0 ? 1ULL << 16 : bits;
  }
  void prefetch(Key key) const { __builtin_prefetch(slots_ + home(key, size_)); }
  bool find(Key key, Weights& weights) const {
    const std::uint64_t wanted = check(key);
    for (std::uint64_t i = home(key, size_);; i = i + 1 == size_ ? 0 : i + 1) {
      const std::uint64_t slot = slots_[i];
      if ((slot & ~0xffffULL) == wanted) {
        weights = {codebook_[(slot >> 8) & 0xff], codebook_[kCodes + (slot & 0xff)]};
        return true;
      }
      if (slot == 0) {
        return false;
      }
    }
  }

 private:
  const std::uint64_t* slots_;
  std::uint64_t size_;
  const float* codebook_;  // [2, 256]: probabilities, back-offs
};

// Log10 probabilities of the words of a sequence, one after the other. Lookups are prefetched kAhead words before
// they are needed: memory latency is hidden, and the memory used does not grow with the sequence.
//
// Sink is called as sink(tag, word, log10 probability) for every word but the first of a sequence.
template <typename Table, typename Sink>
class Scorer {
 public:
  Scorer(int order, const Weights* unigrams, const std::vector<Table>& tables, Sink& sink)
      : order_(order), unigrams_(unigrams), tables_(tables), sink_(sink) {}

  void begin() {
    pushed_ = resolved_ = 0;
    push(kBegin, 0);
  }
  void push(Word word, std::uint64_t tag) {
    Position& position = ring_[pushed_ % kRing];
    position.word = word;
    position.tag = tag;
    position.longest = static_cast<int>(std::min<std::uint64_t>(order_, pushed_ + 1));
    Key key = extend(0, word);
    for (int k = 2; k <= position.longest; ++k) {
      key = extend(key, ring_[(pushed_ - k + 1) % kRing].word);
      position.keys[k] = key;
      tables_[k - 2].prefetch(key);
    }
    __builtin_prefetch(unigrams_ + word);
    if (++pushed_ - resolved_ > kAhead) {
      resolve();
    }
  }
  void end(std::uint64_t tag) {
    push(kEnd, tag);
    while (resolved_ < pushed_) {
      resolve();
    }
  }

 private:
  static constexpr std::uint64_t kAhead = 8;
  static constexpr std::uint64_t kRing = 16;  // at least kAhead + kMaxOrder

  struct Position {
    std::array<Key, kMaxOrder + 1> keys;
    std::uint64_t tag;
    Word word;
    int longest;
  };

  void resolve() {
    const Position& position = ring_[resolved_ % kRing];
    std::array<float, kMaxOrder + 1> backoffs;
    Weights weights = unigrams_[position.word];
    float log_probability = weights.log_probability;
    backoffs[1] = weights.log_backoff;
    int matched = 1;
    // An n-gram is kept only with its context and with its suffix, so the search ends at the first miss.
    const int longest = std::min(position.longest, matched_ + 1);
    while (resolved_ > 0 && matched < longest && tables_[matched - 1].find(position.keys[matched + 1], weights)) {
      ++matched;
      log_probability = weights.log_probability;
      backoffs[matched] = weights.log_backoff;
    }
    if (resolved_ > 0) {
      const int context = std::min(matched_, order_ - 1);
      double sum = log_probability;
      for (int k = matched; k <= context; ++k) {
        sum += backoffs_[k];
      }
      sink_(position.tag, position.word, sum);
    }
    backoffs_ = backoffs;
    matched_ = matched;
    ++resolved_;
  }

  int order_;
  const Weights* unigrams_;
  const std::vector<Table>& tables_;
  Sink& sink_;
  std::array<Position, kRing> ring_;
  std::uint64_t pushed_ = 0;
  std::uint64_t resolved_ = 0;
  std::array<float, kMaxOrder + 1> backoffs_{};
  int matched_ = 0;
};

}  // namespace b2::ngram
