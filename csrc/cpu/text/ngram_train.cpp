#include "text/ngram_train.h"

#include <cmath>
#include <limits>
#include <numeric>
#include <utility>

namespace b2::ngram {

namespace {

constexpr std::uint32_t kSequenceEnd = 0xffffffff;
constexpr double kSlotsPerGram = 1.5;
constexpr std::array<double, 3> kFallbackDiscounts{0.5, 1.0, 1.5};

// D1, D2, D3+ of equation 26; without a value when the counts of counts are degenerate.
std::optional<std::array<double, 3>> discounts_of(const std::array<std::uint64_t, 5>& with_count) {
  const auto n = [&](int i) { return static_cast<double>(with_count[i]); };
  if (with_count[1] == 0 || with_count[2] == 0 || with_count[3] == 0 || with_count[4] == 0) {
    return std::nullopt;
  }
  const double y = n(1) / (n(1) + 2 * n(2));
  std::array<double, 3> discounts{};
  for (int i = 1; i <= 3; ++i) {
    discounts[i - 1] = i - (i + 1) * y * n(i + 1) / n(i);
    if (discounts[i - 1] < 0 || discounts[i - 1] > i) {
      return std::nullopt;
    }
  }
  return discounts;
}

// Probabilities of the n-grams of one order while they are estimated. Index: slot of the table, or word.
struct Level {
  std::vector<double> probability;
  std::vector<double> followers;  // sum of the adjusted counts of the n-grams with this context
  std::vector<double> freed;      // what of it discounts and pruning set free

  explicit Level(std::size_t size) : probability(size), followers(size), freed(size) {}
  double backoff(std::size_t i) const { return followers[i] > 0 ? freed[i] / followers[i] : 1.0; }
};

constexpr std::uint64_t kAbsent = std::numeric_limits<std::uint64_t>::max();

std::uint64_t slot_of(const std::vector<FloatTable::Slot>& table, Key key) {
  for (std::uint64_t i = home(key, table.size());; i = i + 1 == table.size() ? 0 : i + 1) {
    if (table[i].key == key) {
      return i;
    }
    if (table[i].key == 0) {
      return kAbsent;
    }
  }
}

std::uint64_t insert(std::vector<FloatTable::Slot>& table, Key key) {
  for (std::uint64_t i = home(key, table.size());; i = i + 1 == table.size() ? 0 : i + 1) {
    if (table[i].key == key) {
      throw std::runtime_error("two n-grams have the same 64-bit key; prune more n-grams or train on less text");
    }
    if (table[i].key == 0) {
      table[i].key = key;
      return i;
    }
  }
}

// Key of words[first], the word before it, ... (count words, last word first).
Key key_of(const Word* words, int count) {
  Key key = 0;
  for (int i = 0; i < count; ++i) {
    key = extend(key, words[i]);
  }
  return key;
}

class Estimator {
 public:
  Estimator(int order, const std::array<OrderCounts, kMaxOrder + 1>& counts, TrainedModel& model)
      : model_(model) {
    for (int k = 1; k <= order; ++k) {
      const auto discounts = discounts_of(counts[k].with_count);
      model.orders.push_back(
          {counts[k].seen, counts[k].kept, discounts.value_or(kFallbackDiscounts), !discounts.has_value()});
    }
  }

  void unigrams(AdjustedFile& file) {
    const std::size_t size = model_.unigrams.size();
    std::vector<std::uint64_t> counts(size);
    double total = 0;
    double freed = 0;
    file.each([&](const AdjustedGram& gram) {
      counts[gram.words[0]] = gram.count;
      total += static_cast<double>(gram.count);
      freed += discount(1, gram.count);
    });
    Level level(size);
    const double uniform = freed / total / static_cast<double>(size - 1);  // over all words but <s>
    for (std::size_t word = 0; word < size; ++word) {
      const double left = counts[word] == 0 ? 0.0 : static_cast<double>(counts[word]) - discount(1, counts[word]);
      level.probability[word] = left / total + uniform;
      model_.unigrams[word] = {static_cast<float>(std::log10(level.probability[word])), 0.0F};
    }
    model_.unigrams[kBegin].log_probability = -99.0F;  // what ARPA files write for a word that never follows
    level_ = std::move(level);
  }

  // Orders from 2 on, one after the other.
  void grams(int k, AdjustedFile& file) {
    const std::uint64_t kept = model_.orders[k - 1].kept;
    std::vector<FloatTable::Slot> table(static_cast<std::size_t>(static_cast<double>(kept) * kSlotsPerGram) + 2);
    file.each([&](const AdjustedGram& gram) {
      const std::uint64_t context = lower_index(k, gram.words.data() + 1);
      if (context != kAbsent) {
        const auto count = static_cast<double>(gram.count);
        level_.followers[context] += count;
        level_.freed[context] += gram.kept ? discount(k, gram.count) : count;
      }
      if (gram.kept) {
        insert(table, key_of(gram.words.data(), k));
      }
    });
    Level level(table.size());
    file.each([&](const AdjustedGram& gram) {
      if (gram.kept) {
        const std::uint64_t context = lower_index(k, gram.words.data() + 1);
        const std::uint64_t suffix = lower_index(k, gram.words.data());
        const double left = static_cast<double>(gram.count) - discount(k, gram.count);
        const std::uint64_t slot = slot_of(table, key_of(gram.words.data(), k));
        level.probability[slot] =
            left / level_.followers[context] + level_.backoff(context) * level_.probability[suffix];
        table[slot].weights = {static_cast<float>(std::log10(level.probability[slot])), 0.0F};
      }
    });
    store_backoffs(k - 1);
    model_.tables.push_back(std::move(table));
    level_ = std::move(level);
  }

 private:
  double discount(int k, std::uint64_t count) const {
    return model_.orders[k - 1].discounts[std::min<std::uint64_t>(count, 3) - 1];
  }
  // Index of the (k - 1)-gram that starts at words (last word first).
  std::uint64_t lower_index(int k, const Word* words) const {
    return k == 2 ? words[0] : slot_of(model_.tables[k - 3], key_of(words, k - 1));
  }
  void store_backoffs(int k) {
    for (std::size_t i = 0; i < level_.followers.size(); ++i) {
      const float value = static_cast<float>(std::log10(level_.backoff(i)));
      (k == 1 ? model_.unigrams[i] : model_.tables[k - 2][i].weights).log_backoff = value;
    }
  }

  TrainedModel& model_;
  Level level_{0};
};

// The whole model as text, for other tools (the format is that of SRILM's ngram-format manual).
class ArpaWriter {
 public:
  explicit ArpaWriter(const std::string& path) : path_(path), file_(std::fopen(path.c_str(), "wb")) {
    if (file_ == nullptr) {
      throw std::runtime_error(path + ": cannot be written");
    }
  }
  ~ArpaWriter() {
    if (file_ != nullptr) {
      std::fclose(file_);
    }
  }
  ArpaWriter(const ArpaWriter&) = delete;
  ArpaWriter& operator=(const ArpaWriter&) = delete;

  template <int N>
  void write(const TrainedModel& model, CountAdjuster<N>& adjuster) {
    std::fprintf(file_, "\\data\\\nngram 1=%zu\n", model.unigrams.size());
    for (int k = 2; k <= N; ++k) {
      std::fprintf(file_, "ngram %d=%llu\n", k, static_cast<unsigned long long>(model.orders[k - 1].kept));
    }
    std::fprintf(file_, "\n\\1-grams:\n");
    for (Word word = 0; word < model.unigrams.size(); ++word) {
      line(model, &word, 1, N, model.unigrams[word]);
    }
    for (int k = 2; k <= N; ++k) {
      std::fprintf(file_, "\n\\%d-grams:\n", k);
      const auto& table = model.tables[k - 2];
      adjuster.file(k).each([&](const AdjustedGram& gram) {
        if (gram.kept) {
          line(model, gram.words.data(), k, N, table[slot_of(table, key_of(gram.words.data(), k))].weights);
        }
      });
    }
    std::fprintf(file_, "\n\\end\\\n");
    const bool failed = std::ferror(file_) != 0;
    if (std::fclose(std::exchange(file_, nullptr)) != 0 || failed) {
      throw std::runtime_error(path_ + ": cannot be written (is the disk full?)");
    }
  }

 private:
  void line(const TrainedModel& model, const Word* words, int k, int order, const Weights& weights) {
    std::fprintf(file_, "%.9g\t", static_cast<double>(weights.log_probability));
    for (int i = k - 1; i >= 0; --i) {
      std::fputs(model.words[words[i]].c_str(), file_);
      std::fputc(i > 0 ? ' ' : k < order ? '\t' : '\n', file_);
    }
    if (k < order) {
      std::fprintf(file_, "%.9g\n", static_cast<double>(weights.log_backoff));
    }
  }

  std::string path_;
  std::FILE* file_;
};

// Centres of `codes` bins with equally many of the sorted values.
std::vector<float> bin_centres(std::vector<float> values, std::size_t codes) {
  std::sort(values.begin(), values.end());
  std::vector<float> centres;
  for (std::size_t i = 0; i < codes; ++i) {
    const std::size_t begin = values.size() * i / codes;
    const std::size_t end = values.size() * (i + 1) / codes;
    const double sum = std::accumulate(values.begin() + begin, values.begin() + end, 0.0);
    const float empty = centres.empty() ? 0.0F : centres.back();
    centres.push_back(begin == end ? empty : static_cast<float>(sum / static_cast<double>(end - begin)));
  }
  return centres;
}

std::uint64_t nearest(const float* centres, std::size_t codes, float value) {
  const std::size_t above = std::lower_bound(centres, centres + codes, value) - centres;
  const bool lower = above == codes || (above > 0 && value - centres[above - 1] < centres[above] - value);
  return lower ? above - 1 : above;
}

}  // namespace

Trainer::Trainer(TrainOptions options)
    : options_(std::move(options)), stream_(std::make_unique<TemporaryFile>(options_.prefix + ".words")) {}

void Trainer::put(std::uint32_t value) {
  buffer_.push_back(value);
  if (buffer_.size() >= 1 << 16) {
    stream_->write(buffer_.data(), buffer_.size());
    buffer_.clear();
  }
}

void Trainer::add_text(std::string_view text) {
  each_word(
      text,
      [&](std::uint64_t hash, std::uint64_t begin, std::uint64_t end) {
        put(words_.add(hash, text.substr(begin, end - begin)));
        ++tokens_;
      },
      [&](std::uint64_t) {
        put(kSequenceEnd);
        ++sequences_;
      });
}

void Trainer::add_tokens(const std::int32_t* ids, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0) {
      throw std::invalid_argument("token id " + std::to_string(ids[i]) + " is negative");
    }
    put(static_cast<std::uint32_t>(ids[i]));
  }
  if (count > 0) {
    put(kSequenceEnd);
    tokens_ += static_cast<std::uint64_t>(count);
    ++sequences_;
  }
}

// Numbers of the words by their order of appearance; fills words and vocabulary of the model.
std::vector<Word> Trainer::number_words(TrainedModel& model) const {
  std::vector<std::uint32_t> chosen;
  for (std::uint32_t i = 0; i < words_.size(); ++i) {
    if (words_.count(i) >= options_.min_count && !words_.spelled(i).empty()) {
      chosen.push_back(i);
    }
  }
  std::sort(chosen.begin(), chosen.end(), [this](std::uint32_t a, std::uint32_t b) {
    return words_.count(a) != words_.count(b) ? words_.count(a) > words_.count(b)
                                              : words_.spelled(a) < words_.spelled(b);
  });
  chosen.resize(std::min<std::size_t>(chosen.size(), options_.max_words));
  std::vector<Word> numbers(words_.size(), kUnknown);
  const std::uint64_t slots = chosen.size() * 2 + 2;
  model.vocabulary.resize(2 * slots);
  for (const std::uint32_t i : chosen) {
    numbers[i] = static_cast<Word>(model.words.size());
    model.words.push_back(words_.spelled(i));
    std::uint64_t slot = home(words_.hash(i), slots);
    while (model.vocabulary[2 * slot] != 0) {
      slot = slot + 1 == slots ? 0 : slot + 1;
    }
    model.vocabulary[2 * slot] = words_.hash(i);
    model.vocabulary[2 * slot + 1] = numbers[i];
  }
  return numbers;
}

TrainedModel Trainer::finish(std::uint64_t num_tokens, const std::string& arpa_path) {
  TrainedModel model;
  model.tokens = tokens_;
  model.sequences = sequences_;
  model.words = {"<unk>", "<s>", "</s>"};
  if (sequences_ == 0) {
    throw std::invalid_argument("no text to train on: every text is empty");
  }
  std::vector<Word> numbers;
  if (num_tokens == 0) {
    numbers = number_words(model);
  } else {
    for (std::uint64_t id = 0; id < num_tokens; ++id) {
      numbers.push_back(static_cast<Word>(id) + kFirstWord);
      model.words.push_back(std::to_string(id));
    }
  }
  model.unigrams.resize(model.words.size());
  stream_->write(buffer_.data(), buffer_.size());
  buffer_ = {};
  words_ = WordCounter();
  switch (options_.order) {
    case 1: estimate<1>(numbers, arpa_path, model); break;
    case 2: estimate<2>(numbers, arpa_path, model); break;
    case 3: estimate<3>(numbers, arpa_path, model); break;
    case 4: estimate<4>(numbers, arpa_path, model); break;
    case 5: estimate<5>(numbers, arpa_path, model); break;
    case 6: estimate<6>(numbers, arpa_path, model); break;
    default: throw std::invalid_argument("order " + std::to_string(options_.order) + " is not 1 to 6");
  }
  return model;
}

template <int N>
void Trainer::estimate(const std::vector<Word>& numbers, const std::string& arpa_path, TrainedModel& model) {
  CountAdjuster<N> adjuster(options_.prefix, options_.prune);
  {
    GramSorter<N> sorter(options_.prefix, options_.memory_bytes);
    std::array<Word, N> window;  // last word first
    window.fill(kBegin);
    const auto add = [&](Word word) {
      std::copy_backward(window.begin(), window.end() - 1, window.end());
      window[0] = word;
      Gram<N> gram;
      for (int i = 0; i < N; ++i) {
        gram.set(i, window[i]);
      }
      sorter.add(gram);
    };
    std::vector<std::uint32_t> block(1 << 16);
    stream_->rewind();
    while (const std::size_t count = stream_->read(block.data(), block.size())) {
      for (std::size_t i = 0; i < count; ++i) {
        if (block[i] != kSequenceEnd) {
          if (block[i] >= numbers.size()) {
            throw std::invalid_argument("token id " + std::to_string(block[i]) + " is outside of the " +
                                        std::to_string(numbers.size()) + " tokens");
          }
          add(numbers[block[i]]);
          continue;
        }
        add(kEnd);
        window.fill(kBegin);
      }
    }
    stream_.reset();
    sorter.drain([&](const Gram<N>& gram, std::uint64_t count) { adjuster.take(gram, count); });
    adjuster.finish();
  }
  Estimator estimator(N, adjuster.counts(), model);
  estimator.unigrams(adjuster.file(1));
  for (int k = 2; k <= N; ++k) {
    estimator.grams(k, adjuster.file(k));
  }
  if (!arpa_path.empty()) {
    ArpaWriter(arpa_path).write(model, adjuster);
  }
}

QuantizedOrder quantize(const std::vector<FloatTable::Slot>& table) {
  constexpr std::size_t kCodes = QuantizedTable::kCodes;
  std::vector<float> probabilities;
  std::vector<float> backoffs;
  for (const FloatTable::Slot& slot : table) {
    if (slot.key != 0) {
      probabilities.push_back(slot.weights.log_probability);
      if (slot.weights.log_backoff != 0) {
        backoffs.push_back(slot.weights.log_backoff);
      }
    }
  }
  QuantizedOrder quantized;
  quantized.codebook = bin_centres(std::move(probabilities), kCodes);
  const std::vector<float> centres = bin_centres(std::move(backoffs), kCodes - 1);
  quantized.codebook.push_back(0.0F);  // n-grams that are no context are many: they stay exact
  quantized.codebook.insert(quantized.codebook.end(), centres.begin(), centres.end());
  const float* codebook = quantized.codebook.data();
  quantized.slots.resize(table.size());
  for (const FloatTable::Slot& slot : table) {
    if (slot.key == 0) {
      continue;
    }
    const float backoff = slot.weights.log_backoff;
    const std::uint64_t backoff_code = backoff == 0 ? 0 : 1 + nearest(codebook + kCodes + 1, kCodes - 1, backoff);
    const std::uint64_t check = QuantizedTable::check(slot.key);
    std::uint64_t i = home(slot.key, table.size());
    for (; quantized.slots[i] != 0; i = i + 1 == table.size() ? 0 : i + 1) {
      if ((quantized.slots[i] & ~0xffffULL) == check) {
        throw std::runtime_error("two n-grams have the same 48-bit key; do not quantise this model");
      }
    }
    quantized.slots[i] = check | nearest(codebook, kCodes, slot.weights.log_probability) << 8 | backoff_code;
  }
  return quantized;
}

}  // namespace b2::ngram
