// What the other trained models read: words parted by spaces for the classifier, counts of hashed n-grams and products
// with sparse matrices for the dense features (megatron_b2/corpus/models/classifier.py, embedding.py).

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "text/hashing.h"
#include "text/ngram_words.h"
#include "text/words.h"
#include "texts.h"

namespace py = pybind11;

namespace b2::ngram {
namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Int32s = py::array_t<std::int32_t, py::array::c_style>;
using Int64s = py::array_t<std::int64_t, py::array::c_style>;

constexpr char kLineEnd[] = "\u00b6";

// The words of a text as the n-gram model sees them, at most `max_words` of them, on one line; ¶ stands for the end of
// a line that has words.
py::list join_words(const Bytes& data, const Offsets& offsets, std::int64_t max_words) {
  const Texts texts(data, offsets);
  std::vector<std::string> joined(static_cast<std::size_t>(texts.size()));
  {
    py::gil_scoped_release release;
    for (std::int64_t i = 0; i < texts.size(); ++i) {
      std::string& line = joined[static_cast<std::size_t>(i)];
      std::int64_t left = max_words;
      const auto append = [&](std::string_view word) {
        if (left-- > 0) {
          line.append(line.empty() ? "" : " ").append(word);
        }
      };
      each_word(
          texts[i],
          [&](std::uint64_t, std::uint64_t begin, std::uint64_t end) {
            if (left > 0) {
              append(spelling(texts[i].substr(begin, end - begin)));
            }
          },
          [&](std::uint64_t) { append(kLineEnd); });
    }
  }
  py::list lines;
  for (const std::string& line : joined) {
    lines.append(py::str(line));
  }
  return lines;
}

// Collects the hashes of one text: lower-case words, pairs of neighbours, and pieces of four characters of longer
// words, so that inflected forms have something in common.
class HashedFeatures {
 public:
  void ascii(std::string_view word, const char*) {
    lowered_.assign(word);
    for (char& byte : lowered_) {
      byte |= 0x20;
    }
    add(lowered_);
  }
  void word(std::string_view word, const char*) { add(word); }

  std::vector<std::uint64_t> hashes;

  void begin() {
    hashes.clear();
    previous_ = 0;
  }

 private:
  static constexpr std::size_t kPiece = 4;

  static std::uint64_t hash_of(const char32_t* first, const char32_t* last) {
    std::uint64_t hash = 0xcbf29ce484222325ULL;
    for (; first < last; ++first) {
      hash = add_to_hash(hash, *first);
    }
    return text::avalanche(hash);
  }
  void add(std::string_view word) {
    characters_.assign(1, U'<');
    for (const char* p = word.data(); p < word.data() + word.size();) {
      characters_.push_back(text::decode(p, word.data() + word.size()));
    }
    characters_.push_back(U'>');
    const char32_t* const first = characters_.data();
    const std::size_t size = characters_.size();
    const std::uint64_t whole = hash_of(first, first + size);
    hashes.push_back(whole);
    if (previous_ != 0) {
      hashes.push_back(text::avalanche(previous_ * 3 + whole));
    }
    previous_ = whole;
    for (std::size_t i = 0; size > kPiece + 1 && i + kPiece <= size; ++i) {
      hashes.push_back(hash_of(first + i, first + i + kPiece));
    }
  }

  std::string lowered_;
  std::u32string characters_;
  std::uint64_t previous_ = 0;
};

// Counts of the hashed features of N texts as a sparse matrix [N, 2^bits]: row starts [N + 1], columns in order,
// counts.
py::tuple hashed_ngrams(const Bytes& data, const Offsets& offsets, int bits) {
  if (bits < 1 || bits > 30) {
    throw std::invalid_argument("bits is " + std::to_string(bits) + "; give 1 to 30");
  }
  const Texts texts(data, offsets);
  std::vector<std::int64_t> starts{0};
  std::vector<std::int32_t> columns;
  std::vector<float> counts;
  {
    py::gil_scoped_release release;
    HashedFeatures features;
    for (std::int64_t i = 0; i < texts.size(); ++i) {
      features.begin();
      text::WordReader(texts[i], features).run();
      for (std::uint64_t& hash : features.hashes) {
        hash >>= 64 - bits;
      }
      std::sort(features.hashes.begin(), features.hashes.end());
      for (std::size_t j = 0; j < features.hashes.size();) {
        std::size_t k = j + 1;
        while (k < features.hashes.size() && features.hashes[k] == features.hashes[j]) {
          ++k;
        }
        columns.push_back(static_cast<std::int32_t>(features.hashes[j]));
        counts.push_back(static_cast<float>(k - j));
        j = k;
      }
      starts.push_back(static_cast<std::int64_t>(columns.size()));
    }
  }
  return py::make_tuple(Int64s(static_cast<py::ssize_t>(starts.size()), starts.data()),
                        Int32s(static_cast<py::ssize_t>(columns.size()), columns.data()),
                        Floats(static_cast<py::ssize_t>(counts.size()), counts.data()));
}

// A sparse matrix [N, D] whose rows are checked once.
struct Sparse {
  Sparse(const Int64s& starts, const Int32s& columns, const Floats& values, std::int64_t width)
      : start(starts.data()), column(columns.data()), value(values.data()), rows(starts.size() - 1) {
    bool valid = starts.ndim() == 1 && rows >= 0 && start[0] == 0 && columns.size() == values.size() &&
                 std::is_sorted(start, start + rows + 1) && start[rows] == columns.size();
    for (py::ssize_t i = 0; valid && i < columns.size(); ++i) {
      valid = column[i] >= 0 && column[i] < width;
    }
    if (!valid) {
      throw std::invalid_argument("starts, columns and values are no sparse matrix with " + std::to_string(width) +
                                  " columns");
    }
  }
  const std::int64_t* start;
  const std::int32_t* column;
  const float* value;
  std::int64_t rows;
};

void check_matrix(const Floats& dense) {
  if (dense.ndim() != 2) {
    throw std::invalid_argument("the dense matrix must have two dimensions");
  }
}

// sparse [N, D] x dense [D, k] -> [N, k], summed in the order of the columns.
Floats sparse_times(const Int64s& starts, const Int32s& columns, const Floats& values, const Floats& dense) {
  check_matrix(dense);
  const Sparse sparse(starts, columns, values, dense.shape(0));
  const std::int64_t width = dense.shape(1);
  Floats product({static_cast<py::ssize_t>(sparse.rows), dense.shape(1)});
  float* out = product.mutable_data();
  const float* in = dense.data();
  py::gil_scoped_release release;
  std::fill_n(out, sparse.rows * width, 0.0F);
  for (std::int64_t row = 0; row < sparse.rows; ++row, out += width) {
    for (std::int64_t j = sparse.start[row]; j < sparse.start[row + 1]; ++j) {
      const float* const from = in + sparse.column[j] * width;
      for (std::int64_t k = 0; k < width; ++k) {
        out[k] += sparse.value[j] * from[k];
      }
    }
  }
  return product;
}

// Transposed sparse [N, D] x dense [N, k] -> [D, k], summed in the order of the rows.
Floats transposed_times(const Int64s& starts, const Int32s& columns, const Floats& values, const Floats& dense,
                        std::int64_t num_columns) {
  check_matrix(dense);
  const Sparse sparse(starts, columns, values, num_columns);
  if (dense.shape(0) != sparse.rows) {
    throw std::invalid_argument("the matrices have different numbers of rows");
  }
  const std::int64_t width = dense.shape(1);
  Floats product({static_cast<py::ssize_t>(num_columns), dense.shape(1)});
  float* const out = product.mutable_data();
  const float* in = dense.data();
  py::gil_scoped_release release;
  std::fill_n(out, num_columns * width, 0.0F);
  for (std::int64_t row = 0; row < sparse.rows; ++row, in += width) {
    for (std::int64_t j = sparse.start[row]; j < sparse.start[row + 1]; ++j) {
      float* const to = out + sparse.column[j] * width;
      for (std::int64_t k = 0; k < width; ++k) {
        to[k] += sparse.value[j] * in[k];
      }
    }
  }
  return product;
}

}  // namespace
}  // namespace b2::ngram

void bind_ngram_features(py::module_& m) {
  using namespace b2::ngram;
  m.def("join_words", &join_words, py::arg("data").noconvert(), py::arg("offsets").noconvert(), py::kw_only(),
        py::arg("max_words"), "One line of words for each text.");
  m.def("hashed_ngrams", &hashed_ngrams, py::arg("data").noconvert(), py::arg("offsets").noconvert(), py::kw_only(),
        py::arg("bits"), "Counts of hashed n-grams: row starts [N + 1], columns, counts.");
  m.def("sparse_times", &sparse_times, py::arg("starts").noconvert(), py::arg("columns").noconvert(),
        py::arg("values").noconvert(), py::arg("dense").noconvert(), "sparse [N, D] x dense [D, k].");
  m.def("transposed_times", &transposed_times, py::arg("starts").noconvert(), py::arg("columns").noconvert(),
        py::arg("values").noconvert(), py::arg("dense").noconvert(), py::kw_only(), py::arg("num_columns"),
        "Transposed sparse [N, D] x dense [N, k].");
}
