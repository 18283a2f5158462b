// Sorted n-gram counts within a memory limit, and the adjusted counts of Kneser-Ney smoothing.
//
// Grams are sorted by their last word first, then by the one before it, and so on: all n-grams with one suffix are
// neighbours, so a single pass over the longest n-grams gives the counts of every order (Heafield et al.,
// "Scalable Modified Kneser-Ney Language Model Estimation", 2013).

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <queue>
#include <stdexcept>
#include <string>
#include <vector>

#include "text/ngram.h"

namespace b2::ngram {

// A file that is read or written once from its start to its end and removed with this object.
class TemporaryFile {
 public:
  explicit TemporaryFile(std::string path) : path_(std::move(path)), file_(std::fopen(path_.c_str(), "w+b")) {
    if (file_ == nullptr) {
      throw std::runtime_error(path_ + ": cannot be written");
    }
    std::setvbuf(file_, nullptr, _IOFBF, 1 << 20);
  }
  ~TemporaryFile() {
    std::fclose(file_);
    std::remove(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  template <typename T>
  void write(const T* values, std::size_t count) {
    if (std::fwrite(values, sizeof(T), count, file_) != count) {
      throw std::runtime_error(path_ + ": cannot be written (is the disk full?)");
    }
  }
  void rewind() {
    if (std::fflush(file_) != 0 || std::fseek(file_, 0, SEEK_SET) != 0) {
      throw std::runtime_error(path_ + ": cannot be written (is the disk full?)");
    }
  }
  // Values read, fewer than `count` at the end of the file.
  template <typename T>
  std::size_t read(T* values, std::size_t count) {
    const std::size_t got = std::fread(values, sizeof(T), count, file_);
    if (got != count && std::ferror(file_)) {
      throw std::runtime_error(path_ + ": cannot be read");
    }
    return got;
  }

 private:
  std::string path_;
  std::FILE* file_;
};

// N words, last word first, packed two in an integer: comparing the integers compares the words.
template <int N>
class Gram {
 public:
  Word word(int i) const { return static_cast<Word>(i % 2 ? halves_[i / 2] : halves_[i / 2] >> 32); }
  void set(int i, Word word) { halves_[i / 2] |= i % 2 ? word : static_cast<std::uint64_t>(word) << 32; }
  bool operator<(const Gram& other) const { return halves_ < other.halves_; }
  bool operator==(const Gram& other) const { return halves_ == other.halves_; }
  // Words that both end with.
  int common(const Gram& other) const {
    int i = 0;
    while (i < N && word(i) == other.word(i)) {
      ++i;
    }
    return i;
  }

 private:
  std::array<std::uint64_t, (N + 1) / 2> halves_{};
};

template <int N>
struct Counted {
  Gram<N> gram;
  std::uint64_t count;
};

// Collects grams in any order; hands them out sorted, each once with its count.
template <int N>
class GramSorter {
 public:
  GramSorter(std::string prefix, std::uint64_t memory_bytes)
      : prefix_(std::move(prefix)), memory_bytes_(memory_bytes),
        capacity_(std::max<std::uint64_t>(memory_bytes / sizeof(Gram<N>), 1024)) {}

  void add(const Gram<N>& gram) {
    if (grams_.size() == capacity_) {
      spill();
    }
    grams_.push_back(gram);
  }

  // Calls take(gram, count) in order; to be called once.
  template <typename Take>
  void drain(Take&& take) {
    if (runs_.empty()) {
      each_sorted(take);
      return;
    }
    spill();
    grams_ = {};
    merge(take);
  }

 private:
  struct Run {
    std::unique_ptr<TemporaryFile> file;
    std::vector<Counted<N>> block;
    std::size_t next = 0;
    std::size_t filled = 0;

    const Counted<N>& head() const { return block[next]; }
    bool advance() { return ++next < filled || fill(); }
    bool fill() {
      next = 0;
      filled = file->read(block.data(), block.size());
      return filled > 0;
    }
  };

  template <typename Take>
  void each_sorted(Take&& take) {
    std::sort(grams_.begin(), grams_.end());
    for (std::size_t i = 0; i < grams_.size();) {
      std::size_t j = i + 1;
      while (j < grams_.size() && grams_[j] == grams_[i]) {
        ++j;
      }
      take(grams_[i], static_cast<std::uint64_t>(j - i));
      i = j;
    }
  }

  void spill() {
    Run run;
    run.file = std::make_unique<TemporaryFile>(prefix_ + ".run" + std::to_string(runs_.size()));
    each_sorted([&](const Gram<N>& gram, std::uint64_t count) {
      const Counted<N> counted{gram, count};
      run.file->write(&counted, 1);
    });
    run.file->rewind();
    runs_.push_back(std::move(run));
    grams_.clear();
  }

  template <typename Take>
  void merge(Take&& take) {
    const auto later = [this](std::size_t a, std::size_t b) { return runs_[b].head().gram < runs_[a].head().gram; };
    std::priority_queue<std::size_t, std::vector<std::size_t>, decltype(later)> heap(later);
    const std::size_t block = std::max<std::size_t>(memory_bytes_ / sizeof(Counted<N>) / runs_.size(), 256);
    for (std::size_t i = 0; i < runs_.size(); ++i) {
      runs_[i].block.resize(block);
      if (runs_[i].fill()) {
        heap.push(i);
      }
    }
    while (!heap.empty()) {
      const Gram<N> gram = runs_[heap.top()].head().gram;
      std::uint64_t count = 0;
      while (!heap.empty() && runs_[heap.top()].head().gram == gram) {
        const std::size_t i = heap.top();
        heap.pop();
        count += runs_[i].head().count;
        if (runs_[i].advance()) {
          heap.push(i);
        }
      }
      take(gram, count);
    }
    runs_.clear();
  }

  std::string prefix_;
  std::uint64_t memory_bytes_;
  std::uint64_t capacity_;
  std::vector<Gram<N>> grams_;
  std::vector<Run> runs_;
};

struct OrderCounts {
  std::array<std::uint64_t, 5> with_count{};  // [i]: n-grams whose adjusted count is i
  std::uint64_t seen = 0;                     // n-grams
  std::uint64_t kept = 0;                     // n-grams that survive pruning
};

// An n-gram with its adjusted count, as the estimator reads it; words last word first.
struct AdjustedGram {
  std::array<Word, kMaxOrder> words;
  std::uint64_t count;
  bool kept;
};

// The n-grams of one order in a temporary file, in order.
class AdjustedFile {
 public:
  AdjustedFile(std::string path, int order) : file_(std::move(path)), order_(order) {}

  void append(const AdjustedGram& gram) {
    const std::uint64_t count = gram.count << 1 | static_cast<std::uint64_t>(gram.kept);
    file_.write(gram.words.data(), order_);
    file_.write(&count, 1);
  }
  template <typename Take>
  void each(Take&& take) {
    file_.rewind();
    AdjustedGram gram;
    std::uint64_t count = 0;
    while (file_.read(gram.words.data(), order_) == static_cast<std::size_t>(order_) && file_.read(&count, 1) == 1) {
      gram.count = count >> 1;
      gram.kept = count & 1;
      take(gram);
    }
  }

 private:
  TemporaryFile file_;
  int order_;
};

// Turns the sorted grams of order N into adjusted counts of orders 1 to N. The adjusted count of an n-gram of the
// highest order, and of one that starts with <s>, is how often it occurs; that of any other is the number of
// different words before it. `prune[k - 1]` drops k-grams that occur at most that often.
template <int N>
class CountAdjuster {
 public:
  CountAdjuster(const std::string& prefix, std::vector<std::uint64_t> prune) : prune_(std::move(prune)) {
    for (int k = 1; k <= N; ++k) {
      files_.push_back(std::make_unique<AdjustedFile>(prefix + ".order" + std::to_string(k), k));
    }
  }

  void take(const Gram<N>& gram, std::uint64_t count) {
    const int common = started_ ? previous_.common(gram) : 0;
    if (started_) {
      close(common);
    }
    for (int k = common + 1; k <= N; ++k) {
      occurrences_[k] = extensions_[k] = 0;
    }
    for (int k = 1; k <= N; ++k) {
      occurrences_[k] += count;
    }
    for (int k = std::max(common, 1); k < N; ++k) {  // each new (k + 1)-gram extends its suffix to the left
      extensions_[k] += 1;
    }
    previous_ = gram;
    started_ = true;
  }
  void finish() {
    if (started_) {
      close(0);
    }
  }

  const std::array<OrderCounts, kMaxOrder + 1>& counts() const { return counts_; }
  AdjustedFile& file(int order) { return *files_[order - 1]; }

 private:
  // Writes the n-grams of more than `common` words that end the previous gram.
  void close(int common) {
    for (int k = N; k > common; --k) {
      bool whole = true;  // <s> only in front
      for (int i = 0; i + 1 < k; ++i) {
        whole = whole && previous_.word(i) != kBegin;
      }
      if (!whole) {
        continue;
      }
      AdjustedGram gram{};
      for (int i = 0; i < k; ++i) {
        gram.words[i] = previous_.word(i);
      }
      const bool raw = k == N || gram.words[k - 1] == kBegin;
      gram.count = raw ? occurrences_[k] : extensions_[k];
      gram.kept = occurrences_[k] > prune_[k - 1];
      if (gram.count < counts_[k].with_count.size()) {
        counts_[k].with_count[gram.count] += 1;
      }
      counts_[k].seen += 1;
      counts_[k].kept += gram.kept;
      files_[k - 1]->append(gram);
    }
  }

  std::vector<std::uint64_t> prune_;
  std::vector<std::unique_ptr<AdjustedFile>> files_;
  std::array<OrderCounts, kMaxOrder + 1> counts_{};
  std::array<std::uint64_t, kMaxOrder + 1> occurrences_{};
  std::array<std::uint64_t, kMaxOrder + 1> extensions_{};
  Gram<N> previous_;
  bool started_ = false;
};

}  // namespace b2::ngram
