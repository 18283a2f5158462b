"""Metrics: collected without waiting for the device, fetched every N steps, written to all sinks."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import InputError
from megatron_b2.files.atomic import atomic_file
from megatron_b2.training.events import Callback, StepEvent, Validation
from megatron_b2.training.flops import model_flops_utilization


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """One optimizer step. Rates are means over the logging interval that the step is in."""

    step: int
    tokens: int
    """Input tokens seen since the run began."""
    loss: float
    ce: float
    max_z: float
    grad_norm: float
    """Before clipping."""
    lr: float
    skipped: bool
    step_seconds: float
    tokens_per_second: float
    """Of the whole run, all devices."""
    mfu: float | None
    """Share of the peak, by the `causal` convention of flops.py; none without train.peak_tflops."""
    kind: str = "train"


@dataclass(frozen=True, kw_only=True)
class ValidRecord:
    """One validation."""

    step: int
    tokens: int
    loss: float
    ce: float
    max_z: float
    num_targets: int
    seconds: float
    kind: str = "valid"


Record = TrainRecord | ValidRecord


class Sink(Protocol):
    """Where records go."""

    def write(self, records: Sequence[Record]) -> None:
        """Take records of rising steps."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class MetricsRecorder(Callback):
    """Turns events into records. Runs on rank 0 only, so the others never wait for their device.

    Every step is recorded; device tensors are fetched together every `train.log_interval` steps and before
    anything that takes a pause.
    """

    def __init__(self, config: RunConfig, *, num_devices: int, sinks: Sequence[Sink]) -> None:
        self._config = config
        self._num_devices = num_devices
        self._sinks = tuple(sinks)
        self._pending: list[StepEvent] = []
        self._interval_start: float | None = None

    def step_begin(self, event: StepEvent) -> None:
        """Start the clock of an interval."""
        if self._interval_start is None:
            self._interval_start = time.perf_counter()

    def step_end(self, event: StepEvent) -> None:
        """Keep the step; fetch at the end of an interval."""
        self._pending.append(event)
        if event.step % self._config.train.log_interval == 0:
            self._flush()

    def pause(self, event: StepEvent) -> None:
        """Fetch what is pending, so that the pause does not count as training time."""
        self._flush()

    def validated(self, event: StepEvent, validation: Validation) -> None:
        """Write the validation."""
        self._write([ValidRecord(step=event.step, tokens=event.tokens, **asdict(validation))])

    def run_end(self, event: StepEvent) -> None:
        """Write the rest and close the sinks."""
        self._flush()
        for sink in self._sinks:
            sink.close()

    def _flush(self) -> None:
        events, self._pending = self._pending, []
        if not events or self._interval_start is None:
            return
        results = [event.result for event in events if event.result is not None]
        values = torch.stack(
            [
                torch.stack([r.loss.double(), r.ce.double(), r.max_z.double(), r.grad_norm.double()])
                for r in results
            ]
        ).tolist()  # the only wait for the device
        seconds = time.perf_counter() - self._interval_start
        self._interval_start = None
        rate = sum(result.tokens for result in results) / max(seconds, 1e-9)
        mfu = model_flops_utilization(
            self._config.model,
            seq_len=self._config.data.seq_len,
            tokens_per_second=rate,
            num_devices=self._num_devices,
            peak_tflops=self._config.train.peak_tflops,
        )
        self._write(
            [
                TrainRecord(
                    step=event.step,
                    tokens=event.tokens,
                    loss=loss,
                    ce=ce,
                    max_z=max_z,
                    grad_norm=grad_norm,
                    lr=event.lr,
                    skipped=result.skipped,
                    step_seconds=seconds / len(events),
                    tokens_per_second=rate,
                    mfu=mfu,
                )
                for event, result, (loss, ce, max_z, grad_norm) in zip(events, results, values, strict=True)
            ]
        )

    def _write(self, records: Sequence[Record]) -> None:
        for sink in self._sinks:
            sink.write(records)


class JsonlSink:
    """One JSON object a record and line. Values that are no numbers are null.

    A resumed run first removes the lines after `resume_step`: steps that a crash made the run repeat.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        keep = [line for line in _lines(path) if json.loads(line)["step"] <= resume_step]
        with atomic_file(path) as file:
            file.writelines(f"{line}\n".encode() for line in keep)
        self._file = path.open("a", encoding="utf-8")

    def write(self, records: Sequence[Record]) -> None:
        """Append the records and hand them to the operating system."""
        for record in records:
            self._file.write(json.dumps({k: _finite(v) for k, v in asdict(record).items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Make the file durable."""
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl, in order. Raises InputError when there is no such file."""
    if not path.is_file():
        raise InputError(f"{path}: no such metrics file")
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[str]:
    """Whole lines; the last one may be cut when a machine went down."""
    if not path.is_file():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line.endswith("}")]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
