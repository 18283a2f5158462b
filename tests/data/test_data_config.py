"""Phases and the Megatron-LM order as settings: from TOML and back, and the rules between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_b2.config import load_config, to_dict, to_toml
from megatron_b2.config.checks import find_problems
from megatron_b2.config.data_checks import DATA_RULES
from megatron_b2.config.decode import from_dict
from megatron_b2.config.schema import DataConfig, MegatronOrderConfig, PhaseConfig, RunConfig, SourceConfig
from megatron_b2.errors import ConfigError

PHASED = """
extends = ["preset:toy"]
[[data.sources]]
prefix = "zh"
weight = 0.6
[[data.sources]]
prefix = "en"
weight = 0.4

[[data.phases]]
from_step = 100
[[data.phases.sources]]
prefix = "zh"
append = ["zh-2024"]
[[data.phases.sources]]
prefix = "en"
weight = 2

[[data.phases]]
from_step = 200
[[data.phases.sources]]
prefix = "code"
weight = 0.1
[[data.phases.sources]]
prefix = "zh"
append = ["zh-2024", "zh-2025"]

[data.megatron]
surplus = 0.01
"""


def test_phases_are_tables_and_survive_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(PHASED)
    config = load_config(path).config
    assert [phase.from_step for phase in config.data.phases] == [100, 200]
    assert config.data.phases[0].sources == (
        SourceConfig(prefix="zh", append=("zh-2024",)),
        SourceConfig(prefix="en", weight=2.0),
    )
    assert config.data.phases[1].sources[1].append == ("zh-2024", "zh-2025")
    assert config.data.megatron == MegatronOrderConfig(surplus=0.01)
    assert find_problems(config, world_size=1) == []
    path.write_text(to_toml(config))
    assert load_config(path).config == config
    assert from_dict(RunConfig, to_dict(config)) == config


def test_mistakes_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        PHASED.replace("weight = 0.1", "wait = 0.1").replace("from_step = 100", 'from_step = "x"')
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert "run.toml:11: data.phases[0].from_step must be an integer, got 'x'" in text
    assert "run.toml:23: unknown key data.phases[1].sources[0].wait; did you mean" in text


ZH, EN = SourceConfig(prefix="zh"), SourceConfig(prefix="en")
GROWN = replace(ZH, append=("zh2",))
MEGATRON = {"order": "megatron", "split": (969.0, 30.0, 1.0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": (PhaseConfig(from_step=0, sources=(ZH,)),)}, "data.phases[0].from_step = 0 must be greater than 0"),
        (
            {"phases": (PhaseConfig(from_step=7, sources=(ZH,)), PhaseConfig(from_step=7, sources=(ZH,)))},
            "data.phases[1].from_step = 7 must be greater than that of the phase before, 7",
        ),
        ({"phases": (PhaseConfig(from_step=7),)}, "data.phases[0].sources is empty: list the whole blend from step 7 on"),
        (
            {"phases": (PhaseConfig(from_step=7, sources=(replace(ZH, weight=0.0),)),)},
            "data.phases[0].sources[0].weight = 0 must be greater than 0",
        ),
        (
            {"phases": (PhaseConfig(from_step=7, sources=(ZH, ZH)),)},
            "data.phases[0].sources[0].prefix = 'zh' is given 2 times",
        ),
        (
            {"phases": (PhaseConfig(from_step=7, sources=(replace(ZH, append=("en",)), EN)),)},
            "data.phases[0].sources[0].append = 'en' is given 2 times",
        ),
        (
            {"sources": (replace(ZH, append=("",)),)},
            "data.sources[0].append is empty: give the path",
        ),
        (
            {"sources": (GROWN,), "phases": (PhaseConfig(from_step=7, sources=(ZH,)),)},
            "data.phases[0].sources[0].append = [] must begin with ['zh2'], which 'zh' has by then",
        ),
        (
            {
                "phases": (
                    PhaseConfig(from_step=7, sources=(GROWN,)),
                    PhaseConfig(from_step=8, sources=(EN,)),
                    PhaseConfig(from_step=9, sources=(replace(ZH, append=("zh3", "zh2")),)),
                )
            },
            "data.phases[2].sources[0].append = ['zh3', 'zh2'] must begin with ['zh2']",
        ),
        (
            {**MEGATRON, "phases": (PhaseConfig(from_step=7, sources=(ZH,)),)},
            'data.order = "megatron" repeats a Megatron-LM run, whose data cannot change: remove data.phases',
        ),
        ({**MEGATRON, "sources": (GROWN,)}, 'data.order = "megatron" repeats a Megatron-LM run, whose data cannot'),
        (
            {**MEGATRON, "megatron": MegatronOrderConfig(train_samples=15)},
            "data.megatron.train_samples = 15 is less than train.steps * train.global_batch_size = ",
        ),
        ({"megatron": MegatronOrderConfig(surplus=-0.1)}, "data.megatron.surplus = -0.1 must be 0 or more"),
        ({"megatron": MegatronOrderConfig(train_samples=-1)}, "data.megatron.train_samples = -1 must be 0 or more"),
        ({"split": (969.0, 30.0, 1.0)}, "data.split = [969.0, 30.0, 1.0] (train, validation, test) must be 0 or more"),
    ],
)  # fmt: skip
def test_rules(changes: dict[str, Any], message: str) -> None:
    toy = load_config("preset:toy").config
    data = DataConfig(**({"sources": (ZH, EN)} | changes))
    problems = find_problems(replace(toy, data=data))
    assert any(problem.startswith(message) for problem in problems), problems


def test_a_seed_that_numpy_cannot_take() -> None:
    toy = load_config("preset:toy").config
    data = DataConfig(sources=(ZH,), **MEGATRON)  # type: ignore[arg-type]
    assert find_problems(replace(toy, data=data)) == []
    wrong = replace(toy, data=data, train=replace(toy.train, seed=2**32))
    assert find_problems(wrong) == [
        'train.seed = 4294967296 must be less than 2^32 with data.order = "megatron"'
    ]


def test_every_rule_says_what_it_holds() -> None:
    assert all(rule.__doc__ for rule in DATA_RULES)
