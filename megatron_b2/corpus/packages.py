"""Which Debian packages make which corpus, and under which licence their text is.

Sizes were counted on Debian 12; every package is in Debian's main archive, so its text is free to use and
to pass on. A licence declared here is that of the text (a copyright file also lists those of bundled
programs); without one it is read from the package's own copyright file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_b2.errors import InputError


@dataclass(frozen=True)
class CorpusSet:
    """A named choice of packages."""

    summary: str
    packages: tuple[str, ...]


def _each(pattern: str, languages: str) -> tuple[str, ...]:
    return tuple(pattern.format(language) for language in languages.split())


QUICKSTART = (
    *_each("libreoffice-help-{}", "zh-cn zh-tw en-us"),
    *_each("manpages-{}", "es ru"),
    *_each("aptitude-doc-{}", "fr ja"),
    "debian-faq-de",
    "fortunes-zh",
    "maint-guide-ja",
    "manpages",
)
ZHEN = (
    *_each("debian-reference-{}", "zh-cn zh-tw en"),
    *_each("libreoffice-help-{}", "zh-cn zh-tw en-us"),
    *_each("libreoffice-l10n-{}", "zh-cn zh-tw"),
    *_each("maint-guide-{}", "zh-cn zh-tw"),
    "cppreference-doc-en-html",
    "debian-faq-zh-cn",
    "debian-handbook",
    "debmake-doc",
    "fortunes-zh",
    "gnome-user-docs",
    "harden-doc",
    "lilypond-doc-html-zh",
    "linux-doc-6.1",
    "manpages-dev",
    "manpages-zh",
    "postgresql-doc-15",
    "python3.11-doc",
    "rapidjson-doc",
    "rust-web-doc",
)
MULTILINGUAL = (
    *ZHEN,
    *_each("libreoffice-help-{}", "es fr de ja ru ko pt it pl"),
    *_each("debian-reference-{}", "es fr de ja it pt"),
    *_each("manpages-{}", "es fr de ja ru pl"),
    *_each("manpages-{}-dev", "fr de ja"),
    "installation-guide-amd64",
)

SETS: Mapping[str, CorpusSet] = MappingProxyType(
    {
        "quickstart": CorpusSet("15 MB to download: zh-Hans, zh-Hant, en, es, ru, ja, fr, de", QUICKSTART),
        "zhen": CorpusSet("156 MB to download, 275 MB of text: 217 en, 17 zh-Hans, 10 zh-Hant", ZHEN),
        "multilingual": CorpusSet("230 MB to download: the zhen set and twelve more languages", MULTILINGUAL),
    }
)

DECLARED_LICENCES: Mapping[str, str] = MappingProxyType(
    {
        "libreoffice-help": "MPL-2.0",
        "libreoffice-l10n": "MPL-2.0",
        "debian-faq": "GPL-2+",
        "debian-handbook": "CC-BY-SA-3.0 or GPL-2+",
        "cppreference-doc": "CC-BY-SA-3.0",
        "gnome-user-docs": "CC-BY-SA-3.0",
        "harden-doc": "GPL-2+",
        "installation-guide": "GPL-2+",
        "maint-guide": "GPL-2+",
        "manpages-zh": "GFDL-1.2+",
        "rust-web-doc": "MIT or Apache-2.0",
    }
)


def packages_of(name: str) -> tuple[str, ...]:
    """Packages of a set, sorted and unique; raises InputError for an unknown set."""
    if name not in SETS:
        raise InputError(f"unknown corpus set {name!r}; choose one of {', '.join(SETS)}")
    return tuple(sorted(set(SETS[name].packages)))


def declared_licence(package: str) -> str | None:
    """Licence of a package's text from the table above, by the longest matching prefix."""
    matches = [
        prefix for prefix in DECLARED_LICENCES if package == prefix or package.startswith(f"{prefix}-")
    ]
    return DECLARED_LICENCES[max(matches, key=len)] if matches else None


def copyright_licence(text: str) -> str | None:
    """Licence named by a Debian copyright file: of "Files: *", else all of them, else the one referred to."""
    stanzas = [_fields(block) for block in text.replace("\r", "").split("\n\n")]
    for stanza in stanzas:
        if stanza.get("files", "").split() == ["*"] and "license" in stanza:
            return stanza["license"]
    named = dict.fromkeys(s["license"] for s in stanzas if s.get("license"))
    if named:
        return ", ".join(list(named)[:6])
    marker = "common-licenses/"
    referred = {part.split()[0].rstrip("'`\".,;:)") for part in text.split(marker)[1:] if part.split()}
    return ", ".join(sorted(referred)) or None


def _fields(block: str) -> dict[str, str]:
    """First line of each "Name: value" field of a stanza, names in lower case."""
    fields: dict[str, str] = {}
    for line in block.splitlines():
        name, colon, value = line.partition(":")
        if colon and name and not name[0].isspace():
            fields[name.lower()] = value.strip()
    return fields
