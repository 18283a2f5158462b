// How much of a text repeats itself: lines, paragraphs and n-grams of words (Rae et al. 2021, A.1.1).

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace b2::text {

// Gives equal keys equal numbers, counted from 0 in the order in which they come.
class Numbering {
 public:
  // Forgets all keys and makes room for `count` of them.
  void reset(std::size_t count) {
    std::size_t slots = 16;
    while (slots < 2 * count) {
      slots *= 2;
    }
    mask_ = slots - 1;
    slots_.assign(slots, kFree);
    keys_.clear();
  }

  std::uint32_t number(std::uint64_t key) {
    // Multiplication moves all bits of the key into the upper half.
    std::size_t slot = static_cast<std::size_t>(key * 0x9E3779B97F4A7C15 >> 32) & mask_;
    for (std::uint32_t known; (known = slots_[slot]) != kFree; slot = (slot + 1) & mask_) {
      if (keys_[known] == key) {
        return known;
      }
    }
    keys_.push_back(key);
    return slots_[slot] = size() - 1;
  }

  std::uint32_t size() const { return static_cast<std::uint32_t>(keys_.size()); }

 private:
  static constexpr std::uint32_t kFree = 0xFFFFFFFF;

  std::vector<std::uint64_t> keys_;   // of each number
  std::vector<std::uint32_t> slots_;  // number whose key belongs here or shortly before
  std::size_t mask_ = 0;
};

// Parts of a text, such as its lines: which of them have come before.
class Duplicates {
 public:
  void clear() { parts_.clear(); }
  void add(std::uint64_t hash, std::int64_t characters) { parts_.push_back({hash, characters}); }
  std::size_t size() const { return parts_.size(); }

  struct Share {
    double parts, characters;
  };

  // Share of the parts that are equal to an earlier one, and share of the characters of all parts in them.
  Share share(Numbering& numbering) const {
    numbering.reset(parts_.size());
    std::int64_t repeats = 0, repeated = 0, all = 0;
    for (const Part& part : parts_) {
      const std::uint32_t known = numbering.size();
      const bool is_repeat = numbering.number(part.hash) < known;
      repeats += is_repeat;
      repeated += is_repeat ? part.characters : 0;
      all += part.characters;
    }
    const auto of = [](std::int64_t x, auto total) {
      return total ? static_cast<double>(x) / static_cast<double>(total) : 0.0;
    };
    return {of(repeats, parts_.size()), of(repeated, all)};
  }

 private:
  struct Part {
    std::uint64_t hash;
    std::int64_t characters;
  };
  std::vector<Part> parts_;
};

// n-grams of the words of a text that occur more than once.
//
// An n-gram can only be repeated where both (n-1)-grams in it are, so that each n looks at what the last one left:
// few positions after the first steps. A group is all positions of one n-gram; that of an n-gram follows from those of
// its two (n-1)-grams, so that no hash of an n-gram can collide.
class RepeatedNgrams {
 public:
  static constexpr std::uint32_t kMinLength = 2, kMaxTop = 4, kMaxLength = 10;
  using Shares = std::array<double, kMaxLength - kMinLength + 1>;

  void clear() {
    words_.clear();
    before_.assign(1, 0);
  }
  void add(std::uint64_t word_hash, std::uint64_t characters) {
    words_.push_back(word_hash);
    before_.push_back(before_.back() + characters);
  }
  std::size_t size() const { return words_.size(); }

  // For n = 2 to 10: of the characters of all words, each counted once, the share in the most frequent n-gram if that
  // is repeated (of several the longest, then the first) for n <= 4, and in n-grams that have come before for n >= 5.
  Shares shares(Numbering& numbering) {
    Shares shares{};
    number_words(numbering);
    for (std::uint32_t n = kMinLength; n <= kMaxLength && !places_.empty(); ++n) {
      const std::uint64_t repeated = extend(numbering, n);
      const std::uint64_t covered = n <= kMaxTop ? in_top(n) : repeated;
      shares[n - kMinLength] = static_cast<double>(covered) / static_cast<double>(before_.back());
      keep_repeated();
    }
    return shares;
  }

 private:
  void number_words(Numbering& numbering) {
    numbering.reset(words_.size());
    forget_groups();
    places_.resize(words_.size());
    group_.resize(words_.size());
    for (std::uint32_t i = 0; i < words_.size(); ++i) {
      places_[i] = i;
      group_[i] = enter(numbering.number(words_[i]), i);
    }
    keep_repeated();
  }

  void forget_groups() {
    firsts_.clear();
    counts_.clear();
    top_count_ = 0;
  }

  std::uint32_t enter(std::uint32_t group, std::uint32_t place) {
    if (group == counts_.size()) {
      firsts_.push_back(place);
      counts_.push_back(0);
    }
    top_count_ = std::max(top_count_, ++counts_[group]);
    return group;
  }

  // From (n-1)-grams to n-grams. Returns the characters in n-grams that have come before.
  std::uint64_t extend(Numbering& numbering, std::uint32_t n) {
    numbering.reset(places_.size());
    forget_groups();
    std::size_t kept = 0;
    std::uint64_t repeated = 0;
    std::uint32_t counted = 0;  // words up to here are in `repeated` or not repeated
    for (std::size_t j = 0; j + 1 < places_.size(); ++j) {
      const std::uint32_t place = places_[j];
      if (places_[j + 1] != place + 1) {
        continue;
      }
      const std::uint64_t key = static_cast<std::uint64_t>(group_[place]) << 32 | group_[place + 1];
      const std::uint32_t group = group_[place] = enter(numbering.number(key), place);
      places_[kept++] = place;
      if (counts_[group] > 1) {
        repeated += before_[place + n] - before_[std::max(place, counted)];
        counted = place + n;
      }
    }
    places_.resize(kept);
    return repeated;
  }

  std::uint64_t in_top(std::uint32_t n) const {
    if (top_count_ < 2) {
      return 0;
    }
    std::uint32_t group = 0;
    std::uint64_t longest = 0;
    for (std::uint32_t g = 0; g < counts_.size(); ++g) {
      if (counts_[g] == top_count_ && before_[firsts_[g] + n] - before_[firsts_[g]] > longest) {
        longest = before_[firsts_[g] + n] - before_[firsts_[g]];
        group = g;
      }
    }
    std::uint64_t covered = 0;
    std::uint32_t counted = 0;
    for (const std::uint32_t place : places_) {
      if (group_[place] == group) {
        covered += before_[place + n] - before_[std::max(place, counted)];
        counted = place + n;
      }
    }
    return covered;
  }

  void keep_repeated() {
    places_.erase(std::remove_if(places_.begin(), places_.end(),
                                 [&](std::uint32_t place) { return counts_[group_[place]] < 2; }),
                  places_.end());
  }

  std::vector<std::uint64_t> words_;    // hash of each
  std::vector<std::uint64_t> before_;   // characters of the words before each, and of all
  std::vector<std::uint32_t> places_;   // words at which an n-gram in work starts, ascending
  std::vector<std::uint32_t> group_;    // of the n-gram at each such word
  std::vector<std::uint32_t> firsts_;   // place of each group
  std::vector<std::uint32_t> counts_;   // places of each group
  std::uint32_t top_count_ = 0;         // of the largest group
};

}  // namespace b2::text
