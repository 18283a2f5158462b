"""megatron_b2: the training system of the Baichuan 2 report.

Importing the package loads no heavy library. `megatron_b2.load` (see api.py) and
`megatron_b2.tokenizer` are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_b2 import tokenizer as tokenizer
    from megatron_b2.api import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "tokenizer"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return import_module("megatron_b2.api").load
    if name == "tokenizer":
        return import_module("megatron_b2.tokenizer")
    raise AttributeError(f"module 'megatron_b2' has no attribute {name!r}")
