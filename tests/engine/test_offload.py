"""parallel.offload_optimizer: the same numbers with the optimizer on the CPU; and what needs CUDA is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from megatron_b2.engine.deepspeed import require_quantization_kernels
from megatron_b2.errors import ConfigError
from megatron_b2.testing.fork import run_ranks
from tests.engine.runs import Trace, assemble, make_engine, run, run_config
from tests.engine.test_finite import poisoned_step

pytestmark = pytest.mark.slow  # many engine start-ups

TOLERANCE = 1e-6
Precision = Literal["fp32", "bf16"]


def assert_same(traces: list[Trace], expected: list[Trace]) -> None:
    """Every step on every rank; every weight and moment."""
    for trace in traces:
        torch.testing.assert_close(
            torch.tensor(trace.steps), torch.tensor(expected[0].steps), atol=TOLERANCE, rtol=TOLERANCE
        )
    whole = assemble(expected)
    for name, value in assemble(traces).items():
        torch.testing.assert_close(
            value, whole[name], atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture(scope="module")
def reference() -> Trace:
    return run(run_config())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_equals_one_process(reference: Trace, stage: int) -> None:
    for micro_batch_size in (1, 4):  # with accumulation and without
        config = run_config(zero=stage, layout={"offload_optimizer": True}, micro_batch_size=micro_batch_size)
        assert_same(run_ranks(2, run, config), [reference])


@pytest.mark.parametrize(
    ("precision", "stage", "layout"),
    [
        ("bf16", 1, {}),
        ("bf16", 2, {}),
        ("bf16", 3, {}),
        ("bf16", 1, {"pipeline": 2}),
        ("bf16", 1, {"pipeline": 2, "schedule": "zero_bubble"}),
        ("fp32", 1, {"pipeline": 2, "schedule": "zero_bubble"}),
    ],
    ids=str,
)
def test_offloading_changes_nothing(precision: Precision, stage: int, layout: dict[str, Any]) -> None:
    """Of bf16 the first step also shows that gradients are accumulated in fp32: rounded sums would differ by
    1e-3. In later ones a weight may be rounded to the other neighbour, since norms are summed in another order."""

    def runs(steps: int) -> Iterator[list[Trace]]:
        for is_offloaded in (True, False):
            offload = {"offload_optimizer": is_offloaded, **layout}
            config = run_config(zero=stage, layout=offload, precision=precision, micro_batch_size=1, steps=steps)
            yield run_ranks(2, run, replace(config, optim=replace(config.optim, warmup_steps=1)))

    assert_same(*runs(steps=1 if precision == "bf16" else 5))
    if precision == "bf16":
        offloaded, plain = (torch.tensor(traces[0].steps) for traces in runs(steps=5))
        torch.testing.assert_close(offloaded, plain, atol=0, rtol=2e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_step_after_a_skipped_one_is_taken(stage: int) -> None:
    """In bf16 DeepSpeed looks for overflows too; see `ZeroState.discard_gradients`."""
    rows = []
    for is_offloaded in (True, False):
        layout = {"offload_optimizer": is_offloaded}
        config = run_config(zero=stage, layout=layout, precision="bf16", on_nonfinite="skip")
        rows.append(run_ranks(2, poisoned_step, config, "output")[0][2])
    offloaded, plain = map(torch.tensor, rows)
    torch.testing.assert_close(offloaded, plain, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["quantized_weights", "quantized_gradients"])
def test_quantization_is_refused_on_cpus(name: str) -> None:
    config = run_config(zero=3, layout={name: True})
    with pytest.raises(AssertionError, match=f"ConfigError: parallel.{name} = true needs CUDA kernels"):
        run_ranks(2, make_engine, config)
    require_quantization_kernels(config, torch.device("cuda"))


def test_both_quantizations_are_refused_together() -> None:
    config = run_config(zero=3, layout={"quantized_weights": True, "quantized_gradients": True})
    with pytest.raises(ConfigError) as caught:
        require_quantization_kernels(config, torch.device("cpu"))
    assert len(caught.value.problems) == 2
