"""Records, sinks and the display."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_b2.engine.base import StepResult
from megatron_b2.errors import InputError
from megatron_b2.training.events import StepEvent, Validation
from megatron_b2.training.metrics import (
    JsonlSink,
    MetricsRecorder,
    Record,
    TrainRecord,
    ValidRecord,
    read_metrics,
)
from megatron_b2.training.plot import plot_metrics
from megatron_b2.training.progress import ProgressDisplay
from tests.training.runs import run_config


def _record(step: int, *, loss: float = 1.0, mfu: float | None = None, skipped: bool = False) -> TrainRecord:
    return TrainRecord(
        step=step,
        tokens=step * 10,
        loss=loss,
        ce=loss,
        max_z=2.0,
        grad_norm=3.0,
        lr=1e-3,
        skipped=skipped,
        step_seconds=2.0,
        tokens_per_second=5.0,
        mfu=mfu,
    )


def _event(step: int, *, loss: float) -> StepEvent:
    value = torch.tensor(loss)
    result = StepResult(value, value, value * 2, value * 3, 10, False)
    return StepEvent(step=step, tokens=10 * step, lr=0.1, result=result)


class Collect:
    """Remembers what is written, write by write."""

    def __init__(self) -> None:
        self.writes: list[list[Record]] = []
        self.closed = False

    def write(self, records) -> None:  # type: ignore[no-untyped-def]
        self.writes.append(list(records))

    def close(self) -> None:
        self.closed = True


def test_steps_are_fetched_by_interval_and_before_a_pause(tmp_path: Path) -> None:
    sink = Collect()
    recorder = MetricsRecorder(run_config(tmp_path, tmp_path), num_devices=1, sinks=[sink])
    for step in range(1, 6):
        recorder.step_begin(StepEvent(step=step - 1, tokens=0, lr=0.1))
        recorder.step_end(_event(step, loss=step / 4))
    recorder.pause(_event(5, loss=0.0))
    recorder.validated(
        _event(5, loss=0.0), Validation(loss=1.0, ce=0.9, max_z=500.0, num_targets=7, seconds=0.1)
    )
    recorder.run_end(_event(5, loss=0.0))
    assert [[record.step for record in records] for records in sink.writes] == [[1, 2, 3], [4, 5], [5]]
    first = sink.writes[0][0]
    assert isinstance(first, TrainRecord)
    assert (first.loss, first.max_z, first.grad_norm, first.lr, first.mfu) == (0.25, 0.5, 0.75, 0.1, None)
    assert isinstance(sink.writes[2][0], ValidRecord)
    assert sink.closed


def test_mfu_is_reported_only_with_a_peak(tmp_path: Path) -> None:
    sink = Collect()
    config = run_config(tmp_path, tmp_path, train={"peak_tflops": 1e-9, "log_interval": 1})
    recorder = MetricsRecorder(config, num_devices=2, sinks=[sink])
    recorder.step_begin(StepEvent(step=0, tokens=0, lr=0.1))
    recorder.step_end(_event(1, loss=1.0))
    record = sink.writes[0][0]
    assert isinstance(record, TrainRecord)
    # One block: 6 x (4h^2 + 3hf + Vh) + 6 h s, on two devices of 1,000 FLOP/s each.
    flops = 6 * (4 * 16**2 + 3 * 16 * 24 + 64 * 16) + 6 * 16 * 16
    assert record.mfu == pytest.approx(record.tokens_per_second * flops / 2000)


def test_jsonl_drops_repeated_steps_and_cut_lines_and_writes_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, resume_step=0)
    sink.write([_record(1), _record(2), _record(3, loss=math.nan)])
    sink.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert read_metrics(path)[2]["loss"] is None
    again = JsonlSink(path, resume_step=2)
    again.write([_record(3, loss=0.5)])
    again.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 1.0, 0.5]
    with pytest.raises(InputError, match="no such metrics file"):
        read_metrics(tmp_path / "none.jsonl")


def test_plain_lines_off_a_terminal() -> None:
    out = io.StringIO()
    display = ProgressDisplay(total_steps=10, console=Console(file=out, width=200))
    display.run_begin(StepEvent(step=0, tokens=0, lr=0.1))
    display.write([_record(1), _record(2)])
    display.write([_record(4, mfu=0.4567, skipped=True)])
    display.write(
        [ValidRecord(step=4, tokens=40, loss=1.5, ce=1.25, max_z=9.0, num_targets=1000, seconds=2.0)]
    )
    display.saved(StepEvent(step=4, tokens=40, lr=0.1), Path("run/step"))
    display.close()
    first, second, third, fourth = [line for line in out.getvalue().splitlines() if line]
    assert first.startswith("step 2/10  loss 1.0000  ce 1.0000  max-z 2.0  lr 1.00e-03  grad 3.000")
    assert first.endswith("5 tok/s  MFU n/a  left 0:00:16")
    assert "MFU 45.7%" in second
    assert "SKIPPED (not finite)" in second
    assert third == "step 4: validation loss 1.5000  ce 1.2500  max-z 9.0  (1,000 tokens, 2.0 s)"
    assert fourth == "step 4: saved run/step"


def test_live_bar_on_a_terminal() -> None:
    out = io.StringIO()
    display = ProgressDisplay(total_steps=10, console=Console(file=out, width=200, force_terminal=True))
    display.run_begin(StepEvent(step=0, tokens=0, lr=0.1))
    display.write([_record(2)])
    display.step_end(StepEvent(step=2, tokens=20, lr=0.1))
    display.close()
    assert "step 2/10" in out.getvalue()
    assert "left 0:00:16" in out.getvalue()
    assert "MFU n/a" in out.getvalue()


def test_plot_survives_missing_values(tmp_path: Path) -> None:
    records = [
        {"kind": "train", "step": 1, "loss": None, "ce": 1.0, "max_z": 1.0, "lr": 1.0, "grad_norm": None}
        | {"tokens_per_second": 1.0}
    ]
    for drawn in (records, []):
        path = plot_metrics(drawn, tmp_path / "curves.png", title="x")
        assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
