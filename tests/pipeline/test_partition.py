"""Layers over stages: balanced, with embedding and head counted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_b2.config import load_config
from megatron_b2.config.schema import ModelConfig
from megatron_b2.errors import ConfigError
from megatron_b2.pipeline.partition import balance, stage_costs, stage_layers


def counts(model: ModelConfig, num_stages: int) -> list[int]:
    return [len(stage.layers) for stage in stage_layers(model, num_stages)]


def test_13b_embedding_and_head_count_as_two_layers_each() -> None:
    model = load_config("preset:baichuan2-13b").config.model
    assert counts(model, 2) == [20, 20]
    assert counts(model, 4) == [9, 11, 11, 9]
    assert counts(model, 8) == [3, 5, 5, 6, 6, 6, 6, 3]


def test_7b() -> None:
    model = load_config("preset:baichuan2-7b").config.model
    assert counts(model, 4) == [7, 9, 9, 7]
    assert counts(model, 8) == [2, 4, 4, 5, 5, 5, 5, 2]


def test_every_layer_is_on_one_stage_in_order() -> None:
    model = load_config("preset:baichuan2-13b").config.model
    for num_stages in (1, 3, 8, 40):
        stages = stage_layers(model, num_stages)
        assert [layer for stage in stages for layer in stage.layers] == list(range(40))
        assert [stage.has_embedding for stage in stages] == [i == 0 for i in range(num_stages)]
        assert [stage.has_head for stage in stages] == [i == num_stages - 1 for i in range(num_stages)]


def test_more_stages_than_layers_are_refused() -> None:
    model = load_config("preset:baichuan2-13b").config.model
    with pytest.raises(ConfigError, match=r"41 virtual pipeline stages .* but the model has 40"):
        stage_layers(model, 41)


def splits(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for head in range(1, total - parts + 2):
        yield from ((head, *tail) for tail in splits(total - head, parts - 1))


@pytest.mark.parametrize("first", [0, 3, 7, 25])
@pytest.mark.parametrize("last", [0, 4, 11])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_no_split_is_better(num_stages: int, first: int, last: int) -> None:
    def quality(split: tuple[int, ...]) -> tuple[int, int]:
        costs = stage_costs(split, layer=3, first=first, last=last)
        return max(costs), sum(cost * cost for cost in costs)

    found = balance(9, num_stages, layer=3, first=first, last=last)
    assert quality(found) == min(quality(split) for split in splits(9, num_stages))
