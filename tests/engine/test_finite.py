"""A NaN stops or skips the step before anything moves, on every rank, with a name."""

from __future__ import annotations

import pytest
import torch

from megatron_b2.engine import deepspeed as _preloaded  # noqa: F401 (imported once, before the forks)
from megatron_b2.errors import NonFiniteError
from megatron_b2.testing.fork import run_ranks
from tests.engine.runs import make_engine, micro_batches, pieces, run_config, train

STAGES = [None, 0, 1, 2, 3]


def poisoned_step(config, poison: str) -> tuple[str, bool, list]:
    """One good step, one with a NaN on the last rank, one good step; (message, state unchanged, rows)."""
    engine = make_engine(config)
    train(engine, 1, 1)
    before = pieces(engine.logical_state())
    if engine.dp_rank == engine.dp_size - 1:
        if poison == "output":
            module = engine.module.layers["1"].mlp
            handle = module.register_forward_hook(lambda _m, _i, out: out * float("nan"))
        else:
            handle = engine.module.layers["0"].mlp.register_full_backward_hook(
                lambda _m, grads, _o: tuple(g * float("inf") for g in grads)
            )
    message = ""
    try:
        out = engine.train_step(micro_batches(2, engine), lr=1e-3, step=2)
        assert out.skipped
    except NonFiniteError as error:
        message = str(error)
    after = pieces(engine.logical_state())
    same = all(
        torch.equal(a[1], b[1])
        for name in before
        for a, b in zip(before[name][1], after[name][1], strict=True)
    )
    if engine.dp_rank == engine.dp_size - 1:
        handle.remove()
    rows = train(engine, 3, 4) if config.train.on_nonfinite == "skip" else []
    return message, same, rows


def results(stage: int | None, poison: str, action: str) -> list[tuple[str, bool, list]]:
    config = run_config(zero=stage, on_nonfinite=action)
    if stage is None:
        return [poisoned_step(config, poison)]
    return run_ranks(2, poisoned_step, config, poison)


@pytest.mark.parametrize("stage", STAGES)
def test_a_nan_activation_stops_every_rank_and_is_named(stage: int | None) -> None:
    ranks = results(stage, "output", "stop")
    for message, same, _ in ranks:
        assert (
            f"rank {len(ranks) - 1}: loss is not finite, first seen in the output of layers.1.mlp" in message
        )
        assert "step 2" in message
        assert same


@pytest.mark.parametrize("stage", STAGES)
def test_an_infinite_gradient_names_the_parameter(stage: int | None) -> None:
    ranks = results(stage, "gradient", "stop")
    for message, same, _ in ranks:
        assert f"rank {len(ranks) - 1}: gradient of layers.0." in message
        assert same


@pytest.mark.parametrize("stage", STAGES)
def test_a_skipped_step_leaves_no_trace(stage: int | None) -> None:
    engine_rows = results(stage, "output", "skip")[0]
    assert engine_rows[1]
    reference = make_engine(run_config())
    train(reference, 1, 1)
    expected = train(reference, 3, 4)
    torch.testing.assert_close(torch.tensor(engine_rows[2]), torch.tensor(expected), atol=1e-6, rtol=1e-6)
