"""What callbacks see of a run: read-only events at fixed moments."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_b2.engine.base import StepResult


class Outcome(Enum):
    """How a run ended."""

    COMPLETED = "completed"
    """All steps are done."""
    PREEMPTED = "preempted"
    """A signal asked it to stop; its state is saved and the same command continues it."""


@dataclass
class RunState:
    """How far the run is: the part of its state that is no tensor. Saved in every checkpoint."""

    step: int = 0
    """Optimizer steps finished."""
    tokens: int = 0
    """Input tokens seen."""
    seconds: float = 0.0
    """Wall time of the training loop, over all restarts."""


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """A moment of the run."""

    step: int
    """Optimizer steps finished."""
    tokens: int
    """Input tokens seen."""
    lr: float
    """Learning rate of the step just begun or finished."""
    result: StepResult | None = None
    """Of the step just finished. Its tensors live on the device: reading one waits for it."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Means over the validation batches."""

    loss: float
    ce: float
    """Cross-entropy in nats a token."""
    max_z: float
    """Mean squared largest logit."""
    num_targets: int
    """Tokens predicted."""
    seconds: float
    """Wall time it took."""


class Callback:
    """Override what you need; every rank calls its callbacks at the same moments, in their order."""

    def run_begin(self, event: StepEvent) -> None:
        """Before the first step; `event.step` is the step resumed from."""

    def step_begin(self, event: StepEvent) -> None:
        """Before each step."""

    def step_end(self, event: StepEvent) -> None:
        """After each step; `event.result` is set."""

    def pause(self, event: StepEvent) -> None:
        """Training stops for a validation or a checkpoint: time until the next step is no training time."""

    def validated(self, event: StepEvent, validation: Validation) -> None:
        """After a validation."""

    def saved(self, event: StepEvent, path: Path) -> None:
        """After a checkpoint was published at `path`."""

    def run_end(self, event: StepEvent) -> None:
        """After the last step, also when the run stops by an error."""
