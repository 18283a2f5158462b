"""Flags that take several values may also be given several times."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def gather_repeated(argv: Sequence[str] | None, flags: Sequence[str]) -> list[str]:
    """Arguments (none: those of the process) in which each of `flags` stands once, with all its values.

    `--input a --input=b c` becomes `--input a b c`: the parser alone would keep only the last use, silently.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    kept: list[str] = []
    values: dict[str, list[str]] = {}
    current: list[str] | None = None
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if flag in flags:
            current = values.setdefault(flag, [])
            if equals:
                current.append(value)
        elif argument.startswith("-") and not argument[1:2].isdigit():
            current = None
            kept.append(argument)
        else:
            (kept if current is None else current).append(argument)
    return kept + [word for flag, words in values.items() for word in (flag, *words)]
