"""Whole tiny runs: what they leave, exact resume, stop signals, refused inputs."""

from __future__ import annotations

import gc
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_b2.checkpoint.catalog import list_checkpoints
from megatron_b2.checkpoint.store import CheckpointReader
from megatron_b2.cli import checkpoint as checkpoint_command
from megatron_b2.config import load_config
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import B2Error, CheckpointError, ConfigError, DataError
from megatron_b2.optim.schedule import learning_rate
from megatron_b2.parallel.comm import ProcessGroupComm
from megatron_b2.testing.fork import run_ranks
from megatron_b2.training.checkpoints import milestone_name
from megatron_b2.training.events import Callback, Outcome, StepEvent
from megatron_b2.training.metrics import read_metrics
from tests.checkpoint.support import flip
from tests.training.runs import run, run_config, write_data


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return write_data(tmp_path)


def _train_lines(config: RunConfig) -> list[dict[str, float]]:
    return [r for r in read_metrics(Path(config.output_dir) / "metrics.jsonl") if r["kind"] == "train"]


def _weights(config: RunConfig, step: int) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(Path(config.output_dir) / "checkpoints" / f"step_{step:08d}")
    return {name: reader.read(name) for name in reader.names()}


def _trace(config: RunConfig) -> list[tuple[float, ...]]:
    return [
        tuple(line[key] for key in ("step", "tokens", "loss", "ce", "max_z", "grad_norm", "lr"))
        for line in _train_lines(config)
    ]


class SignalAt(Callback):
    """Sends this process a signal during a step, twice."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def step_begin(self, event: StepEvent) -> None:
        if event.step + 1 == self.step:
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)


def test_a_run_leaves_metrics_curves_checkpoints_and_a_summary(tmp_path: Path, prefix: Path) -> None:
    config = run_config(tmp_path, prefix, train={"steps": 8, "eval_interval": 5})
    assert run(config) is Outcome.COMPLETED
    assert gc.isenabled()
    output = Path(config.output_dir)

    lines = _train_lines(config)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["tokens"] for line in lines] == [64 * step for step in range(1, 9)]
    for line in lines:
        assert line["lr"] == learning_rate(config.optim, train_steps=8, step=int(line["step"]) - 1)
        assert line["loss"] == pytest.approx(line["ce"] + 2e-4 * line["max_z"], rel=1e-5)
        assert line["mfu"] is None
    assert lines[-1]["loss"] < lines[0]["loss"]
    valid = [r["step"] for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "valid"]
    assert valid == [5, 8]

    events = EventAccumulator(str(output / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("train/ce")] == list(range(1, 9))
    assert events.Scalars("train/loss")[2].value == pytest.approx(lines[2]["loss"], rel=1e-6)
    assert [point.step for point in events.Scalars("valid/ce")] == [5, 8]

    summary = json.loads((output / "summary.json").read_text())
    assert (summary["outcome"], summary["step"], summary["tokens"]) == ("completed", 8, 512)
    assert summary["train"]["ce"] == pytest.approx(sum(line["ce"] for line in lines) / 8)
    assert Path(summary["picture"]).read_bytes().startswith(b"\x89PNG")
    assert Path(summary["checkpoint"]).is_dir()
    assert [info.step for info in list_checkpoints(output / "checkpoints")] == [4, 8]
    assert not (output / "PREEMPTED").exists()


def test_stored_configs_run_again(tmp_path: Path, prefix: Path) -> None:
    config = run_config(tmp_path, prefix)
    run(config)
    for path in (
        Path(config.output_dir) / "config.toml",
        Path(config.output_dir) / "checkpoints" / "step_00000008" / "config.toml",
    ):
        assert load_config(path).config == config


def test_resume_is_bit_exact(tmp_path: Path, prefix: Path) -> None:
    straight = run_config(tmp_path / "a", prefix)
    run(straight)
    halves = run_config(tmp_path / "b", prefix)
    assert run(halves, SignalAt(4, signal.SIGUSR1)) is Outcome.PREEMPTED
    assert run(halves) is Outcome.COMPLETED
    assert _trace(halves) == _trace(straight)
    expected, found = _weights(straight, 8), _weights(halves, 8)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_crash_repeats_steps_but_not_metric_lines(tmp_path: Path, prefix: Path) -> None:
    class Crash(Callback):
        def step_begin(self, event: StepEvent) -> None:
            if event.step == 6:
                raise RuntimeError("power failure")

    straight = run_config(tmp_path / "a", prefix)
    run(straight)
    config = run_config(tmp_path / "b", prefix)
    with pytest.raises(RuntimeError, match="power failure"):
        run(config, Crash())
    assert [line["step"] for line in _train_lines(config)] == [1, 2, 3, 4, 5, 6]
    with (Path(config.output_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    assert run(config) is Outcome.COMPLETED
    assert _trace(config) == _trace(straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_this_step_and_asks_for_requeue(tmp_path: Path, prefix: Path, number: int) -> None:
    config = run_config(tmp_path, prefix)
    before = signal.getsignal(number)
    assert run(config, SignalAt(3, number)) is Outcome.PREEMPTED
    assert signal.getsignal(number) is before
    output = Path(config.output_dir)
    assert [info.step for info in list_checkpoints(output / "checkpoints")] == [3]
    assert (output / "PREEMPTED").read_text() == "3\n"
    assert json.loads((output / "summary.json").read_text())["outcome"] == "preempted"
    assert run(config) is Outcome.COMPLETED
    assert not (output / "PREEMPTED").exists()


def test_a_signal_to_one_rank_stops_all_ranks_after_the_same_step(tmp_path: Path, prefix: Path) -> None:
    config = run_config(tmp_path, prefix, parallel={"engine": "deepspeed", "zero_stage": 1})

    def body() -> str:
        comm = ProcessGroupComm()
        callbacks = [SignalAt(3)] if comm.rank == 1 else []
        return run(config, *callbacks, comm=comm).value

    assert run_ranks(2, body) == ["preempted", "preempted"]
    assert [info.step for info in list_checkpoints(Path(config.output_dir) / "checkpoints")] == [3]


def test_running_a_finished_run_again_changes_nothing(tmp_path: Path, prefix: Path) -> None:
    config = run_config(tmp_path, prefix)
    run(config)
    output = Path(config.output_dir)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    assert run(config) is Outcome.COMPLETED
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert run(replace(config, train=replace(config.train, steps=9))) is Outcome.COMPLETED
    assert _train_lines(config)[-1]["step"] == 9


def test_a_signal_does_not_lose_the_validation_of_its_step(tmp_path: Path, prefix: Path) -> None:
    config = run_config(tmp_path, prefix, train={"eval_interval": 3})
    assert run(config, SignalAt(3)) is Outcome.PREEMPTED
    assert run(config, SignalAt(8)) is Outcome.PREEMPTED
    assert run(config) is Outcome.COMPLETED
    records = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "valid"] == [3, 6, 8]


def test_init_from_takes_the_weights_only(tmp_path: Path, prefix: Path) -> None:
    first = run_config(tmp_path / "a", prefix)
    run(first)
    second = run_config(
        tmp_path / "b",
        prefix,
        train={"steps": 1},
        checkpoint={"init_from": first.output_dir},
        optim={"max_lr": 1e-9, "warmup_steps": 0},
    )
    run(second)
    before, after = _weights(first, 8), _weights(second, 1)
    assert after["optim/step"].item() == 1
    name = "model/layers.0.mlp.down.weight"
    assert torch.allclose(before[name], after[name], atol=1e-8)


def test_init_from_refuses_another_model_and_damage(tmp_path: Path, prefix: Path) -> None:
    first = run_config(tmp_path / "a", prefix)
    run(first)
    checkpoint = {"init_from": first.output_dir}
    other = run_config(tmp_path / "b", prefix, checkpoint=checkpoint, model={"norm_eps": 1e-5, "init_std": 0.1})
    with pytest.raises(CheckpointError, match=r"init_from = .* with model.norm_eps = 1e-06, now 1e-05: set"):
        run(other)
    flip(Path(first.output_dir) / "checkpoints" / "step_00000008" / "rank_00000.safetensors", 4_000)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors: damaged, its SHA-256"):
        run(run_config(tmp_path / "b", prefix, checkpoint=checkpoint))
    assert not Path(other.output_dir).exists()


def test_token_milestones_are_saved_and_kept(tmp_path: Path, prefix: Path) -> None:
    # 64 tokens a step: 150, 300 and 450 are first reached after steps 3, 5 and 8.
    config = run_config(tmp_path, prefix, checkpoint={"interval": 0, "milestone_tokens": 150, "keep_last": 1})
    run(config)
    root = Path(config.output_dir) / "checkpoints"
    assert [info.step for info in list_checkpoints(root)] == [3, 5, 8]
    links = {link.name: link.readlink().name for link in (root / "milestones").iterdir()}
    assert links == {
        "train_00150": "step_00000003",
        "train_00300": "step_00000005",
        "train_00450": "step_00000008",
    }
    assert CheckpointReader(root / "milestones" / "train_00300").step == 5
    assert checkpoint_command.main(["list", config.output_dir, "--json", str(tmp_path / "list.json")]) == 0
    listed = json.loads((tmp_path / "list.json").read_text())
    assert [row["milestone"] for row in listed] == sorted(links)


@pytest.mark.parametrize(
    ("tokens", "name"), [(220 * 10**9, "train_00220B"), (5 * 10**6, "train_00005M"), (1_500, "train_01500")]
)
def test_milestones_are_named_by_tokens(tokens: int, name: str) -> None:
    assert milestone_name(tokens) == name


def _other_seed(config: RunConfig) -> RunConfig:
    return replace(config, train=replace(config.train, seed=99))


def _change(table: str, **settings: object) -> Callable[[RunConfig], RunConfig]:
    return lambda config: replace(config, **{table: replace(getattr(config, table), **settings)})


def _other_batch(config: RunConfig) -> RunConfig:
    return replace(config, train=replace(config.train, global_batch_size=8))


def _never(config: RunConfig) -> RunConfig:
    return replace(config, checkpoint=replace(config.checkpoint, resume="never"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_seed, "was trained with other data"),
        (_other_batch, "was trained with train.global_batch_size = 4, now 8"),
        (_change("model", num_heads=4), "was trained with model.num_heads = 2, now 4"),
        (_change("model", position="alibi"), "was trained with model.position = 'rope', now 'alibi'"),
        (_change("model", norm_eps=1e-5), "was trained with model.norm_eps = 1e-06, now 1e-05"),
        (_change("model", rope_base=500.0), r"was trained with model.rope_base = 10000\.0, now 500\.0"),
        (_change("data", document_masking=False), "data.document_masking = True, now False"),
        (_never, 'checkpoint.resume is "never"'),
    ],
)
def test_a_run_is_not_continued_with_other_data(tmp_path: Path, prefix: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    config = run_config(tmp_path, prefix)
    run(config, SignalAt(2))
    lines = _train_lines(config)
    with pytest.raises(CheckpointError, match=message):
        run(change(config))
    assert _train_lines(config) == lines


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": {"global_batch_size": 3}}, ConfigError, "global_batch_size = 3"),
        ({"data": {"sources": ()}}, ConfigError, "data.sources is empty"),
        ({"train": {"global_batch_size": 64}}, DataError, "fewer than one global batch"),
        ({"data": {"seq_len": 5000}}, DataError, "no sample of 5001 tokens"),
        ({"checkpoint": {"init_from": "nowhere"}}, CheckpointError, "nowhere"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(
    tmp_path: Path, prefix: Path, changes: dict[str, dict[str, object]], error: type[B2Error], message: str
) -> None:
    config = run_config(tmp_path, prefix, **changes)
    with pytest.raises(error, match=message):
        run(config)
    assert not Path(config.output_dir).exists()


def test_without_a_validation_split_nothing_is_validated(tmp_path: Path, prefix: Path) -> None:
    config = run_config(tmp_path, prefix, data={"split": (1.0, 0.0, 0.0)}, train={"steps": 2})
    assert run(config) is Outcome.COMPLETED
    assert json.loads((Path(config.output_dir) / "summary.json").read_text())["validation"] is None
