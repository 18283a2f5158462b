"""The one table of tile sizes, by kernel, architecture and shape class (timing would let ranks disagree)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True)
class Tile:
    """How one kernel cuts its work."""

    rows: int
    """Rows (queries, tokens) a program works on."""
    columns: int
    """Columns (keys, vocabulary) a step works on."""
    depth: int
    """Of the inner product a step; 0 where there is none or all of it is one step."""
    warps: int
    stages: int


@dataclass(frozen=True)
class HeadTiles:
    """Of the kernels of the head, ops/triton/head_kernels.py and matmul.py."""

    norms: Tile
    """Vocabulary rows, hidden columns."""
    statistics: Tile
    """Tokens, vocabulary columns, hidden depth."""
    kept_statistics: Tile
    """Where the products are stored as well. The columns and depth of `statistics`, so the same bits."""
    merge: Tile
    """Tokens."""
    logit_gradient: Tile
    """Tokens, vocabulary columns, hidden depth."""
    hidden_gradient: Tile
    """Tokens, hidden columns, vocabulary depth."""
    weight_gradient: Tile
    """Vocabulary rows, hidden columns, token depth."""
    weight_gradient_sum: Tile
    """Where a running sum is added: it needs registers beside the product."""


_HEAD_HALF: Final = HeadTiles(
    norms=Tile(rows=4, columns=1024, depth=0, warps=4, stages=1),
    statistics=Tile(rows=128, columns=128, depth=64, warps=8, stages=3),
    kept_statistics=Tile(rows=64, columns=128, depth=64, warps=8, stages=3),
    merge=Tile(rows=16, columns=0, depth=0, warps=4, stages=1),
    logit_gradient=Tile(rows=128, columns=128, depth=64, warps=8, stages=3),
    hidden_gradient=Tile(rows=128, columns=128, depth=64, warps=8, stages=3),
    weight_gradient=Tile(rows=128, columns=256, depth=64, warps=8, stages=3),
    weight_gradient_sum=Tile(rows=128, columns=128, depth=64, warps=8, stages=3),
)
_HEAD_SINGLE: Final = HeadTiles(
    norms=Tile(rows=4, columns=1024, depth=0, warps=4, stages=1),
    statistics=Tile(rows=64, columns=64, depth=16, warps=8, stages=3),
    kept_statistics=Tile(rows=64, columns=64, depth=16, warps=8, stages=3),
    merge=Tile(rows=16, columns=0, depth=0, warps=4, stages=1),
    logit_gradient=Tile(rows=64, columns=64, depth=16, warps=4, stages=3),
    hidden_gradient=Tile(rows=128, columns=64, depth=16, warps=8, stages=3),
    weight_gradient=Tile(rows=128, columns=64, depth=16, warps=8, stages=3),
    weight_gradient_sum=Tile(rows=128, columns=64, depth=16, warps=8, stages=3),
)
_HEAD_CPU: Final = HeadTiles(
    norms=Tile(rows=256, columns=128, depth=0, warps=4, stages=1),
    statistics=Tile(rows=32, columns=64, depth=128, warps=4, stages=1),
    kept_statistics=Tile(rows=32, columns=64, depth=128, warps=4, stages=1),
    merge=Tile(rows=64, columns=0, depth=0, warps=4, stages=1),
    logit_gradient=Tile(rows=32, columns=128, depth=128, warps=4, stages=1),
    hidden_gradient=Tile(rows=64, columns=64, depth=256, warps=4, stages=1),
    weight_gradient=Tile(rows=128, columns=64, depth=64, warps=4, stages=1),
    weight_gradient_sum=Tile(rows=128, columns=64, depth=64, warps=4, stages=1),
)
_HEAD: Final[Mapping[tuple[str, int], HeadTiles]] = MappingProxyType(
    {
        ("sm_80", 2): _HEAD_HALF,
        ("sm_80", 4): _HEAD_SINGLE,
        ("sm_90", 2): _HEAD_HALF,
        ("sm_90", 4): _HEAD_SINGLE,
        ("cpu", 2): _HEAD_CPU,
        ("cpu", 4): _HEAD_CPU,
    }
)


def head_tiles(arch: str, itemsize: int) -> HeadTiles:
    """Tiles of the head for inputs of `itemsize` bytes; those of sm_80 where an architecture has none."""
    return _HEAD.get((arch, itemsize), _HEAD["sm_80", itemsize])


MAX_HEAD_DIM: Final = 160
"""A wider head of attention does not fit the shared memory of a tile."""


@dataclass(frozen=True)
class AttentionTiles:
    """Of the kernels of attention, ops/triton/attention_forward.py and attention_backward.py."""

    forward: Tile
    """Queries, keys."""
    query_gradient: Tile
    """Queries, keys."""
    key_gradient: Tile
    """Queries a step, keys a program."""
    delta: Tile
    """Queries."""


_DELTA: Final = Tile(rows=64, columns=0, depth=0, warps=4, stages=1)
_ATTENTION_CPU: Final = AttentionTiles(
    forward=Tile(rows=256, columns=128, depth=0, warps=4, stages=1),
    query_gradient=Tile(rows=256, columns=128, depth=0, warps=4, stages=1),
    key_gradient=Tile(rows=128, columns=256, depth=0, warps=4, stages=1),
    delta=Tile(rows=256, columns=0, depth=0, warps=4, stages=1),
)


def _attention(
    forward: tuple[int, int, int, int], query: tuple[int, int, int, int], key: tuple[int, int, int, int]
) -> AttentionTiles:
    """Each (rows, columns, warps, stages)."""
    first, second, third = (
        Tile(rows, columns, 0, warps, stages) for rows, columns, warps, stages in (forward, query, key)
    )
    return AttentionTiles(first, second, third, _DELTA)


def _attention_single(key_columns: int) -> AttentionTiles:
    """In fp32; all but the keys of a program of the key gradient is the same for every width."""
    return AttentionTiles(
        forward=Tile(rows=32, columns=32, depth=32, warps=8, stages=1),
        query_gradient=Tile(rows=32, columns=32, depth=16, warps=4, stages=1),
        key_gradient=Tile(rows=16, columns=key_columns, depth=32, warps=8, stages=1),
        delta=_DELTA,
    )


# The largest tiles found that spill no register, with ALiBi, documents and skipping (docs/kernels.md).
_ATTENTION_HALF: Final[Mapping[tuple[str, int], AttentionTiles]] = MappingProxyType(
    {
        ("sm_80", 64): _attention((128, 64, 8, 3), (64, 64, 4, 3), (32, 64, 4, 2)),
        ("sm_80", 96): _attention((64, 64, 4, 2), (128, 32, 8, 2), (32, 64, 4, 2)),
        ("sm_80", 127): _attention((128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
        ("sm_80", 128): _attention((128, 32, 8, 3), (64, 32, 4, 2), (64, 64, 8, 2)),
        ("sm_80", 144): _attention((128, 32, 8, 2), (32, 32, 8, 2), (16, 64, 4, 2)),
        ("sm_80", 160): _attention((128, 32, 8, 2), (64, 16, 8, 2), (16, 64, 4, 2)),
        ("sm_90", 64): _attention((128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        ("sm_90", 96): _attention((128, 64, 8, 3), (64, 64, 4, 2), (32, 64, 4, 2)),
        ("sm_90", 127): _attention((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
        ("sm_90", 128): _attention((128, 64, 8, 3), (128, 64, 8, 2), (32, 64, 4, 2)),
        ("sm_90", 144): _attention((128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 8, 2)),
        ("sm_90", 160): _attention((128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 8, 2)),
    }
)
"""By architecture and the largest width of a head, in 16 bits. Widths that are padded need more registers."""
_ATTENTION_SINGLE: Final[Mapping[int, AttentionTiles]] = MappingProxyType(
    {
        64: _attention_single(key_columns=32),
        96: _attention_single(key_columns=16),
        128: _attention_single(key_columns=32),
        160: _attention_single(key_columns=16),
    }
)
"""By the largest width of a head, in fp32, for every architecture."""


def attention_tiles(arch: str, head_dim: int, itemsize: int) -> AttentionTiles:
    """Tiles of attention for heads of `head_dim` columns and inputs of `itemsize` bytes; those of sm_80 where
    an architecture has none."""
    if arch == "cpu":
        return _ATTENTION_CPU
    if itemsize == 4:
        return next(tiles for limit, tiles in _ATTENTION_SINGLE.items() if head_dim <= limit)
    known = arch if (arch, 128) in _ATTENTION_HALF else "sm_80"
    return next(
        tiles for (name, limit), tiles in _ATTENTION_HALF.items() if name == known and head_dim <= limit
    )
