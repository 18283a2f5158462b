"""[deepspeed] is judged together with everything else: one list of problems, whatever else is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_b2.config import RunConfig, find_problems, load_config
from megatron_b2.config.deepspeed_keys import zero_settings
from megatron_b2.engine.deepspeed_config import deepspeed_json
from megatron_b2.errors import ConfigError

FILE = """
extends = ["preset:baichuan2-13b"]
[parallel]
tensor = 16
[deepspeed]
gradient_clipping = 9.0
optimizer = {type = "Adam"}
[deepspeed.zero_optimization]
stage = 1
reduce_bucket_size = "much"
"""
CLIPPING = "deepspeed.gradient_clipping = 9.0 contradicts the generated 0.5: change optim.grad_clip instead"
OPTIMIZER = "deepspeed.optimizer must not be given: AdamW comes from [optim]"
BUCKET = (
    "deepspeed.zero_optimization.reduce_bucket_size = 'much' must be a whole number, 0 or more, as the generated "
    "200000000"
)


def config_with(*overrides: str, **deepspeed: Any) -> RunConfig:
    return replace(load_config("preset:baichuan2-13b", overrides).config, deepspeed=deepspeed)


def test_conflicts_and_broken_rules_are_one_list_that_names_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["--train.global-batch-size", "0"], world_size=1024)
    problems = caught.value.problems
    for message, line in ((CLIPPING, 6), (OPTIMIZER, 7), (BUCKET, 10)):
        assert f"{message} ({path}:{line})" in problems
    stage = "deepspeed.zero_optimization.stage = 1 contradicts the generated 2: change parallel.zero_stage instead"
    assert f"{stage} ({path}:9)" in problems
    assert any(
        text.startswith("model.num_heads = 40 is not a multiple of parallel.tensor") for text in problems
    )
    assert any(text.startswith("train.global_batch_size = 0 must be") for text in problems)


@pytest.mark.parametrize("name", ["tensor", "context", "pipeline"])
def test_sizes_below_one_do_not_hide_them(name: str) -> None:
    config = config_with(gradient_clipping=9.0, gradient_accumulation_steps=7)
    config = replace(config, parallel=replace(config.parallel, **{name: 0}))
    problems = find_problems(config, world_size=8)
    assert CLIPPING in problems
    assert any(text.startswith(f"parallel.{name} = 0 must be greater than 0") for text in problems)


def test_the_accumulation_is_judged_once_the_ranks_are_known() -> None:
    config = config_with(gradient_accumulation_steps=7)
    assert find_problems(config) == []
    assert find_problems(config, world_size=64) == [
        "deepspeed.gradient_accumulation_steps = 7 contradicts the generated 16: change train.global_batch_size "
        "instead"
    ]
    assert find_problems(config_with(gradient_accumulation_steps=16), world_size=64) == []


def test_the_single_engine_does_not_hide_them() -> None:
    config = config_with(gradient_clipping=9.0)
    problems = find_problems(replace(config, parallel=replace(config.parallel, engine="single")))
    assert CLIPPING in problems
    assert any(
        text.startswith('[deepspeed] sets gradient_clipping, which parallel.engine = "single"')
        for text in problems
    )


@pytest.mark.parametrize("stage", [1, 3])
def test_what_auto_chooses_is_not_given_as_well(stage: int) -> None:
    config = config_with("--parallel.auto", zero_optimization={"stage": stage})
    assert find_problems(config, world_size=64) == [
        f"deepspeed.zero_optimization.stage = {stage} is chosen by parallel.auto = true: remove it or turn auto off"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("overlap_comm", 1), ("reduce_bucket_size", True), ("sub_group_size", -1), ("sub_group_size", 1.5)],
)
def test_values_have_the_type_of_what_they_replace(name: str, value: object) -> None:
    (problem,) = find_problems(config_with(zero_optimization={name: value}))
    assert problem.startswith(f"deepspeed.zero_optimization.{name} = {value!r} must be ")


def test_zero_settings_are_those_of_the_json() -> None:
    config = config_with(zero_optimization={"reduce_bucket_size": 5e8, "stage3_max_live_parameters": 7})
    settings = zero_settings(config)
    assert settings == deepspeed_json(config, world_size=64)["zero_optimization"]
    assert (settings["reduce_bucket_size"], settings["stage3_max_live_parameters"]) == (5e8, 7)
    assert settings["stage3_max_reuse_distance"] == 1_000_000_000
