"""Time of a transformer block and of the head on one device, without communication.

Every kernel costs `work / sustained rate + bytes / sustained bandwidth + latency`. The sum, not the larger of
both, makes the rate of a product depend on the size of the local matrices: tensor parallelism shrinks them,
more tokens in a micro-batch grow them. Bytes are counted from what the kernels of Megatron-LM (unfused
attention, LayerNorm, GeLU, dropout) or of our own blocks (fused attention, RMSNorm, SwiGLU) read and write.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

from megatron_b2.planner.constants import Constants
from megatron_b2.planner.hardware import Gpu
from megatron_b2.planner.workload import Workload

SCORE_BYTES_FORWARD: Final = 9
"""Bytes of a score of unfused attention beside its products: the causal softmax reads half and writes 2,
dropout reads 2 and writes 2 and a mask of 1, and the mask of padding is read as 1."""
SCORE_BYTES_BACKWARD: Final = 11
"""Dropout reads 2 and 1 and writes 2; the softmax reads 4 and writes 2."""
TILE: Final = (256, 128)
"""Rows and columns of the output that a multiprocessor makes at once: the largest tile of cuBLAS on A100."""
LOSS_BYTES: Final = 32
"""Bytes of a logit beside its products, forward and backward: cast to fp32 (6), maximum (4), exponential and
sum (8), gradient (8) and cast back (6)."""
FUSED_BACKWARD: Final = 2.5
"""Work of fused attention's backward relative to its forward: five products instead of two."""


@dataclass(frozen=True)
class Device:
    """Sustained rates of one device for one workload's precision."""

    flops: float
    """FLOP/s of large products."""
    bandwidth: float
    """Bytes/s."""
    latency: float
    """Seconds a kernel."""
    width: int
    """Bytes of a weight or activation."""
    multiprocessors: float
    """Over which tiles go in waves; 0 if not known."""
    scalar_attention: float
    """Rate of products without tensor cores, relative to `flops`."""
    fused_attention: float
    """Rate of the workload's fused attention, relative to `flops`."""

    @classmethod
    def of(cls, gpu: Gpu, workload: Workload, constants: Constants) -> Device:
        """The rates of a GPU."""
        share = constants.matmul(gpu.architecture)
        precision = 1.0 if workload.precision == "bf16" else constants.tf32_share
        return cls(
            flops=gpu.peak_flops * share * precision,
            bandwidth=gpu.memory_bandwidth * constants.memory,
            latency=constants.kernel_latency,
            width=workload.element_bytes,
            multiprocessors=gpu.multiprocessors,
            scalar_attention=constants.scalar_attention / share,
            fused_attention=constants.fused_rate(workload.attention, gpu.architecture),
        )

    def product(self, m: float, n: float, k: float, *, batch: float = 1, rate: float = 1.0) -> float:
        """`batch` products [m, k] x [k, n]; `rate` is relative to large ones."""
        work = 2.0 * batch * m * n * k / (self.flops * rate) * self.waves(m, n, batch)
        return work + self.touch(self.width * batch * (m * k + k * n + m * n))

    def waves(self, m: float, n: float, batch: float) -> float:
        """Time of a product over that of one that fills all multiprocessors at every moment: an output is cut
        into tiles, and the last wave of tiles takes as long as a full one."""
        if not self.multiprocessors:
            return 1.0
        return min(self._waves(m, n, batch), self._waves(n, m, batch))

    def _waves(self, tall: float, wide: float, batch: float) -> float:
        tiles = batch * ceil(tall / TILE[0]) * ceil(wide / TILE[1])
        area = batch * tall * wide / (min(tall, TILE[0]) * min(wide, TILE[1]))
        return ceil(tiles / self.multiprocessors) * self.multiprocessors / area

    def touch(self, num_bytes: float) -> float:
        """A kernel that reads and writes so many bytes."""
        return num_bytes / self.bandwidth + self.latency


@dataclass(frozen=True)
class Passes:
    """Seconds of the passes of one micro-batch."""

    forward: float
    backward: float
    """Gradients only."""
    again: float = 0.0
    """What backward computes a second time."""

    def times(self, count: int) -> Passes:
        """Of `count` blocks."""
        return Passes(self.forward * count, self.backward * count, self.again * count)

    def plus(self, other: Passes) -> Passes:
        """One after the other."""
        return Passes(self.forward + other.forward, self.backward + other.backward, self.again + other.again)


def block_passes(work: Workload, device: Device) -> Passes:
    """One block, on one tensor- and context-parallel rank."""
    matrices = _matrices(work)
    tokens = work.local_tokens
    attention = _attention(work, device)
    forward_products = sum(device.product(tokens, n, k) for n, k in matrices)
    backward_products = sum(device.product(tokens, k, n) + device.product(k, n, tokens) for n, k in matrices)
    elementwise = device.touch(tokens * _elementwise_bytes(work)) + 5 * device.latency
    weights = sum(n * k for n, k in matrices)
    accumulate = device.touch(weights * _sum_bytes(work))
    forward = forward_products + attention.forward + elementwise
    # Gradients read the saved input as well: half as much again as forward.
    backward = backward_products + attention.backward + 1.5 * elementwise + accumulate
    some = attention.forward if work.zero_engine != "fsdp" else forward_products / 2 + elementwise
    again = {"none": 0.0, "selective": some, "full": forward}[work.recompute]
    return Passes(forward, backward, again)


def _sum_bytes(work: Workload) -> float:
    """Bytes of a weight whose gradient is added to the sum of the micro-batches, beside what the product
    writes: the sum is read and written, and a gradient of its own is read; a product that adds to the sum
    writes nothing else."""
    return 2 * work.gradient_bytes + (1 if work.gradient_copy else -1) * work.element_bytes


def _matrices(work: Workload) -> list[tuple[float, float]]:
    """Output and input width of the products of a block on one rank."""
    shape, t = work.shape, work.tensor
    h, f = shape.hidden_size, shape.ffn_hidden_size
    up = f * (shape.mlp_matrices - 1)
    return [((h + 2 * shape.kv_width) / t, h), (h, h / t), (up / t, h), (h, f / t)]


def _elementwise_bytes(work: Workload) -> float:
    """Bytes a token of what is neither product nor attention, forward: norms, residuals, dropout, the MLP's
    activation, and queries, keys and values brought into place."""
    shape, t, shards, width = work.shape, work.tensor, work.sequence_shards, work.element_bytes
    h, f = shape.hidden_size, shape.ffn_hidden_size
    norms = 2 * 2 * h / shards
    # Bias, dropout and residual in one kernel read two and write one, and a mask of one byte.
    residuals = 2 * 3 * h / shards
    masks = 0 if shape.gated else 2 * h / shards
    activation = (3 if shape.gated else 2) * f / t
    heads = 2 * (h + shape.kv_width) / t + 2 * h / t
    return width * (norms + residuals + activation + heads) + masks


def _attention(work: Workload, device: Device) -> Passes:
    """Scores, softmax and the sum of values."""
    shape = work.shape
    heads = work.micro_batch_size * shape.num_heads / work.tensor
    rows, columns, width = work.seq_len / work.context, work.seq_len, shape.head_dim
    if work.attention != "unfused":
        flops = 4.0 * heads * rows * columns * width / 2  # the causal half
        forward = flops / (device.flops * device.fused_attention) + device.latency
        return Passes(forward, FUSED_BACKWARD * forward)
    rate = 1.0 if width % 8 == 0 else device.scalar_attention
    product = device.product(rows, columns, width, batch=heads, rate=rate)
    scores = heads * rows * columns * work.element_bytes / 2
    forward = 2 * product + device.touch(scores * SCORE_BYTES_FORWARD) + 2 * device.latency
    backward = 4 * product + device.touch(scores * SCORE_BYTES_BACKWARD) + device.latency
    return Passes(forward, backward)


def head_passes(work: Workload, device: Device) -> Passes:
    """Final norm, logits and loss."""
    tokens, h, rows = work.local_tokens, work.shape.hidden_size, work.shape.vocab_size / work.tensor
    loss = device.touch(tokens * rows * LOSS_BYTES / 2) + 3 * device.latency
    norm = device.touch(2 * tokens * h * work.element_bytes)
    forward = device.product(tokens, rows, h) + loss + norm
    accumulate = device.touch(rows * h * _sum_bytes(work))
    backward = device.product(tokens, h, rows) + device.product(h, rows, tokens) + loss + norm + accumulate
    return Passes(forward, backward)


def embedding_passes(work: Workload, device: Device) -> Passes:
    """Rows looked up, and their gradients added."""
    touched = device.touch(2 * work.local_tokens * work.shape.hidden_size * work.element_bytes)
    return Passes(touched, 2 * touched)


def optimizer_seconds(work: Workload, device: Device, parameters: int) -> float:
    """Adam on a rank that computes with `parameters` of the model: gradients are zeroed, read for their norm
    and by the update, which reads and writes master weights and moments and writes the working weights."""
    shard = parameters / work.data_context if work.zero_stage >= 1 else parameters
    gradients = parameters / work.data_context if work.zero_stage >= 2 else parameters
    touched = shard * (24 + work.gradient_bytes + work.element_bytes) + gradients * 2 * work.gradient_bytes
    return device.touch(touched)
