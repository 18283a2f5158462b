// Training of the interpolated modified Kneser-Ney model (Chen & Goodman, "An Empirical Study of Smoothing
// Techniques for Language Modeling", TR-10-98, 1998, section 4.1 and equation 26).

#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/ngram.h"
#include "text/ngram_counts.h"
#include "text/ngram_words.h"

namespace b2::ngram {

struct TrainOptions {
  int order;
  std::vector<std::uint64_t> prune;  // [order]: k-grams that occur at most prune[k - 1] times are dropped
  std::uint64_t min_count;           // rarer words become <unk>
  std::uint64_t max_words;           // only the most frequent words have a number of their own
  std::uint64_t memory_bytes;        // of the sort
  std::string prefix;                // of the temporary files
};

struct OrderReport {
  std::uint64_t seen;
  std::uint64_t kept;
  std::array<double, 3> discounts;
  bool is_fallback;  // the counts of counts gave no valid discounts
};

struct TrainedModel {
  std::vector<Weights> unigrams;
  std::vector<std::vector<FloatTable::Slot>> tables;  // of orders 2, 3, ...
  std::vector<std::string> words;                     // by number; of token ids, their decimal numbers
  std::vector<std::uint64_t> vocabulary;              // slots of Vocabulary; empty for a model of token ids
  std::vector<OrderReport> orders;
  std::uint64_t tokens = 0;     // without line ends
  std::uint64_t sequences = 0;  // lines
};

// Gathers sequences of words, then estimates. Either texts or token ids are added, not both.
class Trainer {
 public:
  explicit Trainer(TrainOptions options);

  // Every line of a text is a sequence.
  void add_text(std::string_view text);
  // Ids are in [0, 2^31).
  void add_tokens(const std::int32_t* ids, std::int64_t count);
  // Estimates the model, once; token ids from `num_tokens` on do not exist (0: as many as texts have words).
  TrainedModel finish(std::uint64_t num_tokens, const std::string& arpa_path);

 private:
  void put(std::uint32_t value);
  std::vector<Word> number_words(TrainedModel& model) const;
  template <int N>
  void estimate(const std::vector<Word>& numbers, const std::string& arpa_path, TrainedModel& model);

  TrainOptions options_;
  WordCounter words_;
  std::unique_ptr<TemporaryFile> stream_;  // words in the order of WordCounter, or token ids; kSequenceEnd
  std::vector<std::uint32_t> buffer_;
  std::uint64_t tokens_ = 0;
  std::uint64_t sequences_ = 0;
};

// Tables of 8-byte slots and codebooks [2, 256] instead of tables of 16-byte slots.
struct QuantizedOrder {
  std::vector<std::uint64_t> slots;
  std::vector<float> codebook;
};
QuantizedOrder quantize(const std::vector<FloatTable::Slot>& table);

}  // namespace b2::ngram
