"""Which operation has which backend, what this machine can run, and what a run uses (decision D7).

A backend is chosen once, before the model is built, from the configuration and the device alone, so that all
ranks choose the same. `auto` takes the first available of the operation's list; a choice by name that is not
available is an error. The torch reference of an operation is its specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final, Literal

import torch

from megatron_b2.config.schema import OpsConfig
from megatron_b2.errors import ConfigError

Backend = Literal["reference", "triton", "cuda"]

BACKENDS: Final[Mapping[str, tuple[Backend, ...]]] = MappingProxyType(
    {
        "attention": ("triton", "reference"),
        "head_loss": ("triton", "reference"),
        "rms_norm": ("cuda", "triton", "reference"),
        "rope": ("triton", "reference"),
        "swiglu": ("cuda", "triton", "reference"),
        "adamw": ("cuda", "reference"),
    }
)
"""Operation -> its backends, in the order in which `auto` prefers them. Fused kernels come before torch, and
CUDA C++, which fits its threads to the width of a row, before Triton (our choice, not measured on a GPU)."""

MAX_TRITON_HEAD_DIM: Final = 160
"""A wider head does not fit the shared memory of a tile."""


@dataclass(frozen=True)
class Choice:
    """The backend of one operation."""

    op: str
    backend: Backend
    reason: str
    """Why this one, for people."""


def unavailable(
    op: str,
    backend: Backend,
    *,
    device: torch.device,
    head_dim: int | None = None,
    offloaded: bool = False,
) -> str:
    """Why `backend` cannot run `op` on `device`; empty if it can.

    `head_dim` is the width of an attention head of the model, where there is one; `offloaded` says that the
    optimizer works on the CPU.
    """
    if backend == "reference":
        return ""
    if op == "adamw" and offloaded:
        return "works on the CPU under parallel.offload_optimizer"
    if backend == "triton":
        reason = _triton_missing(device)
        if not reason and op == "attention" and head_dim is not None and head_dim > MAX_TRITON_HEAD_DIM:
            reason = f"heads are {head_dim} wide, at most {MAX_TRITON_HEAD_DIM} fit"
        return reason
    if find_spec("megatron_b2._cuda") is None:
        return "megatron_b2._cuda was not built: install CUDA's nvcc and run `make setup` again"
    return "" if device.type == "cuda" else f"needs a CUDA device, this is {device.type}"


def _triton_missing(device: torch.device) -> str:
    if find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda":
        return ""
    import triton

    if triton.knobs.runtime.interpret:
        return ""
    return f"needs a CUDA device, this is {device.type} (or, to try it slowly in fp32, TRITON_INTERPRET=1)"


def choose(
    config: OpsConfig, *, device: torch.device, head_dim: int | None = None, offloaded: bool = False
) -> tuple[Choice, ...]:
    """The backend of every operation; arguments as of `unavailable`.

    Raises:
        ConfigError: with every choice by name that is not available.
    """
    problems, choices = [], []
    for op, backends in BACKENDS.items():
        reasons = {
            b: unavailable(op, b, device=device, head_dim=head_dim, offloaded=offloaded) for b in backends
        }
        wanted, key = getattr(config, op), f"ops.{op}"
        if wanted == "default":
            wanted, key = config.backend, "ops.backend"
            if wanted not in ("auto", *backends):
                wanted, key = "auto", f"{key} = {wanted!r}, which it does not have"
        if wanted == "auto":
            choices.append(_automatic(op, key, reasons))
            continue
        if reasons[wanted]:
            usable = " or ".join(backend for backend, reason in reasons.items() if not reason)
            problems.append(f'{key} = "{wanted}": {op} {reasons[wanted]}; use {usable}, or "auto"')
        choices.append(Choice(op, wanted, key))
    if problems:
        raise ConfigError(problems)
    return tuple(choices)


def _automatic(op: str, key: str, reasons: Mapping[Backend, str]) -> Choice:
    """The first without a reason against it; the reference never has one."""
    chosen = next(backend for backend, reason in reasons.items() if not reason)
    against = [f"; {backend} {reason}" for backend, reason in reasons.items() if reason]
    return Choice(op, chosen, f"auto ({key})" + "".join(against))
