"""Matrix products by cuBLAS with fp32 results, and sums of them, from factors of any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, *, out: Tensor, adds: bool = False) -> Tensor:
    """a b, or with `adds` out + a b.

    Args:
        a: [M, K], fp32, fp16 or bf16, of any strides.
        b: [K, N], of the same dtype.
        out: fp32 [M, N].

    Returns:
        out.
    """
    return torch.addmm(out, a, b, beta=float(adds), out_dtype=torch.float32, out=out)
