"""The precision in which operations compute, and the dtypes that kernels take."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from megatron_b2.errors import InputError

KERNEL_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32; float64 stays, so that gradients can be checked in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def one_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that all inputs of a kernel share.

    Raises:
        InputError: if they differ, or it is not fp32, fp16 or bf16.
    """
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) != 1 or not dtypes <= set(KERNEL_DTYPES):
        found = " and ".join(sorted(str(dtype) for dtype in dtypes))
        raise InputError(f"kernels take tensors of one dtype, fp32, fp16 or bf16; got {found}")
    return dtypes.pop()
