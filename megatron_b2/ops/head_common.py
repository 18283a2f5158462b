"""What heads over the vocabulary share: statistics of logits, their merge over parts and ranks, scales.

The statistics of one token over a set of vocabulary columns are four fp32 numbers: the largest logit m, the
sum s of exp(z - m), the lowest id among the largest (exact, ids are below 2^24) and the label's logit (0
where it is not in the set). The log-sum-exp is m + log s. Two sets are merged as in online softmax (Milakov
and Gimelshein 2018). T tokens.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.parallel.tensor_parallel import TensorParallel

PARTS: Final = 8
"""Parts of the whole vocabulary that are merged pair by pair; up to so many ranks have the same bits."""


def check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    """Refuse what a kernel, which trusts the sizes of hidden, would read beyond the end of.

    Raises:
        InputError: if they are not [T, H], [V, H] and int64 [T].
    """
    fits = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and len(weight) > 0
    if not fits or labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise InputError(
            f"hidden must be [T, H], weight [V, H] and labels int64 [T]; got {list(hidden.shape)}, "
            f"{list(weight.shape)} and {str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
        )


class Statistics(NamedTuple):
    """Of the logits of each token over some columns: 16 bytes a token, what tensor-parallel ranks gather."""

    table: Tensor
    """fp32 [T, 4], contiguous: columns as the properties below; `total` is the sum of exp(logit - top)."""

    @classmethod
    def empty(cls, num_tokens: int, device: torch.device) -> Statistics:
        """Of no column: maximum -inf, sum 0, no id (inf), label's logit 0."""
        table = torch.zeros(num_tokens, 4, dtype=torch.float32, device=device)
        table[:, 0].fill_(-torch.inf)
        table[:, 2].fill_(torch.inf)
        return cls(table)

    @property
    def top(self) -> Tensor:
        """Largest logit."""
        return self.table[:, 0]

    @property
    def total(self) -> Tensor:
        """Sum of exp(logit - top)."""
        return self.table[:, 1]

    @property
    def top_index(self) -> Tensor:
        """Vocabulary id of the largest logit, int64, the lowest among equals."""
        return self.table[:, 2].long()

    @property
    def target_logit(self) -> Tensor:
        """Logit of the label; 0 where no column had it."""
        return self.table[:, 3]

    @property
    def lse(self) -> Tensor:
        """Logarithm of the sum of exp(logit)."""
        return self.top + self.total.log()

    def sums(self, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of the cross-entropy where `counted` (bool [T]) and of the squared largest logit, fp32."""
        ce = (self.top - self.target_logit) + self.total.log()
        return (ce * counted).sum(), self.top.square().sum()


def merge(tables: Tensor) -> Statistics:
    """Statistics over neighbouring sets of columns, fp32 [n, T, 4], lowest ids first.

    Merged as a balanced tree: of a power of two of sets, runs of 2^k that were merged before (by the ranks
    that hold them) give the same bits.
    """
    while len(tables) > 1:
        even = len(tables) // 2 * 2
        tables = torch.cat([_merge_pairs(tables[0:even:2], tables[1:even:2]), tables[even:]])
    return Statistics(tables[0])


def _merge_pairs(lower: Tensor, upper: Tensor) -> Tensor:
    """[n, T, 4] each; the lower ids win ties. Sets without a column add nothing, NaN stays NaN."""
    (top, total, index, target), (other_top, other_total, other_index, other_target) = (
        table.unbind(-1) for table in (lower, upper)
    )
    new_top = torch.maximum(top, other_top)
    base = new_top.clamp(min=torch.finfo(torch.float32).min)
    new_total = total * (top - base).exp() + other_total * (other_top - base).exp()
    new_index = torch.where(other_top > top, other_index, index)
    return torch.stack([new_top, new_total, new_index, target + other_target], dim=-1)


def over_ranks(local: Statistics, tensor: TensorParallel) -> Statistics:
    """Statistics over the vocabulary of all ranks, from those of each rank's rows with vocabulary-wide ids.

    One all-gather of 16 bytes a token, merged in rank order, so that every rank has the same bits.
    """
    if tensor.group is None:
        return local
    gathered = local.table.new_empty(tensor.size * len(local.table), 4)
    dist.all_gather_single(gathered, local.table, group=tensor.group)
    return merge(gathered.view(tensor.size, *local.table.shape))


def parts_of_rank(ranks: int) -> int:
    """Into how many of the `PARTS` a rank's rows are cut: a power of two.

    With a power of two of ranks, up to `PARTS`, the parts of all ranks depend on the whole vocabulary only.
    """
    parts = 1
    while parts * 2 * ranks <= PARTS:
        parts *= 2
    return parts


def unit_scales(ce_scale: Tensor, z_scale: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two near the larger scale, 0-dim, and fp32 [2]: ce_scale and 2 z_scale in that unit.

    In units of it the gradient of a logit does not underflow in half precision, as 1 / tokens of a global
    batch times a probability would in fp16.
    """
    scales = torch.stack([ce_scale, 2 * z_scale])
    largest = scales.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    unit = largest / torch.frexp(largest).mantissa
    return unit, scales / unit


def scalar(value: Tensor | float, device: torch.device) -> Tensor:
    """0-dim fp32. A number is filled in on the device: copying it there would wait for the GPU."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32)
    return torch.full((), value, dtype=torch.float32, device=device)
