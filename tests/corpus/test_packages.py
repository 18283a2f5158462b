"""Sets and licences."""

from __future__ import annotations

import pytest

from megatron_b2.corpus.packages import SETS, copyright_licence, declared_licence, packages_of
from megatron_b2.errors import InputError


def test_sets_are_sorted_and_nested() -> None:
    for name in SETS:
        packages = packages_of(name)
        assert list(packages) == sorted(set(packages))
    assert set(packages_of("zhen")) <= set(packages_of("multilingual"))
    with pytest.raises(InputError, match="unknown corpus set 'zh'; choose one of quickstart"):
        packages_of("zh")


@pytest.mark.parametrize(
    ("package", "licence"),
    [
        ("libreoffice-help-zh-cn", "MPL-2.0"),
        ("manpages-zh", "GFDL-1.2+"),
        ("manpages-fr", None),
        ("debian-faq", "GPL-2+"),
    ],
)
def test_declared_licence(package: str, licence: str | None) -> None:
    assert declared_licence(package) == licence


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        (
            "Format: x\n\nFiles: a\nLicense: MIT\n\nFiles: *\nCopyright: me\nLicense: GPL-2+\n more\n",
            "GPL-2+",
        ),
        ("Format: x\n\nFiles: a b\nLicense: MIT\n\nLicense: BSD\n text\n", "MIT, BSD"),
        ("Free text, see `/usr/share/common-licenses/GPL-2'.", "GPL-2"),
        ("Nothing here", None),
    ],
)
def test_copyright_licence(text: str, licence: str | None) -> None:
    assert copyright_licence(text) == licence
