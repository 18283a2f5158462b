"""The engine: one optimizer step over micro-batches, the same arithmetic whatever shards the state.

The loss is a sum divided by the global number of targets before the backward pass (architecture decision
D9), so neither gradient accumulation nor the number of ranks changes a gradient. Non-finite losses and
gradients are found before the optimizer moves anything.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_b2.checkpoint.logical import LogicalState
from megatron_b2.config.schema import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.finite import FiniteGuard, first_nonfinite_layer
from megatron_b2.engine.sharded_state import logical_name
from megatron_b2.errors import NonFiniteError
from megatron_b2.ops.head_loss import IGNORE_INDEX
from megatron_b2.ops.registry import Backend, choose
from megatron_b2.parallel.breadcrumbs import Breadcrumbs
from megatron_b2.parallel.comm import Comm
from megatron_b2.parallel.layout import Layout

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. Tensors are 0-dim fp32 on the engine's device."""

    loss: Tensor
    """ce + max_z_weight * max_z, mean over the global batch."""
    ce: Tensor
    """Cross-entropy, mean over the targets of the global batch."""
    max_z: Tensor
    """Squared largest logit, mean over the positions of the global batch."""
    grad_norm: Tensor
    """Global gradient norm before clipping."""
    tokens: int
    """Input tokens of the global batch."""
    skipped: bool
    """True if a non-finite value made the step leave everything as it was."""


@dataclass(frozen=True)
class EvalResult:
    """Means over a validation batch of all ranks; tensors as in `StepResult`."""

    loss: Tensor
    ce: Tensor
    max_z: Tensor
    num_targets: int
    """Targets counted in the cross-entropy."""


@dataclass(frozen=True)
class _Scales:
    targets: Tensor
    positions: Tensor
    ce: Tensor
    z: Tensor


class Engine(ABC):
    """Runs the model on this rank and keeps weights and optimizer state.

    Args:
        config: the whole run.
        comm: all ranks of the run.
        device: where this rank computes.
        layout: sizes of the parallel dimensions.
        crumbs: take where this rank is, for a watchdog.
    """

    module: nn.Module
    """What this rank trains: the model, or the pipeline stages that it holds."""

    def __init__(
        self,
        config: RunConfig,
        *,
        comm: Comm,
        device: torch.device,
        layout: Layout,
        crumbs: Breadcrumbs | None = None,
    ) -> None:
        self.config = config
        self.comm = comm
        self.device = device
        self.layout = layout
        self.coordinates = layout.coordinates(comm.rank)
        self.op_choices = choose(
            config.ops,
            device=device,
            head_dim=config.model.head_dim,
            offloaded=config.parallel.offload_optimizer,
        )
        """The backend of every operation."""
        for choice in self.op_choices if comm.rank == 0 else ():
            LOGGER.info("%s: %s, %s", choice.op, choice.backend, choice.reason)
        self.crumbs = Breadcrumbs() if crumbs is None else crumbs
        self.dp_rank = self.coordinates.dp
        self.dp_size = layout.data

    def backend_of(self, op: str) -> Backend:
        """What was chosen for an operation."""
        return next(choice.backend for choice in self.op_choices if choice.op == op)

    # What a kind of engine provides.

    @abstractmethod
    def _accumulate(self, micro: Sequence[Batch], ce_scale: Tensor, z_scale: Tensor) -> Tensor:
        """Forward and backward of all micro-batches: sums [ce, max_z], fp64, of what this rank computed.

        Gradients are accumulated and reduced over the ranks that share this rank's weights.
        """

    @abstractmethod
    def _evaluate(self, micro: Sequence[Batch]) -> Tensor:
        """Forward only; sums as in `_accumulate`."""

    @abstractmethod
    def _update(self, lr: float) -> Tensor:
        """Clip, step the optimizer, clear gradients; the gradient norm before clipping, 0-dim."""

    @abstractmethod
    def _discard_gradients(self) -> None:
        """Forget what was accumulated, as if the step had not been."""

    @abstractmethod
    def _sum_over_batch(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that hold the other parts of the global batch, in place."""

    @abstractmethod
    def _sum_over_stages(self, tensor: Tensor) -> Tensor:
        """Sum over the pipeline stages of this rank's batch, in place."""

    @abstractmethod
    def logical_state(self) -> LogicalState:
        """Weights and optimizer state as views of this rank's memory; writing into them loads."""

    @abstractmethod
    def state_loaded(self) -> None:
        """Make the working weights follow what was written into `logical_state`."""

    @property
    def point_to_point_groups(self) -> Sequence[ProcessGroup]:
        """Groups that carry messages: their ranks do not all make the same calls.

        Whatever waits for one of these groups leaves a breadcrumb that names the ranks it waits for.
        """
        return ()

    # What all share.

    def _start(self, module: nn.Module) -> None:
        self.module = module
        self._guard = FiniteGuard(module, device=self.device)

    def train_step(self, micro: Sequence[Batch], *, lr: float, step: int) -> StepResult:
        """Forward, backward, reduce, check, clip, update.

        Args:
            micro: this rank's micro-batches of the global batch.
            lr: learning rate of this step.
            step: 1-based number of the step, for messages.

        Raises:
            NonFiniteError: a loss or gradient is NaN or infinite and train.on_nonfinite is "stop"; weights
                and optimizer state are as before the step.
        """
        tokens = self.dp_size * sum(batch.input_ids.numel() for batch in micro)
        micro = self._here(micro)
        scales = self._scales(micro)
        self._guard.reset()
        # Engines average gradients over the ranks that share weights, hence the factor.
        average = self.layout.data_context
        sums = self._accumulate(micro, scales.ce * average, scales.z * average)
        skipped = self._nonfinite(micro, sums, step)
        if skipped:
            self._discard_gradients()
            grad_norm = torch.full((), torch.nan, device=self.device)
        else:
            with self.crumbs.operation("clipping and optimizer step"):
                grad_norm = self._update(lr)
        ce, max_z = self._means(sums, scales)
        loss = ce + self.config.train.max_z_weight * max_z
        return StepResult(loss, ce, max_z, grad_norm, tokens, skipped)

    @torch.no_grad()
    def eval_step(self, micro: Sequence[Batch]) -> EvalResult:
        """Losses of this rank's share of a validation batch, averaged over all ranks."""
        micro = self._here(micro)
        scales = self._scales(micro)
        self.module.eval()
        sums = self._evaluate(micro)
        self.module.train()
        ce, max_z = self._means(sums, scales)
        loss = ce + self.config.train.max_z_weight * max_z
        return EvalResult(loss, ce, max_z, int(scales.targets.item()))

    def rank_state(self) -> dict[str, Tensor]:
        """Random-number state of this rank, uint8 tensors."""
        state = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def load_rank_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `rank_state` returned on this rank."""
        torch.set_rng_state(state["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in state:
            torch.cuda.set_rng_state(state["rng/cuda"], self.device)

    def _here(self, micro: Sequence[Batch]) -> list[Batch]:
        """This rank's part of its micro-batches, on its device."""
        place, size = self.coordinates.cp, self.layout.context
        return [batch.context_part(place, size).to(self.device) for batch in micro]

    def _scales(self, micro: Sequence[Batch]) -> _Scales:
        counts = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in micro:
            counts[0] += (batch.labels != IGNORE_INDEX).sum()
            counts[1] += batch.labels.numel()
        targets, positions = self._sum_over_batch(counts).unbind()
        ce = (1.0 / targets.clamp(min=1)).float()
        z = (self.config.train.max_z_weight / positions).float()
        return _Scales(targets, positions, ce, z)

    def _means(self, sums: Tensor, scales: _Scales) -> tuple[Tensor, Tensor]:
        total = self._sum_over_batch(self._sum_over_stages(sums.clone()))
        ce, max_z = total / torch.stack([scales.targets.clamp(min=1), scales.positions])
        return ce.float(), max_z.float()

    def _nonfinite(self, micro: Sequence[Batch], sums: Tensor, step: int) -> bool:
        """Whether any rank met a non-finite value; raises on all ranks if the run is to stop."""
        loss_is_finite = bool(torch.isfinite(sums).all())
        parameter = self._guard.culprit()
        if not self.comm.all_reduce_max(int(not loss_is_finite or parameter is not None)):
            return False
        finding = None
        if self.comm.all_reduce_max(int(not loss_is_finite)):
            layer = first_nonfinite_layer(self.module, lambda: self._evaluate(micro))
            if layer is not None or not loss_is_finite:
                seen = f"first seen in the output of {logical_name(layer)}" if layer else "though not again"
                finding = f"loss is not finite, {seen}"
        elif parameter is not None:
            finding = f"gradient of {logical_name(parameter)} is not finite"
        findings = self.comm.all_gather_object(finding)
        lines = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(findings) if text is not None)
        if self.config.train.on_nonfinite == "skip":
            if self.comm.rank == 0:
                LOGGER.warning("step %d skipped: %s", step, lines)
            return True
        raise NonFiniteError(
            f"step {step}: {lines}. Nothing was updated: resume from the last checkpoint with a lower "
            'optim.max_lr, or set train.on_nonfinite = "skip"'
        )
