"""Collectives of a training step, counted by formula: how many calls and bytes on a rank, over which group.

Here are those of our own code: of the model for a micro-batch, of the pipeline and of the engine for a step.
What DeepSpeed calls is in zero_traffic.py. tests/layouts/ compares all with the calls of real ranks, and
those of the model with a rank of 1,024 on a fake process group.

Calls on a group of one rank send nothing and are not counted. Bytes of a call are those of the whole tensor:
what all-reduce sums, what all-gather makes, what reduce-scatter and all-to-all take, what a send carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Final, Literal

from megatron_b2.config.schema import RunConfig
from megatron_b2.layouts.backends import head_pass, planned_backend
from megatron_b2.layouts.memory import HEAD_CHUNK_BYTES, context_method, recompute_of
from megatron_b2.model.split import StageLayers
from megatron_b2.ops.head_loss import chunk_tokens
from megatron_b2.parallel.layout import Layout

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
CHUNK_MULTIPLE: Final = 128
"""Tokens of a chunk of the Triton head that keeps its products are a multiple of it."""

Group = Literal["tp", "cp", "data_context", "hpz", "pp", "model", "world"]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Calls of one kind on one rank."""

    purpose: str
    group: Group
    size: int
    """Ranks in the group."""
    operation: Operation
    count: int
    bytes: int
    """Of all calls together."""
    exact: bool = True
    """Whether `count` and `bytes` are those of the busiest rank, not an upper bound or a model."""

    @property
    def wire_bytes(self) -> int:
        """What a rank sends with ring algorithms."""
        if self.operation == "send":
            return self.bytes
        passes = 2 if self.operation == "all_reduce" else 1
        return passes * self.bytes * (self.size - 1) // self.size

    def times(self, factor: int) -> Traffic:
        """The same, `factor` times."""
        return replace(self, count=self.count * factor, bytes=self.bytes * factor)


@dataclass(frozen=True)
class _Sizes:
    """Elements and bytes of one micro-batch on one rank."""

    config: RunConfig
    layout: Layout

    @property
    def width(self) -> int:
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def tokens(self) -> int:
        return self.config.train.micro_batch_size * self.config.data.seq_len // self.layout.context

    @property
    def hidden_bytes(self) -> int:
        """An activation [T, h]."""
        return self.tokens * self.config.model.hidden_size * self.width

    @property
    def head_chunk(self) -> int:
        """Tokens whose statistics the ranks of the head merge at once: a chunk where gradients are made in
        the forward pass, else all."""
        rows = self.config.model.vocab_size // self.layout.tensor
        if head_pass(self.config.ops) == "backward":
            return self.tokens
        if planned_backend(self.config.ops, "head_loss") == "reference":
            return chunk_tokens(rows)
        return max(1, HEAD_CHUNK_BYTES["triton"] // (4 * rows) // CHUNK_MULTIPLE) * CHUNK_MULTIPLE


def total_traffic(items: Sequence[Traffic]) -> list[Traffic]:
    """Items of the same purpose, group and operation added up, in the order of their first."""
    sums: dict[tuple[str, str, str], Traffic] = {}
    for item in items:
        key = (item.purpose, item.group, item.operation)
        known = sums.get(key)
        sums[key] = (
            item
            if known is None
            else replace(
                known,
                count=known.count + item.count,
                bytes=known.bytes + item.bytes,
                exact=known.exact and item.exact,
            )
        )
    return [item for item in sums.values() if item.count]


def micro_batch_traffic(config: RunConfig, layout: Layout, part: StageLayers) -> list[Traffic]:
    """Collectives of the model's code in one forward and backward of a virtual stage."""
    found = list(_tensor_traffic(config, layout, part)) if layout.tensor > 1 else []
    found += _context_traffic(config, layout, part) if layout.context > 1 else []
    return total_traffic(found)


def _tensor_traffic(config: RunConfig, layout: Layout, part: StageLayers) -> Iterator[Traffic]:
    """Two blocks a layer, each entered and left; the embedding is left, the head is entered."""
    sizes, is_sequence = _Sizes(config, layout), config.parallel.sequence_parallel

    def make(purpose: str, operation: Operation, count: int, size: int) -> Traffic:
        return Traffic(
            purpose=purpose,
            group="tp",
            size=layout.tensor,
            operation=operation,
            count=count,
            bytes=count * size,
        )

    layers = len(part.layers)
    full = sum(recompute_of(config, layer) == "full" for layer in part.layers)
    ends = int(part.has_embedding) + int(part.has_head)
    if is_sequence:
        # Entering gathers and its gradient is scattered; leaving scatters and its gradient is gathered.
        yield make("layers", "all_gather", 4 * layers, sizes.hidden_bytes)
        yield make("layers", "reduce_scatter", 4 * layers, sizes.hidden_bytes)
        yield make("embedding and head", "all_gather", ends, sizes.hidden_bytes)
        yield make("embedding and head", "reduce_scatter", ends, sizes.hidden_bytes)
        norms = 2 * layers + int(part.has_head)
        yield make("norm gradients", "all_reduce", norms, config.model.hidden_size * 4)  # fp32
        # Recomputation stops at the last tensor that backward needs: it never leaves the MLP again.
        yield make("recomputed layers", "all_gather", 2 * full, sizes.hidden_bytes)
        yield make("recomputed layers", "reduce_scatter", full, sizes.hidden_bytes)
    else:
        # Leaving sums; entering sums the gradient.
        yield make("layers", "all_reduce", 4 * layers, sizes.hidden_bytes)
        yield make("embedding and head", "all_reduce", ends, sizes.hidden_bytes)
        yield make("recomputed layers", "all_reduce", full, sizes.hidden_bytes)
    if part.has_head:
        calls = ceil(sizes.tokens / sizes.head_chunk)
        item = make("token statistics of the head", "all_gather", calls, 0)
        yield replace(item, bytes=layout.tensor * sizes.tokens * 4 * 4)


def _context_traffic(config: RunConfig, layout: Layout, part: StageLayers) -> list[Traffic]:
    """Attention over the whole sequence: see the table in ops/context_attention.py."""
    sizes = _Sizes(config, layout)
    unit = sizes.hidden_bytes // layout.tensor
    kinds = [recompute_of(config, layer) for layer in part.layers]
    full, selective, layers = kinds.count("full"), kinds.count("selective"), len(kinds)

    def make(purpose: str, operation: Operation, count: int, size: int) -> Traffic:
        return Traffic(
            purpose=purpose, group="cp", size=layout.context, operation=operation, count=count, bytes=size
        )

    if context_method(config) == "ulysses":
        again = (4 * full + 3 * selective) * unit
        return [
            make("attention", "all_to_all", 4 * layers, 8 * unit * layers),
            make("recomputed attention", "all_to_all", 2 * full + selective, again),
        ]
    # The rank before the last sends most: every shard it has seen goes on, with its gradient behind it.
    sends = layout.context - 1
    gradient = 2 * unit * 4 // sizes.width
    recomputed = sends * (full + selective)
    found = [
        make("attention", "send", 3 * sends * layers, sends * layers * (4 * unit + gradient)),
        make("recomputed attention", "send", recomputed, recomputed * 2 * unit),
    ]
    # Documents hide shards, which are then not sent.
    return [replace(item, exact=not config.data.document_masking) for item in found]


def pipeline_traffic(config: RunConfig, layout: Layout, *, rank: int, num_micro: int) -> list[Traffic]:
    """Sends of a pipeline rank in a step: activations to the next stage, gradients to the one before."""
    if layout.pipeline == 1:
        return []
    parallel, sizes = config.parallel, _Sizes(config, layout)
    stages = [chunk * layout.pipeline + rank for chunk in range(parallel.virtual_stages)]
    last = layout.pipeline * parallel.virtual_stages - 1
    message = sizes.hidden_bytes // (layout.tensor if parallel.sequence_parallel else 1)
    counts = {
        "activations": num_micro * sum(stage < last for stage in stages),
        "activation gradients": num_micro * sum(stage > 0 for stage in stages),
    }
    return [
        Traffic(
            purpose=purpose,
            group="pp",
            size=layout.pipeline,
            operation="send",
            count=count,
            bytes=count * message,
        )
        for purpose, count in counts.items()
        if count
    ]


def engine_traffic(config: RunConfig, layout: Layout) -> list[Traffic]:
    """What the engine and the training loop call once a step, a few bytes each (engine/, training/)."""
    if config.parallel.engine != "deepspeed":
        return []
    sums = 2 * 8  # [targets, positions] or [ce, max_z] in fp64
    calls: list[tuple[str, Group, int, int, int]] = [
        ("targets, then losses", "data_context", layout.data_context, 2, 2 * sums),
        ("losses", "pp", layout.pipeline, 1, sums),
        ("finite check, stop signals", "world", layout.world_size, 2, 2 * 8),
    ]
    return [
        Traffic(purpose=purpose, group=group, size=size, operation="all_reduce", count=count, bytes=total)
        for purpose, group, size, count, total in calls
        if size > 1
    ]
