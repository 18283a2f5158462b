// Candidate pairs from LSH records: documents with the same hash of the same band share a bucket.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "text/uniform_sort.h"

namespace py = pybind11;

namespace {

using Hashes = py::array_t<std::uint64_t, py::array::c_style>;
using Indices = py::array_t<std::int64_t, py::array::c_style>;

struct Record {
  std::uint64_t hash;
  std::int64_t document;
};

using Pair = std::pair<std::int64_t, std::int64_t>;

// Pairs of one bucket, documents in ascending order: each with the `first` first ones and the `previous` before it.
void pair_bucket(const Record* bucket, std::int64_t size, std::int64_t first, std::int64_t previous,
                 std::vector<Pair>& pairs) {
  const auto add = [&](std::int64_t a, std::int64_t b) {
    if (bucket[a].document != bucket[b].document) {
      pairs.emplace_back(bucket[a].document, bucket[b].document);
    }
  };
  for (std::int64_t i = 1; i < size; ++i) {
    const std::int64_t stop = std::min(i, first);
    for (std::int64_t a = 0; a < stop; ++a) {
      add(a, i);
    }
    for (std::int64_t a = std::max(stop, i - previous); a < i; ++a) {
      add(a, i);
    }
  }
}

// Pairs of a bucket of `size` documents: document i has min(i, first + previous).
std::int64_t pairs_of(std::int64_t size, std::int64_t most) {
  const std::int64_t partial = std::min(size - 1, most);
  return partial * (partial + 1) / 2 + (size - 1 - partial) * most;
}

// Sorts the pairs and drops repeats.
void make_unique(std::vector<Pair>& pairs) {
  std::sort(pairs.begin(), pairs.end());
  pairs.erase(std::unique(pairs.begin(), pairs.end()), pairs.end());
}

// int64 [E, 2], with the memory of `pairs`.
py::array_t<std::int64_t> to_array(std::vector<Pair>&& pairs) {
  static_assert(sizeof(Pair) == 2 * sizeof(std::int64_t));
  auto* kept = new std::vector<Pair>(std::move(pairs));
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<std::vector<Pair>*>(pointer); });
  return py::array_t<std::int64_t>({static_cast<py::ssize_t>(kept->size()), py::ssize_t{2}},
                                   reinterpret_cast<const std::int64_t*>(kept->data()), owner);
}

py::array_t<std::int64_t> unique_pairs(const Indices& pairs) {
  if (pairs.ndim() != 2 || pairs.shape(1) != 2) {
    throw std::invalid_argument("unique_pairs needs pairs [E, 2]");
  }
  std::vector<Pair> unique(static_cast<std::size_t>(pairs.shape(0)));
  {
    const std::int64_t* pair = pairs.data();
    py::gil_scoped_release release;
    for (std::size_t e = 0; e < unique.size(); ++e) {
      unique[e] = {pair[2 * e], pair[2 * e + 1]};
    }
    make_unique(unique);
  }
  return to_array(std::move(unique));
}

py::array_t<std::int64_t> candidate_pairs(const Hashes& hashes, const Indices& documents, std::int64_t first,
                                          std::int64_t previous) {
  if (hashes.ndim() != 1 || documents.ndim() != 1 || hashes.size() != documents.size() || first < 1 || previous < 0) {
    throw std::invalid_argument("candidate pairs need hashes [R], documents [R], first >= 1 and previous >= 0");
  }
  std::vector<Pair> pairs;
  {
    const std::uint64_t* hash = hashes.data();
    const std::int64_t* document = documents.data();
    py::gil_scoped_release release;
    std::vector<Record> records(static_cast<std::size_t>(hashes.size()));
    for (std::size_t i = 0; i < records.size(); ++i) {
      records[i] = {hash[i], document[i]};
    }
    std::vector<Record> scratch;
    std::vector<std::size_t> counts;
    b2::text::uniform_sort(
        records, scratch, counts, [](const Record& r) { return r.hash; },
        [](const Record& a, const Record& b) {
          return a.hash != b.hash ? a.hash < b.hash : a.document < b.document;
        });
    scratch = {};
    const auto for_buckets = [&records](const auto& visit) {
      for (std::size_t begin = 0, end = 0; begin < records.size(); begin = end) {
        while (end < records.size() && records[end].hash == records[begin].hash) {
          ++end;
        }
        visit(records.data() + begin, static_cast<std::int64_t>(end - begin));
      }
    };
    std::int64_t total = 0;
    for_buckets([&](const Record*, std::int64_t size) { total += pairs_of(size, first + previous); });
    pairs.reserve(static_cast<std::size_t>(total));
    for_buckets([&](const Record* bucket, std::int64_t size) { pair_bucket(bucket, size, first, previous, pairs); });
    make_unique(pairs);
  }
  return to_array(std::move(pairs));
}

}  // namespace

void bind_candidates(py::module_& m) {
  m.def("candidate_pairs", &candidate_pairs, py::arg("hashes").noconvert(), py::arg("documents").noconvert(),
        py::kw_only(), py::arg("first"), py::arg("previous"),
        "Sorted distinct pairs int64 [E, 2], the smaller document first, of records with equal hashes, uint64 [R], of "
        "documents, int64 [R]: each document with the `first` smallest of its bucket and the `previous` ones before "
        "it. Releases the GIL.");
  m.def("unique_pairs", &unique_pairs, py::arg("pairs").noconvert(),
        "Pairs int64 [E, 2] sorted and without repeats. Releases the GIL.");
}
