"""`b2 pretrain --dry-run` plans what training would run: parallel.auto is resolved, and why is printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_b2.cli.main import main
from megatron_b2.config import RunConfig, to_toml
from megatron_b2.layouts.auto import resolve_auto
from megatron_b2.training import plan
from megatron_b2.training.plan import RunPlan
from tests.training.runs import run_config, write_data


def config_of(folder: Path, memory_gb: float) -> RunConfig:
    config = run_config(
        folder,
        write_data(folder),
        model={"num_layers": 6, "hidden_size": 32, "ffn_hidden_size": 64},
        train={"global_batch_size": 8, "micro_batch_size": 1},
        parallel={"engine": "deepspeed", "auto": True, "memory_gb": memory_gb},
    )
    # DeepSpeed allocates its buffers whole, however small the model is.
    return replace(config, deepspeed={"zero_optimization": {"reduce_bucket_size": 10_000}})


def dry_run(folder: Path, config: RunConfig) -> int:
    path = folder / "run.toml"
    path.write_text(to_toml(config))
    return main(["pretrain", str(path), "--dry-run", "--world-size", "4"])


def test_auto_is_resolved_as_training_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, 0.001)
    choice = resolve_auto(config, world_size=4)
    assert (choice.config.parallel.zero_stage, choice.config.train.recompute) != (1, "none"), (
        "memory is short"
    )
    planned: list[RunConfig] = []
    original = plan.plan_run

    def recorded(config: RunConfig, *, world_size: int) -> RunPlan:
        planned.append(config)
        return original(config, world_size=world_size)

    monkeypatch.setattr(plan, "plan_run", recorded)
    assert dry_run(tmp_path, config) == 0
    out = capsys.readouterr().out
    assert planned == [choice.config]
    assert "\n".join(choice.reasons()) in out
    assert "inputs are in order" in out
    assert not Path(config.output_dir).exists()


def test_what_fits_nothing_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(tmp_path, config_of(tmp_path, 0.0002)) == 2
    assert "parallel.auto = true finds nothing that fits" in capsys.readouterr().err
