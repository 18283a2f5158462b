"""Stop flags, and the exit status of the command."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_b2.checkpoint.catalog import list_checkpoints
from megatron_b2.cli.pretrain import main
from megatron_b2.config import to_toml
from megatron_b2.parallel.comm import ProcessGroupComm, SingleComm
from megatron_b2.testing.fork import run_ranks
from megatron_b2.training.signals import EXIT_REQUEUE, STOP_SIGNALS, StopSignals
from tests.training.runs import run_config, write_data


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_flag_is_set_repeatedly_and_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignals() as stop:
        assert stop.agreed(SingleComm()) == 0
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop.agreed(SingleComm()) == number
        assert stop.agreed(SingleComm()) == number
    assert signal.getsignal(number) is before


def test_a_leaving_process_survives_the_signals_of_srun() -> None:
    def body() -> bool:
        with StopSignals() as stop:
            stop.ignore()
        for number in STOP_SIGNALS:
            os.kill(os.getpid(), number)
        return True

    assert run_ranks(1, body) == [True]


def test_all_ranks_agree() -> None:
    def body() -> list[int]:
        comm = ProcessGroupComm()
        with StopSignals() as stop:
            answers = [stop.agreed(comm)]
            if comm.rank == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            answers.append(stop.agreed(comm))
        return answers

    assert run_ranks(3, body) == [[0, signal.SIGUSR1]] * 3


def test_the_command_exits_with_75_and_continues_when_called_again(tmp_path: Path) -> None:
    config = run_config(tmp_path, write_data(tmp_path), train={"steps": 100_000})
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    metrics = Path(config.output_dir) / "metrics.jsonl"

    def stop_soon() -> None:
        while not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def interrupted() -> int:
        threading.Thread(target=stop_soon, daemon=True).start()
        return main([str(file), "--local_rank=0", "--checkpoint.interval", "0"])

    assert run_ranks(1, interrupted) == [EXIT_REQUEUE]
    (saved,) = list_checkpoints(Path(config.output_dir) / "checkpoints")
    assert saved.problem is None
    steps = str(saved.step + 2)
    assert run_ranks(1, lambda: main([str(file), "--train.steps", steps])) == [0]
    summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
    assert (summary["outcome"], summary["step"]) == ("completed", saved.step + 2)


def test_dry_run_checks_the_inputs_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(tmp_path, write_data(tmp_path))
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config))
    assert main([str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "inputs are in order" in printed
    assert f"{config.model.num_parameters:,}" in printed
    assert not Path(config.output_dir).exists()
