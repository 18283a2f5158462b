"""The single engine does what its configuration says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from torch import nn

from tests.engine.runs import make_engine, run_config, train


@pytest.mark.parametrize(("layers", "forwards"), [((), [2, 2]), ((1,), [1, 2])])
def test_only_the_named_blocks_are_recomputed(layers: tuple[int, ...], forwards: list[int]) -> None:
    config = run_config(recompute="full", micro_batch_size=8)
    config = replace(config, train=replace(config.train, recompute_layers=layers))
    engine = make_engine(config)
    calls: Counter[int] = Counter()

    def count(module: nn.Module, inputs: object, index: int) -> None:
        calls[index] += 1

    for index in (0, 1):
        block = engine.module.get_submodule(f"layers.{index}.mlp")
        block.register_forward_pre_hook(lambda module, inputs, i=index: count(module, inputs, i))
    train(engine, 1, 1)
    assert [calls[index] for index in (0, 1)] == forwards
