"""`parallel.auto` in `b2 pretrain` and in `pretrain`: refused or resolved, never half of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_b2.cli.main import main
from megatron_b2.errors import ConfigError
from tests.training.runs import run, run_config, write_data


def test_a_wrong_number_of_ranks_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    options = ("--parallel.auto", "--parallel.tensor", "8", "--output-dir", str(output))
    assert main(["pretrain", "preset:baichuan2-13b", *options]) == 2
    error = capsys.readouterr().err
    assert "1 ranks is not a multiple of tensor x context x pipeline = 8 x 1 x 1 = 8" in error
    assert "command line" in error, "where the setting was made"
    assert not output.exists()


def test_pretrain_refuses_what_is_not_resolved(tmp_path: Path) -> None:
    config = run_config(tmp_path, write_data(tmp_path), parallel={"engine": "deepspeed", "auto": True})
    with pytest.raises(ConfigError, match=r"parallel.auto = true is still to be resolved: .*resolve_auto"):
        run(config)
    assert not Path(config.output_dir).exists()
    with pytest.raises(ConfigError, match=r'needs parallel.engine = "deepspeed"'):
        run(replace(config, parallel=replace(config.parallel, engine="single")))
