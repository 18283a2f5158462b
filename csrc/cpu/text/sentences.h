// Sentences and paragraphs of a text, for Chinese and English (and whatever ends sentences as they do).

#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace b2::text {

// What parts a sentence from the next one.
enum class Break : std::uint8_t {
  None,       // both are on one line
  Line,       // one end of a line
  Paragraph,  // a blank line
};

// A sentence starts where the one before it ends, and owns the white space behind it up to the last end of a line:
// what indents the next line belongs to the next sentence.
struct Sentence {
  std::int64_t end;  // byte of the text
  Break after;
};

// A text has no more sentences; the last takes the rest. This bounds the memory for texts made of stops.
inline constexpr std::size_t kMaxSentences = std::size_t{1} << 24;

// Sentences of `text` in order; their bytes are all bytes of the text. A text without bytes has none.
//
// An end of a line always ends a sentence. So do 。！？ with the quotes and brackets that close behind them, unless a
// comma or the like goes on; and . ! ? … before white space, unless the next word starts with a small letter, or
// what stands before a period is an abbreviation, an initial, or the number of a list item. No rule is learned from
// data, so the same text has the same sentences everywhere (our choice; the reports name no splitter).
void split_sentences(std::string_view text, std::vector<Sentence>& sentences);

// The break that ends a paragraph of a text with these sentences: a blank line; where the text has none between its
// sentences, each line is a paragraph (our choice: many extractors write one paragraph a line).
Break paragraph_break(const std::vector<Sentence>& sentences);

}  // namespace b2::text
