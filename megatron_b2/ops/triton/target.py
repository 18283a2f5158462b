"""Which machine a kernel is for, and what it can compute there."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.precision import one_dtype

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


def check_dtype(*tensors: Tensor) -> None:
    """Refuse what kernels do not compute.

    Raises:
        InputError: for other dtypes than fp32, fp16 and bf16, for several, and for bf16 under Triton's own
            interpreter, which computes on its bits as if they were integers (testing/kernels/interpreter.py
            corrects that).
    """
    if one_dtype(*tensors) == torch.bfloat16 and tensors[0].device.type == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        if InterpreterBuilder.cast_impl.__module__ == InterpreterBuilder.__module__:
            raise InputError(
                'Triton\'s interpreter computes wrong numbers in bf16: use train.precision = "fp32", or '
                'ops.backend = "reference"'
            )
