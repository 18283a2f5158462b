// Python's view of the n-gram language model: training, and scores of texts and of token ids.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "text/ngram.h"
#include "text/ngram_train.h"
#include "text/ngram_words.h"
#include "texts.h"

namespace py = pybind11;

namespace b2::ngram {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Int32s = py::array_t<std::int32_t, py::array::c_style>;
using Int64s = py::array_t<std::int64_t, py::array::c_style>;
using Uint64s = py::array_t<std::uint64_t, py::array::c_style>;

void check_offsets(const Int64s& offsets, std::int64_t end, const char* what) {
  const std::int64_t* values = offsets.data();
  if (offsets.ndim() != 1 || offsets.size() < 1 || values[0] < 0 || !std::is_sorted(values, values + offsets.size()) ||
      values[offsets.size() - 1] > end) {
    throw std::invalid_argument(std::string(what) + " must be int64 [n + 1], sorted, and within the " +
                                std::to_string(end) + " given");
  }
}

// Marks the tag of a word that has a character beyond ASCII.
constexpr std::uint64_t kBeyondAscii = 1ULL << 63;

bool beyond_ascii(std::string_view word) {
  return std::any_of(word.begin(), word.end(), [](char byte) { return static_cast<signed char>(byte) < 0; });
}

// What a segment of the texts adds up to.
struct Segments {
  Segments(const Int64s& offsets, const Weights* unigram_weights)
      : bounds(offsets.data()), size(offsets.size() - 1), unigrams(unigram_weights), log10(size), unigram_log10(size),
        words(size), unknown(size), foreign(size), end(size) {
    for (Doubles* sums : {&log10, &unigram_log10}) {
      std::fill_n(sums->mutable_data(), size, 0.0);
    }
    for (Int64s* counts : {&words, &unknown, &foreign}) {
      std::fill_n(counts->mutable_data(), size, 0);
    }
    std::fill_n(end.mutable_data(), size, std::numeric_limits<double>::quiet_NaN());
    sum = log10.mutable_data();
    unigram_sum = unigram_log10.mutable_data();
    word_count = words.mutable_data();
    unknown_count = unknown.mutable_data();
    foreign_count = foreign.mutable_data();
    last_end = end.mutable_data();
  }

  // The word at byte `tag` of the texts; words come in order. The end of a line belongs to the word before it.
  void operator()(std::uint64_t tag, Word word, double log_probability) {
    const auto position = static_cast<std::int64_t>(tag & ~kBeyondAscii) - (word == kEnd);
    while (current < size && bounds[current + 1] <= position) {
      ++current;
    }
    if (current == size || position < bounds[current]) {
      return;
    }
    sum[current] += log_probability;
    unigram_sum[current] += unigrams[word].log_probability;
    word_count[current] += 1;
    unknown_count[current] += word == kUnknown;
    foreign_count[current] += word == kUnknown && (tag & kBeyondAscii) != 0;
    if (word == kEnd) {
      last_end[current] = log_probability;
    }
  }

  const std::int64_t* bounds;
  std::int64_t size;
  const Weights* unigrams;
  std::int64_t current = 0;
  Doubles log10;
  Doubles unigram_log10;
  Int64s words;
  Int64s unknown;
  Int64s foreign;
  Doubles end;
  double* sum;
  double* unigram_sum;
  std::int64_t* word_count;
  std::int64_t* unknown_count;
  std::int64_t* foreign_count;
  double* last_end;
};

// Views of arrays (usually of a mapped file) that this object keeps alive.
class Model {
 public:
  Model(Floats unigrams, std::vector<Uint64s> tables, std::vector<Floats> codebooks, Uint64s vocabulary)
      : unigrams_(std::move(unigrams)), tables_(std::move(tables)), codebooks_(std::move(codebooks)),
        vocabulary_(std::move(vocabulary)), order_(static_cast<int>(tables_.size()) + 1) {
    if (unigrams_.ndim() != 2 || unigrams_.shape(1) != 2 || unigrams_.shape(0) < kFirstWord || order_ > kMaxOrder ||
        (!codebooks_.empty() && codebooks_.size() != tables_.size()) || vocabulary_.size() % 2 != 0) {
      throw std::invalid_argument("damaged n-gram model: shapes of its arrays");
    }
    const bool quantized = !codebooks_.empty();
    for (std::size_t i = 0; i < tables_.size(); ++i) {
      const Uint64s& table = tables_[i];
      const int width = quantized ? QuantizedTable::kWordsPerSlot : FloatTable::kWordsPerSlot;
      if (table.size() < 1 || table.size() % width != 0 ||
          (quantized && codebooks_[i].size() != 2 * QuantizedTable::kCodes)) {
        throw std::invalid_argument("damaged n-gram model: table of order " + std::to_string(i + 2));
      }
    }
  }

  int order() const { return order_; }
  std::int64_t num_words() const { return unigrams_.shape(0); }

  py::tuple score_texts(const Bytes& data, const Offsets& offsets, const Int64s& segments) const {
    const Texts texts(data, offsets);
    check_offsets(segments, data.size(), "segments");
    Segments sums(segments, unigrams());
    {
      py::gil_scoped_release release;
      const auto* const bytes = reinterpret_cast<const char*>(data.data());
      const auto tag = [bytes](std::uint64_t begin, std::uint64_t end) {
        return beyond_ascii({bytes + begin, end - begin}) ? begin | kBeyondAscii : begin;
      };
      with_scorer(sums, [&](auto& scorer) { each_text(texts, offsets.data(), scorer, tag); });
    }
    return py::make_tuple(sums.log10, sums.unigram_log10, sums.words, sums.unknown, sums.foreign, sums.end);
  }

  py::tuple score_words(const Bytes& data, const Offsets& offsets) const {
    const Texts texts(data, offsets);
    std::vector<std::int64_t> bounds;
    std::vector<float> scores;
    {
      py::gil_scoped_release release;
      const auto sink = [&](std::uint64_t, Word, double score) { scores.push_back(static_cast<float>(score)); };
      const auto tag = [&](std::uint64_t begin, std::uint64_t end) {
        bounds.push_back(static_cast<std::int64_t>(begin));
        bounds.push_back(static_cast<std::int64_t>(end));
        return begin;
      };
      with_scorer(sink, [&](auto& scorer) { each_text(texts, offsets.data(), scorer, tag); });
    }
    const auto count = static_cast<py::ssize_t>(scores.size());
    return py::make_tuple(Int64s({count, py::ssize_t{2}}, bounds.data()), Floats(count, scores.data()));
  }

  py::tuple score_tokens(const Int32s& ids, const Int64s& offsets) const {
    check_offsets(offsets, ids.size(), "offsets");
    Floats tokens(ids.size());
    Floats ends(offsets.size() - 1);
    float* token = tokens.mutable_data();
    float* end = ends.mutable_data();
    std::fill_n(token, ids.size(), std::numeric_limits<float>::quiet_NaN());
    const std::int32_t* id = ids.data();
    const std::int64_t* bounds = offsets.data();
    const std::int64_t known = num_words() - kFirstWord;
    {
      py::gil_scoped_release release;
      const auto sink = [&](std::uint64_t tag, Word word, double log_probability) {
        (word == kEnd ? end : token)[tag] = static_cast<float>(log_probability);
      };
      with_scorer(sink, [&](auto& scorer) {
        for (std::int64_t i = 0; i < ends.size(); ++i) {
          scorer.begin();
          for (std::int64_t t = bounds[i]; t < bounds[i + 1]; ++t) {
            scorer.push(id[t] >= 0 && id[t] < known ? static_cast<Word>(id[t]) + kFirstWord : kUnknown, t);
          }
          scorer.end(i);
        }
      });
    }
    return py::make_tuple(tokens, ends);
  }

 private:
  const Weights* unigrams() const { return reinterpret_cast<const Weights*>(unigrams_.data()); }

  // Calls use(scorer) with the scorer of this model's kind of tables.
  template <typename Sink, typename Use>
  void with_scorer(Sink& sink, Use&& use) const {
    if (codebooks_.empty()) {
      scorer_of<FloatTable>(sink, use);
    } else {
      scorer_of<QuantizedTable>(sink, use);
    }
  }
  template <typename Table, typename Sink, typename Use>
  void scorer_of(Sink& sink, Use&& use) const {
    std::vector<Table> tables;
    for (std::size_t i = 0; i < tables_.size(); ++i) {
      tables.emplace_back(tables_[i].data(), tables_[i].size() / Table::kWordsPerSlot,
                          codebooks_.empty() ? nullptr : codebooks_[i].data());
    }
    Scorer<Table, Sink> scorer(order_, unigrams(), tables, sink);
    use(scorer);
  }

  // Scores every line; tag(begin, end) of a word gives what the sink is told, that of a line end has begin == end.
  template <typename ScorerType, typename Tag>
  void each_text(const Texts& texts, const std::int64_t* offsets, ScorerType& scorer, Tag&& tag) const {
    const Vocabulary vocabulary(vocabulary_.data(), vocabulary_.size() / 2);
    for (std::int64_t i = 0; i < texts.size(); ++i) {
      const auto start = static_cast<std::uint64_t>(offsets[i]);
      bool inside = false;
      each_word(
          texts[i],
          [&](std::uint64_t hash, std::uint64_t begin, std::uint64_t end) {
            if (!inside) {
              scorer.begin();
              inside = true;
            }
            scorer.push(vocabulary.find(hash), tag(start + begin, start + end));
          },
          [&](std::uint64_t end) {
            scorer.end(tag(start + end, start + end));
            inside = false;
          });
    }
  }

  Floats unigrams_;
  std::vector<Uint64s> tables_;
  std::vector<Floats> codebooks_;
  Uint64s vocabulary_;
  int order_;
};

// Hands a vector over to numpy without a copy; elements of type T seen as `columns` values of type V each.
template <typename V, typename T>
py::array_t<V> to_array(std::vector<T> values, py::ssize_t columns) {
  auto* owner = new std::vector<T>(std::move(values));
  const py::capsule release(owner, [](void* pointer) { delete static_cast<std::vector<T>*>(pointer); });
  const auto rows = static_cast<py::ssize_t>(owner->size() * sizeof(T) / sizeof(V)) / columns;
  const std::vector<py::ssize_t> shape =
      columns == 1 ? std::vector<py::ssize_t>{rows} : std::vector<py::ssize_t>{rows, columns};
  return py::array_t<V>(shape, reinterpret_cast<const V*>(owner->data()), release);
}

py::dict to_python(TrainedModel model, bool quantized) {
  std::string words;
  for (const std::string& word : model.words) {
    words += word;
    words += '\n';
  }
  py::dict arrays;
  arrays["unigrams"] = to_array<float>(std::move(model.unigrams), 2);
  arrays["vocabulary"] = to_array<std::uint64_t>(std::move(model.vocabulary), 2);
  arrays["words"] = Bytes(static_cast<py::ssize_t>(words.size()), reinterpret_cast<const std::uint8_t*>(words.data()));
  for (std::size_t i = 0; i < model.tables.size(); ++i) {
    const std::string order = std::to_string(i + 2);
    if (quantized) {
      QuantizedOrder table = quantize(std::exchange(model.tables[i], {}));
      arrays[py::str("order" + order)] = to_array<std::uint64_t>(std::move(table.slots), 1);
      arrays[py::str("codebook" + order)] = to_array<float>(std::move(table.codebook), QuantizedTable::kCodes);
    } else {
      arrays[py::str("order" + order)] = to_array<std::uint64_t>(std::move(model.tables[i]), 2);
    }
  }
  py::list orders;
  for (const OrderReport& report : model.orders) {
    orders.append(py::make_tuple(report.seen, report.kept, report.discounts, report.is_fallback));
  }
  py::dict result;
  result["arrays"] = arrays;
  result["orders"] = orders;
  result["tokens"] = model.tokens;
  result["sequences"] = model.sequences;
  return result;
}

}  // namespace
}  // namespace b2::ngram

void bind_ngram(py::module_& m) {
  using namespace b2::ngram;
  py::class_<Trainer>(m, "NgramTrainer", "Modified Kneser-Ney trainer; see megatron_b2/corpus/models/perplexity.py.")
      .def(py::init([](int order, std::vector<std::uint64_t> prune, std::uint64_t min_count, std::uint64_t max_words,
                       std::uint64_t memory_bytes, std::string prefix) {
             if (order < 1 || order > kMaxOrder || prune.size() != static_cast<std::size_t>(order)) {
               throw std::invalid_argument("order is 1 to 6, with a pruning threshold for each");
             }
             return Trainer({order, std::move(prune), min_count, max_words, memory_bytes, std::move(prefix)});
           }),
           py::kw_only(), py::arg("order"), py::arg("prune"), py::arg("min_count"), py::arg("max_words"),
           py::arg("memory_bytes"), py::arg("prefix"))
      .def(
          "add_texts",
          [](Trainer& trainer, const b2::Bytes& data, const b2::Offsets& offsets) {
            const b2::Texts texts(data, offsets);
            py::gil_scoped_release release;
            for (std::int64_t i = 0; i < texts.size(); ++i) {
              trainer.add_text(texts[i]);
            }
          },
          py::arg("data").noconvert(), py::arg("offsets").noconvert(), "Every line is a sequence; releases the GIL.")
      .def(
          "add_tokens",
          [](Trainer& trainer, const Int32s& ids, const Int64s& offsets) {
            check_offsets(offsets, ids.size(), "offsets");
            const std::int32_t* id = ids.data();
            const std::int64_t* bounds = offsets.data();
            const py::ssize_t size = offsets.size() - 1;
            py::gil_scoped_release release;
            for (py::ssize_t i = 0; i < size; ++i) {
              trainer.add_tokens(id + bounds[i], bounds[i + 1] - bounds[i]);
            }
          },
          py::arg("ids").noconvert(), py::arg("offsets").noconvert(), "Every row is a sequence; releases the GIL.")
      .def(
          "finish",
          [](Trainer& trainer, std::uint64_t num_tokens, bool quantized, const std::string& arpa_path) {
            TrainedModel model;
            {
              py::gil_scoped_release release;
              model = trainer.finish(num_tokens, arpa_path);
            }
            return to_python(std::move(model), quantized);
          },
          py::kw_only(), py::arg("num_tokens"), py::arg("quantized"), py::arg("arpa_path"),
          "Estimate, once: a dict of arrays, counts and discounts.");
  py::class_<Model>(m, "NgramModel", "N-gram model over arrays that it keeps alive; read-only and thread-safe.")
      .def(py::init<Floats, std::vector<Uint64s>, std::vector<Floats>, Uint64s>(), py::kw_only(),
           py::arg("unigrams").noconvert(), py::arg("tables").noconvert(), py::arg("codebooks").noconvert(),
           py::arg("vocabulary").noconvert())
      .def_property_readonly("order", &Model::order)
      .def_property_readonly("num_words", &Model::num_words)
      .def("score_texts", &Model::score_texts, py::arg("data").noconvert(), py::arg("offsets").noconvert(),
           py::arg("segments").noconvert(),
           "By segment: sums of log10 probabilities by the model and by its unigrams; words, unknown words, those of them "
           "beyond ASCII; and log10 P(</s>) of the last line.")
      .def("score_words", &Model::score_words, py::arg("data").noconvert(), py::arg("offsets").noconvert(),
           "Bytes of each word, int64 [n, 2] (both the same at a line end), and its log10 probability.")
      .def("score_tokens", &Model::score_tokens, py::arg("ids").noconvert(), py::arg("offsets").noconvert(),
           "Log10 probability of every token, and of the end of every sequence.");
}
