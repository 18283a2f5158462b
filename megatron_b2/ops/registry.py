"""Which operation has which backend, what this machine can run, and what a run uses (decision D7).

A backend is chosen once, before the model is built, from the configuration and the device alone, so that all
ranks choose the same. `auto` takes the first available of the operation's list; a choice by name that is not
available is an error. The torch reference of an operation is its specification.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from types import MappingProxyType
from typing import Final, Literal

import torch

from megatron_b2.config.schema import OpsConfig
from megatron_b2.errors import ConfigError
from megatron_b2.ops.cuda import extension
from megatron_b2.ops.triton.tiles import MAX_HEAD_DIM

Backend = Literal["reference", "triton", "cuda"]

BACKENDS: Final[Mapping[str, tuple[Backend, ...]]] = MappingProxyType(
    {
        "attention": ("triton", "reference", "cuda"),
        "head_loss": ("triton", "cuda", "reference"),
        "rms_norm": ("cuda", "triton", "reference"),
        "rope": ("triton", "reference"),
        "swiglu": ("cuda", "triton", "reference"),
        "adamw": ("cuda", "reference"),
    }
)
"""Operation -> its backends, in the order in which `auto` prefers them. Fused kernels come before torch, and
CUDA C++, which fits its threads to the width of a row, before Triton (our choice, not measured on a GPU). The
head of CUDA C++ is not fused with its products and comes after Triton's. What stands behind the reference is
taken only where ops.<operation> names it."""


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
        if not reason and op == "attention" and head_dim is not None and head_dim > MAX_HEAD_DIM:
            reason = f"heads are {head_dim} wide, at most {MAX_HEAD_DIM} fit"
        return reason
    needs = "" if device.type == "cuda" else f"needs a CUDA device, this is {device.type}"
    return extension.missing() or needs


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
        general = backends[: backends.index("reference") + 1]
        wanted, key = getattr(config, op), f"ops.{op}"
        if wanted == "default":
            wanted, key = config.backend, "ops.backend"
            if wanted not in ("auto", *general):
                why = f"only ops.{op} can name" if wanted in backends else "it does not have"
                wanted, key = "auto", f"{key} = {wanted!r}, which {why}"
        if wanted == "auto":
            choice = _automatic(op, key, {backend: reasons[backend] for backend in general})
        else:
            choice = Choice(op, wanted, key)
            if reasons[wanted]:
                usable = " or ".join(backend for backend, reason in reasons.items() if not reason)
                problems.append(f'{key} = "{wanted}": {op} {reasons[wanted]}; use {usable}, or "auto"')
        if op == "attention" and config.skip_negligible_keys:
            if choice.backend == "triton":
                choice = replace(choice, reason=choice.reason + "; negligible keys left out")
            else:
                why = f"only Triton's attention does, not {choice.backend} ({choice.reason})"
                problems.append(f"ops.skip_negligible_keys = true: {why}; use false")
        if op == "head_loss":
            made = f"; gradients made in the {gradient_pass(choice.backend, config)} pass"
            choice = replace(choice, reason=choice.reason + made)
        choices.append(choice)
    if problems:
        raise ConfigError(problems)
    return tuple(choices)


def gradient_pass(backend: Backend, config: OpsConfig) -> Literal["forward", "backward"]:
    """Pass in which a head makes its gradients: only that of Triton has both ways."""
    if backend == "triton":
        return config.head_gradient
    return "forward" if backend == "reference" else "backward"


def _automatic(op: str, key: str, reasons: Mapping[Backend, str]) -> Choice:
    """The first without a reason against it; the reference never has one."""
    chosen = next(backend for backend, reason in reasons.items() if not reason)
    against = [f"; {backend} {reason}" for backend, reason in reasons.items() if reason]
    return Choice(op, chosen, f"auto ({key})" + "".join(against))
