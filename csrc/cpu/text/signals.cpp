#include "text/signals.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <vector>

#include "text/characters.h"
#include "text/hashing.h"
#include "text/repetition.h"
#include "text/sentences.h"
#include "text/words.h"
#include "texts.h"

namespace py = pybind11;

namespace b2::text {

namespace {

using namespace std::string_view_literals;

// Repetition is measured on the first so many words, lines and paragraphs, which bounds the memory (our choice: ten
// times the longest document that Gopher keeps).
constexpr std::size_t kMaxRepetition = std::size_t{1} << 20;
constexpr std::int64_t kC4MinWords = 5, kC4MaxWord = 1000;  // of a line that C4 keeps
constexpr std::int64_t kShortLine = 30;                     // FineWeb

// Words that signals look for. The first eight are Gopher's English stop words.
enum Keyword : std::int8_t {
  kNone = -1, kThe, kBe, kTo, kOf, kAnd, kThat, kHave, kWith,
  kJavascript, kLorem, kIpsum, kTerms, kUse, kUses, kCookie, kCookies, kPrivacy, kPolicy,
};
constexpr std::string_view kKeywordTexts[] = {
    "the"sv, "be"sv, "to"sv, "of"sv, "and"sv, "that"sv, "have"sv, "with"sv,
    "javascript"sv, "lorem"sv, "ipsum"sv, "terms"sv, "use"sv, "uses"sv, "cookie"sv, "cookies"sv, "privacy"sv,
    "policy"sv,
};

class KeywordTable {
 public:
  KeywordTable() {
    for (std::size_t i = 0; i < std::size(kKeywordTexts); ++i) {
      const std::string_view word = kKeywordTexts[i];
      const std::uint64_t hash = hash_word<0>(word, word.data() + word.size());
      std::size_t slot = hash % kSlots;
      while (slots_[slot].keyword != kNone) {
        slot = (slot + 1) % kSlots;
      }
      slots_[slot] = {hash, static_cast<Keyword>(i)};
    }
  }

  Keyword find(std::uint64_t hash) const {
    std::size_t slot = hash % kSlots;
    while (slots_[slot].keyword != kNone && slots_[slot].hash != hash) {
      slot = (slot + 1) % kSlots;
    }
    return slots_[slot].keyword;
  }

 private:
  static constexpr std::size_t kSlots = 256;
  struct Slot {
    std::uint64_t hash = 0;
    Keyword keyword = kNone;
  };
  std::array<Slot, kSlots> slots_;
};

const KeywordTable kKeywords;

// What ends a sentence, or the quotation around one: in Latin, in Chinese and Japanese, then the question mark and full
// stop of Arabic, and the full stops of the scripts of India, Armenia, Ethiopia, Burma, Cambodia and Tibet.
constexpr std::u32string_view kTerminals = U".!?\"\u201D。！？｡．」』؟۔।॥։።፧။។៕༎།";

// Function characters of Chinese, in both scripts: a bit for each.
unsigned chinese_stop(char32_t c) {
  switch (c) {
    case U'的': return 1;
    case U'了': return 2;
    case U'是': return 4;
    case U'在': return 8;
    case U'和': return 16;
    case U'有': return 32;
    case U'不': return 64;
    case U'这': case U'這': return 128;
    default: return 0;
  }
}

bool is_in(char32_t c, std::u32string_view set) { return set.find(c) != std::u32string_view::npos; }

bool is_latin(char32_t c) {
  return c < 0x250 || (c >= 0x1E00 && c < 0x1F00) || (c >= 0x2C60 && c < 0x2C80) || (c >= 0xA720 && c < 0xA800) ||
         (c >= 0xFB00 && c < 0xFB07) || (c >= 0xFF21 && c < 0xFF5B);
}

// As wide as two letters: Han, kana, Hangul and their punctuation.
bool is_wide(char32_t c, Kind k) {
  return k == Kind::Han || k == Kind::Kana || k == Kind::Hangul || (c >= 0x3000 && c < 0x3040) ||
         (c >= 0xFF01 && c < 0xFF61);
}

bool is_control(char32_t c) {
  return (c < 0x20 && c != U'\t' && c != U'\n' && c != U'\r') || (c >= 0x7F && c < 0xA0);
}

// What Windows-1252 reads in the bytes 0x80 to 0xBF. Not the no-break space, which good text has too.
bool is_misread(char32_t c) {
  return (c >= 0x80 && c < 0xC0 && c != 0xA0) || is_in(c, U"ŒœŠšŸŽžƒˆ˜–—‘’‚“”„†‡•…‰‹›€™");
}

struct AsciiTable {
  std::array<Kind, 256> kinds{};  // Kind::Other from 128 on
  std::array<bool, 128> looks{};  // characters that signals count or that may end what they count

  AsciiTable() {
    for (char32_t c = 0; c < 128; ++c) {
      kinds[c] = kind(c);
      looks[c] = is_control(c) || is_in(c, U"#{}.:");
    }
  }
};

const AsciiTable kAscii;

// The words of a document, line by line.
class Words {
 public:
  explicit Words(RepeatedNgrams& ngrams) : ngrams_(ngrams) {}

  void start_document() {
    count = spaced = spaced_characters = alphabetic = lorem_ipsum = 0;
    english_stops = chinese_stops = 0;
  }

  void start_line() {
    has_javascript = has_policy = false;
    last_ = before_last_ = kNone;
  }

  void ascii(std::string_view word, const char* limit) {
    const bool has_letter = std::any_of(word.begin(), word.end(), [](char c) { return c >= 'A'; });
    const std::uint64_t hash = hash_word<0x20>(word, limit);
    add(hash, word.size(), has_letter, kKeywords.find(hash));
    spaced_characters += static_cast<std::int64_t>(word.size());
    ++spaced;
  }

  void word(std::string_view word, const char* limit) {
    const char* p = word.data();
    const char* const end = p + word.size();
    const char32_t first = decode(p, end);
    const Kind first_kind = kind(first);
    std::size_t characters = 1;
    bool has_letter = first_kind != Kind::Digit;
    for (; p < end; ++characters) {
      const Kind k = kind(decode(p, end));
      has_letter = has_letter || (k != Kind::Digit && k != Kind::Mark);
    }
    const std::uint64_t hash = hash_word<0>(word, limit);
    add(hash, characters, has_letter, first < 0x80 ? kKeywords.find(hash) : kNone);
    if (first_kind == Kind::Letter || first_kind == Kind::Digit) {
      spaced_characters += static_cast<std::int64_t>(characters);
      ++spaced;
    } else {
      chinese_stops |= chinese_stop(first);
    }
  }

  std::int64_t count, alphabetic, lorem_ipsum;
  std::int64_t spaced, spaced_characters;  // of scripts that part words by spaces
  unsigned english_stops, chinese_stops;   // a bit for each that was seen
  bool has_javascript, has_policy;         // on this line

 private:
  void add(std::uint64_t hash, std::size_t characters, bool has_letter, Keyword keyword) {
    ++count;
    alphabetic += has_letter;
    if (ngrams_.size() < kMaxRepetition) {
      ngrams_.add(hash, characters);
    }
    if (keyword != kNone) {
      english_stops |= keyword <= kWith ? 1U << keyword : 0U;
      has_javascript = has_javascript || keyword == kJavascript;
      has_policy = has_policy || ends_policy(keyword);
      lorem_ipsum += keyword == kIpsum && last_ == kLorem;
    }
    before_last_ = last_;
    last_ = keyword;
  }

  // terms of use, privacy policy, cookie policy, uses cookies, use of cookies, use cookies
  bool ends_policy(Keyword keyword) const {
    switch (keyword) {
      case kUse: return last_ == kOf && before_last_ == kTerms;
      case kPolicy: return last_ == kPrivacy || last_ == kCookie;
      case kCookies: return last_ == kUses || last_ == kUse || (last_ == kOf && before_last_ == kUse);
      default: return false;
    }
  }

  RepeatedNgrams& ngrams_;
  Keyword last_, before_last_;
};

class Analyzer {
 public:
  Signals run(std::string_view text) {
    begin_ = text.data();
    end_ = begin_ + text.size();
    out_ = {};
    out_.bytes = static_cast<std::int64_t>(text.size());
    totals_ = {};
    kinds_ = {};
    seen_ = {};
    ngrams_.clear();
    line_parts_.clear();
    paragraph_parts_.clear();
    paragraph_ = {};
    words_.start_document();
    split_sentences(text, sentences_);
    next_sentence_ = 0;
    for (const char* p = begin_; p < end_;) {
      p = read_line(p);
    }
    finish_paragraph();
    finish_counts();
    finish_line_shares();
    finish_repetition();
    finish_character_shares();
    return out_;
  }

 private:
  // What is read of a line, up to its last visible character.
  struct Line {
    const char* begin = nullptr;  // its first visible character; nullptr: blank so far
    const char* end = nullptr;
    std::int64_t characters = 0, width = 0;  // between them
    std::int64_t spaces = 0;                 // behind `end`
    std::int64_t token = 0;                  // characters since the last white space
    std::int64_t longest_token = 0;
    bool is_symbol = false;  // the token has no letter and no digit

    void add(const char* from, const char* to, std::int64_t count, std::int64_t wide, bool symbol) {
      begin = begin == nullptr ? from : begin;
      end = to;
      characters += spaces + count;
      width += spaces + wide;
      spaces = 0;
      is_symbol = symbol && (token == 0 || is_symbol);
      token += count;
      longest_token = std::max(longest_token, token);
    }
  };

  // Reads the line at `p` and its end; returns where the next one starts.
  const char* read_line(const char* p) {
    Line line;
    while (p < end_) {
      const char* const start = p;
      char32_t c = static_cast<unsigned char>(*p);
      Kind k = kAscii.kinds[c];
      if (k == Kind::Letter || k == Kind::Digit) {
        p = read_ascii_word(p);
        line.add(start, p, p - start, p - start, false);
        continue;
      }
      if (c < 0x80) {
        ++p;
        if (kAscii.looks[c]) {
          look_at_ascii(start, c);
        }
      } else {
        c = decode(p, end_);
        k = kind(c);
        look_at_other(start, p, c, k);
      }
      ++kinds_[static_cast<std::size_t>(k)];
      if (k == Kind::Newline) {
        p = end_of_newline(p, c);
        break;
      }
      if (k == Kind::Space) {
        finish_token(line);
        line.spaces += line.begin != nullptr;
      } else {
        const bool is_symbol = k < Kind::Digit || k == Kind::Mark || k == Kind::Format;
        line.add(start, p, 1, c >= 0x80 && is_wide(c, k) ? 2 : 1, is_symbol);
      }
    }
    finish_token(line);
    finish_line(line);
    return p;
  }

  void finish_token(Line& line) {
    totals_.symbols += line.token > 0 && line.is_symbol;
    line.token = 0;
  }

  // Counts the ASCII letters and digits at `p`; returns their end.
  const char* read_ascii_word(const char* p) {
    const char* const begin = p;
    std::int64_t digits = 0;
    for (; p < end_; ++p) {
      const Kind k = kAscii.kinds[static_cast<unsigned char>(*p)];
      if (k != Kind::Letter && k != Kind::Digit) {
        break;
      }
      digits += k == Kind::Digit;
    }
    kinds_[static_cast<std::size_t>(Kind::Digit)] += digits;
    kinds_[static_cast<std::size_t>(Kind::Letter)] += p - begin - digits;
    return p;
  }

  const char* end_of_newline(const char* p, char32_t c) {
    ++totals_.newlines;
    if (c == U'\r' && p < end_ && *p == '\n') {
      ++kinds_[static_cast<std::size_t>(Kind::Newline)];
      ++p;
    }
    return p;
  }

  void look_at_ascii(const char* at, char32_t c) {
    switch (c) {
      case U'#': ++totals_.hashes; break;
      case U'{': case U'}': ++out_.curly_brackets; break;
      case U':': out_.urls += ends_scheme(at); break;
      case U'.':
        seen_.dots = at == seen_.after_dot ? seen_.dots + 1 : 1;
        seen_.after_dot = at + 1;
        totals_.ellipses += seen_.dots % 3 == 0;
        out_.urls += is_before(at, "www"sv) && !(at - begin_ > 3 && is_in_url(at[-4]));
        break;
      default: ++out_.control_characters;
    }
  }

  // Whether `word` (small ASCII letters) in any case stands before `at`.
  bool is_before(const char* at, std::string_view word) const {
    const auto length = static_cast<std::ptrdiff_t>(word.size());
    return at - begin_ >= length &&
           std::equal(word.begin(), word.end(), at - length, [](char a, char b) { return a == (b | 0x20); });
  }

  // Whether the colon at `at` is that of http:// or https://.
  bool ends_scheme(const char* at) const {
    return end_ - at > 2 && at[1] == '/' && at[2] == '/' && (is_before(at, "http"sv) || is_before(at, "https"sv));
  }

  static bool is_in_url(char c) {
    const auto byte = static_cast<unsigned char>(c);
    return c == '/' || c == '_' || (byte < 0x80 && kAscii.kinds[byte] >= Kind::Digit);
  }

  void look_at_other(const char* begin, const char* end, char32_t c, Kind k) {
    totals_.other_letters += k == Kind::Letter && !is_latin(c);
    totals_.ellipses += c == U'…';
    out_.replacement_characters += c == kReplacement;
    out_.control_characters += is_control(c);
    const bool follows = begin == seen_.after_other;
    const char32_t last = follows ? seen_.last : 0;
    const char32_t before_last = follows ? seen_.before_last : 0;
    // UTF-8 of two or three bytes read as Windows-1252 (Ã© for é, â€™ for ’), and 锟斤拷, two U+FFFD read as GBK.
    out_.mojibake += c == U'斤' && last == U'锟';
    const bool is_second = last == 0xC2 || last == 0xC3;
    const bool is_third = before_last >= 0xE2 && before_last <= 0xEF && is_misread(last);
    out_.mojibake += (is_second || is_third) && is_misread(c);
    seen_.after_other = end;
    seen_.last = c;
    seen_.before_last = last;
  }

  void finish_line(const Line& line) {
    if (line.begin == nullptr) {
      finish_paragraph();
      return;
    }
    const std::string_view text(line.begin, static_cast<std::size_t>(line.end - line.begin));
    const std::int64_t words_before = words_.count;
    words_.start_line();
    WordReader<Words>(text, words_).run();
    const std::uint64_t hash = hash_word<0>(text, end_);
    if (line_parts_.size() < kMaxRepetition) {
      line_parts_.add(hash, line.characters);
    }
    paragraph_.hash = avalanche(paragraph_.hash) + hash;
    paragraph_.characters += line.characters;
    ++paragraph_.lines;
    count_line(line, text, words_.count - words_before);
  }

  void count_line(const Line& line, std::string_view text, std::int64_t words) {
    const bool has_ellipsis = ends_with(text, "..."sv) || ends_with(text, "…"sv);
    const char32_t last = last_character(text);
    const bool is_terminal = !has_ellipsis && is_in(last, kTerminals);
    const bool has_few_words = words < kC4MinWords;
    const bool has_long_word = line.longest_token > kC4MaxWord;
    ++out_.lines;
    out_.javascript_lines += words_.has_javascript;
    out_.policy_lines += words_.has_policy;
    out_.long_word_lines += has_long_word;
    totals_.bullet_lines += has_bullet(text);
    totals_.ellipsis_lines += has_ellipsis;
    totals_.terminal_lines += is_terminal;
    totals_.few_word_lines += has_few_words;
    totals_.punctuated_lines += is_terminal || has_ellipsis || is_in(last, U"'\u2019");
    totals_.short_lines += line.width <= kShortLine;
    totals_.line_characters += line.characters;
    const std::int64_t sentences = line_sentences();
    out_.sentences += sentences;
    if (is_terminal && !has_few_words && !has_long_word && !words_.has_javascript && !words_.has_policy) {
      out_.c4_sentences += sentences;
      totals_.c4_characters += line.characters;
    }
  }

  // An end of a line ends a sentence, so that the sentences of the lines follow each other (up to kMaxSentences).
  std::int64_t line_sentences() {
    const std::size_t before = next_sentence_;
    while (next_sentence_ < sentences_.size() && sentences_[next_sentence_++].after == Break::None) {
    }
    return static_cast<std::int64_t>(next_sentence_ - before);
  }

  static bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
  }

  static char32_t last_character(std::string_view text) {
    const char* const end = text.data() + text.size();
    const char* p = end - 1;
    while (p > text.data() && is_continuation(*p)) {
      --p;
    }
    return decode(p, end);
  }

  // A bullet, or a hyphen, dash or star with white space behind it.
  static bool has_bullet(std::string_view text) {
    const char* p = text.data();
    const char* const end = p + text.size();
    const char32_t first = decode(p, end);
    return is_in(first, U"•‣⁃◦▪▫●○■□◆►➢★·・") ||
           (is_in(first, U"-*–—") && p < end && kind(decode(p, end)) == Kind::Space);
  }

  void finish_paragraph() {
    if (paragraph_.lines > 0) {
      ++out_.paragraphs;
      if (paragraph_parts_.size() < kMaxRepetition) {
        paragraph_parts_.add(paragraph_.hash, paragraph_.characters);
      }
      paragraph_ = {};
    }
  }

  std::int64_t count(Kind k) const { return kinds_[static_cast<std::size_t>(k)]; }

  static float share(std::int64_t part, std::int64_t whole) {
    return whole == 0 ? 0.0F : static_cast<float>(static_cast<double>(part) / static_cast<double>(whole));
  }

  void finish_counts() {
    for (const std::int64_t characters : kinds_) {
      out_.characters += characters;
    }
    out_.words = words_.count;
    out_.cjk_characters = count(Kind::Han) + count(Kind::Kana) + count(Kind::Hangul);
    out_.stop_words = __builtin_popcount(words_.english_stops);
    out_.stop_words_zh = __builtin_popcount(words_.chinese_stops);
    out_.lorem_ipsum = words_.lorem_ipsum;
    out_.mean_word_length = share(words_.spaced_characters, words_.spaced);
    out_.alphabetic_words = share(words_.alphabetic, words_.count + totals_.symbols);
    out_.hashes_per_word = share(totals_.hashes, words_.count);
    out_.ellipses_per_word = share(totals_.ellipses, words_.count);
    out_.newlines_per_word = share(totals_.newlines, words_.count);
  }

  void finish_line_shares() {
    out_.bullet_lines = share(totals_.bullet_lines, out_.lines);
    out_.ellipsis_lines = share(totals_.ellipsis_lines, out_.lines);
    out_.terminal_lines = share(totals_.terminal_lines, out_.lines);
    out_.few_word_lines = share(totals_.few_word_lines, out_.lines);
    out_.punctuated_lines = share(totals_.punctuated_lines, out_.lines);
    out_.short_lines = share(totals_.short_lines, out_.lines);
    out_.c4_characters = share(totals_.c4_characters, totals_.line_characters);
  }

  void finish_repetition() {
    // Without a blank line, each line is a paragraph, as in sentences.h.
    const bool has_one_block = out_.paragraphs == 1;
    out_.paragraphs = has_one_block ? out_.lines : out_.paragraphs;
    const Duplicates::Share lines = line_parts_.share(numbering_);
    const Duplicates::Share paragraphs = has_one_block ? lines : paragraph_parts_.share(numbering_);
    out_.duplicate_lines = static_cast<float>(lines.parts);
    out_.duplicate_line_characters = static_cast<float>(lines.characters);
    out_.duplicate_paragraphs = static_cast<float>(paragraphs.parts);
    out_.duplicate_paragraph_characters = static_cast<float>(paragraphs.characters);
    const RepeatedNgrams::Shares ngrams = ngrams_.shares(numbering_);
    float* const targets[] = {&out_.top_2_gram,         &out_.top_3_gram,        &out_.top_4_gram,
                              &out_.duplicate_5_grams,  &out_.duplicate_6_grams, &out_.duplicate_7_grams,
                              &out_.duplicate_8_grams,  &out_.duplicate_9_grams, &out_.duplicate_10_grams};
    for (std::size_t n = 0; n < std::size(targets); ++n) {
      *targets[n] = static_cast<float>(ngrams[n]);
    }
  }

  void finish_character_shares() {
    const std::int64_t spaces = count(Kind::Space) + count(Kind::Newline);
    const std::int64_t visible = out_.characters - spaces;
    out_.white_space = share(spaces, out_.characters);
    out_.broken =
        share(out_.replacement_characters + out_.mojibake + out_.control_characters, out_.characters);
    out_.latin = share(count(Kind::Letter) - totals_.other_letters, visible);
    out_.other_letters = share(totals_.other_letters, visible);
    out_.han = share(count(Kind::Han), visible);
    out_.kana = share(count(Kind::Kana), visible);
    out_.hangul = share(count(Kind::Hangul), visible);
    out_.unspaced_letters = share(count(Kind::Cluster), visible);
    out_.digits = share(count(Kind::Digit), visible);
    out_.punctuation = share(count(Kind::Punctuation) + count(Kind::Symbol), visible);
  }

  // Counts that become shares.
  struct Totals {
    std::int64_t symbols, hashes, ellipses, newlines, other_letters, line_characters, c4_characters;
    std::int64_t bullet_lines, ellipsis_lines, terminal_lines, few_word_lines, punctuated_lines, short_lines;
  };
  // What stood before the character in work.
  struct Seen {
    std::int64_t dots = 0;
    const char* after_dot = nullptr;
    const char* after_other = nullptr;  // behind the last character that is not ASCII, which is `last`
    char32_t last = 0, before_last = 0;
  };
  struct Paragraph {
    std::uint64_t hash = 0;
    std::int64_t lines = 0, characters = 0;
  };

  const char* begin_ = nullptr;
  const char* end_ = nullptr;
  Signals out_{};
  Totals totals_{};
  Seen seen_;
  Paragraph paragraph_;
  std::array<std::int64_t, static_cast<std::size_t>(Kind::Cluster) + 1> kinds_{};
  std::vector<Sentence> sentences_;
  std::size_t next_sentence_ = 0;
  Numbering numbering_;
  RepeatedNgrams ngrams_;
  Duplicates line_parts_, paragraph_parts_;
  Words words_{ngrams_};
};

py::array_t<Signals> signals(const Bytes& bytes, const Offsets& offsets) {
  const Texts texts(bytes, offsets);
  py::array_t<Signals> table(static_cast<py::ssize_t>(texts.size()));
  Signals* rows = table.mutable_data();
  py::gil_scoped_release release;
  Analyzer analyzer;
  for (std::int64_t i = 0; i < texts.size(); ++i) {
    rows[i] = analyzer.run(texts[i]);
  }
  return table;
}

}  // namespace

}  // namespace b2::text

void bind_signals(py::module_& m) {
  using b2::text::Signals;
  PYBIND11_NUMPY_DTYPE(Signals, B2_SIGNAL_COUNTS, B2_SIGNAL_SHARES);
  m.def("signals", &b2::text::signals, py::arg("bytes").noconvert(), py::arg("offsets").noconvert(),
        "Signals of N texts, a structured array [N] of int64 counts and float32 shares; releases the GIL.");
}
