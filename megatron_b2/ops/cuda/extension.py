"""Door to the compiled kernels, `megatron_b2._cuda`: pointers, streams, errors that say what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.ops.precision import one_dtype

DTYPE_CODES: Final[Mapping[torch.dtype, int]] = MappingProxyType(
    {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
)
"""As in csrc/cuda/kernels.h."""

CTAS_PER_SM: Final = 2
"""Programs of a kernel that loops over rows, for each multiprocessor (our choice)."""
NOTICE: Final = Path(__file__).parents[2] / "_cuda.txt"
"""Left by setup.py where it could not build megatron_b2._cuda: a line of heading, then why."""


def missing() -> str:
    """Why there is no megatron_b2._cuda, and what to do; empty if there is."""
    if find_spec("megatron_b2._cuda") is not None:
        return ""
    if not NOTICE.is_file():
        return "megatron_b2._cuda was not built: install CUDA's nvcc and run `make setup` again"
    lines = NOTICE.read_text(encoding="utf-8").splitlines()[1:]
    why = " ".join(line.strip() for line in lines)
    return f"megatron_b2._cuda was not built: {why}; mend that and run `make setup` again"


def launch(name: str, device: torch.device, *args: Tensor | int | float | None) -> None:
    """Queue a kernel on the current stream of a device.

    Args:
        name: function of csrc/cuda/kernels.h without its prefix.
        device: of every tensor.
        args: its arguments but the stream; a tensor stands for its memory, none for a null pointer.
    """
    if device.type != "cuda":
        raise InputError(f"CUDA kernels work on CUDA tensors; these are on {device}")
    if reason := missing():
        raise InputError(reason)
    kernels = import_module("megatron_b2._cuda")
    stream = torch.cuda.current_stream(device).cuda_stream
    getattr(kernels, name)(device.index, *plain(args), stream)


def plain(args: tuple[Tensor | int | float | None, ...]) -> list[int | float]:
    """Tensors as addresses."""
    return [arg.data_ptr() if isinstance(arg, Tensor) else 0 if arg is None else arg for arg in args]


def programs(device: torch.device, rows: int) -> int:
    """CTAs of a kernel that loops over `rows` rows.

    On the CPU, where only tests run, one for 16 rows: about what 4,096 rows are on a GPU.
    """
    if device.type != "cuda":
        return -(-rows // 16)
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return min(rows, CTAS_PER_SM * count)


def dtype_code(*tensors: Tensor) -> int:
    """Code of the dtype that all tensors share.

    Raises:
        InputError: if they differ, or it is not fp32, fp16 or bf16.
    """
    return DTYPE_CODES[one_dtype(*tensors)]
