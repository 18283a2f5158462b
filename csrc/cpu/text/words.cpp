// Binding of words.h.

#include "text/words.h"

#include <pybind11/pybind11.h>

#include <string>
#include <string_view>

namespace py = pybind11;

namespace {

struct ListWords {
  py::list words;

  void ascii(std::string_view word, const char*) {
    std::string lowered(word);
    for (char& byte : lowered) {
      byte |= 0x20;
    }
    words.append(py::str(lowered));
  }
  void word(std::string_view word, const char*) { words.append(py::str(word.data(), word.size())); }
};

py::list words(const py::bytes& text) {
  ListWords list;
  b2::text::WordReader(std::string_view(text), list).run();
  return list.words;
}

}  // namespace

void bind_words(py::module_& m) {
  m.attr("UNICODE_VERSION") = b2::text::kUnicodeVersion;
  m.def("words", &words, py::arg("text"),
        "The words of one text (UTF-8), as shingles see them; malformed bytes part words.");
  m.def(
      "character_kinds",
      [] {
        std::string kinds;
        for (char32_t c = 0; c <= b2::text::kLastCharacter; ++c) {
          kinds.push_back(static_cast<char>(b2::text::kind(c)));
        }
        return py::bytes(kinds);
      },
      "Kind of every character up to U+10FFFF, one byte each, numbered as in characters.h.");
  m.def(
      "lower", [](const py::bytes& text) {
        std::string lowered;
        const std::string_view view(text);
        for (const char* p = view.data(); p < view.data() + view.size();) {
          b2::text::encode(b2::text::lower(b2::text::decode(p, view.data() + view.size())), lowered);
        }
        return py::bytes(lowered);
      },
      py::arg("text"), "Simple lower case of one text (UTF-8); malformed bytes become U+FFFD one by one.");
}
