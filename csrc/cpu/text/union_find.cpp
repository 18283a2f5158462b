// Connected components over a flat array, which may be a memory map: parent[i] <= i, and a root is its own parent.
// A root is the smallest member of its component, whatever the order of the edges.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

using Indices = py::array_t<std::int64_t, py::array::c_style>;

// The parent of i; what is no forest is refused here, so that it can never be an address.
std::int64_t parent_of(const std::int64_t* parent, std::int64_t i) {
  const std::int64_t found = parent[i];
  if (found < 0 || found > i) {
    throw std::invalid_argument("parent " + std::to_string(found) + " of " + std::to_string(i) + " is not in 0.." +
                                std::to_string(i));
  }
  return found;
}

// Root of i; halves the path on the way (Tarjan and van Leeuwen 1984).
std::int64_t root_of(std::int64_t* parent, std::int64_t i) {
  for (;;) {
    const std::int64_t above = parent_of(parent, i);
    if (above == i) {
      return i;
    }
    i = parent[i] = parent_of(parent, above);
  }
}

void connect(Indices& parents, const Indices& edges) {
  if (parents.ndim() != 1 || edges.ndim() != 2 || edges.shape(1) != 2) {
    throw std::invalid_argument("connect needs parents [N] and edges [E, 2]");
  }
  std::int64_t* parent = parents.mutable_data();
  const std::int64_t* edge = edges.data();
  const std::int64_t size = parents.size();
  const std::int64_t count = edges.shape(0);
  py::gil_scoped_release release;
  for (std::int64_t e = 0; e < count; ++e) {
    for (int side = 0; side < 2; ++side) {
      if (edge[2 * e + side] < 0 || edge[2 * e + side] >= size) {
        throw std::out_of_range("edge " + std::to_string(e) + " names node " + std::to_string(edge[2 * e + side]) +
                                " of " + std::to_string(size));
      }
    }
    const std::int64_t a = root_of(parent, edge[2 * e]);
    const std::int64_t b = root_of(parent, edge[2 * e + 1]);
    if (a < b) {
      parent[b] = a;
    } else {
      parent[a] = b;
    }
  }
}

void flatten(Indices& parents) {
  if (parents.ndim() != 1) {
    throw std::invalid_argument("flatten needs parents [N]");
  }
  std::int64_t* parent = parents.mutable_data();
  const std::int64_t size = parents.size();
  py::gil_scoped_release release;
  for (std::int64_t i = 0; i < size; ++i) {
    parent[i] = parent[parent_of(parent, i)];  // the parent stands before i and is flat already
  }
}

}  // namespace

void bind_union_find(py::module_& m) {
  m.def("connect", &connect, py::arg("parents").noconvert(), py::arg("edges").noconvert(),
        "Join the components of the two nodes of every edge, int64 [E, 2], in parents, int64 [N]. Releases the GIL.");
  m.def("flatten", &flatten, py::arg("parents").noconvert(),
        "Replace every parent by the root: the smallest node of the component. Releases the GIL.");
}
