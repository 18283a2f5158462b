"""ALiBi slopes (Press et al. 2022) for any number of heads, exactly as Baichuan 2 13B uses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def alibi_slopes(num_heads: int) -> Tensor:
    """Slope of each head, fp32 [num_heads].

    For a power of two n: 2^(-8i/n), i = 1..n. Otherwise the slopes of the largest power of two p below,
    followed by every second slope of 2p. The list is not monotone (40 heads: 32 slopes, then 8 from the
    64-head list), so a tensor-parallel rank slices the global list and never recomputes its own.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * j / power) for j in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)
