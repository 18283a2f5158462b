"""Memory against Korthikanti's formulas, ZeRO's shares and our own exact model of layouts/memory.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_b2.config import load_config
from megatron_b2.layouts.memory import block_activations as own_block
from megatron_b2.planner.constants import load_constants
from megatron_b2.planner.memory import block_activations, predict_memory
from megatron_b2.planner.workload import ModelShape, Recompute, Workload

CONSTANTS = load_constants()
H, HEADS, S, T = 12_288, 96, 2048, 8
WORK = Workload(
    shape=ModelShape(
        hidden_size=H,
        ffn_hidden_size=4 * H,
        num_layers=96,
        num_heads=HEADS,
        vocab_size=51_200,
        gated=False,
        tied=True,
    ),
    seq_len=S,
    micro_batch_size=1,
    global_batch=64,
    tensor=T,
    pipeline=8,
    zero_stage=0,
    attention="unfused",
    gradient_bytes=2,
    overlap_data=False,
    chunked_head=False,
    balanced_stages=False,
)


@pytest.mark.parametrize(
    ("recompute", "parallel", "expected"),
    [
        # arXiv 2205.05198, table 2: bytes of a layer over s b h.
        ("none", False, 10 + 24 / T + 5 * HEADS * S / H / T),
        ("none", True, 34 / T + 5 * HEADS * S / H / T),
        ("selective", False, 10 + 24 / T),
        ("selective", True, 34 / T),
        ("full", False, 2),
    ],
)
def test_activations_of_a_layer(recompute: Recompute, parallel: bool, expected: float) -> None:
    work = replace(WORK, recompute=recompute, sequence_parallel=parallel)
    assert block_activations(work) / (S * H) == pytest.approx(expected, rel=1e-12)


def test_close_to_our_exact_model() -> None:
    """layouts/memory.py counts what our modules keep, tensor by tensor."""
    loaded = load_config("preset:baichuan2-13b", ["--train.precision", "bf16", "--ops.backend", "triton"])
    config = replace(loaded.config, parallel=replace(loaded.config.parallel, tensor=4))
    work = replace(Workload.of(config, gpus=4), chunked_head=True)
    for kind in ("none", "selective", "full"):
        exact = own_block(config, work.layout, kind)  # type: ignore[arg-type]
        assert block_activations(work, recompute=kind) == pytest.approx(exact, rel=0.2)


def test_checkpointing_by_operation() -> None:
    """FSDP: the block's input, attention's output and every second of seven products (q, k, v, o, gate, up and
    down), so much less than what Megatron-LM's selective recomputation keeps."""
    shape = ModelShape(
        hidden_size=4096,
        ffn_hidden_size=14_336,
        num_layers=32,
        num_heads=32,
        kv_heads=8,
        vocab_size=128_256,
    )
    work = Workload(shape=shape, seq_len=8192, micro_batch_size=1, global_batch=8, recompute="selective")
    by_operation = replace(work, zero_engine="fsdp")
    outputs = 4096 + 1024 + 1024 + 4096 + 14_336 + 14_336 + 4096
    assert block_activations(by_operation) == 8192 * 2 * (4096 + 4096 + outputs / 2)
    assert block_activations(by_operation) < 0.6 * block_activations(work)


def test_states_by_zero_stage() -> None:
    """18 bytes a parameter in mixed precision with fp32 sums (2 + 4 + 12); each stage divides one more part."""
    work = replace(WORK, tensor=1, pipeline=1, data=16, gradient_bytes=4, gradient_copy=False)
    size, states = work.parameters, {}
    for stage in (0, 1, 2, 3):
        rank = predict_memory(replace(work, zero_stage=stage), CONSTANTS).ranks[0]
        states[stage] = (rank.parameters / size, rank.gradients / size, rank.optimizer / size)
    assert states[0] == pytest.approx((2, 4, 12))
    assert states[1] == pytest.approx((2, 4, 12 / 16))
    assert states[2] == pytest.approx((2, 4 / 16, 12 / 16))
    two_blocks = 2 * work.shape.layer_parameters / size * 2
    assert states[3] == pytest.approx((2 / 16 + two_blocks, 4 / 16, 12 / 16))
    copied = predict_memory(replace(work, gradient_copy=True), CONSTANTS).ranks[0]
    assert copied.gradients / size == pytest.approx(6)


def test_micro_batches_in_flight() -> None:
    """1F1B: rank r keeps p - r micro-batches of its 12 layers; the last one the head's inputs as well."""
    plan = predict_memory(replace(WORK, recompute="full"), CONSTANTS)
    layer = 2 * S * H
    kept = [rank.activations for rank in plan.ranks]
    assert kept[:-1] == [(8 - rank) * 12 * layer for rank in range(7)]
    assert kept[-1] == 12 * layer + 2 * layer
    gpipe = predict_memory(replace(WORK, recompute="full", schedule="gpipe"), CONSTANTS)
    assert gpipe.ranks[0].activations == 64 * 12 * layer


def test_worst_rank_and_head() -> None:
    plan = predict_memory(WORK, CONSTANTS)
    assert plan.total == max(rank.total for rank in plan.ranks)
    assert [rank.head > 0 for rank in plan.ranks] == [False] * 7 + [True]
    logits = S * 51_200 / 8 * 10
    assert plan.ranks[-1].head == pytest.approx(logits + S * H * 2)
    assert (
        predict_memory(replace(WORK, chunked_head=True), CONSTANTS).ranks[-1].head < plan.ranks[-1].head + 1
    )
    assert {rank.allocator for rank in plan.ranks} == {CONSTANTS.allocator_bytes}


def test_fused_loss_keeps_two_widths_of_a_logit() -> None:
    """Logit and gradient in bf16 (4 bytes), not bf16 and twice fp32 (10 bytes)."""
    plain, fused = (predict_memory(replace(WORK, fused_loss=on), CONSTANTS).ranks[-1] for on in (False, True))
    assert plain.head - fused.head == pytest.approx(6 * S * 51_200 / 8)


def test_programs_with_fsdp_have_no_dropout_masks() -> None:
    work = replace(WORK, zero_engine="fsdp", attention="flash-1")
    assert block_activations(replace(work, zero_engine="megatron")) - block_activations(work) == 2 * S * H


def test_a_smaller_device_holds_less_back() -> None:
    """In proportion up to 80 GB; FSDP has its own constant."""
    whole = predict_memory(WORK, CONSTANTS).ranks[0].allocator
    assert predict_memory(WORK, CONSTANTS, memory_bytes=42.45e9).ranks[0].allocator == whole / 2
    assert predict_memory(WORK, CONSTANTS, memory_bytes=150e9).ranks[0].allocator == whole
    fsdp = predict_memory(replace(WORK, zero_engine="fsdp"), CONSTANTS)
    assert fsdp.ranks[0].allocator == CONSTANTS.fsdp_allocator_bytes < whole


def test_fits_is_on_the_safe_side() -> None:
    plan = predict_memory(WORK, CONSTANTS)
    assert not plan.fits(plan.total)
    assert plan.fits(plan.total * (1 + plan.band))
    assert plan.band == CONSTANTS.memory_band > 0
