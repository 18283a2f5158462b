"""parallel.auto: what it chooses, that it fits, and that nothing cheaper would."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_b2.config import RunConfig, check, load_config
from megatron_b2.errors import ConfigError
from megatron_b2.layouts.auto import AutoChoice, resolve_auto
from megatron_b2.layouts.memory import GIB, rank_memory, usable_bytes
from megatron_b2.layouts.parameters import kept_whole, part_parameters
from megatron_b2.layouts.stages import rank_parts, run_schedule
from megatron_b2.parallel.layout import Layout


def choose(world_size: int, *overrides: str) -> AutoChoice:
    config = load_config(
        "preset:baichuan2-13b", ["--parallel.auto", *overrides], world_size=world_size
    ).config
    return resolve_auto(config, world_size=world_size)


def largest(config: RunConfig, world_size: int) -> int:
    layout = Layout.of(config.parallel, world_size=world_size)
    pairs = zip(rank_parts(config), run_schedule(config, layout), strict=True)
    return max(rank_memory(config, layout, *pair).total for pair in pairs)


def test_plenty_of_memory_needs_nothing() -> None:
    choice = choose(1024, "--parallel.tensor", "8", "--parallel.sequence-parallel")
    assert choice.config.parallel.zero_stage == 1
    assert choice.config.train.recompute == "none"
    assert not choice.config.parallel.auto
    check(choice.config, world_size=1024)


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (64, ("--parallel.memory-gb", "40")),
        (64, ("--parallel.memory-gb", "24")),
        (64, ("--parallel.memory-gb", "40", "--train.micro-batch-size", "2")),
        (512, ("--parallel.tensor", "8", "--parallel.pipeline", "4", "--parallel.memory-gb", "12")),
        (
            512,
            (
                *("--parallel.tensor", "4", "--parallel.pipeline", "4", "--parallel.memory-gb", "24"),
                *("--parallel.schedule", "interleaved", "--parallel.virtual-stages", "2"),
            ),
        ),
    ],
)
def test_what_is_chosen_fits_and_with_one_block_less_it_would_not(
    world_size: int, overrides: tuple[str, ...]
) -> None:
    choice = choose(world_size, *overrides)
    config, usable = choice.config, usable_bytes(choice.config)
    check(config, world_size=world_size)
    assert largest(config, world_size) == choice.chosen.memory.total <= usable
    assert all(choice.chosen.seconds <= item.seconds for item in choice.candidates if item.fits)
    layers = choice.chosen.recompute_layers
    if config.parallel.zero_stage < 3 and layers:
        for layer in layers:  # on a pipeline rank that is full without it
            rest = tuple(other for other in layers if other != layer)
            train = replace(
                config.train, recompute_layers=rest, recompute=config.train.recompute if rest else "none"
            )
            assert largest(replace(config, train=train), world_size) > usable


def test_zero_3_keeps_whole_what_fits() -> None:
    choice = choose(64, "--parallel.memory-gb", "30")
    config = choice.config
    assert config.parallel.zero_stage == 3
    assert 0 < config.parallel.whole_parameters < config.model.num_parameters
    parameters = part_parameters(config.model, rank_parts(config)[0][0], tensor=1)
    limit = config.parallel.whole_parameters
    whole = kept_whole(parameters, each=limit, together=limit)
    assert whole[0].name == "embedding.weight"
    more = replace(config.parallel, whole_parameters=limit + parameters[len(whole)].size)
    assert largest(replace(config, parallel=more), 64) > usable_bytes(config)


def test_reasons_say_what_was_weighed() -> None:
    choice = choose(64)
    lines = choice.reasons()
    assert lines[0] == "budget: parallel.memory_gb = 80 GiB, of which 72.0 may be filled"
    assert sum(line.startswith("chosen ") for line in lines) == 1
    assert any("does not fit" in line for line in lines)


def test_given_partitioning_is_kept() -> None:
    choice = choose(64, "--parallel.hpz", "8")
    assert {item.zero_stage for item in choice.candidates} == {3}
    assert choice.config.parallel.hpz == 8


def test_a_pipeline_stays_at_zero_1() -> None:
    choice = choose(64, "--parallel.pipeline", "4")
    assert {item.zero_stage for item in choice.candidates} == {1}


def test_nothing_fits_names_the_closest_and_what_would_help() -> None:
    with pytest.raises(ConfigError) as caught:
        choose(64, "--parallel.memory-gb", "4")
    message = str(caught.value)
    assert message.startswith(
        "parallel.auto = true finds nothing that fits parallel.memory_gb = 4 (3.6 GiB may be"
    )
    assert "Closest: ZeRO-3, full recomputation of 40 blocks (0-39) needs" in message
    assert message.endswith(
        "try parallel.tensor or parallel.pipeline higher, train.micro_batch_size lower or "
        "parallel.offload_optimizer = true"
    )


def test_broken_rules_are_reported_before_anything_is_chosen() -> None:
    config = load_config("preset:baichuan2-13b", ["--parallel.auto", "--parallel.tensor", "8"]).config
    with pytest.raises(ConfigError, match="100 ranks is not a multiple of tensor x context x pipeline"):
        resolve_auto(config, world_size=100)


def test_the_given_zero_stage_does_not_matter() -> None:
    given = ("--parallel.offload-optimizer", "--parallel.zero-stage")
    zero, one = (choose(64, *given, stage) for stage in ("0", "1"))
    assert zero.config == one.config


def test_choice_is_deterministic() -> None:
    first, second = (choose(64, "--parallel.memory-gb", "40") for _ in range(2))
    assert first.config == second.config
    assert first.chosen.memory.total < 40 * GIB
