"""Softmax of NormHead between two matrix products, one chunk of vocabulary columns at a time
(csrc/cuda/head_softmax.cu).

Raw products r = x W_chunk^T [T, C] come in; logits n_v r, n_v = 1 / ||w_v||, are never stored. Forward:
`update_statistics` for each chunk. Backward: r again, then `epilogue` turns it into delta n in place (delta
is the gradient of the logits), from which dx += (delta n) W_chunk and G = (delta n)^T x follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.cuda import extension
from megatron_b2.ops.head_common import Statistics

MAX_VOCAB = 2**24
"""Ids travel as fp32, 16 bytes a token in all."""
SPLITS = 16
"""Parts of the tokens whose column sums are made at once (our choice)."""


def update_statistics(
    statistics: Statistics, products: Tensor, inverse_norms: Tensor, labels: Tensor, *, first_column: int
) -> None:
    """Merge one chunk into the statistics, in place.

    Args:
        statistics: of the chunks before, in ascending order of columns.
        products: raw products [T, C], rows contiguous (a stride between them may be larger than C).
        inverse_norms: fp32 [C].
        labels: int64 [T], vocabulary ids; others than this chunk's count for nothing here.
        first_column: vocabulary id of column 0.
    """
    _check(products, inverse_norms, labels, first_column)
    pointers = (products, inverse_norms, labels, statistics.table)
    sizes = (*products.shape, products.stride(0), first_column)
    code = extension.dtype_code(products)
    extension.launch("head_statistics", products.device, *pointers, *sizes, code)


def epilogue(
    products: Tensor,
    inverse_norms: Tensor,
    labels: Tensor,
    *,
    lse: Tensor,
    ce_grad: Tensor,
    z_grad: Tensor,
    top_index: Tensor,
    column_sums: Tensor,
    first_column: int,
    out: Tensor | None = None,
) -> Tensor:
    """delta n of one chunk, delta = ce_grad (softmax - 1_label) + z_grad 1_top, with one rounding.

    Args:
        products: raw products [T, C], overwritten unless `out` is given.
        inverse_norms: fp32 [C].
        labels: int64 [T].
        lse: fp32 [T], over the whole vocabulary.
        ce_grad: fp32 [T], gradient of each token's cross-entropy, 0 where it does not count.
        z_grad: fp32 [T], gradient of each token's largest logit.
        top_index: int64 [T], vocabulary id of the largest logit.
        column_sums: fp32 [C]; sum over tokens of delta times logit is added to it.
        first_column: vocabulary id of column 0.
        out: of the shape and strides of `products`, or none.

    Returns:
        [T, C]: products, or out.
    """
    _check(products, inverse_norms, labels, first_column)
    grad = products if out is None else out
    if grad.shape != products.shape or grad.stride() != products.stride():
        raise InputError("out must have the shape and strides of products")
    if column_sums.shape != inverse_norms.shape or column_sums.dtype != torch.float32:
        raise InputError(f"column_sums must be fp32 {list(inverse_norms.shape)}")
    table = torch.stack([lse, ce_grad, z_grad, top_index.float()], dim=1)
    if table.dtype != torch.float32:
        raise InputError("lse, ce_grad and z_grad must be fp32")
    splits = min(SPLITS, max(len(products), 1))
    partial = torch.empty(splits, products.shape[1], dtype=torch.float32, device=products.device)
    pointers = (products, inverse_norms, labels, table, grad, partial, column_sums, splits)
    sizes = (*products.shape, products.stride(0), first_column)
    codes = extension.dtype_code(products), extension.dtype_code(grad)
    extension.launch("head_epilogue", products.device, *pointers, *sizes, *codes)
    return grad


def _check(products: Tensor, inverse_norms: Tensor, labels: Tensor, first_column: int) -> None:
    tokens, columns = products.shape
    if products.stride(1) != 1 or products.stride(0) < columns:
        raise InputError("the rows of products must be contiguous")
    if inverse_norms.shape != (columns,) or inverse_norms.dtype != torch.float32:
        raise InputError(f"inverse_norms must be fp32 [{columns}]")
    if labels.shape != (tokens,) or labels.dtype != torch.int64:
        raise InputError(f"labels must be int64 [{tokens}]")
    if not (inverse_norms.is_contiguous() and labels.is_contiguous()):
        raise InputError("inverse_norms and labels must be contiguous")
    if first_column + columns > MAX_VOCAB:
        raise InputError(f"vocabulary ids must be below {MAX_VOCAB:,}")
