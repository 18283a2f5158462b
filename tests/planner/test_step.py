"""Parts of a step against closed forms: products, rings, sends, overlap, bubble, and the crossover."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_b2.planner.constants import load_constants
from megatron_b2.planner.flops import tflops_per_gpu
from megatron_b2.planner.hardware import load_hardware
from megatron_b2.planner.kernels import Device, block_passes, optimizer_seconds
from megatron_b2.planner.network import Links
from megatron_b2.planner.step import StepTime, predict_step
from megatron_b2.planner.workload import ModelShape, Workload

CONSTANTS = load_constants()
A100 = load_hardware("a100-80g")
GPT_175B = ModelShape(
    hidden_size=12_288,
    ffn_hidden_size=49_152,
    num_layers=96,
    num_heads=96,
    vocab_size=51_200,
    gated=False,
    tied=True,
)
MEGATRON = Workload(
    shape=GPT_175B,
    seq_len=2048,
    micro_batch_size=1,
    global_batch=1536,
    tensor=8,
    pipeline=12,
    data=4,
    zero_stage=0,
    recompute="full",
    attention="unfused",
    gradient_bytes=2,
    overlap_data=False,
    chunked_head=False,
    balanced_stages=False,
)
ZERO_3 = replace(
    MEGATRON,
    tensor=1,
    pipeline=1,
    data=384,
    micro_batch_size=4,
    zero_stage=3,
    overlap_data=True,
)


def step(work: Workload) -> StepTime:
    return predict_step(work, A100, CONSTANTS)


def test_parts_add_up() -> None:
    time = step(MEGATRON)
    parts = ("compute", "tensor", "context", "pipeline", "data", "bubble", "optimizer")
    assert time.total == pytest.approx(sum(getattr(time, part) for part in parts))
    assert all(getattr(time, part) >= 0 for part in parts)
    assert (time.low, time.high) == (time.total * (1 - time.band), time.total * (1 + time.band))
    assert time.describe() == f"{time.total:.3g} s ± {100 * time.band:.0f} %"


def test_all_reduce_of_a_ring() -> None:
    """A rank sends 2 (n - 1) / n of the tensor, in 2 (n - 1) steps."""
    links = Links(A100, CONSTANTS)
    n, size = 8, 100e6
    rate = A100.gpu.nvlink_bandwidth * CONSTANTS.nvlink
    expected = 2 * (n - 1) / n * size / rate + 2 * (n - 1) * CONSTANTS.node_latency
    assert links.ring(n, stride=1).all_reduce(size) == pytest.approx(expected, rel=1e-12)
    assert links.ring(n, stride=1).gather(size) == pytest.approx(expected / 2, rel=1e-12)
    assert links.ring(1, stride=1).all_reduce(size) == 0


def test_rails_between_nodes() -> None:
    """One rank of each node uses one port; all eight use all eight, and the same tensor goes 8 times faster."""
    links = Links(A100, CONSTANTS)
    one, all_eight = links.ring(16, stride=8), links.ring(128, stride=1)
    assert (one.nodes, all_eight.nodes) == (16, 16)
    assert one.bandwidth == pytest.approx(25e9 * CONSTANTS.network)
    assert all_eight.bandwidth == pytest.approx(8 * one.bandwidth)
    assert links.ring(128, stride=1, rails=1).bandwidth == pytest.approx(one.bandwidth)
    inside = links.ring(8, stride=1)
    assert (inside.nodes, inside.bandwidth) == (1, pytest.approx(300e9 * CONSTANTS.nvlink))


def test_tensor_parallel_sums() -> None:
    """Megatron-LM: two sums of [T, h] a block in each of forward, recomputation and backward; and one at each
    end of the model, of which no stage has both."""
    time = step(MEGATRON)
    message = 2048 * 12_288 * 2
    once = Links(A100, CONSTANTS).ring(8, stride=1).all_reduce(message)
    assert time.tensor == pytest.approx(384 * once * (8 * 6 + 1), rel=1e-9)


def test_bubble_of_a_pipeline() -> None:
    """Nearly (p - 1) / m of the work: the head makes one stage longer than the others."""
    time = step(MEGATRON)
    busy = time.compute + time.tensor
    assert time.bubble / busy == pytest.approx(11 / 384, rel=0.05)
    assert step(replace(MEGATRON, pipeline=1, data=48)).bubble == 0
    interleaved = step(replace(MEGATRON, virtual_stages=2, schedule="interleaved"))
    assert interleaved.bubble == pytest.approx(time.bubble / 2, rel=0.1)
    assert interleaved.pipeline > time.pipeline


def test_products_approach_the_sustained_rate() -> None:
    device = Device.of(A100.gpu, MEGATRON, CONSTANTS)
    flops = 2 * 16_384.0**3

    def share(m: int, n: int, k: int) -> float:
        return 2.0 * m * n * k / device.product(m, n, k) / device.flops

    assert flops / device.product(16_384, 16_384, 16_384) < device.flops
    assert share(27_648, 16_384, 16_384) > 0.94  # 108 x 128 tiles: whole waves
    assert share(2048, 512, 512) < share(2048, 4096, 4096) < share(27_648, 16_384, 16_384)


def test_waves_of_tiles() -> None:
    """108 multiprocessors: 108 tiles of 256 x 128 are one wave, 110 need two."""
    device = Device.of(A100.gpu, MEGATRON, CONSTANTS)
    assert device.waves(256 * 54, 256, 1) == 1
    assert device.waves(256 * 55, 256, 1) == pytest.approx(2 * 108 / 110)
    assert device.waves(256, 256, 27) == pytest.approx(2)
    assert replace(device, multiprocessors=0).waves(256 * 55, 256, 1) == 1


def test_work_of_a_block() -> None:
    """At an infinite memory bandwidth and no latency a block takes its FLOPs: 24 T h^2 + 4 T s h forward (SC21,
    appendix), twice that backward, and the forward again."""
    gpu = replace(A100.gpu, memory_bandwidth=1e30, multiprocessors=0)
    device = Device.of(gpu, MEGATRON, replace(CONSTANTS, kernel_latency=0.0))
    passes = block_passes(MEGATRON, device)
    tokens, h = 2048, 12_288
    forward = (24 * tokens * h**2 + 4 * tokens * 2048 * h) / 8 / device.flops
    assert passes.forward == pytest.approx(forward, rel=1e-9)
    assert passes.backward == pytest.approx(2 * forward, rel=1e-9)
    assert passes.again == pytest.approx(forward, rel=1e-9)
    selective = block_passes(replace(MEGATRON, recompute="selective"), device)
    assert selective.again == pytest.approx(4 * tokens * 2048 * h / 8 / device.flops, rel=1e-9)


def test_heads_without_tensor_cores() -> None:
    """Unfused attention needs a head width that is a multiple of 8: 13,824 / 128 = 108 is none."""
    wide = replace(MEGATRON, shape=replace(GPT_175B, hidden_size=13_824, ffn_hidden_size=55_296))
    slow = replace(wide, shape=replace(wide.shape, num_heads=128))
    assert step(slow).total > 1.25 * step(wide).total
    fused = [replace(work, attention="fused") for work in (wide, slow)]
    assert step(fused[1]).total == pytest.approx(step(fused[0]).total, rel=0.01)


def test_gradients_that_nothing_hides() -> None:
    """All-reduce of what the fullest rank holds; ZeRO-1 of Megatron-LM sends as much, in two halves; DeepSpeed
    sums before it gathers."""
    parameters = max(MEGATRON.stage_parameters(stage) for stage in MEGATRON.stages())
    ring = Links(A100, CONSTANTS).ring(4, stride=8)
    assert step(MEGATRON).data == pytest.approx(ring.all_reduce(2 * parameters))
    sharded = replace(MEGATRON, zero_stage=1, zero_engine="megatron")
    assert step(sharded).data == pytest.approx(step(MEGATRON).data)
    deepspeed = replace(MEGATRON, zero_stage=1)
    assert step(deepspeed).data == pytest.approx(1.5 * step(MEGATRON).data)


def test_overlap_hides_but_slows() -> None:
    """A gradient reduction beside a long backward costs the share that it takes from the work."""
    work = replace(MEGATRON, micro_batch_size=8)
    hidden = step(replace(work, overlap_data=True))
    assert hidden.data == pytest.approx(CONSTANTS.interference * step(work).data)
    # Beside a short one it is the part that is longer.
    assert CONSTANTS.interference * step(MEGATRON).data < step(replace(MEGATRON, overlap_data=True)).data


def test_optimizer_is_sharded() -> None:
    device = Device.of(A100.gpu, MEGATRON, CONSTANTS)
    whole, part = (optimizer_seconds(replace(MEGATRON, zero_stage=stage), device, 10**9) for stage in (0, 1))
    # Read and write of fp32 weights and moments, the gradient, the new weight; zeroing and the norm.
    assert whole == pytest.approx((24 + 2 + 2 + 4) * 1e9 / device.bandwidth, rel=1e-3)
    assert part == pytest.approx((28 / 4 + 4) * 1e9 / device.bandwidth, rel=1e-3)


def test_zero_3_collapses_at_a_fixed_batch() -> None:
    """SC21, table 2: 144, 88 and 44 TFLOP/s on 384, 768 and 1,536 GPUs, against 153, 149 and 141 of tensor and
    pipeline parallelism. Twice the GPUs are hardly faster once the gathers are longer than the work."""
    works = [replace(ZERO_3, data=384 * 2**i, micro_batch_size=4 // 2**i) for i in range(3)]
    rates = [tflops_per_gpu(work, step(work).total, "sc21") for work in works]
    assert rates == pytest.approx([144, 88, 44], rel=0.1)
    split = [replace(MEGATRON, data=4 * 2**i) for i in range(3)]
    assert [tflops_per_gpu(work, step(work).total, "sc21") for work in split] == pytest.approx(
        [153, 149, 141], rel=0.1
    )
    assert step(works[1]).total == pytest.approx(step(works[2]).total, rel=0.05)
    # FSDP uses all ports of a node and would not collapse.
    assert step(replace(works[2], zero_engine="fsdp")).total < 0.6 * step(works[2]).total


def test_crossover_of_13b_on_a800() -> None:
    """ZeRO-3 alone is fast while a GPU has a large batch. On 1,024 with 4M tokens a step, tensor parallelism
    in the node with ZeRO across wins."""
    cluster = load_hardware("a800-80g")
    shape = ModelShape(
        hidden_size=5120, ffn_hidden_size=13_696, num_layers=40, num_heads=40, vocab_size=125_696
    )

    def rate(gpus: int, tensor: int, micro: int) -> float:
        work = Workload(
            shape=shape,
            seq_len=4096,
            micro_batch_size=micro,
            global_batch=1024,
            tensor=tensor,
            data=gpus // tensor,
            zero_stage=3,
            sequence_parallel=tensor > 1,
            recompute="full",
        )
        return tflops_per_gpu(work, predict_step(work, cluster, CONSTANTS).total, "megatron")

    assert rate(64, 1, 8) > rate(64, 4, 8)
    assert rate(1024, 1, 1) < 0.6 * rate(64, 1, 8)
    assert rate(1024, 4, 4) > 1.5 * rate(1024, 1, 1)


def test_first_flash_attention_is_slower() -> None:
    """By its rate, of each architecture; and a kind of attention of another program changes nothing else."""
    for cluster, rate in (
        (A100, CONSTANTS.ampere_flash_1),
        (load_hardware("h100-80g"), CONSTANTS.hopper_flash_1),
    ):
        fused, first = (
            Device.of(cluster.gpu, replace(MEGATRON, attention=kind), CONSTANTS)
            for kind in ("fused", "flash-1")
        )
        assert (fused.fused_attention, first.fused_attention) == (CONSTANTS.fused_attention, rate)
        works = [
            replace(MEGATRON, attention=kind, seq_len=65_536, recompute="none")
            for kind in ("fused", "flash-1")
        ]
        extra = [
            block_passes(work, first if work.attention == "flash-1" else fused).forward for work in works
        ]
        flops = 4 * 12 * 65_536**2 * 128 / 2
        assert extra[1] - extra[0] == pytest.approx(
            flops / fused.flops * (1 / rate - 1 / CONSTANTS.fused_attention), rel=1e-9
        )


def test_overlapped_tensor_parallel_sums() -> None:
    """What products hide costs the share by which it slows them down."""
    work = replace(MEGATRON, pipeline=1, data=48)
    hidden, bare = step(replace(work, overlap_tensor=True)), step(work)
    ends = 2 * work.num_micro * Links(A100, CONSTANTS).tensor(work).all_reduce(2048 * 12_288 * 2)
    assert hidden.tensor - ends == pytest.approx(CONSTANTS.interference * (bare.tensor - ends), rel=1e-9)
    assert hidden.compute == bare.compute


def test_context_parallelism_has_a_price() -> None:
    work = replace(MEGATRON, tensor=1, pipeline=1, data=6, attention="fused", micro_batch_size=4, context=4)
    assert step(work).context > 0
    assert step(replace(work, context=1, data=24)).context == 0
