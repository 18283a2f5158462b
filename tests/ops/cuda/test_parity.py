"""Every check of the kit, by the sources on the CPU."""

from __future__ import annotations

import pytest
import torch

from megatron_b2.testing.kernels import cpu_shim
from megatron_b2.testing.kernels.cuda import checks
from megatron_b2.testing.kernels.parity import Check

CASES = [
    pytest.param(check, id=f"{check.op}: {check.name}", marks=() if check.quick else pytest.mark.slow)
    for check in checks()
]


@pytest.mark.skipif(bool(cpu_shim.missing()), reason=cpu_shim.missing())
@pytest.mark.parametrize("check", CASES)
def test_error_is_at_most_twice_that_of_torch(check: Check) -> None:
    assert check.backend == "cuda"
    assert [d for d in check.run(torch.device("cpu")) if not d.passed] == []
