"""Sends and receives of one pipeline rank: posted without waiting, waited for when their tensor is needed.

Everything goes through batch_isend_irecv. gloo matches by tag and moves data on its own threads; NCCL ignores
tags and matches by the order that `plan.py` fixes, on a stream of its own for each group. A send and the
receive that follows it on the same group form one batch, so that NCCL moves both at once; further receives
are batches of their own, so that a tensor that is needed soon never waits for one that is needed later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_b2.parallel.breadcrumbs import Breadcrumbs, Operation
from megatron_b2.pipeline.simulate import Message


class Transport:
    """One step's messages of this rank.

    Args:
        rank: this pipeline rank, which is also its rank in the group.
        groups: the pipeline ranks, for activations and for gradients; none if there is only one rank.
        num_stages: virtual stages, for distinct tags.
        shape: of every activation and gradient.
        dtype: of every activation and gradient.
        device: where receives are put.
        crumbs: take whom this rank waits for, for a watchdog.
    """

    def __init__(
        self,
        *,
        rank: int,
        groups: tuple[ProcessGroup, ProcessGroup] | None,
        num_stages: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        crumbs: Breadcrumbs,
    ) -> None:
        self._rank, self._groups, self._num_stages = rank, groups, num_stages
        self._crumbs = crumbs
        self._global_ranks = [] if groups is None else dist.get_process_group_ranks(groups[0])
        self._shape, self._dtype, self._device = tuple(shape), dtype, device
        self._receives: dict[Message, tuple[Any, Tensor]] = {}
        self._sends: dict[Message, tuple[Any, Tensor]] = {}

    def post(self, send: tuple[Message, Tensor] | None, receives: Sequence[Message]) -> None:
        """Start a send, then receives; returns at once. The sent tensor must not be changed any more."""
        batch = []
        if send is not None:
            message, tensor = send
            self._check(message, tensor)
            batch.append((message, tensor.contiguous()))
        for message in receives:
            if batch and self._group(batch[0][0]) is not self._group(message):
                self._start(batch)
                batch = []
            batch.append((message, torch.empty(self._shape, dtype=self._dtype, device=self._device)))
            self._start(batch)
            batch = []
        self._start(batch)

    def take(self, message: Message) -> Tensor:
        """The received tensor, once it is there."""
        work, tensor = self._receives.pop(message)
        with self._waiting("receive", message):
            work.wait()
        return tensor

    def let_go(self, messages: Sequence[Message]) -> None:
        """Free the tensors of sends that are known to be through."""
        for message in messages:
            work, _ = self._sends.pop(message)
            with self._waiting("send", message):
                work.wait()

    def finish(self) -> None:
        """Wait for the sends that are left, and on a GPU for everything: its host has not waited so far."""
        self.let_go(tuple(self._sends))
        assert not self._receives, f"received and not used: {list(self._receives)}"
        if self._device.type == "cuda" and self._global_ranks:
            others = tuple(r for index, r in enumerate(self._global_ranks) if index != self._rank)
            with self._crumbs.operation("messages of the pipeline on the GPU", peers=others):
                torch.cuda.current_stream(self._device).synchronize()

    def _waiting(self, kind: Literal["send", "receive"], message: Message) -> Operation:
        """The breadcrumb while a message is waited for: it names the other rank."""
        peer = self._global_ranks[message.source if kind == "receive" else message.target]
        name = f"{kind} {message.direction} for stage {message.stage}"
        return self._crumbs.operation(name, micro=message.micro, peers=(peer,))

    def _start(self, batch: Sequence[tuple[Message, Tensor]]) -> None:
        if not batch:
            return
        works = dist.batch_isend_irecv([self._operation(message, tensor) for message, tensor in batch])
        # NCCL returns one handle for the whole batch.
        if len(works) < len(batch):
            works = [works[0]] * len(batch)
        for (message, tensor), work in zip(batch, works, strict=True):
            pending = self._sends if message.source == self._rank else self._receives
            pending[message] = (work, tensor)

    def _group(self, message: Message) -> ProcessGroup:
        assert self._groups is not None
        return self._groups[message.direction == "gradient"]

    def _operation(self, message: Message, tensor: Tensor) -> dist.P2POp:
        is_send = message.source == self._rank
        return dist.P2POp(
            dist.isend if is_send else dist.irecv,
            tensor,
            group=self._group(message),
            group_peer=message.target if is_send else message.source,
            tag=2 * (message.micro * self._num_stages + message.stage) + (message.direction == "gradient"),
        )

    def _check(self, message: Message, tensor: Tensor) -> None:
        if tuple(tensor.shape) != self._shape or tensor.dtype != self._dtype:
            raise ValueError(
                f"{message.describe()} is {tensor.dtype} {list(tensor.shape)}, but the pipeline was told "
                f"{self._dtype} {list(self._shape)}"
            )
