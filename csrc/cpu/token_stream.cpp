// Cuts training samples out of a memory-mapped Megatron-LM .bin/.idx pair (layout: megatron_b2/data/indexed.py).
//
// The tokens of a file are one stream: document d covers [document_start(d), document_start(d + 1)). Sample s is
// seq_len + 1 consecutive tokens of it. All arithmetic is 64-bit and every value read from a file is checked
// before it is used as an address; nothing here is an assert that a build flag could remove.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

constexpr std::int64_t kHeaderBytes = 34;
constexpr std::int64_t kIgnoredLabel = -100;

using Bytes = py::array_t<std::uint8_t, py::array::c_style>;
using Int64Array = py::array_t<std::int64_t, py::array::c_style>;
using Int32Array = py::array_t<std::int32_t, py::array::c_style>;

// Fields of an .idx are not aligned (the header has 34 bytes), hence memcpy instead of a pointer cast.
template <typename T>
T load(const std::uint8_t* address) {
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

template <typename T>
void widen(const std::uint8_t* source, std::int64_t count, std::int64_t* target) {
  for (std::int64_t i = 0; i < count; ++i) {
    target[i] = static_cast<std::int64_t>(load<T>(source + i * static_cast<std::int64_t>(sizeof(T))));
  }
}

std::int64_t token_bytes(int dtype_code) {
  switch (dtype_code) {
    case 1: case 2: return 1;
    case 3: case 8: return 2;
    case 4: return 4;
    case 5: return 8;
    default:
      throw std::invalid_argument("dtype code " + std::to_string(dtype_code) + " does not hold token ids");
  }
}

// Where one row of the batch is written.
struct Row {
  std::int64_t* input_ids;
  std::int64_t* labels;
  std::int32_t* segment_ids;
  std::int32_t* position_ids;
};

class TokenStream {
 public:
  TokenStream(Bytes bin, Bytes idx, int dtype_code, std::int64_t num_sequences, std::int64_t num_documents)
      : bin_(std::move(bin)),
        idx_(std::move(idx)),
        dtype_code_(dtype_code),
        token_bytes_(token_bytes(dtype_code)),
        num_sequences_(num_sequences),
        num_documents_(num_documents),
        num_tokens_(static_cast<std::int64_t>(bin_.size()) / token_bytes_) {
    const std::int64_t idx_bytes = static_cast<std::int64_t>(idx_.size());
    if (num_sequences < 0 || num_documents < 0 || num_sequences > idx_bytes / 12 || num_documents > idx_bytes / 8 ||
        kHeaderBytes + 12 * num_sequences + 8 * (num_documents + 1) > idx_bytes) {
      throw std::invalid_argument("an .idx of " + std::to_string(idx_bytes) + " bytes cannot hold " +
                                  std::to_string(num_sequences) + " sequences and " +
                                  std::to_string(num_documents) + " documents");
    }
    tokens_ = bin_.data();
    pointers_ = idx_.data() + kHeaderBytes + 4 * num_sequences;
    documents_ = pointers_ + 8 * num_sequences;
  }

  // Fills rows[i] of the four [B, S] arrays with the sample that starts at token starts[i].
  void gather(const Int64Array& starts, const Int64Array& rows, std::int64_t vocab_size, bool document_masking,
              Int64Array& input_ids, Int64Array& labels, Int32Array& segment_ids, Int32Array& position_ids) const {
    if (input_ids.ndim() != 2 || starts.ndim() != 1 || rows.ndim() != 1 || rows.size() != starts.size()) {
      throw std::invalid_argument("starts and rows are [n], the outputs [B, S]");
    }
    const std::int64_t batch = input_ids.shape(0);
    const std::int64_t seq_len = input_ids.shape(1);
    const auto same_shape = [&](const py::array& other) {
      return other.ndim() == 2 && other.shape(0) == batch && other.shape(1) == seq_len;
    };
    if (!same_shape(labels) || !same_shape(segment_ids) || !same_shape(position_ids)) {
      throw std::invalid_argument("the four outputs must have one shape [B, S]");
    }
    const std::int64_t count = starts.size();
    const std::int64_t* start = starts.data();
    const std::int64_t* row = rows.data();
    std::int64_t* input = input_ids.mutable_data();
    std::int64_t* label = labels.mutable_data();
    std::int32_t* segment = segment_ids.mutable_data();
    std::int32_t* position = position_ids.mutable_data();

    py::gil_scoped_release release;
    std::vector<std::int64_t> window(static_cast<std::size_t>(seq_len) + 1);
    for (std::int64_t i = 0; i < count; ++i) {
      if (row[i] < 0 || row[i] >= batch) {
        throw std::out_of_range("row " + std::to_string(row[i]) + " of a batch of " + std::to_string(batch));
      }
      const std::int64_t offset = row[i] * seq_len;
      read_window(start[i], vocab_size, window);
      write_row(start[i], seq_len, window, document_masking,
                Row{input + offset, label + offset, segment + offset, position + offset});
    }
  }

  // Document that holds token `token`; empty documents hold none.
  std::int64_t document_of(std::int64_t token) const {
    if (token < 0 || token >= num_tokens_) {
      throw std::out_of_range("token " + std::to_string(token) + " of a stream of " + std::to_string(num_tokens_));
    }
    // From where it would be if all documents were equally long, in steps that double: in a large file that is not in
    // memory yet, a search from both ends would read another page at every step.
    const long double share = static_cast<long double>(token) / static_cast<long double>(num_tokens_);
    const auto guess = static_cast<std::int64_t>(share * static_cast<long double>(num_documents_));
    std::int64_t low = std::min(guess, num_documents_ - 1);  // document_start(low) <= token
    std::int64_t high = low + 1;                             // document_start(high) > token
    for (std::int64_t step = 1; low > 0 && document_start(low) > token; step *= 2) {
      high = low;
      low = std::max<std::int64_t>(0, low - step);
    }
    for (std::int64_t step = 1; high < num_documents_ && document_start(high) <= token; step *= 2) {
      low = high;
      high = std::min(num_documents_, high + step);
    }
    while (high - low > 1) {
      const std::int64_t middle = low + (high - low) / 2;
      (document_start(middle) <= token ? low : high) = middle;
    }
    return low;
  }

  // First token of document `document`; that of `num_documents` is the end of the stream.
  std::int64_t document_start(std::int64_t document) const {
    if (document < 0 || document > num_documents_) {
      throw std::out_of_range("document " + std::to_string(document) + " of " + std::to_string(num_documents_));
    }
    const auto sequence = load<std::int64_t>(documents_ + 8 * document);
    if (sequence == num_sequences_) {
      return num_tokens_;
    }
    if (sequence < 0 || sequence > num_sequences_) {
      throw std::runtime_error("damaged .idx: document " + std::to_string(document) + " starts at sequence " +
                               std::to_string(sequence) + " of " + std::to_string(num_sequences_));
    }
    const auto pointer = load<std::int64_t>(pointers_ + 8 * sequence);
    if (pointer < 0 || pointer % token_bytes_ != 0 || pointer / token_bytes_ > num_tokens_) {
      throw std::runtime_error("damaged .idx: sequence " + std::to_string(sequence) + " starts at byte " +
                               std::to_string(pointer) + " of " + std::to_string(num_tokens_ * token_bytes_));
    }
    return pointer / token_bytes_;
  }

 private:
  void read_window(std::int64_t start, std::int64_t vocab_size, std::vector<std::int64_t>& window) const {
    const auto count = static_cast<std::int64_t>(window.size());
    if (start < 0 || count > num_tokens_ || start > num_tokens_ - count) {
      throw std::out_of_range("sample of " + std::to_string(count) + " tokens at token " + std::to_string(start) +
                              " leaves a stream of " + std::to_string(num_tokens_));
    }
    const std::uint8_t* source = tokens_ + start * token_bytes_;
    switch (dtype_code_) {
      case 1: widen<std::uint8_t>(source, count, window.data()); break;
      case 2: widen<std::int8_t>(source, count, window.data()); break;
      case 3: widen<std::int16_t>(source, count, window.data()); break;
      case 4: widen<std::int32_t>(source, count, window.data()); break;
      case 5: widen<std::int64_t>(source, count, window.data()); break;
      default: widen<std::uint16_t>(source, count, window.data()); break;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      if (window[i] < 0 || window[i] >= vocab_size) {
        const std::int64_t document = document_of(start + i);
        throw std::runtime_error("token id " + std::to_string(window[i]) + " at token " +
                                 std::to_string(start + i - document_start(document)) + " of document " +
                                 std::to_string(document) + " is outside the vocabulary of " +
                                 std::to_string(vocab_size));
      }
    }
  }

  void write_row(std::int64_t start, std::int64_t seq_len, const std::vector<std::int64_t>& window,
                 bool document_masking, const Row& row) const {
    std::copy_n(window.begin(), seq_len, row.input_ids);
    std::copy_n(window.begin() + 1, seq_len, row.labels);
    if (!document_masking) {
      for (std::int64_t t = 0; t < seq_len; ++t) {
        row.segment_ids[t] = 0;
        row.position_ids[t] = static_cast<std::int32_t>(t);
      }
      return;
    }
    std::int64_t document = document_of(start);
    std::int32_t segment = 0;
    for (std::int64_t begin = 0; begin < seq_len; ++document) {
      const std::int64_t end = document_start(document + 1) - start;
      if (end < begin) {
        throw std::runtime_error("damaged .idx: document " + std::to_string(document) + " ends before it starts");
      }
      if (end == begin) {
        continue;  // an empty document takes no segment
      }
      const std::int64_t stop = std::min(end, seq_len);
      for (std::int64_t t = begin; t < stop; ++t) {
        row.segment_ids[t] = segment;
        row.position_ids[t] = static_cast<std::int32_t>(t - begin);
      }
      if (end <= seq_len) {
        row.labels[end - 1] = kIgnoredLabel;
      }
      begin = stop;
      ++segment;
    }
  }

  Bytes bin_;  // keep the mappings alive
  Bytes idx_;
  int dtype_code_;
  std::int64_t token_bytes_;
  std::int64_t num_sequences_;
  std::int64_t num_documents_;
  std::int64_t num_tokens_;
  const std::uint8_t* tokens_;
  const std::uint8_t* pointers_;
  const std::uint8_t* documents_;
};

}  // namespace

void bind_token_stream(py::module_& m) {
  py::class_<TokenStream>(m, "TokenStream", "Token stream of one .bin/.idx pair; read-only and thread-safe.")
      .def(py::init<Bytes, Bytes, int, std::int64_t, std::int64_t>(), py::kw_only(), py::arg("bin").noconvert(),
           py::arg("idx").noconvert(), py::arg("dtype_code"), py::arg("num_sequences"), py::arg("num_documents"),
           "bin and idx are uint8 [bytes] views of the whole files.")
      .def("gather", &TokenStream::gather, py::kw_only(), py::arg("starts").noconvert(), py::arg("rows").noconvert(),
           py::arg("vocab_size"), py::arg("document_masking"), py::arg("input_ids").noconvert(),
           py::arg("labels").noconvert(), py::arg("segment_ids").noconvert(), py::arg("position_ids").noconvert(),
           "Write the samples that start at tokens `starts` into `rows` of the [B, S] outputs; releases the GIL.")
      .def("document_start", &TokenStream::document_start, py::arg("document"), "First token of a document.");
}
