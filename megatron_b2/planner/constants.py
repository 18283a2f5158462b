"""The constants of the model: frozen in constants.toml by fit.py, never typed by hand.

Fitted ones come from few published rows, which constants.toml names; the others are counted or are hardware
facts, each with its source below. docs/planner.md lists both.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, Final

from megatron_b2.errors import ConfigError

CONSTANTS_FILE: Final = "constants.toml"
ALLOCATOR_DEVICE: Final = 84.9e9
"""Bytes of the device on which allocator_bytes was fitted (A100 of 80 GB)."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What the prediction depends on beside the data sheet and the shapes."""

    # Fitted (constants.toml).
    ampere_matmul: float
    """Share of the peak that large matrix products reach on A100 and A800."""
    hopper_matmul: float
    """The same on H100, H800 and H200, whose clocks fall more under load."""
    memory: float
    """Share of the memory bandwidth that elementwise kernels, and the operands of products, reach."""
    nvlink: float
    """Share of the NVLink bandwidth that ring collectives in a node reach."""
    network: float
    """Share of the network ports' bandwidth that collectives and sends reach (InfiniBand and RoCE)."""
    omnipath: float
    """The same on Omni-Path, which has no GPUDirect RDMA on A100 nodes."""
    interference: float
    """Seconds that a second of overlapped communication slows the work beside it down: NCCL's kernels take
    multiprocessors and memory bandwidth."""
    scalar_attention: float
    """Share of the peak of attention products whose head width is no multiple of 8, which unfused attention
    does without tensor cores."""
    ampere_flash_1: float
    """Rate of the first FlashAttention (llm-foundry, 2023) on A100, relative to large products."""
    hopper_flash_1: float
    """The same on H100, for which its kernels were not written."""
    allocator_bytes: float
    """Device memory that no formula counts, on a device of 80 GB: fragmentation, CUDA context, NCCL and
    library workspaces."""
    fsdp_allocator_bytes: float
    """The same of PyTorch's FSDP (2023 and later), as PyTorch counts it."""

    # Not fitted.
    kernel_latency: float = 5e-6
    """Seconds that a kernel costs beyond its work: launch gap and ramp (our choice; 3 to 8 us on A100)."""
    fused_attention: float = 0.75
    """Rate of fused attention relative to large products: 225 of 312 TFLOP/s at best (FlashAttention-2,
    arXiv 2307.08691, section 4.1), against ampere_matmul."""
    node_latency: float = 3.4e-6
    """Seconds of a ring step inside a node (NCCL's tuning table: NVLink, ring, Simple)."""
    network_latency: float = 14e-6
    """Seconds of a ring step between nodes (NCCL's tuning table: network, ring, Simple)."""
    tf32_share: float = 0.5
    """Peak of fp32 work on tensor cores (TF32), relative to bf16 (A100 and H100 data sheets)."""

    bands: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    """|measured / predicted - 1| of the time by regime, and of "memory", of nine in ten held-out rows."""

    def with_values(self, values: Mapping[str, float]) -> Constants:
        """The same with other values of the fields named."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        return Constants(**{**own, **values})

    def matmul(self, architecture: str) -> float:
        """Share of the peak of large products; all of it where the peak was measured with a product."""
        return {"hopper": self.hopper_matmul, "measured": 1.0}.get(architecture, self.ampere_matmul)

    def fused_rate(self, attention: str, architecture: str) -> float:
        """Rate of a kind of fused attention relative to large products."""
        if attention != "flash-1":
            return self.fused_attention
        return self.hopper_flash_1 if architecture == "hopper" else self.ampere_flash_1

    def allocator(self, zero_engine: str, memory_bytes: float) -> float:
        """What no formula counts on a device of `memory_bytes`: in proportion up to 80 GB, as a smaller
        device has less to hold back (our choice; no published row gives the memory of a smaller one)."""
        whole = self.fsdp_allocator_bytes if zero_engine == "fsdp" else self.allocator_bytes
        return whole * min(1.0, memory_bytes / ALLOCATOR_DEVICE)

    def band(self, regime: str) -> float:
        """The regime's error; the widest of any time where no held-out row has been of the regime."""
        times = (band for name, band in self.bands.items() if name != "memory")
        return self.bands[regime] if regime in self.bands else max(times, default=1.0)

    def fabric(self, name: str) -> float:
        """Share of the network ports' bandwidth on a fabric."""
        return self.omnipath if name == "omnipath" else self.network

    @property
    def memory_band(self) -> float:
        """Relative error of the memory that nine in ten held-out rows kept."""
        return self.band("memory")


FITTED: Final = (
    *("ampere_matmul", "hopper_matmul", "memory", "nvlink", "network", "omnipath", "interference"),
    *("scalar_attention", "ampere_flash_1", "hopper_flash_1"),
    *("allocator_bytes", "fsdp_allocator_bytes"),
)
"""Constants that constants.toml must give."""


@dataclass(frozen=True, kw_only=True)
class ErrorRow:
    """How far the predictions of one set of published rows are off."""

    name: str
    quantity: str
    """time or memory"""
    rows: int
    mape: float
    """Mean of |predicted / measured - 1|."""
    worst: float
    bias: float
    """Mean of predicted / measured - 1: below 0 is too fast, or too small."""
    fitted: str
    """Which constants were fitted on rows of the set; empty where all rows are held out."""


@cache
def load_constants() -> Constants:
    """The frozen constants."""
    return constants_from(_document())


@cache
def load_errors() -> tuple[ErrorRow, ...]:
    """The errors that the fit has stored, by set of rows."""
    return tuple(ErrorRow(**row) for row in _document().get("errors", []))


def constants_from(document: Mapping[str, Any]) -> Constants:
    """Constants of a parsed constants.toml.

    Raises:
        ConfigError: a constant is missing, unknown or no positive number.
    """
    values = document.get("constants", {})
    problems = [f"{CONSTANTS_FILE}: constants.{name} is missing" for name in FITTED if name not in values]
    known = {item.name for item in fields(Constants)} - {"bands"}
    for name, value in values.items():
        if name not in known:
            problems.append(f"{CONSTANTS_FILE}: constants.{name} is unknown; use {', '.join(sorted(known))}")
        elif not isinstance(value, int | float) or value <= 0:
            problems.append(f"{CONSTANTS_FILE}: constants.{name} = {value!r} must be a number above 0")
    if problems:
        raise ConfigError(problems)
    return Constants(**values, bands=MappingProxyType(dict(document.get("bands", {}))))


def _document() -> dict[str, Any]:
    text = resources.files(__package__).joinpath(CONSTANTS_FILE).read_text(encoding="utf-8")
    return tomllib.loads(text)
