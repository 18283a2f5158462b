// Heuristic signals of the published quality filters, all in one pass over a document.

#pragma once

#include <cstdint>
#include <string_view>

namespace b2::text {

// The columns in order; what each one means and where it comes from: megatron_b2/corpus/signals/signals.py.
#define B2_SIGNAL_COUNTS                                                                                       \
  bytes, characters, lines, paragraphs, sentences, words, cjk_characters, stop_words, stop_words_zh, c4_sentences, \
      javascript_lines, policy_lines, long_word_lines, curly_brackets, lorem_ipsum, urls, replacement_characters,  \
      mojibake, control_characters

#define B2_SIGNAL_SHARES                                                                                          \
  mean_word_length, hashes_per_word, ellipses_per_word, bullet_lines, ellipsis_lines, alphabetic_words,           \
      duplicate_lines, duplicate_paragraphs, duplicate_line_characters, duplicate_paragraph_characters, top_2_gram, \
      top_3_gram, top_4_gram, duplicate_5_grams, duplicate_6_grams, duplicate_7_grams, duplicate_8_grams,         \
      duplicate_9_grams, duplicate_10_grams, terminal_lines, few_word_lines, c4_characters, punctuated_lines,     \
      short_lines, newlines_per_word, latin, other_letters, han, kana, hangul, unspaced_letters, digits,          \
      punctuation, white_space, broken

struct Signals {
  std::int64_t B2_SIGNAL_COUNTS;
  float B2_SIGNAL_SHARES;
};

}  // namespace b2::text
