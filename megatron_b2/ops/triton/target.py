"""Which machine a kernel is for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch

MULTIPROCESSORS: Final[Mapping[str, int]] = MappingProxyType({"sm_80": 108, "sm_90": 132})
"""Of an A100/A800 and an H100/H800 SXM. Fixed, so that every rank launches the same programs."""


def arch_of(device: torch.device) -> str:
    """ "sm_80", "sm_90" ... of a CUDA device; "cpu" for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def multiprocessors(arch: str) -> int:
    """Multiprocessors to fill on an architecture; 108 where it is not in the table. So too for the
    interpreter, whose sums then have the order of a GPU's."""
    return MULTIPROCESSORS.get(arch, 108)
