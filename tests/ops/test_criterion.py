"""What the criterion of the parity checks refuses: comparisons with nothing, and small errors of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_b2.ops.attention import Pattern, TorchTiles
from megatron_b2.testing.kernels.attention import DTYPES, QUICK, Shape, compare
from megatron_b2.testing.kernels.parity import Check, Deviation, deviation
from megatron_b2.testing.kernels.verify import Result

CPU = torch.device("cpu")


@pytest.mark.parametrize("torch_result", [torch.inf, torch.nan])
def test_a_torch_that_overflows_excuses_nothing(torch_result: float) -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    found = deviation("out", exact.float(), torch.tensor([torch_result, 2.0]), exact)
    assert not found.passed


@pytest.mark.parametrize("order", [1, -1])
def test_the_line_of_a_check_names_what_failed(order: int) -> None:
    deviations = (Deviation("grad_q", torch.nan, 1e-3, 1e-7), Deviation("out", 1e-3, 1e-3, 1e-7))[::order]
    check = Check("causal_attention", "triton", "a", lambda device: [], quick=True)
    assert Result(check, deviations).describe() == "grad_q nan, torch 1.0e-03  TOO FAR OFF"


@dataclass(frozen=True)
class Changed(TorchTiles):
    """The reference with another log-sum-exp."""

    change: Callable[[Tensor], Tensor]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q, k, v, pattern, **rest)
        return out, self.change(lse)


@pytest.mark.parametrize("shape", QUICK, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_of_the_log_sum_exp_of_a_hundred_thousandth_is_seen(
    shape: Shape, dtype: torch.dtype
) -> None:
    """That is a tenth of the sum of a key among 10,000 equal ones; rounding to 16 bits is much more."""

    def failing(change: Callable[[Tensor], Tensor]) -> set[str]:
        return {x.quantity for x in compare(shape, dtype, CPU, Changed(change)) if not x.passed}

    assert failing(lambda lse: lse) == set()
    assert "lse" in failing(lambda lse: lse + 1e-5)
    assert "lse" in failing(lambda lse: lse.bfloat16().float())
