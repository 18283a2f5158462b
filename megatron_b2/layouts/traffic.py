"""Collectives of a training step, counted by formula: how many calls and bytes on a rank, over which group.

`micro_batch_traffic` is what the model's own code calls in one forward and backward of a virtual stage:
exact, to be compared with a count on a fake process group. Pipeline sends are exact too. What DeepSpeed
calls is counted in bytes; its number of calls depends on its buckets and is marked as not exact.

Bytes of a call are those of the whole tensor: what all-reduce sums, what all-gather makes, what
reduce-scatter and all-to-all take, what a send carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal

from megatron_b2.config.schema import RunConfig
from megatron_b2.engine.deepspeed_config import BUCKET_ELEMENTS, kept_whole_limits
from megatron_b2.layouts.memory import context_method, recompute_of
from megatron_b2.layouts.parameters import kept_whole, part_parameters
from megatron_b2.model.split import StageLayers
from megatron_b2.ops.head_loss import chunk_tokens
from megatron_b2.parallel.layout import Layout

Operation = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
Group = Literal["tp", "cp", "data_context", "hpz", "pp"]


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
    """Whether `count` is exact; `bytes` is, up to padding."""

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
        calls = ceil(sizes.tokens / chunk_tokens(config.model.vocab_size // layout.tensor))
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


def zero_traffic(
    config: RunConfig, layout: Layout, parts: Sequence[StageLayers], *, num_micro: int
) -> list[Traffic]:
    """What DeepSpeed does over the ranks that share parameters, in a step (fp32 gradients)."""
    if layout.data_context == 1:
        return []
    width = _Sizes(config, layout).width
    parameters = [p for part in parts for p in part_parameters(config.model, part, tensor=layout.tensor)]
    size = sum(parameter.size for parameter in parameters)
    stage = config.parallel.zero_stage
    if stage == 3:
        each, together = kept_whole_limits(config)
        whole = kept_whole(parameters, each=each, together=together)
        sizes = (size, sum(parameter.size for parameter in whole), len(parameters) - len(whole))
        return _zero_3_traffic(config, layout, sizes, width=width, num_micro=num_micro)
    # ZeRO-2 reduces after every micro-batch; 0 and 1 once. DeepSpeed 0.19.8 reduces with all-reduce here.
    times = num_micro if stage == 2 else 1
    buckets = ceil(size / BUCKET_ELEMENTS)
    found = [_data(layout, "gradients", "all_reduce", times * buckets, times * 4 * size)]
    if stage:
        found.append(_data(layout, "updated weights", "all_gather", buckets, width * size))
    return found


def _data(layout: Layout, purpose: str, operation: Operation, count: int, size: int) -> Traffic:
    return Traffic(
        purpose=purpose,
        group="data_context",
        size=layout.data_context,
        operation=operation,
        count=count,
        bytes=size,
        exact=False,
    )


def _zero_3_traffic(
    config: RunConfig, layout: Layout, sizes: tuple[int, int, int], *, width: int, num_micro: int
) -> list[Traffic]:
    """`sizes`: elements of all parameters, of those kept whole, and the number of the partitioned ones."""
    size, whole, tensors = sizes
    parallel = config.parallel
    partitioned = size - whole
    gathered = partitioned * (1 if parallel.quantized_weights else width)
    found = [_data(layout, "parameters, forward", "all_gather", num_micro * tensors, num_micro * gathered)]
    backward = _data(layout, "parameters, backward", "all_gather", num_micro * tensors, num_micro * gathered)
    if parallel.hpz > 1:
        backward = replace(backward, group="hpz", size=parallel.hpz, bytes=num_micro * partitioned * width)
    found.append(backward)
    buckets = ceil(size / BUCKET_ELEMENTS)
    operation: Operation = "all_to_all" if parallel.quantized_gradients else "reduce_scatter"
    gradient = size // 2 if parallel.quantized_gradients else 4 * size
    found.append(_data(layout, "gradients", operation, num_micro * buckets, num_micro * gradient))
    if whole:
        found.append(_data(layout, "whole parameters", "all_gather", 1, width * whole))
    return found
