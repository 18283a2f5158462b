"""NormHead (report section 2.5): logits = x (W / ||W_row||)^T, the same in training and in evaluation.

Stateless: the stored rows are never rewritten. The scale is applied to the product, so W / ||W_row|| never
exists. Shapes: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12
"""Smallest row norm that is divided by (report's published code)."""


def inverse_row_norms(weight: Tensor) -> Tensor:
    """1 / max(||W_v||, 1e-12), fp32 [V], for weight [V, H]."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)
    return norms.clamp_min_(EPS).reciprocal_()


def normalise_rows(weight: Tensor) -> Tensor:
    """Rows of weight [V, H] divided by their length, fp32: what exports bake into a plain head."""
    rows = weight.float()
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_min_(EPS)


def norm_head_logits(hidden: Tensor, weight: Tensor, *, inverse_norms: Tensor | None = None) -> Tensor:
    """Logits against normalised rows.

    Args:
        hidden: [..., H].
        weight: [V, H], raw rows.
        inverse_norms: fp32 [V] from `inverse_row_norms`, to reuse between calls that share the weight.

    Returns:
        fp32 [..., V].
    """
    scale = inverse_row_norms(weight) if inverse_norms is None else inverse_norms
    return torch.matmul(hidden, weight.t()).float() * scale
