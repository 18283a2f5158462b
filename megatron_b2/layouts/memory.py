"""Bytes on the device of each pipeline position: the memory model of the layout check and of parallel.auto.

Exact up to padding: parameters, optimizer, and the activations that our modules keep between a forward and
its backward (tests/layouts/test_memory.py compares them with live tensors). A model: ZeRO-3's gathered
parameters, buckets, and the working memory of one block. Not counted: allocator fragmentation, CUDA context
and NCCL buffers, for which RESERVED_SHARE of the device is left free.

Symbols: h hidden, f FFN, H heads, V vocabulary, t tensor, s = t under sequence parallelism else 1, T tokens
of one micro-batch on one context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Final, Literal

from megatron_b2.config.deepspeed_keys import zero_settings
from megatron_b2.config.schema import RunConfig
from megatron_b2.layouts.backends import head_pass, planned_backend
from megatron_b2.layouts.parameters import LocalParameter, part_parameters, zero_3_whole
from megatron_b2.model.split import StageLayers
from megatron_b2.ops.registry import Backend
from megatron_b2.parallel.layout import Layout
from megatron_b2.pipeline.schedule import Instruction

GIB: Final = 2**30
RESERVED_SHARE: Final = 0.10
"""Of parallel.memory_gb, for what is not counted (our choice). `b2 plan` keeps more free: a constant that was
fitted on BLOOM's published runs, and the upper end of its error (planner/constants.toml)."""
HEAD_CHUNK_BYTES: Final[Mapping[Backend, int]] = MappingProxyType(
    {"reference": 48 * 2**20, "triton": 64 * 2**20, "cuda": 64 * 2**20}
)
"""fp32 logits in memory at once of a head that keeps them (ops/head_loss.py, ops/triton/head_loss.py with
ops.head_gradient = "forward", ops/cuda/head_loss.py); a copy in the working precision comes with it."""
HEAD_ROWS: Final = 4096
"""Vocabulary rows, at most, whose logits the Triton head makes again at once in the backward pass."""

WHOLE_MODEL_BUCKET: Final = 500_000_000
"""Elements after which gradients are reduced where ZeRO does not reduce itself (DeepSpeed's constant)."""

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank; `parameters` counts elements."""

    parameters: int
    """Elements of the model that this rank computes with (its tensor-parallel part of its layers)."""
    weights: int
    """Working weights; under ZeRO-3 the partition, whole parameters, the hpZ copy and gathered ones."""
    gradients: int
    optimizer: int
    """Two fp32 moments, and fp32 master weights under ZeRO."""
    activations: int
    """Kept between forward and backward for every micro-batch in flight."""
    working: int
    """One block (or the head) at work, and communication buckets."""
    host: int
    """Optimizer on the CPU."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True)
class _Tokens:
    """Sizes that the activations of one micro-batch depend on."""

    config: RunConfig
    layout: Layout

    @property
    def count(self) -> int:
        return self.config.train.micro_batch_size * self.config.data.seq_len // self.layout.context

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def shards(self) -> int:
        """Sequence shards between blocks."""
        return self.layout.tensor if self.config.parallel.sequence_parallel else 1


def usable_bytes(config: RunConfig) -> int:
    """What the parts of `RankMemory` may fill of one device."""
    return int(config.parallel.memory_gb * GIB * (1 - RESERVED_SHARE))


def recompute_of(config: RunConfig, layer: int) -> Recompute:
    """What the backward pass recomputes of a block."""
    layers = config.train.recompute_layers
    return config.train.recompute if not layers or layer in layers else "none"


def block_activations(config: RunConfig, layout: Layout, kind: Recompute) -> int:
    """Bytes that one block keeps of one micro-batch."""
    tokens, model = _Tokens(config, layout), config.model
    h, f, t, s = model.hidden_size, model.ffn_hidden_size, layout.tensor, tokens.shards
    if kind == "full":
        return tokens.count * tokens.width * h // s
    # Two residual streams, two gathered norm outputs, qkv and the attention output, gate and up.
    kept = 2 * h // s + 2 * h + 4 * h // t + 2 * f // t
    rows = 8 // s
    if kind == "none":
        kept += f // t + _attention_copies(config, layout) * h // t
        rows += 4 * model.num_heads // t
        if planned_backend(config.ops, "attention") == "cuda":  # it keeps the probabilities
            kept += config.data.seq_len * model.num_heads // t
    return tokens.count * (tokens.width * kept + rows)


def _attention_copies(config: RunConfig, layout: Layout) -> int:
    """Tensors [T, h / t] that attention keeps beside qkv and its output: rotated q and k, or those that
    context parallelism has moved."""
    rotated = 2 if config.model.position == "rope" else 0
    if layout.context == 1:
        return rotated
    # Ulysses replaces qkv and keeps its output twice. The ring has its own keys and values; without RoPE its
    # queries are a view of qkv, which then stays as well.
    return 1 if context_method(config) == "ulysses" else (0 if rotated else 2)


def context_method(config: RunConfig) -> Literal["ulysses", "ring"]:
    """What context_method = "auto" means, as `parallel.context_parallel.resolve_method`."""
    parallel = config.parallel
    if parallel.context_method != "auto":
        return parallel.context_method
    return "ulysses" if config.model.num_heads // parallel.tensor % parallel.context == 0 else "ring"


def part_activations(config: RunConfig, layout: Layout, part: StageLayers) -> int:
    """Bytes that a virtual stage keeps of one micro-batch: its blocks and, of the head, its norm's input with
    both finished gradients or what they are made of: its input, 16 bytes a token, the norms of its rows."""
    tokens, model = _Tokens(config, layout), config.model
    h, t, s = model.hidden_size, layout.tensor, tokens.shards
    total = sum(block_activations(config, layout, recompute_of(config, layer)) for layer in part.layers)
    if part.has_head:
        total += tokens.count * (tokens.width * (h + h // s) + 4 // s)
        if head_pass(config.ops) == "forward":
            total += tokens.width * model.vocab_size * h // t
        else:
            total += 16 * tokens.count + 4 * model.vocab_size // t
    return total


def deferred_gradients(config: RunConfig, layout: Layout, part: StageLayers) -> int:
    """Bytes that a split backward keeps of one micro-batch beside its activations until it makes gradients of
    parameters: those of every product and norm of the stage. The first stage does all at once."""
    if part.has_embedding or config.train.recompute == "full":
        return 0
    tokens, model = _Tokens(config, layout), config.model
    h, f, t, s = model.hidden_size, model.ffn_hidden_size, layout.tensor, tokens.shards
    # qkv; gate and up; attention's output and down; both norms.
    block = 3 * h // t + 2 * f // t + 2 * h + 2 * h // s
    return tokens.count * tokens.width * (len(part.layers) * block + int(part.has_head) * h)


def peak_activations(
    order: Sequence[Instruction], chunk_bytes: Sequence[int], deferred: Sequence[int] = ()
) -> int:
    """Largest sum of what micro-batches in flight keep, over a rank's instructions.

    A micro-batch is kept from its forward F to the end of its whole backward B, or of W when it is split;
    then `deferred` comes to it between I and W.
    """
    now = peak = 0
    for instruction in order:
        chunk = instruction.chunk
        if instruction.kind == "F":
            now += chunk_bytes[chunk]
        elif instruction.kind == "B":
            now -= chunk_bytes[chunk]
        elif deferred:
            now += deferred[chunk] if instruction.kind == "I" else -deferred[chunk]
        if instruction.kind == "W":
            now -= chunk_bytes[chunk]
        peak = max(peak, now)
    return peak


def rank_memory(
    config: RunConfig, layout: Layout, parts: Sequence[StageLayers], order: Sequence[Instruction]
) -> RankMemory:
    """Memory of one pipeline rank.

    Args:
        config: the run.
        layout: its sizes.
        parts: the rank's virtual stages, by chunk.
        order: its instructions.
    """
    parameters = [p for part in parts for p in part_parameters(config.model, part, tensor=layout.tensor)]
    size = sum(parameter.size for parameter in parameters)
    stage, ranks = _zero_stage(config), layout.data_context
    width = _Tokens(config, layout).width
    shard = ceil(size / ranks)
    gradients = 4 * (shard if stage >= 2 else size)
    if keeps_fp32_gradients(config):
        gradients += width * size  # of the micro-batch at work, before they are added to the fp32 sums
    if stage == 2 and width == 4 and config.train.accumulation_steps(layout.data) > 1:
        gradients += 4 * shard  # the same; bf16 is added to the sum at once
    optimizer = (8 if stage == 0 else 12) * (shard if stage >= 1 else size)
    offload = config.parallel.offload_optimizer
    return RankMemory(
        parameters=size,
        weights=width * (_zero_3_elements(config, parameters, ranks) if stage == 3 else size),
        gradients=gradients,
        optimizer=0 if offload else optimizer,
        activations=peak_activations(
            order,
            [part_activations(config, layout, part) for part in parts],
            [deferred_gradients(config, layout, part) for part in parts],
        ),
        working=working_bytes(config, layout, parts) + bucket_bytes(config, size),
        host=optimizer if offload else 0,
    )


def _zero_stage(config: RunConfig) -> int:
    return config.parallel.zero_stage if config.parallel.engine == "deepspeed" else 0


def _zero_3_elements(config: RunConfig, parameters: Sequence[LocalParameter], ranks: int) -> int:
    """Elements of parameters on a ZeRO-3 rank: partitions of all, whole ones, hpZ's copy, gathered ones."""
    size = sum(parameter.size for parameter in parameters)
    whole = sum(parameter.size for parameter in zero_3_whole(config, parameters))
    hpz = config.parallel.hpz
    second = ceil((size - whole) / hpz) if hpz > 1 else 0
    live = int(zero_settings(config)["stage3_max_live_parameters"])
    return ceil(size / ranks) + whole + second + min(live, size - whole)


def bucket_bytes(config: RunConfig, size: int) -> int:
    """What DeepSpeed reduces gradients in, on a rank with `size` elements of parameters.

    Buffers of reduce_bucket_size elements (two where one is filled while the other is reduced) and, of bf16
    ones, an fp32 copy; or, where ZeRO does not reduce itself, a flat copy of many gradients.
    """
    stage = _zero_stage(config)
    if stage == 0 or keeps_fp32_gradients(config):
        return 4 * min(size, WHOLE_MODEL_BUCKET) if config.parallel.engine == "deepspeed" else 0
    settings = zero_settings(config)
    is_double = stage < 3 and settings["overlap_comm"]
    width = 4 if config.train.precision == "fp32" or stage == 1 else 2
    copy = 4 if width == 2 else 0
    return int(settings["reduce_bucket_size"]) * (width * (2 if is_double else 1) + copy)


def keeps_fp32_gradients(config: RunConfig) -> bool:
    """Whether DeepSpeed takes its optimizer for bf16 at stage 1, which sums all gradients in fp32 and keeps
    those of the backward pass beside them."""
    return (
        _zero_stage(config) == 1
        and config.train.precision == "bf16"
        and not config.parallel.offload_optimizer
    )


def working_bytes(config: RunConfig, layout: Layout, parts: Sequence[StageLayers]) -> int:
    """Bytes at work on a rank that holds `parts`: the larger of a block's backward (with what it recomputes)
    and the head's loss."""
    tokens, model = _Tokens(config, layout), config.model
    h, f, t = model.hidden_size, model.ffn_hidden_size, layout.tensor
    kinds = {recompute_of(config, layer) for part in parts for layer in part.layers}
    whole = block_activations(config, layout, "none")
    again = max(
        0
        if kind == "none"
        else whole - (block_activations(config, layout, kind) if kind == "selective" else 0)
        for kind in kinds or {"none"}
    )
    gradients = tokens.count * tokens.width * (2 * h + 3 * f // t)
    head = _head_working(config, layout) if any(part.has_head for part in parts) else 0
    return max(again + gradients, head)


def _head_working(config: RunConfig, layout: Layout) -> int:
    """Logits of a chunk, and sums in fp32: of the weight's gradient where it is made in the forward pass;
    else of the input's, beside both gradients."""
    tokens, model = _Tokens(config, layout), config.model
    h, width, rows = model.hidden_size, tokens.width, model.vocab_size // layout.tensor
    backend = planned_backend(config.ops, "head_loss")
    chunk = HEAD_CHUNK_BYTES[backend] * (4 + width) // 4
    if head_pass(config.ops) == "forward":
        return 4 * rows * h + chunk
    if backend == "triton":
        chunk = tokens.count * min(HEAD_ROWS, rows) * width
    return chunk + tokens.count * h * (4 + width) + width * rows * h
