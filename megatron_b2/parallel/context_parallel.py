"""The context-parallel ranks of a model: each holds a contiguous part of every sequence.

Two ways of attending over all of it (`ops/context_attention.py`) need two kinds of communication:

- Ulysses (Jacobs et al. 2023) trades the sequence for the heads and back: `exchange`, one all-to-all.
- The ring (Liu et al. 2023) sends keys and values from rank to rank. Causal attention sees only earlier
  positions, so the ring is a line: a shard travels from its owner to the last rank that sees it and no
  further. `Ring` is the timetable, `Messages` what is sent and received in one of its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_b2.errors import ConfigError
from megatron_b2.parallel.breadcrumbs import Breadcrumbs

Method = Literal["ulysses", "ring"]


@dataclass(frozen=True)
class ContextParallel:
    """One rank of a context-parallel group; the default is a sequence that is not split."""

    size: int = 1
    rank: int = 0
    group: ProcessGroup | None = None
    method: Method = "ulysses"
    crumbs: Breadcrumbs = field(default_factory=Breadcrumbs, compare=False, repr=False)
    """Take whom the ring waits for, for a watchdog."""

    def shard(self, x: Tensor) -> Tensor:
        """This rank's positions [B, S / size, ...] of a whole [B, S, ...]; a view, without communication."""
        assert x.shape[1] % self.size == 0, f"{x.shape[1]} positions do not divide by context {self.size}"
        return x.chunk(self.size, dim=1)[self.rank]


def resolve_method(name: Literal["auto", "ulysses", "ring"], *, heads_local: int, context: int) -> Method:
    """The method that `parallel.context_method` means.

    Args:
        name: "auto" is ulysses where the heads divide, else ring.
        heads_local: attention heads of one tensor-parallel rank.
        context: context-parallel ranks.
    """
    divides = heads_local % context == 0
    if name == "ulysses" and not divides:
        fitting = ", ".join(str(n) for n in range(1, heads_local + 1) if heads_local % n == 0)
        raise ConfigError(
            f'parallel.context_method = "ulysses" gives each of parallel.context = {context} ranks an equal '
            f"share of a tensor-parallel rank's attention heads, and {heads_local} heads do not divide by "
            f'{context}: use context_method = "auto" or "ring", or a parallel.context of {fitting}'
        )
    if name == "auto":
        return "ulysses" if divides else "ring"
    return name


def _all_to_all(x: Tensor, group: ProcessGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad, ctx.group), None


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """x [n, ...] holds a piece for each of the n ranks; the result [n, ...] holds the piece from each.

    One all-to-all; its gradient is one all-to-all back.
    """
    result: Tensor = _Exchange.apply(x, group)
    return result


@dataclass(frozen=True)
class Ring:
    """When the shards of a sequence and their gradients travel, the same on every rank.

    In step t rank r works on the keys and values of shard r - t: its own first, then r - 1 and so on down to
    the first it sees. Before the work of step t it sends that shard on to rank r + 1 and begins to receive
    the next from rank r - 1. In the backward pass the gradient of a shard follows one step behind the shard,
    each rank adds its part, and the last rank sends the sum home to the owner. A message has the same step
    on both of its sides: no rank waits for one that its peer posts later.

    Every method returns the peer of a rank, or none where there is nothing to send or receive.
    """

    first: tuple[int, ...]
    """For each rank the earliest shard that any of its queries sees; never decreases."""

    def last(self, shard: int) -> int:
        """The last rank that sees `shard`."""
        return max(rank for rank, first in enumerate(self.first) if first <= shard)

    def sees(self, rank: int, shard: int) -> bool:
        """Whether any query of `rank` sees a key of `shard`."""
        return self.first[rank] <= shard <= rank

    def num_steps(self, rank: int) -> int:
        """Steps of the forward pass."""
        return rank - self.first[rank] + 1

    def num_backward_steps(self, rank: int) -> int:
        """Steps of the backward pass: also one to pass the last gradient on, and those until ours is home."""
        return 1 + max(self.num_steps(rank), self.last(rank) - rank + 1)

    def keys_to(self, rank: int, step: int) -> int | None:
        """Where keys and values of shard rank - step go in this step."""
        shard = rank - step
        return rank + 1 if self.sees(rank, shard) and rank < self.last(shard) else None

    def keys_from(self, rank: int, step: int) -> int | None:
        """Where keys and values of shard rank - step - 1 come from in this step."""
        return rank - 1 if self.sees(rank, rank - step - 1) else None

    def gradient_to(self, rank: int, step: int) -> int | None:
        """Where the gradient of shard rank - step + 1, worked on in the step before, goes in this step."""
        shard = rank - step + 1
        if not self.sees(rank, shard):
            return None
        if rank < self.last(shard):
            return rank + 1
        return None if shard == rank else shard

    def gradient_from(self, rank: int, step: int) -> int | None:
        """Where the gradient of shard rank - step, without this rank's part, comes from in this step."""
        return rank - 1 if step > 0 and self.sees(rank, rank - step) else None

    def home_from(self, rank: int, step: int) -> int | None:
        """Where the whole gradient of this rank's own shard comes from in this step."""
        last = self.last(rank)
        return last if last > rank and step == last - rank + 1 else None


class Messages:
    """Messages between two ranks each that are posted together and run beside the work until `wait`.

    Between two ranks they must be given in the same order on both sides. On NCCL the group must have run a
    collective before (`ParallelGroups.create`): a step need not involve all ranks, and communicators are made
    by all. `name` is what breadcrumbs call the operation.
    """

    def __init__(self, context: ContextParallel, name: str) -> None:
        assert context.group is not None
        self._group, self._crumbs, self._name = context.group, context.crumbs, name
        self._operations: list[dist.P2POp] = []
        self._waits: list[tuple[str, tuple[int, ...]]] = []
        """Of each operation its kind and the global rank of its peer."""
        self._works: list[dist.Work] = []

    def send(self, tensor: Tensor | None, peer: int | None) -> None:
        """Send a contiguous tensor to rank `peer` of the group, if any; leave it alone until `wait`."""
        if peer is not None:
            assert tensor is not None, f"nothing to send to rank {peer}"
            self._add(dist.isend, tensor, peer)

    def receive(self, like: Tensor, peer: int | None, *, dtype: torch.dtype | None = None) -> Tensor | None:
        """Room, of the shape of `like`, for what rank `peer` sends, if any; filled after `wait`."""
        if peer is None:
            return None
        tensor = torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
        self._add(dist.irecv, tensor, peer)
        return tensor

    def post(self) -> None:
        """Begin."""
        if self._operations:
            self._works = dist.batch_isend_irecv(self._operations)

    def wait(self) -> None:
        """Return when everything is sent and received (on a GPU: for the later work of this stream)."""
        waits = self._waits
        if len(self._works) < len(waits):  # NCCL has one work for the whole batch
            everybody = tuple(peer for _, peers in waits for peer in peers)
            waits = [("send and receive", everybody)] * len(self._works)
        for work, (kind, peers) in zip(self._works, waits, strict=True):
            with self._crumbs.operation(f"{self._name}: {kind}", peers=peers):
                work.wait()

    def _add(self, operation: Callable[..., Any], tensor: Tensor, peer: int) -> None:
        self._operations.append(dist.P2POp(operation, tensor, group=self._group, group_peer=peer))
        kind = "send" if operation is dist.isend else "receive"
        self._waits.append((kind, (dist.get_global_rank(self._group, peer),)))
