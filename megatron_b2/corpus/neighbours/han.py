"""Traditional Chinese characters as simplified ones."""

from __future__ import annotations

from functools import cache

import numpy as np

FIRST, LAST = 0x3400, 0x9FFF
"""Han characters of the basic plane, where all that OpenCC maps alone are."""


@cache
def simplified() -> np.ndarray:
    """uint32 [65536]: for each character up to U+FFFF its simplified form (t2s of OpenCC), else itself."""
    from opencc import OpenCC

    converter = OpenCC("t2s")
    table = np.arange(1 << 16, dtype=np.uint32)
    for code in range(FIRST, LAST + 1):
        mapped = converter.convert(chr(code))
        if len(mapped) == 1:
            table[code] = ord(mapped)
    table.flags.writeable = False
    return table


def characters(across_scripts: bool) -> np.ndarray:
    """The table for the native functions; empty, which changes nothing, unless `across_scripts`."""
    return simplified() if across_scripts else np.zeros(0, np.uint32)
