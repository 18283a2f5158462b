"""The operations that a model is built with: plain functions, chosen by `registry.choose`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from types import MappingProxyType
from typing import Any, Final

import torch

from megatron_b2.config.schema import OpsConfig
from megatron_b2.ops.attention import causal_attention
from megatron_b2.ops.context_attention import context_attention
from megatron_b2.ops.head_loss import norm_head_loss
from megatron_b2.ops.registry import Choice
from megatron_b2.ops.rms_norm import add_rms_norm, rms_norm
from megatron_b2.ops.rope import rope_split
from megatron_b2.ops.swiglu import swiglu

FUNCTIONS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "attention": ("attention.causal_attention", "context_attention.context_attention"),
        "head_loss": ("head_loss.norm_head_loss",),
        "rms_norm": ("rms_norm.rms_norm", "rms_norm.add_rms_norm"),
        "rope": ("rope.rope_split",),
        "swiglu": ("swiglu.swiglu",),
    }
)
"""Operation -> its functions, those of `Ops`, as MODULE.FUNCTION below megatron_b2.ops or .ops.<backend>."""

COMPILED: Final = ("rms_norm", "swiglu")
"""What torch.compile may fuse: the others loop over tiles or write into views."""


@dataclass(frozen=True)
class Ops:
    """The functions of a model; by default the references. Signatures are theirs."""

    causal_attention: Callable[..., Any] = causal_attention
    context_attention: Callable[..., Any] = context_attention
    norm_head_loss: Callable[..., Any] = norm_head_loss
    rms_norm: Callable[..., Any] = rms_norm
    add_rms_norm: Callable[..., Any] = add_rms_norm
    rope_split: Callable[..., Any] = rope_split
    swiglu: Callable[..., Any] = swiglu


def load_ops(choices: Sequence[Choice], config: OpsConfig) -> Ops:
    """Import what was chosen.

    Args:
        choices: of `registry.choose`.
        config: that they were chosen from. `compile` wraps the references of `COMPILED` in torch.compile;
            `skip_negligible_keys` is for Triton's attention.
    """
    found: dict[str, Callable[..., Any]] = {}
    for choice in choices:
        folder = "" if choice.backend == "reference" else f".{choice.backend}"
        for place in FUNCTIONS.get(choice.op, ()):
            module, name = place.split(".")
            keeps = (choice.op, choice.backend, config.head_gradient) == ("head_loss", "triton", "forward")
            variant = f"{name}_kept" if keeps else name
            function = getattr(import_module(f"megatron_b2.ops{folder}.{module}"), variant)
            if config.skip_negligible_keys and (choice.op, choice.backend) == ("attention", "triton"):
                function = partial(function, skip_negligible=True)
            if config.compile and choice.backend == "reference" and choice.op in COMPILED:
                function = torch.compile(function, fullgraph=True)
            found[name] = function
    assert set(found) <= {field.name for field in fields(Ops)}
    return Ops(**found)
