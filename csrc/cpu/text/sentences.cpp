#include "text/sentences.h"

#include <algorithm>
#include <array>
#include <iterator>

#include "text/characters.h"

namespace b2::text {

namespace {

using namespace std::string_view_literals;

// In sorted order, in small letters, without the last period.
// Nothing of the kind ends a sentence: a name or an example follows.
constexpr std::string_view kTitles[] = {
    "adm"sv,  "approx"sv, "brig"sv, "ca"sv,   "capt"sv, "cf"sv,   "cmdr"sv, "col"sv,  "cpl"sv,    "dr"sv,
    "esp"sv,  "gen"sv,    "gov"sv,  "hon"sv,  "lt"sv,   "maj"sv,  "messrs"sv, "mlle"sv, "mme"sv,  "mr"sv,
    "mrs"sv,  "ms"sv,     "mt"sv,   "mx"sv,   "prof"sv, "rep"sv,  "resp"sv, "rev"sv,  "sen"sv,    "sgt"sv,
    "st"sv,   "supt"sv,   "viz"sv,  "vs"sv,
};
// No end before a number.
constexpr std::string_view kCounted[] = {
    "al"sv,   "apr"sv, "art"sv, "aug"sv, "c"sv,   "ch"sv,   "chap"sv, "dec"sv,  "ed"sv,  "eq"sv,   "eqs"sv,
    "feb"sv,  "fig"sv, "figs"sv, "jan"sv, "jul"sv, "jun"sv, "mar"sv,  "no"sv,   "nos"sv, "nov"sv,  "oct"sv,
    "p"sv,    "par"sv, "pp"sv,  "pt"sv,  "ref"sv, "refs"sv, "sec"sv,  "sect"sv, "sep"sv, "sept"sv, "tab"sv,
    "ver"sv,  "vol"sv, "vols"sv,
};
// Words with periods inside that often end a sentence; all others (e.g., i.e., U.S., Ph.D.) do not.
constexpr std::string_view kFinalDotted[] = {"a.m"sv, "p.m"sv};

constexpr std::size_t kLongestAbbreviation = 8;
constexpr std::size_t kQuoteWindow = 1024;  // bytes looked back for an open straight quote

template <std::size_t N>
constexpr bool is_sorted(const std::string_view (&words)[N]) {
  for (std::size_t i = 1; i < N; ++i) {
    if (!(words[i - 1] < words[i])) {
      return false;
    }
  }
  return true;
}

static_assert(is_sorted(kTitles) && is_sorted(kCounted) && is_sorted(kFinalDotted));

template <std::size_t N>
bool is_in(const std::string_view (&words)[N], std::string_view word) {
  return std::binary_search(std::begin(words), std::end(words), word);
}

bool is_wide_stop(char32_t c) {
  return c == U'。' || c == U'！' || c == U'？' || c == U'｡' || c == U'．' || (c >= U'\u2047' && c <= U'\u2049') ||
         c == U'\u203C';
}

bool is_closer(char32_t c) {
  constexpr std::u32string_view kClosers = U")]}'\u2019\u201D\u00BB\u203A」』）】》〉〕］｝〗＂＇｣";
  return kClosers.find(c) != std::u32string_view::npos;
}

bool is_opener(char32_t c) {
  constexpr std::u32string_view kOpeners = U"([{\"'\u2018\u201C\u00AB\u2039\u00BF\u00A1「『（【《〈〔［｛〖｢";
  return kOpeners.find(c) != std::u32string_view::npos;
}

// What goes on with a sentence after a stop inside of it: “好！”，他说.
bool goes_on(char32_t c) {
  constexpr std::u32string_view kMiddle = U",;:，、；：\u2013\u2014";
  return kMiddle.find(c) != std::u32string_view::npos;
}

bool is_han_or_kana(char32_t c) { return kind(c) == Kind::Han || kind(c) == Kind::Kana; }

// Of the scripts with two cases: Latin, Greek, Cyrillic, Armenian.
bool is_small(char32_t c) {
  return (c < 0x590 || (c >= 0x1E00 && c < 0x2000)) && kind(c) == Kind::Letter && lower(c) == c;
}

bool is_word(char byte) {
  return static_cast<unsigned char>(byte) >= 0x80 || (byte >= '0' && byte <= '9') || (byte >= 'a' && byte <= 'z') ||
         (byte >= 'A' && byte <= 'Z');
}

// What a byte may be, so that most bytes need no more than a look into a table.
enum class Lead : std::uint8_t { Inside, Space, Newline, Stop, Other };  // Other: begins a character that may be either

std::array<Lead, 256> leads() {
  std::array<Lead, 256> leads{};
  for (char32_t c = 0; c < 0x80; ++c) {
    const Kind k = kind(c);
    leads[c] = k == Kind::Space ? Lead::Space : k == Kind::Newline ? Lead::Newline : Lead::Inside;
  }
  leads['.'] = leads['!'] = leads['?'] = Lead::Stop;
  // U+0085 and spaces · Ogham · … ‼ U+2028 and spaces · 。 and U+3000 · ！？．｡
  leads[0xC2] = leads[0xE1] = leads[0xE2] = leads[0xE3] = leads[0xEF] = Lead::Other;
  return leads;
}

const std::array<Lead, 256> kLeads = leads();

Lead lead_at(const char* position) { return kLeads[static_cast<unsigned char>(*position)]; }

std::size_t longest_part(std::string_view dotted) {
  std::size_t longest = 0, length = 0;
  for (const char c : dotted) {
    length = c == '.' ? 0 : length + 1;
    longest = std::max(longest, length);
  }
  return longest;
}

class Splitter {
 public:
  Splitter(std::string_view text, std::vector<Sentence>& sentences)
      : begin_(text.data()), end_(begin_ + text.size()), start_(begin_), first_(begin_), sentences_(sentences) {}

  void split() {
    const char* position = first_ = white_space(start_).end;
    while (position < end_ && sentences_.size() + 1 < kMaxSentences) {
      const Lead lead = lead_at(position);
      if (lead <= Lead::Space) {
        ++position;
        continue;
      }
      const char* next = position;
      const char* stop = nullptr;  // end of the sentence without the white space behind it
      const char32_t c = decode(next, end_);
      if (lead == Lead::Newline || (lead == Lead::Other && kind(c) == Kind::Newline)) {
        stop = position;
      } else if (lead == Lead::Stop || c == U'…' || is_wide_stop(c)) {
        stop = end_of_stop(position, next);
      }
      position = stop == nullptr ? next : close(stop);
    }
    if (start_ < end_) {
      sentences_.push_back({end_ - begin_, Break::None});
    }
  }

 private:
  char32_t at(const char* position) const { return position < end_ ? decode(position, end_) : U'\0'; }

  char32_t before(const char* position) const {
    if (position == start_) {
      return U'\0';
    }
    do {
      --position;
    } while (position > start_ && is_continuation(*position));
    return at(position);
  }

  struct WhiteSpace {
    const char* end;
    const char* last_line;  // behind its last end of a line
    Break kind;
  };

  WhiteSpace white_space(const char* position) const {
    WhiteSpace space{position, position, Break::None};
    while (space.end < end_) {
      const char* next = space.end;
      const Lead lead = lead_at(next);
      if (lead == Lead::Inside || lead == Lead::Stop) {
        break;
      }
      const char32_t c = decode(next, end_);
      const Kind k = lead == Lead::Space ? Kind::Space : lead == Lead::Newline ? Kind::Newline : kind(c);
      if (k == Kind::Newline) {
        next += c == U'\r' && next < end_ && *next == '\n';
        space.kind = space.kind == Break::None ? Break::Line : Break::Paragraph;
        space.last_line = next;
      } else if (k != Kind::Space) {
        break;
      }
      space.end = next;
    }
    return space;
  }

  // Ends the sentence at `stop`; returns where the search goes on.
  const char* close(const char* stop) {
    const WhiteSpace space = white_space(stop);
    start_ = space.kind == Break::None || space.end == end_ ? space.end : space.last_line;
    first_ = space.end;
    sentences_.push_back({start_ - begin_, space.kind});
    return first_;
  }

  // Where the sentence ends that the stop at `position` ends, or nullptr with `next` behind what was looked at.
  const char* end_of_stop(const char* position, const char*& next) const {
    if (*position == '.' && next < end_ && static_cast<unsigned char>(*next) < 0x80 && is_word(*next)) {
      return nullptr;  // 3.14, example.com
    }
    const char* stop = position;
    int dots = 0, ellipses = 0;
    bool strong = false, wide = false;
    for (next = position; next < end_; stop = next) {
      const char32_t c = decode(next, end_);
      if (c == U'.') {
        ++dots;
      } else if (c == U'…') {
        ++ellipses;
      } else if (c == U'!' || c == U'?') {
        strong = true;
      } else if (is_wide_stop(c)) {
        wide = true;
      } else {
        break;
      }
    }
    next = stop;
    wide = wide || ellipses >= 2 || dots >= 6;  // …… and ...... are Chinese
    const bool is_period = !wide && !strong && dots == 1 && ellipses == 0;
    const char* closed = after_closers(stop);
    const WhiteSpace space = white_space(closed);
    const char* word = space.end;
    if (word == end_ || space.kind != Break::None) {
      return closed;
    }
    if (word == closed) {
      return ends_unspaced(position, at(closed), wide, is_period || strong) ? closed : nullptr;
    }
    if (wide) {
      return goes_on(at(word)) ? nullptr : closed;
    }
    while (word < end_ && is_opener(at(word))) {
      decode(word, end_);
    }
    const char32_t first = at(word);
    if (is_small(first)) {
      return strong && closed == stop ? closed : nullptr;
    }
    return goes_on(first) || (is_period && is_abbreviation(position, first)) ? nullptr : closed;
  }

  // Without white space behind it: 。 ends a sentence, and between Chinese characters also . ! ? but not … or ...
  bool ends_unspaced(const char* position, char32_t follower, bool wide, bool narrow) const {
    if (wide) {
      const bool is_decimal = at(position) == U'．' && kind(before(position)) == Kind::Digit && kind(follower) == Kind::Digit;
      return !goes_on(follower) && !is_decimal;
    }
    return narrow && is_han_or_kana(before(position)) && (is_han_or_kana(follower) || is_opener(follower));
  }

  const char* after_closers(const char* position) const {
    while (position < end_) {
      const char* next = position;
      const char32_t c = decode(next, end_);
      if (!is_closer(c) && !(c == U'"' && has_open_quote(position))) {
        break;
      }
      position = next;
    }
    return position;
  }

  bool has_open_quote(const char* position) const {
    const char* from = std::max(start_, position - std::min<std::ptrdiff_t>(kQuoteWindow, position - start_));
    return std::count(from, position, '"') % 2 == 1;
  }

  // Whether the period at `position` belongs to the word before it; `follower` is the first letter of the next word.
  bool is_abbreviation(const char* position, char32_t follower) const {
    const char* word = position;
    while (word > start_ && (is_word(word[-1]) || word[-1] == '.')) {
      --word;
      if (position - word > static_cast<std::ptrdiff_t>(kLongestAbbreviation)) {
        return false;
      }
    }
    char small[kLongestAbbreviation];
    std::transform(word, position, small, [](char c) {
      return c >= 'A' && c <= 'Z' ? static_cast<char>(c | 0x20) : c;
    });
    const std::string_view name(small, static_cast<std::size_t>(position - word));
    if (name.find_first_not_of("0123456789."sv) == std::string_view::npos) {
      return word == first_;  // "1. Introduction", "2.1. Words"
    }
    if (name.size() == 1 && (word == first_ || name[0] != *word)) {
      return true;  // "a. Words", "J. Smith"
    }
    if (name.find('.') != std::string_view::npos) {
      return longest_part(name) <= 2 && !is_in(kFinalDotted, name);
    }
    return is_in(kTitles, name) || (is_in(kCounted, name) && kind(follower) == Kind::Digit);
  }

  const char* begin_;
  const char* end_;
  const char* start_;  // of the sentence in work
  const char* first_;  // what it has first behind white space
  std::vector<Sentence>& sentences_;
};

}  // namespace

void split_sentences(std::string_view text, std::vector<Sentence>& sentences) {
  sentences.clear();
  Splitter(text, sentences).split();
}

Break paragraph_break(const std::vector<Sentence>& sentences) {
  const auto last = sentences.empty() ? sentences.end() : std::prev(sentences.end());
  const bool has_blank_line =
      std::any_of(sentences.begin(), last, [](const Sentence& s) { return s.after == Break::Paragraph; });
  return has_blank_line ? Break::Paragraph : Break::Line;
}

}  // namespace b2::text
