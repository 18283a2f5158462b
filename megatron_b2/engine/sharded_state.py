"""From what a rank trains on to pieces of whole parameters: tensor shards, ZeRO partitions, stages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from megatron_b2.checkpoint.hf_names import parameter_shapes
from megatron_b2.checkpoint.logical import LogicalState, LogicalTensor, Piece, flat_pieces
from megatron_b2.config.schema import ModelConfig
from megatron_b2.model.sharding import shard_spec
from megatron_b2.optim.adamw import MOMENTS

_CHUNK_PREFIX = re.compile(r"^chunks\.\d+\.")
KINDS: tuple[tuple[str, str | None], ...] = (("model", None), *((f"optim/{key}", key) for key in MOMENTS))
"""Kinds of logical tensors and the optimizer key of each; none is the weight itself."""


def logical_name(name: str) -> str:
    """The parameter's name in every layout: without the pipeline chunk that holds it."""
    return _CHUNK_PREFIX.sub("", name)


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(flat)) of a rank's flattened local parameter."""

    name: str
    """Logical name."""
    local_shape: tuple[int, ...]
    start: int
    flat: Tensor
    """One-dimensional view."""


def whole(tensor: Tensor, *, write: bool = True) -> LogicalTensor:
    """A logical tensor that this rank holds completely."""
    piece = Piece(tensor=tensor.detach(), offsets=(0,) * tensor.dim(), write=write)
    return LogicalTensor(shape=tuple(tensor.shape), dtype=tensor.dtype, pieces=(piece,))


def whole_state(
    masters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, count: Tensor, *, write: bool
) -> LogicalState:
    """Logical state of unsharded fp32 weights with AdamW moments and the step count [1]."""
    state = {
        f"{kind}/{name}": whole(tensor if key is None else optimizer.state[tensor][key], write=write)
        for kind, key in KINDS
        for name, tensor in masters.items()
    }
    state["optim/step"] = whole(count, write=write)
    return state


def fragment_pieces(fragment: Fragment, *, size: int, rank: int, write: bool) -> Iterator[Piece]:
    """Pieces of the whole parameter that a fragment of tensor-parallel rank `rank` of `size` is."""
    local_shape, stop = fragment.local_shape, fragment.start + fragment.flat.numel()
    row_size = prod(local_shape[1:])
    for part in shard_spec(fragment.name).parts(local_shape, size=size, rank=rank):
        first, last = part.row * row_size, (part.row + part.num_rows) * row_size
        low, high = max(first, fragment.start), min(last, stop)
        if low < high:
            yield from flat_pieces(
                fragment.flat[low - fragment.start : high - fragment.start],
                local_shape=(part.num_rows, *local_shape[1:]),
                start=low - first,
                offsets=part.offsets,
                write=write,
            )


def sharded_state(
    model: ModelConfig,
    fragments: Mapping[str, Iterable[Fragment]],
    count: Tensor,
    *,
    tensor_size: int,
    tensor_rank: int,
    write_copies: bool,
    write_count: bool,
) -> LogicalState:
    """Logical state of a rank from its fragments of each kind.

    Args:
        model: shape of the whole model; names that this rank does not hold get no pieces.
        fragments: kind ("model", "optim/exp_avg", ...) to what this rank holds.
        count: step count [1].
        tensor_size: tensor-parallel ranks.
        tensor_rank: this one.
        write_copies: whether this rank saves fragments that other ranks with the same weights hold too.
        write_count: whether this rank saves the count.
    """
    state: LogicalState = {
        f"{kind}/{name}": LogicalTensor(shape=shape, dtype=torch.float32, pieces=())
        for kind in fragments
        for name, shape in parameter_shapes(model).items()
    }
    for kind, held in fragments.items():
        for fragment in held:
            key = f"{kind}/{fragment.name}"
            is_split = tensor_size > 1 and shard_spec(fragment.name).dim is not None
            write = write_copies and (is_split or tensor_rank == 0)
            pieces = fragment_pieces(fragment, size=tensor_size, rank=tensor_rank, write=write)
            state[key] = LogicalTensor(state[key].shape, torch.float32, tuple(pieces))
    state["optim/step"] = whole(count, write=write_count)
    return state
