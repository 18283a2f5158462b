"""Executes any schedule on one pipeline rank. Knows neither model nor engine, and never scales gradients.

    runner = PipelineRunner(schedule="1f1b", rank=..., num_ranks=..., group=..., dtype=..., device=...)
    losses = runner.run(forward, num_micro=8, shape=(micro_batch, sequence, hidden))

`forward(chunk, micro, x)` computes a stage: from x, the activation of the stage before (none for the first
stage), the activation for the next stage, or on the last stage the scalar to call backward on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributed import ProcessGroup

from megatron_b2.errors import ConfigError
from megatron_b2.parallel.breadcrumbs import Breadcrumbs, Operation
from megatron_b2.pipeline.plan import Channels, RankPlan, Step, plan_communication
from megatron_b2.pipeline.schedule import Instruction, Schedule, ScheduleName, build_schedule, forward_only
from megatron_b2.pipeline.simulate import Stages
from megatron_b2.pipeline.split_backward import SplitBackward
from megatron_b2.pipeline.transport import Transport

Forward = Callable[[int, int, Tensor | None], Tensor]
"""(chunk, micro-batch, activation of the stage before or none) to the stage's output."""

AfterBackward = Callable[[int, int], None]
"""(chunk, micro-batch), called when gradients of parameters were just added."""


KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
)
"""What breadcrumbs call an instruction."""


@dataclass
class _Held:
    """What a stage keeps of one forward until its backward. The output itself is not kept, only its edge."""

    x: Tensor | None
    root: GradientEdge | None
    """None if no parameter of the stage, and nothing before it, requires a gradient."""


class PipelineRunner:
    """One pipeline rank.

    Args:
        schedule: which schedule `run` follows.
        num_chunks: chunks of layers this rank holds; chunk c is virtual stage c * num_ranks + rank.
        rank: this pipeline rank, which must also be its rank in the group.
        num_ranks: pipeline ranks.
        group: the pipeline ranks; none if there is only one.
        gradient_group: the same ranks in a second group, for gradients. With NCCL it is what lets activations
            and gradients overtake each other; gloo matches by tag and needs none.
        dtype: of activations.
        device: where this rank computes.
        split_backward: false lets "zero_bubble" compute both gradients at I and nothing at W. Right for
            stages that recompute whole blocks, which would recompute once a pass.
        crumbs: take what this rank computes, and whom it waits for, for a watchdog.

    Raises:
        ConfigError: the ranks of the group were given different settings.
    """

    def __init__(
        self,
        *,
        schedule: ScheduleName,
        rank: int,
        num_ranks: int,
        group: ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
        gradient_group: ProcessGroup | None = None,
        num_chunks: int = 1,
        split_backward: bool = True,
        crumbs: Breadcrumbs | None = None,
    ) -> None:
        if (group is None) != (num_ranks == 1):
            raise ValueError(
                f"{num_ranks} pipeline ranks need {'no' if num_ranks == 1 else 'a'} process group"
            )
        self._schedule, self._stages = schedule, Stages(num_ranks, num_chunks)
        self._rank, self._split_backward = rank, split_backward
        self._dtype, self._device = dtype, device
        self._plans: dict[tuple[str, int], RankPlan] = {}
        self._crumbs = Breadcrumbs() if crumbs is None else crumbs
        self._groups: tuple[ProcessGroup, ProcessGroup] | None = None
        self._channels: Channels = 2
        if group is not None:
            self._groups = (group, gradient_group or group)
            if gradient_group is None and dist.get_backend(group) == "nccl":
                self._channels = 1
            # Also NCCL's first operation on each group, which must be a collective of all its ranks.
            for each in dict.fromkeys(self._groups):
                _require_agreement((schedule, num_ranks, num_chunks, str(dtype)), each)

    def run(
        self,
        forward: Forward,
        *,
        num_micro: int,
        shape: Sequence[int],
        after_backward: AfterBackward | None = None,
    ) -> list[Tensor]:
        """Forward and backward of all micro-batches; gradients are added to `.grad` as by Tensor.backward.

        Args:
            forward: computes a stage; see the module.
            num_micro: micro-batches, the same on every rank.
            shape: of every activation between stages.
            after_backward: called after each backward (of the parameters, when it is split).

        Returns:
            The detached losses in the order of micro-batches on the last pipeline rank; empty on others.
        """
        return self._run(self._plan(self._schedule, num_micro), forward, shape, after_backward, train=True)

    @torch.no_grad()
    def run_forward(self, forward: Forward, *, num_micro: int, shape: Sequence[int]) -> list[Tensor]:
        """Forward of any number of micro-batches without gradients; the losses as in `run`."""
        return self._run(self._plan("forward_only", num_micro), forward, shape, None, train=False)

    def _plan(self, name: ScheduleName | str, num_micro: int) -> RankPlan:
        key = (name, num_micro)
        if key not in self._plans:
            sizes = {
                "num_ranks": self._stages.num_ranks,
                "num_micro": num_micro,
                "num_chunks": self._stages.num_chunks,
            }
            schedule: Schedule = (
                forward_only(**sizes) if name == "forward_only" else build_schedule(self._schedule, **sizes)
            )
            self._plans[key] = plan_communication(schedule, channels=self._channels)[self._rank]
        return self._plans[key]

    def _run(
        self,
        plan: RankPlan,
        forward: Forward,
        shape: Sequence[int],
        after_backward: AfterBackward | None,
        *,
        train: bool,
    ) -> list[Tensor]:
        transport = Transport(
            rank=self._rank,
            groups=self._groups,
            num_stages=self._stages.count,
            shape=shape,
            dtype=self._dtype,
            device=self._device,
            crumbs=self._crumbs,
        )
        compute = _Compute(forward, after_backward, train=train, split=self._split_backward)
        transport.post(None, plan.receives)
        for step in plan.steps:
            received = self._receive(transport, step)
            with self._computing(step.instruction):
                out = compute(step.instruction, received)
            if step.makes is None:
                if out is not None and step.instruction.kind == "F":
                    compute.losses[step.instruction.micro] = out
                transport.post(None, step.receives)
            else:
                assert out is not None
                transport.post((step.makes, out), step.receives)
        transport.finish()
        return [compute.losses[micro] for micro in sorted(compute.losses)]

    def _receive(self, transport: Transport, step: Step) -> Tensor | None:
        if step.needs is None:
            return None
        received = transport.take(step.needs)
        transport.let_go(step.delivered)
        return received

    def _computing(self, instruction: Instruction) -> Operation:
        stage = self._stages.stage(self._rank, instruction.chunk)
        return self._crumbs.operation(f"{KINDS[instruction.kind]} of stage {stage}", micro=instruction.micro)


class _Compute:
    """The computations of one run, and what they hand to each other on this rank."""

    def __init__(
        self, forward: Forward, after_backward: AfterBackward | None, *, train: bool, split: bool
    ) -> None:
        self._forward, self._after_backward = forward, after_backward
        self._train, self._split = train, split
        self._held: dict[tuple[int, int], _Held] = {}
        self._half_done: dict[tuple[int, int], SplitBackward | None] = {}
        self.losses: dict[int, Tensor] = {}
        """Losses by micro-batch."""

    def __call__(self, instruction: Instruction, received: Tensor | None) -> Tensor | None:
        """Do it; returns the activation, the loss, the gradient of the input, or nothing."""
        place = (instruction.chunk, instruction.micro)
        if instruction.kind == "F":
            return self._stage_forward(place, received)
        if instruction.kind == "W":
            self._weights(place)
            return None
        held = self._held.pop(place)
        if held.root is None:
            self._half_done[place] = None
            return None
        if instruction.kind == "I" and self._split:
            split = self._half_done[place] = SplitBackward(held.root, received, held.x)
            return split.input_gradient()
        torch.autograd.backward(held.root, received)
        if instruction.kind == "I":
            self._half_done[place] = None
        self._call_after(place)
        return None if held.x is None else held.x.grad

    def _stage_forward(self, place: tuple[int, int], x: Tensor | None) -> Tensor:
        if self._train and x is not None:
            x.requires_grad_()
        out = self._forward(*place, x)
        if self._train:
            root = get_gradient_edge(out) if out.requires_grad else None
            self._held[place] = _Held(x, root)
        return out.detach()

    def _weights(self, place: tuple[int, int]) -> None:
        split = self._half_done.pop(place)
        if split is not None:
            split.accumulate_weights()
            self._call_after(place)

    def _call_after(self, place: tuple[int, int]) -> None:
        if self._after_backward is not None:
            self._after_backward(*place)


def _require_agreement(settings: tuple[object, ...], group: ProcessGroup) -> None:
    """Refuse to start ranks that would wait for each other for ever."""
    everyone: list[tuple[object, ...]] = [()] * dist.get_world_size(group)
    dist.all_gather_object(everyone, settings, group=group)
    for rank, others in enumerate(everyone):
        if others != everyone[0]:
            raise ConfigError(
                f"pipeline rank {rank} has (schedule, ranks, chunks, dtype) = {others}, rank 0 has "
                f"{everyone[0]}; start all ranks with the same configuration"
            )
