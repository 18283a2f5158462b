// Finds and cuts repeated documents, paragraphs and sentences: see megatron_b2/corpus/spans.

#include "text/spans.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "text/characters.h"
#include "text/hashing.h"
#include "text/sentences.h"
#include "texts.h"

namespace py = pybind11;

namespace b2::text {

namespace {

std::uint64_t rotate(std::uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

std::uint64_t final_mix(std::uint64_t x) {
  x = (x ^ x >> 33) * 0xFF51AFD7ED558CCD;
  x = (x ^ x >> 33) * 0xC4CEB9FE1A85EC53;
  return x ^ x >> 33;
}

// The last `count` < 16 bytes, with zeros above them.
Hash128 load_tail(std::string_view bytes, std::size_t count) {
  if (count == 0) {
    return {0, 0};
  }
  const char* const end = bytes.data() + bytes.size();
  if (bytes.size() < 16) {
    char padded[16] = {};
    std::memcpy(padded, end - count, count);
    return {load8(padded + 8), load8(padded)};
  }
  const auto last = static_cast<unsigned __int128>(load8(end - 8)) << 64 | load8(end - 16);
  const unsigned __int128 tail = last >> 8 * (16 - count);
  return {static_cast<std::uint64_t>(tail >> 64), static_cast<std::uint64_t>(tail)};
}

constexpr std::uint64_t kFirst = 0x87C37B91114253D5, kSecond = 0x4CF5AD432745937F;

std::uint64_t mix_first(std::uint64_t x) { return rotate(x * kFirst, 31) * kSecond; }
std::uint64_t mix_second(std::uint64_t x) { return rotate(x * kSecond, 33) * kFirst; }

}  // namespace

Hash128 murmur3(std::string_view bytes, std::uint32_t seed) {
  std::uint64_t first = seed, second = seed;
  const char* p = bytes.data();
  const char* const last_block = p + bytes.size() / 16 * 16;
  for (; p < last_block; p += 16) {
    first = (rotate(first ^ mix_first(load8(p)), 27) + second) * 5 + 0x52DCE729;
    second = (rotate(second ^ mix_second(load8(p + 8)), 31) + first) * 5 + 0x38495AB5;
  }
  const Hash128 tail = load_tail(bytes, bytes.size() % 16);
  first ^= mix_first(tail.low);
  second ^= mix_second(tail.high);
  first ^= bytes.size();
  second ^= bytes.size();
  first += second;
  second += first;
  first = final_mix(first);
  second = final_mix(second);
  first += second;
  return {first, second + first};
}

namespace {

// What an ASCII character is folded to; 0: it goes.
std::array<char, 128> ascii_folds() {
  std::array<char, 128> folds{};
  for (char32_t c = 0x21; c < 0x7F; ++c) {
    folds[c] = static_cast<char>(lower(c));
  }
  return folds;
}

const std::array<char, 128> kAsciiFolds = ascii_folds();

bool is_folded_away(char32_t c) {
  const Kind k = kind(c);
  return k == Kind::Space || k == Kind::Newline || k == Kind::Format || c < 0x20 || (c >= 0x7F && c < 0xA0);
}

}  // namespace

void fold_text(std::string_view text, std::string& out) {
  const std::size_t before = out.size();
  out.resize(before + text.size());
  char* target = out.data() + before;
  const char* p = text.data();
  const char* const end = p + text.size();
  std::string rest;
  while (p < end) {
    if (static_cast<unsigned char>(*p) < 0x80) {
      *target = kAsciiFolds[static_cast<unsigned char>(*p++)];
      target += *target != 0;
      continue;
    }
    const char* const start = p;
    const char32_t c = decode(p, end);
    const char32_t folded = lower(c);
    if (folded == c) {  // also a byte that is no UTF-8
      if (!is_folded_away(c)) {
        target = std::copy(start, p, target);
      }
      continue;
    }
    rest.clear();
    encode(folded, rest);
    if (static_cast<std::ptrdiff_t>(rest.size()) > p - start) {  // the small letter is longer: rare, and needs room
      const std::size_t done = static_cast<std::size_t>(target - out.data());
      out.resize(out.size() + rest.size() - static_cast<std::size_t>(p - start));
      target = out.data() + done;
    }
    target = std::copy(rest.begin(), rest.end(), target);
  }
  out.resize(static_cast<std::size_t>(target - out.data()));
}

namespace {

// Where a part stands in the corpus: the index of its document << 24 | its index in the document. The order of places
// is the order of the corpus.
constexpr int kPositionBits = 24;
constexpr std::uint64_t kMaxPositions = std::uint64_t{1} << kPositionBits;
static_assert(kMaxSentences <= kMaxPositions);
constexpr std::int64_t kMaxDocuments = std::int64_t{1} << 40;

struct Record {
  std::uint64_t high, low, place;
};

struct Repeat {
  std::uint64_t place, first;
};

bool same_text(const Record& a, const Record& b) { return a.high == b.high && a.low == b.low; }

bool operator<(const Record& a, const Record& b) {
  return std::tie(a.high, a.low, a.place) < std::tie(b.high, b.low, b.place);
}

// The vector's memory as an array, without a copy.
template <typename T>
py::array_t<T> to_array(std::vector<T>&& values) {
  auto owner = std::make_unique<std::vector<T>>(std::move(values));
  const auto size = static_cast<py::ssize_t>(owner->size());
  T* data = owner->data();
  py::capsule capsule(owner.release(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
  return py::array_t<T>(size, data, capsule);
}

using Records = py::array_t<Record, py::array::c_style>;
using Places = py::array_t<std::uint64_t, py::array::c_style>;

// All records in order. One pass puts each near its place by the first bits in which hashes differ, which are random;
// small sorts do the rest.
py::array_t<Record> sort_records(const std::vector<Records>& pieces) {
  constexpr std::int64_t kBucket = 8;
  std::int64_t count = 0;
  std::vector<std::pair<const Record*, const Record*>> ranges;
  for (const Records& piece : pieces) {
    ranges.emplace_back(piece.data(), piece.data() + piece.size());
    count += piece.size();
  }
  py::array_t<Record> sorted(static_cast<py::ssize_t>(count));
  Record* const out = sorted.mutable_data();
  py::gil_scoped_release release;
  std::uint64_t least = ~std::uint64_t{0}, most = 0;
  for (const auto& [begin, end] : ranges) {
    for (const Record* r = begin; r < end; ++r) {
      least = std::min(least, r->high);
      most = std::max(most, r->high);
    }
  }
  const int skipped = least < most ? __builtin_clzll(least ^ most) : 0;
  int bits = 1;
  while (bits < 18 && kBucket << bits < count) {
    ++bits;
  }
  const auto bucket = [=](const Record& r) { return (r.high << skipped) >> (64 - bits); };
  std::vector<std::int64_t> ends((std::size_t{1} << bits) + 1);
  for (const auto& [begin, end] : ranges) {
    std::for_each(begin, end, [&](const Record& r) { ++ends[bucket(r) + 1]; });
  }
  std::partial_sum(ends.begin(), ends.end(), ends.begin());
  for (const auto& [begin, end] : ranges) {
    std::for_each(begin, end, [&](const Record& r) { out[ends[bucket(r)]++] = r; });
  }
  std::int64_t begin = 0;
  for (std::size_t b = 0; b + 1 < ends.size(); ++b) {
    std::sort(out + begin, out + ends[b]);
    begin = ends[b];
  }
  return sorted;
}

py::array_t<std::int64_t> count_below(const Records& records, const Places& hashes) {
  const Record* const begin = records.data();
  const Record* const end = begin + records.size();
  py::array_t<std::int64_t> counts(hashes.size());
  std::transform(hashes.data(), hashes.data() + hashes.size(), counts.mutable_data(), [&](std::uint64_t high) {
    return std::lower_bound(begin, end, high, [](const Record& r, std::uint64_t h) { return r.high < h; }) - begin;
  });
  return counts;
}

// Of sorted records.
py::array_t<Repeat> find_repeats(const Records& records, std::int64_t more_than) {
  const Record* const begin = records.data();
  const Record* const end = begin + records.size();
  std::vector<Repeat> repeats;
  {
    py::gil_scoped_release release;
    for (const Record* group = begin; group < end;) {
      const Record* next = group + 1;
      while (next < end && same_text(*group, *next)) {
        ++next;
      }
      if (next - group > more_than) {
        std::for_each(group + 1, next, [&](const Record& r) { repeats.push_back({r.place, group->place}); });
      }
      group = next;
    }
    std::sort(repeats.begin(), repeats.end(), [](const Repeat& a, const Repeat& b) { return a.place < b.place; });
  }
  return to_array(std::move(repeats));
}

py::array_t<std::uint64_t> hash_texts(const Bytes& bytes, const Offsets& offsets, bool folded) {
  const Texts texts(bytes, offsets);
  py::array_t<std::uint64_t> hashes({static_cast<py::ssize_t>(texts.size()), py::ssize_t{2}});
  std::uint64_t* out = hashes.mutable_data();
  py::gil_scoped_release release;
  std::string buffer;
  for (std::int64_t i = 0; i < texts.size(); ++i) {
    buffer.clear();
    if (folded) {
      fold_text(texts[i], buffer);
    }
    const Hash128 hash = murmur3(folded ? std::string_view(buffer) : texts[i]);
    out[2 * i] = hash.high;
    out[2 * i + 1] = hash.low;
  }
  return hashes;
}

struct Limits {
  std::int64_t paragraph_bytes;
  std::size_t run_length;
  std::int64_t run_bytes, sentence_bytes;
};

std::size_t checked_run_length(std::int64_t run_length) {
  if (run_length < 0) {
    throw std::invalid_argument("run_length " + std::to_string(run_length) + " is negative");
  }
  return static_cast<std::size_t>(run_length);
}

// The records of one document after another.
class Recorder {
 public:
  // `bytes` of text to come: what room they may need is not touched before it is.
  Recorder(const Limits& limits, std::int64_t bytes) : limits_(limits) {
    for (std::vector<Record>* records : {&paragraphs, &runs, &sentences}) {
      records->reserve(static_cast<std::size_t>(bytes / 64));
    }
  }

  void add(std::string_view text, std::uint64_t document) {
    document <<= kPositionBits;
    split_sentences(text, sentences_);
    folded_.clear();
    hashes_.clear();
    ends_.assign(1, 0);
    const Break break_ = paragraph_break(sentences_);
    std::int64_t begin = 0;
    std::size_t paragraph_begin = 0;
    std::uint64_t paragraph = 0;
    for (std::size_t i = 0; i < sentences_.size(); ++i) {
      fold_text(text.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(sentences_[i].end - begin)), folded_);
      begin = sentences_[i].end;
      const std::string_view sentence = std::string_view(folded_).substr(ends_.back());
      if (limits_.run_length > 0 || limits_.sentence_bytes >= 0) {
        hashes_.push_back(murmur3(sentence));
      }
      if (limits_.sentence_bytes >= 0) {
        add_if(sentence, limits_.sentence_bytes, hashes_.back(), document, i, sentences);
      }
      ends_.push_back(folded_.size());
      if (sentences_[i].after >= break_ || i + 1 == sentences_.size()) {
        const std::string_view whole = std::string_view(folded_).substr(paragraph_begin);
        add_if(whole, limits_.paragraph_bytes, murmur3(whole), document, paragraph++, paragraphs);
        paragraph_begin = folded_.size();
      }
    }
    add_runs(document);
    const Hash128 hash = murmur3(folded_);
    documents.push_back({hash.high, hash.low, document});
  }

  std::vector<Record> documents, paragraphs, runs, sentences;

 private:
  static void add_if(std::string_view part, std::int64_t min_bytes, const Hash128& hash, std::uint64_t document,
                     std::uint64_t position, std::vector<Record>& records) {
    if (static_cast<std::int64_t>(part.size()) >= min_bytes) {
      records.push_back({hash.high, hash.low, document | position});
    }
  }

  // Runs of `run_length` sentences; the hash of a run is the hash of its sentences' hashes.
  void add_runs(std::uint64_t document) {
    const std::size_t length = limits_.run_length;
    if (length == 0) {
      return;
    }
    for (std::size_t i = 0; i + length <= hashes_.size(); ++i) {
      const std::size_t bytes = ends_[i + length] - ends_[i];
      if (static_cast<std::int64_t>(bytes) >= limits_.run_bytes) {
        const Hash128 hash = murmur3({reinterpret_cast<const char*>(hashes_.data() + i), length * sizeof(Hash128)});
        runs.push_back({hash.high, hash.low, document | i});
      }
    }
  }

  Limits limits_;
  std::vector<Sentence> sentences_;
  std::string folded_;
  std::vector<Hash128> hashes_;
  std::vector<std::size_t> ends_;
};

// Indexes int64 [N] of the texts' documents in the corpus, ascending.
const std::int64_t* checked_documents(const Texts& texts, const Offsets& documents) {
  if (documents.ndim() != 1 || documents.size() != texts.size()) {
    throw std::invalid_argument(std::to_string(texts.size()) + " texts need as many documents, not " +
                                std::to_string(documents.size()));
  }
  const std::int64_t* const begin = documents.data();
  const std::int64_t* const end = begin + documents.size();
  if (std::adjacent_find(begin, end, std::greater_equal<>()) != end) {
    throw std::invalid_argument("the documents must be in the order of the corpus, each once");
  }
  if (begin != end && (*begin < 0 || end[-1] >= kMaxDocuments)) {
    throw std::out_of_range("documents " + std::to_string(*begin) + " to " + std::to_string(end[-1]) +
                            " are not all between 0 and 2^40");
  }
  return begin;
}

py::tuple record_spans(const Bytes& bytes, const Offsets& offsets, const Offsets& documents,
                       std::int64_t paragraph_bytes, std::int64_t run_length, std::int64_t run_bytes,
                       std::int64_t sentence_bytes) {
  const Texts texts(bytes, offsets);
  const std::int64_t* const document = checked_documents(texts, documents);
  Recorder recorder({paragraph_bytes, checked_run_length(run_length), run_bytes, sentence_bytes}, bytes.size());
  {
    py::gil_scoped_release release;
    for (std::int64_t i = 0; i < texts.size(); ++i) {
      recorder.add(texts[i], static_cast<std::uint64_t>(document[i]));
    }
  }
  return py::make_tuple(to_array(std::move(recorder.documents)), to_array(std::move(recorder.paragraphs)),
                        to_array(std::move(recorder.runs)), to_array(std::move(recorder.sentences)));
}

// Sorted places, read document by document in the order of the corpus.
class PlaceCursor {
 public:
  explicit PlaceCursor(const Places& places) : next_(places.data()), end_(places.data() + places.size()) {
    if (!std::is_sorted(next_, end_)) {
      throw std::invalid_argument("places must be in the order of the corpus");
    }
  }

  // Passes over what stands in earlier documents.
  void seek(std::uint64_t document) {
    while (next_ < end_ && *next_ >> kPositionBits < document) {
      ++next_;
    }
  }
  bool has(std::uint64_t document) const { return next_ < end_ && *next_ >> kPositionBits == document; }
  std::size_t peek() const { return static_cast<std::size_t>(*next_ & (kMaxPositions - 1)); }
  std::size_t take() { return static_cast<std::size_t>(*next_++ & (kMaxPositions - 1)); }

 private:
  const std::uint64_t* next_;
  const std::uint64_t* end_;
};

struct Cut {
  std::int64_t begin, end;
};

// Turns repeated parts of documents into bytes to cut.
class Cutter {
 public:
  Cutter(PlaceCursor paragraphs, PlaceCursor runs, PlaceCursor sentences, std::size_t run_length)
      : paragraphs_(paragraphs), runs_(runs), sentences_(sentences), run_length_(run_length) {}

  void add(std::string_view text, std::uint64_t document) {
    for (PlaceCursor* cursor : {&paragraphs_, &runs_, &sentences_}) {
      cursor->seek(document);
    }
    if (!paragraphs_.has(document) && !runs_.has(document) && !sentences_.has(document)) {
      return;
    }
    split_sentences(text, split_);
    is_cut_.assign(split_.size(), false);
    mark_paragraphs(document);
    while (runs_.has(document)) {
      mark(runs_.take(), run_length_);
    }
    while (sentences_.has(document)) {
      mark(sentences_.take(), 1);
    }
    for (std::size_t i = 0; i < split_.size(); ++i) {
      if (is_cut_[i]) {
        const std::size_t begin = i;
        while (i + 1 < split_.size() && is_cut_[i + 1]) {
          ++i;
        }
        cuts.push_back(cut(text, begin, i));
      }
    }
  }

  std::vector<Cut> cuts;

 private:
  void mark(std::size_t begin, std::size_t count) {
    if (begin + count > is_cut_.size()) {
      throw std::invalid_argument("sentence " + std::to_string(begin + count - 1) + " of a document of " +
                                  std::to_string(is_cut_.size()) + ": these places are not of these texts");
    }
    std::fill_n(is_cut_.begin() + static_cast<std::ptrdiff_t>(begin), count, true);
  }

  void mark_paragraphs(std::uint64_t document) {
    const Break break_ = paragraph_break(split_);
    std::size_t paragraph = 0, begin = 0;
    for (std::size_t i = 0; i < split_.size() && paragraphs_.has(document); ++i) {
      if (split_[i].after >= break_ || i + 1 == split_.size()) {
        if (paragraphs_.peek() == paragraph++) {
          paragraphs_.take();
          mark(begin, i + 1 - begin);
        }
        begin = i + 1;
      }
    }
    if (paragraphs_.has(document)) {
      throw std::invalid_argument("paragraph " + std::to_string(paragraphs_.take()) + " of a document of " +
                                  std::to_string(paragraph) + ": these places are not of these texts");
    }
  }

  // Sentences first..last, with the white space behind them; but a cut that starts inside of a line leaves the line its
  // end, and takes the white space before it instead.
  Cut cut(std::string_view text, std::size_t first, std::size_t last) const {
    std::size_t begin = first == 0 ? 0 : static_cast<std::size_t>(split_[first - 1].end);
    std::size_t end = static_cast<std::size_t>(split_[last].end);
    const bool is_inside = first > 0 && split_[first - 1].after == Break::None;
    if (is_inside && split_[last].after != Break::None) {
      end = without_space(text, begin, end);
      begin = without_space(text, 0, begin);
    } else if (is_inside && last + 1 == split_.size()) {
      begin = without_space(text, 0, begin);
    }
    return {static_cast<std::int64_t>(begin), static_cast<std::int64_t>(end)};
  }

  // The end of text[begin:end] without the white space at its end.
  static std::size_t without_space(std::string_view text, std::size_t begin, std::size_t end) {
    while (end > begin) {
      std::size_t start = end - 1;
      while (start > begin && is_continuation(text[start])) {
        --start;
      }
      const char* p = text.data() + start;
      const Kind k = kind(decode(p, text.data() + end));
      if (k != Kind::Space && k != Kind::Newline) {
        break;
      }
      end = start;
    }
    return end;
  }

  PlaceCursor paragraphs_, runs_, sentences_;
  std::size_t run_length_;
  std::vector<Sentence> split_;
  std::vector<bool> is_cut_;
};

py::tuple find_cuts(const Bytes& bytes, const Offsets& offsets, const Offsets& documents, const Places& paragraphs,
                    const Places& runs, const Places& sentences, std::int64_t run_length) {
  const Texts texts(bytes, offsets);
  const std::int64_t* const document = checked_documents(texts, documents);
  Cutter cutter(PlaceCursor(paragraphs), PlaceCursor(runs), PlaceCursor(sentences), checked_run_length(run_length));
  std::vector<std::int64_t> firsts{0};
  {
    py::gil_scoped_release release;
    for (std::int64_t i = 0; i < texts.size(); ++i) {
      cutter.add(texts[i], static_cast<std::uint64_t>(document[i]));
      firsts.push_back(static_cast<std::int64_t>(cutter.cuts.size()));
    }
  }
  const auto count = static_cast<py::ssize_t>(cutter.cuts.size());
  Offsets ranges({count, py::ssize_t{2}});
  std::transform(cutter.cuts.begin(), cutter.cuts.end(), reinterpret_cast<Cut*>(ranges.mutable_data()),
                 [](const Cut& cut) { return cut; });
  return py::make_tuple(ranges, to_array(std::move(firsts)));
}

py::tuple apply_cuts(const Bytes& bytes, const Offsets& offsets, const Offsets& ranges, const Offsets& firsts) {
  const Texts texts(bytes, offsets);
  if (ranges.ndim() != 2 || ranges.shape(1) != 2 || firsts.ndim() != 1 || firsts.size() != texts.size() + 1 ||
      firsts.data()[0] != 0 || firsts.data()[texts.size()] != ranges.shape(0) ||
      !std::is_sorted(firsts.data(), firsts.data() + firsts.size())) {
    throw std::invalid_argument("the cuts of " + std::to_string(texts.size()) +
                                " texts are ranges int64 [M, 2] and offsets int64 [N + 1] from 0 to M");
  }
  const std::int64_t* const range = ranges.data();
  const std::int64_t* const first = firsts.data();
  std::vector<std::uint8_t> kept;
  std::vector<std::int64_t> starts{0};
  {
    py::gil_scoped_release release;
    kept.reserve(static_cast<std::size_t>(offsets.data()[texts.size()] - offsets.data()[0]));
    for (std::int64_t i = 0; i < texts.size(); ++i) {
      const std::string_view text = texts[i];
      std::int64_t from = 0;
      for (std::int64_t cut = first[i]; cut < first[i + 1]; ++cut) {
        const std::int64_t begin = range[2 * cut], end = range[2 * cut + 1];
        if (begin < from || end < begin || end > static_cast<std::int64_t>(text.size())) {
          throw std::invalid_argument("cut [" + std::to_string(begin) + ", " + std::to_string(end) + ") of text " +
                                      std::to_string(i) + " is out of order or outside of its " +
                                      std::to_string(text.size()) + " bytes");
        }
        kept.insert(kept.end(), text.begin() + from, text.begin() + begin);
        from = end;
      }
      kept.insert(kept.end(), text.begin() + from, text.end());
      starts.push_back(static_cast<std::int64_t>(kept.size()));
    }
  }
  return py::make_tuple(to_array(std::move(kept)), to_array(std::move(starts)));
}

py::tuple split(const Bytes& bytes, const Offsets& offsets, bool paragraphs) {
  const Texts texts(bytes, offsets);
  std::vector<std::int64_t> bounds, firsts;
  {
    py::gil_scoped_release release;
    std::vector<Sentence> sentences;
    for (std::int64_t i = 0; i < texts.size(); ++i) {
      firsts.push_back(static_cast<std::int64_t>(bounds.size()));
      split_sentences(texts[i], sentences);
      const Break break_ = paragraphs ? paragraph_break(sentences) : Break::None;
      const std::int64_t base = offsets.data()[i];
      std::int64_t begin = 0;
      for (std::size_t s = 0; s < sentences.size(); ++s) {
        if (sentences[s].after >= break_ || s + 1 == sentences.size()) {
          bounds.push_back(base + begin);
          begin = sentences[s].end;
        }
      }
    }
    firsts.push_back(static_cast<std::int64_t>(bounds.size()));
    bounds.push_back(offsets.data()[texts.size()]);
  }
  return py::make_tuple(to_array(std::move(bounds)), to_array(std::move(firsts)));
}

py::bytes fold_bytes(const py::bytes& text) {
  std::string out;
  fold_text(static_cast<std::string_view>(text), out);
  return out;
}

py::tuple hash_bytes(const py::bytes& text, std::uint32_t seed) {
  const Hash128 hash = murmur3(static_cast<std::string_view>(text), seed);
  return py::make_tuple(hash.high, hash.low);
}

}  // namespace

}  // namespace b2::text

void bind_spans(py::module_& m) {
  using namespace b2::text;
  PYBIND11_NUMPY_DTYPE(Record, high, low, place);
  PYBIND11_NUMPY_DTYPE(Repeat, place, first);
  m.def("murmur3", &hash_bytes, py::arg("bytes"), py::arg("seed") = 0, "MurmurHash3 x64 128 as (high, low).");
  m.def("fold_text", &fold_bytes, py::arg("text"), "A text in UTF-8 in the form that is compared.");
  m.def("hash_texts", &hash_texts, py::arg("bytes").noconvert(), py::arg("offsets").noconvert(), py::kw_only(),
        py::arg("folded"), "Hashes uint64 [N, 2] of N texts, as they are or folded; releases the GIL.");
  m.def("split_texts", &split, py::arg("bytes").noconvert(), py::arg("offsets").noconvert(), py::kw_only(),
        py::arg("paragraphs"),
        "Offsets int64 [S + 1] of all sentences (or paragraphs) in the bytes, and int64 [N + 1], the first one of each "
        "text and S.");
  m.def("record_spans", &record_spans, py::arg("bytes").noconvert(), py::arg("offsets").noconvert(),
        py::arg("documents").noconvert(), py::kw_only(), py::arg("paragraph_bytes"), py::arg("run_length"),
        py::arg("run_bytes"), py::arg("sentence_bytes"),
        "Records of the documents, paragraphs, runs of sentences and sentences of N texts; sentence_bytes < 0 and "
        "run_length 0 leave those out. Releases the GIL.");
  m.def("sort_records", &sort_records, py::arg("pieces").noconvert(),
        "The records of all arrays of a list, by (high, low, place).");
  m.def("count_below", &count_below, py::arg("records").noconvert(), py::arg("hashes").noconvert(),
        "How many of the sorted records have a `high` below each of the hashes uint64 [H]; reads no more of them than "
        "it needs.");
  m.def("find_repeats", &find_repeats, py::arg("records").noconvert(), py::kw_only(), py::arg("more_than"),
        "Repeats (place, first place) of sorted records: all but the first of each text that stands there more than "
        "`more_than` times, by place.");
  m.def("find_cuts", &find_cuts, py::arg("bytes").noconvert(), py::arg("offsets").noconvert(),
        py::arg("documents").noconvert(), py::kw_only(), py::arg("paragraphs").noconvert(),
        py::arg("runs").noconvert(), py::arg("sentences").noconvert(), py::arg("run_length"),
        "Ranges int64 [M, 2] to cut of N texts and offsets int64 [N + 1], from sorted places uint64 of parts.");
  m.def("apply_cuts", &apply_cuts, py::arg("bytes").noconvert(), py::arg("offsets").noconvert(),
        py::arg("ranges").noconvert(), py::arg("firsts").noconvert(),
        "Bytes and offsets of the texts without what is cut.");
}
