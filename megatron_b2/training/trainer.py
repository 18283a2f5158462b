"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from megatron_b2.config.schema import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.base import Engine, StepResult
from megatron_b2.optim.schedule import learning_rate
from megatron_b2.training.checkpoints import RunCheckpoints
from megatron_b2.training.evaluate import Validator
from megatron_b2.training.events import Callback, Outcome, RunState, StepEvent, Validation
from megatron_b2.training.signals import StopSignals


class Trainer:
    """Runs an engine over batches until `train.steps` or a stop signal.

    `batches` starts at `state.step`; `state` is changed in place; without a `validator` nothing is validated.
    Every rank makes the same calls in the same order.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: Engine,
        batches: Iterator[Sequence[Batch]],
        state: RunState,
        checkpoints: RunCheckpoints,
        signals: StopSignals,
        validator: Validator | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.engine = engine
        self.batches = batches
        self.state = state
        self.checkpoints = checkpoints
        self.signals = signals
        self.validator = validator
        self.callbacks = tuple(callbacks)
        self.validation: Validation | None = None
        """The last validation."""

    def fit(self) -> Outcome:
        """Train; always ends with a checkpoint of the last step, and when completed with a validation.

        A stop signal saves before anything else; a validation that this step asks for comes after it.
        """
        self.emit("run_begin")
        try:
            while self.state.step < self.config.train.steps:
                self.train_one()
                stop = self.signals.agreed(self.engine.comm)
                if stop:
                    self.save()
                if self.validator is not None and self._every(self.config.train.eval_interval):
                    self.validate(self.validator)
                if stop:
                    return Outcome.PREEMPTED
                if self.checkpoints.due(self.state):
                    self.save()
            if self.validator is not None:
                self.validate(self.validator)
            self.save()
            return Outcome.COMPLETED
        finally:
            self.emit("run_end")

    def train_one(self) -> None:
        """One optimizer step."""
        start = time.perf_counter()
        micro, lr = next(self.batches), self.lr
        self.emit("step_begin")
        result = self.engine.train_step(micro, lr=lr, step=self.state.step + 1)
        self.state.step += 1
        self.state.tokens += result.tokens
        self.state.seconds += time.perf_counter() - start
        self.emit("step_end", lr=lr, result=result)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.config.optim, train_steps=self.config.train.steps, step=self.state.step)

    def validate(self, validator: Validator) -> None:
        """Validate and tell the callbacks."""
        self.emit("pause")
        self.validation = validator.run()
        self.emit("validated", self.validation)

    def save(self) -> None:
        """Save, unless this very step is saved already."""
        if self.checkpoints.saved_step != self.state.step:
            self.emit("pause")
            self.emit("saved", self.checkpoints.save(self.state))

    def emit(
        self, moment: str, *details: object, lr: float | None = None, result: StepResult | None = None
    ) -> None:
        """Call the method `moment` of every callback with a read-only event."""
        event = StepEvent(
            step=self.state.step,
            tokens=self.state.tokens,
            lr=self.lr if lr is None else lr,
            result=result,
        )
        for callback in self.callbacks:
            getattr(callback, moment)(event, *details)

    def _every(self, interval: int) -> bool:
        """Whether this step ends an interval; the last step has its own validation."""
        return interval > 0 and self.state.step % interval == 0 and self.state.step < self.config.train.steps
