"""All parity checks of all kernels on one device, for `b2 ops verify`.

On a CPU Triton kernels run under the interpreter and CUDA sources through the fibre header, in forked
processes; on a GPU both run on it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from megatron_b2.ops.cuda import extension
from megatron_b2.testing.kernels import attention, cpu_shim, cuda, elementwise, head_loss
from megatron_b2.testing.kernels.interpreter import run_interpreted
from megatron_b2.testing.kernels.parity import Backend, Check, Deviation


@dataclass(frozen=True)
class Result:
    """One check that ran."""

    check: Check
    deviations: tuple[Deviation, ...]
    failure: str = ""
    """Traceback of a check that did not run to its end."""

    @property
    def passed(self) -> bool:
        """Whether every quantity is within the criterion."""
        return not self.failure and all(deviation.passed for deviation in self.deviations)

    def describe(self) -> str:
        """One line for people: the quantity nearest to, or farthest beyond, its limit."""
        if self.failure:
            return f"FAILED: {self.failure.strip().splitlines()[-1]}"
        worst = max(self.deviations, key=lambda d: (not d.passed, d.ours / max(d.limit, 1e-300)))
        verdict = "ok" if self.passed else "TOO FAR OFF"
        return f"{worst.quantity} {worst.ours:.1e}, torch {worst.torch:.1e}  {verdict}"


def all_checks(*, quick: bool, only: str = "") -> list[Check]:
    """Checks of every kernel whose operation, backend or name contains `only`."""
    found = [*elementwise.checks(), *head_loss.checks(), *attention.checks(), *cuda.checks()]
    return [
        check
        for check in found
        if (check.quick or not quick) and only in f"{check.op} {check.backend} {check.name}"
    ]


def missing(checks: Sequence[Check], device: torch.device) -> dict[Backend, str]:
    """Backends of the checks that cannot run on the device, and what they lack."""
    lacks: dict[Backend, str] = {
        "triton": "" if find_spec("triton") is not None else "the triton package is not installed",
        "cuda": cpu_shim.missing() if device.type == "cpu" else extension.missing(),
    }
    return {check.backend: lacks[check.backend] for check in checks if lacks[check.backend]}


def verify(checks: Sequence[Check], device: torch.device) -> Iterator[Result]:
    """Run them one after the other."""
    for check in checks:
        try:
            if check.backend == "triton" and device.type == "cpu":
                deviations = run_interpreted(check.run, device)
            else:
                deviations = check.run(device)
        except Exception:
            yield Result(check, (), traceback.format_exc())
        else:
            yield Result(check, tuple(deviations))
