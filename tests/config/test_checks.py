"""Each rule between settings: what breaks it, and what the message says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from megatron_b2.config import (
    RunConfig,
    SourceConfig,
    check,
    check_for_training,
    checks,
    find_problems,
    load_config,
)
from megatron_b2.config.data_checks import DATA_RULES
from megatron_b2.config.layout_checks import LAYOUT_RULES
from megatron_b2.errors import ConfigError

GOOD = load_config(
    "preset:toy",
    [
        *("--optim.max-lr", "1e-3", "--optim.warmup-steps", "50", "--train.steps", "500"),
        *(
            "--train.eval-interval",
            "100",
            "--train.global-batch-size",
            "16",
            "--train.micro-batch-size",
            "8",
            "--checkpoint.interval",
            "100",
        ),
    ],
).config
"""The toy model in a run whose numbers the messages below repeat."""
ZH = SourceConfig(prefix="zh")


def changed(changes: Mapping[str, Any]) -> RunConfig:
    config = GOOD
    for key, value in changes.items():
        table, _, name = key.rpartition(".")
        part = replace(getattr(config, table), **{name: value}) if table else value
        config = replace(config, **{table or name: part})
    return config


CASES = {
    "positive": [({key: 0}, f"{key} = 0 must be greater than 0") for key in checks.POSITIVE],
    "not_negative": [({key: -1}, f"{key} = -1 must be 0 or more") for key in checks.NOT_NEGATIVE],
    "named": [
        ({"name": " "}, "name is empty: give it a value"),
        ({"output_dir": ""}, "output_dir is empty: give it a value"),
    ],
    "heads_divide_hidden": [
        (
            {"model.num_heads": 7},
            "model.hidden_size = 256 is not a multiple of model.num_heads = 7: use 4 or 8 heads",
        ),
    ],
    "head_dim_even_for_rope": [
        ({"model.hidden_size": 12}, "model.hidden_size / model.num_heads = 3 is odd, but rope rotates pairs"),
    ],
    "skipping_needs_alibi": [
        (
            {"ops.skip_negligible_keys": True},
            'ops.skip_negligible_keys = true needs ALiBi, and model.position = "rope": use false, or position',
        ),
    ],
    "sequence_length": [({"data.seq_len": 1}, "data.seq_len = 1 must be at least 2")],
    "split_shares": [
        (
            {"data.split": (0.5, 0.4, 0.0)},
            "data.split = [0.5, 0.4, 0.0] (train, validation, test) must be 0 or more ",
        ),
        (
            {"data.split": (1.1, 0.1, -0.2)},
            "data.split = [1.1, 0.1, -0.2] (train, validation, test) must be 0 or ",
        ),
        ({"data.split": (0.0, 0.5, 0.5)}, "data.split = [0.0, 0.5, 0.5] leaves nothing to train on"),
    ],
    "source_weights": [
        (
            {"data.sources": (ZH, replace(ZH, prefix="en", weight=0.0))},
            "data.sources[1].weight = 0 must be greater",
        ),
    ],
    "source_prefixes": [
        ({"data.sources": (replace(ZH, prefix=""),)}, "data.sources[0].prefix is empty"),
        ({"data.sources": (ZH, ZH)}, "data.sources[0].prefix = 'zh' is given 2 times"),
    ],
    "learning_rate_floor": [
        ({"optim.min_lr_ratio": 1.5}, "optim.min_lr_ratio = 1.5 must be between 0 and 1"),
        ({"optim.min_lr_ratio": -0.5}, "optim.min_lr_ratio = -0.5 must be between 0 and 1"),
    ],
    "betas": [
        ({"optim.beta1": 1.0}, "optim.beta1 = 1 must be at least 0 and less than 1"),
        ({"optim.beta2": -0.1}, "optim.beta2 = -0.1 must be at least 0 and less than 1"),
    ],
    "warmup_fits": [
        ({"optim.warmup_steps": 501}, "optim.warmup_steps = 501 is more than train.steps = 500"),
    ],
    "decay_after_warmup": [
        ({"optim.decay_steps": 50}, "optim.decay_steps = 50 must be more than optim.warmup_steps = 50"),
    ],
    "validation_has_data": [
        ({"data.split": (1.0, 0.0, 0.0)}, "train.eval_interval = 100 needs validation data, but data.split"),
    ],
    "bf16_needs_zero": [
        (
            {"train.precision": "bf16", "parallel.zero_stage": 0, "parallel.engine": "deepspeed"},
            'train.precision = "bf16" with parallel.zero_stage = 0 trains wrongly under DeepSpeed: use zero_stage 1,',
        ),
    ],
    "deepspeed_keys_used": [
        (
            {"deepspeed": {"log_level": "info"}},
            '[deepspeed] sets log_level, which parallel.engine = "single" ignores',
        ),
    ],
    "keep_every_is_saved": [
        (
            {"checkpoint.keep_every": 250},
            "checkpoint.keep_every = 250 is not a multiple of checkpoint.interval = 100: use 300",
        ),
        (
            {"checkpoint.keep_every": 250, "checkpoint.interval": 0},
            "checkpoint.keep_every = 250 is not a multiple of checkpoint.interval = 0: set checkpoint.interval",
        ),
    ],
    "milestones_are_apart": [
        (
            {"checkpoint.milestone_tokens": 4095},
            "checkpoint.milestone_tokens = 4095 is less than the 4096 tokens of",
        ),
    ],
}


def test_every_rule_has_a_case() -> None:
    elsewhere = (*LAYOUT_RULES, *DATA_RULES)  # test_layout_checks.py, tests/data/test_data_config.py
    rules = [rule for rule in checks.RULES if rule not in elsewhere]
    assert set(CASES) == {rule.__name__ for rule in rules}
    assert all(rule.__doc__ for rule in (*checks.RULES, *checks.WORLD_RULES, *checks.TRAINING_RULES))


@pytest.mark.parametrize(
    ("rule", "changes", "message"),
    [(rule, *case) for rule, cases in CASES.items() for case in cases],
)
def test_rule(rule: str, changes: dict[str, Any], message: str) -> None:
    assert list(getattr(checks, rule)(GOOD)) == []
    problems = list(getattr(checks, rule)(changed(changes)))
    assert problems[0].message.startswith(message)
    with pytest.raises(ConfigError) as caught:
        check(changed(changes))
    assert any(text.startswith(message) for text in caught.value.problems)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.warmup_steps": 500},
        {"optim.decay_steps": 51},
        {"data.split": (0.9, 0.05, 0.05)},
        {"data.split": (1.0, 0.0, 0.0), "train.eval_interval": 0},
        {"train.precision": "bf16", "parallel.zero_stage": 1, "parallel.engine": "deepspeed"},
        {"deepspeed": {"log_level": "info"}, "parallel.engine": "deepspeed"},
        {"checkpoint.keep_every": 300},
        {"checkpoint.milestone_tokens": 4096},
        {"model.hidden_size": 12, "model.position": "alibi"},
        {"data.sources": (ZH, SourceConfig(prefix="en", weight=0.1))},
    ],
)
def test_edges_that_are_fine(changes: dict[str, Any]) -> None:
    assert find_problems(changed(changes), world_size=1) == []


def test_batch_divides() -> None:
    deepspeed = changed({"parallel.engine": "deepspeed"})
    assert find_problems(deepspeed, world_size=2) == []
    assert find_problems(deepspeed, world_size=3) == [
        "train.global_batch_size = 16 is not a multiple of train.micro_batch_size x ranks = 8 x 3 = 24: use 24"
    ]
    assert find_problems(changed({"train.global_batch_size": 20}), world_size=1)[0].endswith("use 16 or 24")
    assert find_problems(deepspeed) == [], "without a number of ranks the batch cannot be judged"


def test_single_engine_is_alone() -> None:
    (problem,) = find_problems(GOOD, world_size=2)
    assert (
        problem == 'parallel.engine = "single" is one process, but 2 were started: set engine = "deepspeed"'
    )


def test_training_needs_sources() -> None:
    check(GOOD)
    with pytest.raises(ConfigError, match=r"data\.sources is empty"):
        check_for_training(GOOD, world_size=1)
    check_for_training(changed({"data.sources": (ZH,)}), world_size=1)


def test_all_rules_are_reported_at_once_with_origins() -> None:
    arguments = ["--model.num-heads", "7", "--optim.beta1", "2", "--optim.warmup-steps", "900"]
    with pytest.raises(ConfigError) as caught:
        load_config("preset:toy", arguments)
    heads, beta, warmup = caught.value.problems
    assert heads.endswith("(preset:toy:6, command line)")
    assert beta == "optim.beta1 = 2 must be at least 0 and less than 1 (command line)"
    assert warmup.endswith("(command line, preset:toy:21)")
