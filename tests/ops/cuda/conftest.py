"""What tests of the CUDA kernels share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_b2.testing.kernels import cpu_shim


@pytest.fixture
def shim() -> Iterator[cpu_shim.Shim]:
    """CUDA operations work on CPU tensors."""
    if reason := cpu_shim.missing():
        pytest.skip(reason)
    with cpu_shim.kernels_on_cpu() as loaded:
        yield loaded
