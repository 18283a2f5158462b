#include "encode/encoder.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace b2::encode {

namespace {

constexpr std::string_view kSpaceMarkText = "\xE2\x96\x81";
constexpr std::string_view kReplacement = "\xEF\xBF\xBD";
constexpr int kBlock = 64;          // ASCII characters looked at together
constexpr std::size_t kBatch = 32;  // chunks encoded together

// ASCII characters at the start of the text, up to kBlock.
int ascii_run(const char* text, const char* end) {
  const int most = static_cast<int>(std::min<std::ptrdiff_t>(end - text, kBlock));
  int count = 0;
  for (; count + 8 <= most; count += 8) {
    std::uint64_t word;
    std::memcpy(&word, text + count, 8);
    if (const std::uint64_t high = word & 0x8080808080808080u; high != 0) {
      return count + __builtin_ctzll(high) / 8;
    }
  }
  while (count < most && static_cast<std::uint8_t>(text[count]) < 0x80) ++count;
  return count;
}

// Every byte that starts no valid character, replaced.
std::string repaired(std::string_view text) {
  std::string result;
  const char* end = text.data() + text.size();
  std::uint32_t code = 0;
  for (const char* p = text.data(); p < end;) {
    const int length = read_character(p, end, code);
    result += length > 0 ? std::string_view(p, static_cast<std::size_t>(length)) : kReplacement;
    p += std::max(length, 1);
  }
  return result;
}

}  // namespace

void Encoder::encode(std::string_view text, const char* limit, Ids& out) {
  for (std::size_t mark; (mark = text.find(kSpaceMarkText)) != text.npos;) {
    encode_part(text.substr(0, mark), limit, out);
    model_.spell(kSpaceMark, out);
    text.remove_prefix(mark + kSpaceMarkText.size());
  }
  encode_part(text, limit, out);
}

// A text without U+2581.
void Encoder::encode_part(std::string_view part, const char* limit, Ids& out) {
  const std::size_t size = out.size();
  if (encode_valid(part, limit, out)) return;
  out.truncate(size);
  const std::string valid = repaired(part);
  encode_valid(valid, valid.data() + valid.size(), out);
}

// False, with a part of the ids appended, when the text is not valid UTF-8.
bool Encoder::encode_valid(std::string_view part, const char* limit, Ids& out) {
  const char* const end = part.data() + part.size();
  const char* begin = part.data();  // of the chunk
  std::array<Item, kBatch> items;
  std::size_t num_items = 0;
  const auto encode_batch = [&]() {
    encode_items(items.data(), num_items, limit, out);
    num_items = 0;
  };
  const auto add = [&](const Item& item) {
    items[num_items++] = item;
    if (num_items == kBatch) encode_batch();
  };
  const auto cut = [&](const char* at) {
    if (at > begin) add({{begin, static_cast<std::size_t>(at - begin)}, 0});
    begin = at;
  };
  const auto take_user_symbol = [&](const char* at) {
    std::int32_t id = 0;
    const std::size_t length = model_.match_user_symbol(at, end, id);
    if (length == 0) return false;
    cut(at);
    add({{}, id});
    begin = at + length;
    return true;
  };
  std::uint32_t previous = 0;
  for (const char* p = begin; p < end;) {
    std::uint32_t code = 0;
    const int length = read_character(p, end, code);
    if (length == 0) return false;
    if (model_.may_start_user_symbol(code) && take_user_symbol(p)) {
      p = begin;
      continue;
    }
    code = as_in_model(code);
    if (p > begin && !model_.may_join(previous, code)) cut(p);
    p += length;
    previous = code;
    while (static_cast<std::uint8_t>(p[-1]) < 0x80) {  // ASCII after ASCII: a block of characters at a time
      const int count = ascii_run(p, end);
      std::uint64_t events = 0;
      for (int i = 0; i < count; ++i) events |= static_cast<std::uint64_t>(model_.event(p + i) != 0) << i;
      for (; events != 0; events &= events - 1) {
        const char* at = p + __builtin_ctzll(events);
        if (at < begin) continue;  // inside of a user-defined symbol
        const std::uint8_t event = model_.event(at);
        if ((event & Model::kUserSymbol) != 0 && take_user_symbol(at)) continue;
        if ((event & Model::kCut) != 0) cut(at);
      }
      p += count;
      if (begin >= p) {  // behind a user-defined symbol
        p = begin;
        break;
      }
      previous = as_in_model(static_cast<std::uint8_t>(p[-1]));
      if (count < kBlock) break;
    }
  }
  cut(end);
  encode_batch();
  return true;
}

// The caches are larger than those of the processor: all items are looked up a first time, only to fetch memory.
void Encoder::encode_items(const Item* items, std::size_t count, const char* limit, Ids& out) {
  for (std::size_t i = 0; i < count; ++i) {
    const std::string_view chunk = items[i].chunk;
    if (chunk.empty()) continue;
    if (chunk.size() <= short_.kMaxBytes) {
      short_.fetch(short_.key(chunk, limit));
    } else if (chunk.size() <= words_.kMaxBytes) {
      words_.fetch(words_.key(chunk, limit));
    }
  }
  for (std::size_t i = 0; i < count; ++i) {
    if (items[i].chunk.empty()) {
      out.push(items[i].user_symbol);
    } else {
      encode_chunk(items[i].chunk, limit, out);
    }
  }
}

void Encoder::encode_chunk(std::string_view chunk, const char* limit, Ids& out) {
  if (chunk.size() <= short_.kMaxBytes) {
    encode_cached(chunk, limit, short_, out);
  } else if (chunk.size() <= words_.kMaxBytes) {
    encode_cached(chunk, limit, words_, out);
  } else if (chunk.size() <= phrases_.kMaxBytes) {
    encode_cached(chunk, limit, phrases_, out);
  } else {
    merger_.encode(chunk, out);
  }
}

template <typename Cache>
void Encoder::encode_cached(std::string_view chunk, const char* limit, Cache& cache, Ids& out) {
  const typename Cache::Key key = Cache::key(chunk, limit);
  if (cache.find(key, out)) return;
  const std::size_t size = out.size();
  merger_.encode(chunk, out);
  const std::size_t count = out.size() - size;
  if (count <= Cache::kMaxIds) cache.put(key, out.data() + size, count);
}

}  // namespace b2::encode
