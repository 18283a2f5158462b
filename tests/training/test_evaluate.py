"""Validation: the means of uneven batches, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from megatron_b2.data.batch import Batch
from megatron_b2.engine import deepspeed as _preloaded  # noqa: F401 (imported once, before the forks)
from megatron_b2.engine.base import Engine
from megatron_b2.testing.fork import run_ranks
from megatron_b2.training.evaluate import Validator
from megatron_b2.training.events import Validation
from tests.engine.runs import global_batch, make_engine, micro_batches, run_config, train

BATCHES = 3


def batches_of(engine: Engine, index: int) -> list[Batch]:
    """Batch 1 has no target in its first half: all of rank 0's share of two."""
    micro = micro_batches(100 + index, engine)
    if index == 1:
        half = global_batch(0).labels.shape[0] // 2
        first = engine.dp_rank * half if engine.dp_size == 2 else 0
        for number, batch in enumerate(micro):
            if first + number * batch.labels.shape[0] < half:
                batch.labels.fill_(-100)
    return micro


def validate(zero: int | None) -> Validation:
    engine = make_engine(run_config(zero=zero))
    train(engine, 1, 2)
    return Validator(engine, lambda index: batches_of(engine, index), BATCHES).run()


def test_values_are_means_over_all_targets_and_positions() -> None:
    engine = make_engine(run_config())
    logits, labels = [], []
    with torch.no_grad():
        for index in range(BATCHES):
            for batch in batches_of(engine, index):
                out = engine.module.logits(batch.input_ids, segment_ids=batch.segment_ids)
                logits.append(out.double().flatten(0, 1))
                labels.append(batch.labels.flatten())
    scores, targets = torch.cat(logits), torch.cat(labels)
    found = Validator(engine, lambda index: batches_of(engine, index), BATCHES).run()
    ce, max_z = cross_entropy(scores, targets).item(), scores.max(dim=1).values.square().mean().item()
    assert found.num_targets == int((targets != -100).sum())
    assert found.ce == pytest.approx(ce, rel=1e-6)
    assert found.max_z == pytest.approx(max_z, rel=1e-5)
    assert found.loss == pytest.approx(ce + engine.config.train.max_z_weight * max_z, rel=1e-6)


@pytest.mark.parametrize("zero", [1, 3])
def test_two_ranks_equal_one(zero: int) -> None:
    expected = validate(None)
    for found in run_ranks(2, validate, zero):
        assert found.num_targets == expected.num_targets
        for key in ("loss", "ce", "max_z"):
            assert getattr(found, key) == pytest.approx(getattr(expected, key), rel=1e-6)
