"""Which backends a plan assumes: those of a GPU that can run everything, wherever the plan is made."""

from __future__ import annotations

from typing import Literal

from megatron_b2.config.schema import OpsConfig
from megatron_b2.ops.registry import BACKENDS, Backend, gradient_pass


def planned_backend(config: OpsConfig, op: str) -> Backend:
    """As `ops.registry.choose`, but nothing is missing: "auto" is the first of the list."""
    backends = BACKENDS[op]
    general = backends[: backends.index("reference") + 1]
    wanted = getattr(config, op)
    if wanted == "default":
        wanted = config.backend if config.backend in general else "auto"
    return general[0] if wanted == "auto" else wanted


def head_pass(config: OpsConfig) -> Literal["forward", "backward"]:
    """Pass in which the planned head makes its gradients."""
    return gradient_pass(planned_backend(config, "head_loss"), config)


def describe_backends(config: OpsConfig) -> str:
    """For people: the planned backend of every operation, and what follows."""
    chosen = ", ".join(f"{op} {planned_backend(config, op)}" for op in BACKENDS)
    return f'{chosen} ("auto" is planned as on a GPU); gradients of the head in the {head_pass(config)} pass'
