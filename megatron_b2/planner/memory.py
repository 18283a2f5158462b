"""Bytes on the device of each pipeline rank: predict_memory(workload) -> MemoryPlan.

For any decoder-only transformer, ours and GPT, as the published runs need it. What our own code keeps is
known exactly: own.py takes that from layouts/. Activations follow Korthikanti et al. 2022 (arXiv 2205.05198,
section 4), generalised to SwiGLU, grouped queries and fused attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from megatron_b2.layouts.memory import peak_activations
from megatron_b2.pipeline.schedule import build_schedule
from megatron_b2.planner.constants import ALLOCATOR_DEVICE, Constants, load_constants
from megatron_b2.planner.workload import StageSlice, Workload

BUCKET: Final = 500_000_000
"""Elements of a reduction bucket (DeepSpeed's default)."""
SCORE_BYTES: Final = 5
"""Kept of a score by unfused attention: softmax output, dropout output and mask (Korthikanti, 5 a s^2 b)."""
LOGIT_BYTES: Final = 10
"""Of a logit at once: bf16, fp32 and the gradient in fp32 (Megatron-LM's vocabulary-parallel loss). A fused
loss keeps two of them: the logit and its gradient in bf16."""
HEAD_CHUNK: Final = 64 * 2**20
"""Bytes of fp32 logits at once of a head that works in chunks (ours)."""


@dataclass(frozen=True, kw_only=True)
class RankBytes:
    """Bytes of one pipeline rank (one of its tensor-parallel ranks)."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    """Kept between forward and backward of the micro-batches in flight."""
    working: float
    """One block at work in backward: what it computes again, and gradients of activations."""
    head: float
    """Logits of the last stage and their gradients."""
    communication: float
    """Buffers of reductions, gathers and sends."""
    allocator: float
    """The one declared constant: fragmentation, CUDA context, libraries."""

    @property
    def total(self) -> float:
        """All of it."""
        return (
            self.parameters
            + self.gradients
            + self.optimizer
            + self.activations
            + self.working
            + self.head
            + self.communication
            + self.allocator
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a layout."""

    ranks: tuple[RankBytes, ...]
    """By pipeline rank."""
    band: float
    """Relative error that nine in ten held-out published runs kept."""

    @property
    def worst(self) -> RankBytes:
        """The fullest pipeline rank."""
        return max(self.ranks, key=lambda rank: rank.total)

    @property
    def total(self) -> float:
        """Bytes of the fullest pipeline rank."""
        return self.worst.total

    def fits(self, memory_bytes: float) -> bool:
        """Whether the upper end of the band is within the device's memory."""
        return self.total * (1 + self.band) <= memory_bytes


def predict_memory(
    workload: Workload, constants: Constants | None = None, *, memory_bytes: float = ALLOCATOR_DEVICE
) -> MemoryPlan:
    """Memory of each pipeline rank on a device of `memory_bytes`; `constants` default to the frozen ones."""
    constants = constants or load_constants()
    stages, p = workload.stages(), workload.pipeline
    peaks, allocator = _peaks(workload, stages), constants.allocator(workload.zero_engine, memory_bytes)
    ranks = tuple(_rank(workload, stages[rank::p], peaks[rank], allocator) for rank in range(p))
    return MemoryPlan(ranks, constants.memory_band)


def _rank(work: Workload, parts: Sequence[StageSlice], activations: float, allocator: float) -> RankBytes:
    size = sum(work.stage_parameters(part) for part in parts)
    shard = size / work.data_context
    width, stage = work.element_bytes, work.zero_stage
    block = work.shape.layer_parameters / work.tensor
    gradients = work.gradient_bytes * (shard if stage >= 2 else size)
    if work.gradient_copy and work.gradient_bytes > width and stage < 2:
        gradients += width * size
    has_head = any(part.has_head for part in parts)
    return RankBytes(
        # Under ZeRO-3 two blocks are gathered at once: one at work and the next.
        parameters=width * (shard + 2 * block if stage == 3 else size),
        gradients=gradients,
        optimizer=(12 if width == 2 else 8) * (shard if stage >= 1 else size),
        activations=activations,
        working=_working(work),
        head=_head(work) if has_head else 0.0,
        communication=_buckets(work, size, block),
        allocator=allocator,
    )


def _peaks(work: Workload, stages: Sequence[StageSlice]) -> list[float]:
    """Activations that each pipeline rank keeps at its fullest moment."""
    block = block_activations(work)
    kept = [stage.layers * block + (_head_kept(work) if stage.has_head else 0.0) for stage in stages]
    if work.pipeline == 1 and work.virtual_stages == 1:
        return [kept[0]]
    # All but gpipe have begun backward passes after two rounds.
    micro = work.num_micro if work.schedule == "gpipe" else min(work.num_micro, 2 * work.pipeline)
    schedule = build_schedule(
        work.schedule, num_ranks=work.pipeline, num_micro=micro, num_chunks=work.virtual_stages
    )
    return [
        float(peak_activations(order, [round(size) for size in kept[rank :: work.pipeline]]))
        for rank, order in enumerate(schedule)
    ]


def block_activations(work: Workload, *, recompute: str | None = None) -> float:
    """Bytes that a block keeps of a micro-batch; `recompute` overrides the workload's."""
    kind = recompute or work.recompute
    shape, t, shards, width = work.shape, work.tensor, work.sequence_shards, work.element_bytes
    h, f, kv = shape.hidden_size, shape.ffn_hidden_size, shape.kv_width
    if kind == "full":
        return work.local_tokens * width * h / shards
    if kind == "selective" and work.zero_engine == "fsdp":
        # The block's input, attention's output and the output of every second product.
        products = 3 * h + 2 * kv + (shape.mlp_matrices - 1) * f
        return work.local_tokens * width * (h / shards + (h + products / 2) / t)
    # Inputs of both norms and of what follows them; dropout's masks, which no program with FSDP has.
    has_masks = not shape.gated and work.zero_engine != "fsdp"
    rows = width * 4 * h / shards + (2 * h / shards if has_masks else 0)
    # Queries, keys, values and attention's output; the MLP's products.
    split = width * (2 * h + 2 * kv + shape.mlp_matrices * f) / t
    if kind == "selective":
        split -= width * f / t if shape.gated else 0.0
    elif work.attention == "unfused":
        split += SCORE_BYTES * width / 2 * shape.num_heads * work.seq_len / t
    return work.local_tokens * (rows + split)


def _working(work: Workload) -> float:
    """What one block computes again, and the gradients of its activations."""
    tokens, t, width, shape = work.local_tokens, work.tensor, work.element_bytes, work.shape
    again = block_activations(work, recompute="none") - block_activations(work)
    gradients = width * (2 * shape.hidden_size + 3 * shape.ffn_hidden_size / t)
    if work.attention == "unfused":
        gradients += 2 * width * shape.num_heads * work.seq_len / t
    return again + tokens * gradients


def _head_kept(work: Workload) -> float:
    """Input of the final norm and of the head."""
    return 2 * work.local_tokens * work.shape.hidden_size * work.element_bytes


def _head(work: Workload) -> float:
    """Logits at once, and the gradient of the head's input."""
    logits = work.local_tokens * work.shape.vocab_size / work.tensor
    if work.chunked_head:
        logits = min(logits, HEAD_CHUNK / 4)
    each = 2 * work.element_bytes if work.fused_loss else LOGIT_BYTES
    return each * logits + work.local_tokens * work.shape.hidden_size * work.element_bytes


def _buckets(work: Workload, size: int, block: float) -> float:
    """A reduction bucket; under ZeRO-3 the gradients of a block."""
    if work.zero_stage == 0 or work.data_context == 1:
        return 0.0
    if work.zero_stage == 3:
        return block * work.gradient_bytes
    return float(min(BUCKET, size) * work.gradient_bytes)
