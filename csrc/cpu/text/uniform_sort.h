// Sorting by keys that are uniform 64-bit hashes: one pass puts every item near its place, short sorts do the rest.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace b2::text {

template <typename Iterator, typename Less>
void short_sort(Iterator begin, Iterator end, Less less) {
  if (end - begin > 24) {
    std::sort(begin, end, less);
    return;
  }
  for (Iterator i = begin; i != end; ++i) {
    const auto item = *i;
    Iterator hole = i;
    for (; hole != begin && less(item, *(hole - 1)); --hole) {
      *hole = *(hole - 1);
    }
    *hole = item;
  }
}

// Sorts items by `less`, which must order by key(item) first. Linear time for uniform keys, n log n for any.
// `scratch` and `counts` are memory to reuse.
template <typename Item, typename Key, typename Less>
void uniform_sort(std::vector<Item>& items, std::vector<Item>& scratch, std::vector<std::size_t>& counts, Key key,
                  Less less) {
  constexpr std::size_t kItemsABucket = 2;
  const std::size_t n = items.size();
  unsigned bits = 0;
  while (bits < 24 && (std::size_t{kItemsABucket} << (bits + 1)) <= n) {
    ++bits;
  }
  if (bits < 3) {
    short_sort(items.begin(), items.end(), less);
    return;
  }
  const unsigned shift = 64 - bits;
  counts.assign((std::size_t{1} << bits) + 1, 0);
  for (const Item& item : items) {
    ++counts[(key(item) >> shift) + 1];
  }
  for (std::size_t b = 1; b < counts.size(); ++b) {
    counts[b] += counts[b - 1];
  }
  scratch.resize(n);
  for (const Item& item : items) {
    scratch[counts[key(item) >> shift]++] = item;
  }
  std::size_t begin = 0;
  for (std::size_t b = 0; begin < n; ++b) {
    short_sort(scratch.begin() + begin, scratch.begin() + counts[b], less);
    begin = counts[b];
  }
  items.swap(scratch);
}

}  // namespace b2::text
