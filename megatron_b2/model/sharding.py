"""How each parameter is split over tensor-parallel ranks: one table, keyed by its name (decision D5).

A parameter is split along one dimension. Fused matrices consist of several blocks (Q | K | V, gate | up), and
each block is split by itself: a rank holds its part of every block, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShardSpec:
    """Splitting of one parameter."""

    dim: int | None
    """Dimension that is split; none keeps a whole copy on every rank."""
    blocks: int = 1
    """Equal blocks along that dimension, each split by itself."""

    def local_shape(self, shape: Shape, *, size: int) -> Shape:
        """Shape of one rank's part of a parameter of `shape`."""
        if self.dim is None:
            return shape
        return tuple(n // size if d == self.dim else n for d, n in enumerate(shape))

    def logical_shape(self, local_shape: Shape, *, size: int) -> Shape:
        """Shape of the whole parameter."""
        if self.dim is None:
            return local_shape
        return tuple(n * size if d == self.dim else n for d, n in enumerate(local_shape))

    def parts(self, local_shape: Shape, *, size: int, rank: int) -> tuple[ShardPart, ...]:
        """The consecutive pieces of a rank's local tensor and where each lies in the whole parameter."""
        if self.dim is None or size == 1:
            return (ShardPart(0, local_shape[0], (0,) * len(local_shape)),)
        if self.dim != 0:
            offsets = tuple(rank * n if d == self.dim else 0 for d, n in enumerate(local_shape))
            return (ShardPart(0, local_shape[0], offsets),)
        rows = local_shape[0] // self.blocks
        inner = (0,) * (len(local_shape) - 1)
        return tuple(
            ShardPart(block * rows, rows, ((block * size + rank) * rows, *inner))
            for block in range(self.blocks)
        )


@dataclass(frozen=True)
class ShardPart:
    """Rows of a local tensor that are one rectangle of the whole parameter."""

    row: int
    """First row in the local tensor."""
    num_rows: int
    offsets: Shape
    """Where its first element lies in the whole parameter."""


REPLICATED = ShardSpec(None)
_BY_SUFFIX = (
    ("embedding.weight", ShardSpec(0)),
    ("attention.qkv.weight", ShardSpec(0, blocks=3)),
    ("attention.output.weight", ShardSpec(1)),
    ("mlp.gate_up.weight", ShardSpec(0, blocks=2)),
    ("mlp.down.weight", ShardSpec(1)),
    ("head.weight", ShardSpec(0)),
    ("norm.weight", REPLICATED),
)


def shard_spec(name: str) -> ShardSpec:
    """The entry of the parameter `name`; a name without one is a bug in the model."""
    for suffix, spec in _BY_SUFFIX:
        if name.endswith(suffix):
            return spec
    raise KeyError(f"parameter {name} has no entry in the shard table of model/sharding.py")
