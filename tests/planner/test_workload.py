"""Shapes and layouts: parameters against counts that others printed, stages, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.config import load_config
from megatron_b2.errors import ConfigError
from megatron_b2.planner.workload import ModelShape, Workload

BAICHUAN_13B = ModelShape(
    hidden_size=5120, ffn_hidden_size=13_696, num_layers=40, num_heads=40, vocab_size=125_696
)
BAICHUAN_7B = ModelShape(
    hidden_size=4096, ffn_hidden_size=11_008, num_layers=32, num_heads=32, vocab_size=125_696
)


def gpt(hidden: int, layers: int, heads: int, vocab: int = 51_200) -> ModelShape:
    return ModelShape(
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        vocab_size=vocab,
        gated=False,
        tied=True,
    )


def workload(**changes: object) -> Workload:
    fields: dict[str, object] = {
        "shape": BAICHUAN_13B,
        "seq_len": 4096,
        "micro_batch_size": 1,
        "global_batch": 1024,
        "tensor": 8,
        "data": 128,
    }
    return Workload(**{**fields, **changes})  # type: ignore[arg-type]


def test_parameters_of_baichuan_2() -> None:
    """The published checkpoints hold exactly so many."""
    assert BAICHUAN_13B.parameters == 13_896_668_160
    assert BAICHUAN_7B.parameters == 7_505_973_248


def test_parameters_of_llama_3() -> None:
    """Meta's own counts, with grouped queries: 8,030,261,248 and 405,853,388,800."""
    small = ModelShape(
        hidden_size=4096,
        ffn_hidden_size=14_336,
        num_layers=32,
        num_heads=32,
        kv_heads=8,
        vocab_size=128_256,
    )
    large = ModelShape(
        hidden_size=16_384,
        ffn_hidden_size=53_248,
        num_layers=126,
        num_heads=128,
        kv_heads=8,
        vocab_size=128_256,
    )
    assert (small.parameters, large.parameters) == (8_030_261_248, 405_853_388_800)


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "billions"),
    [(2304, 24, 24, 1.7), (6144, 40, 48, 18.4), (12_288, 80, 96, 145.6), (25_600, 128, 160, 1008.0)],
)
def test_parameters_of_sc21(hidden: int, layers: int, heads: int, billions: float) -> None:
    """Equation 2 of the paper: 12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h)), s h of it learned positions."""
    shape = gpt(hidden, layers, heads)
    equation = 12 * layers * hidden**2 * (1 + 13 / (12 * hidden) + 51_200 / (12 * layers * hidden))
    assert shape.parameters - 2 * hidden == pytest.approx(equation, rel=1e-12)  # the last norm is not in it
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.06)


def test_shards_add_up_to_the_model() -> None:
    """Matrices are split over tensor ranks and stages, norms are on every tensor rank."""
    work = workload(pipeline=4, data=32, sequence_parallel=True)
    whole = sum(work.stage_parameters(stage) for stage in work.stages())
    vectors = 40 * 2 * 5120 + 5120
    assert 8 * (whole - vectors) + vectors == work.parameters


def test_tied_table_is_on_both_ends() -> None:
    """With one stage it is one matrix, in a pipeline both ends have it."""
    shape = gpt(1024, 8, 16)
    one = Workload(shape=shape, seq_len=512, micro_batch_size=1, global_batch=8)
    two = replace(one, pipeline=2)
    assert sum(map(one.stage_parameters, one.stages())) == shape.parameters
    assert sum(map(two.stage_parameters, two.stages())) == shape.parameters + 51_200 * 1024


def test_stages_are_even_or_balanced() -> None:
    shape = gpt(12_288, 96, 96)
    work = Workload(shape=shape, seq_len=2048, micro_batch_size=1, global_batch=96, tensor=8, pipeline=12)
    assert {stage.layers for stage in replace(work, balanced_stages=False).stages()} == {8}
    wide = replace(work, shape=replace(shape, vocab_size=250_880))
    counts = [stage.layers for stage in wide.stages()]
    # The table weighs 1.7 blocks, so the ends have fewer.
    assert counts[0] < counts[1]
    assert counts[-1] < counts[-2]
    assert sum(counts) == 96


@settings(max_examples=60, deadline=None)
@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.sampled_from([1, 2, 4, 5]),
    data=st.integers(1, 8),
    micro=st.integers(1, 4),
    steps=st.integers(5, 12),
)
def test_derived_sizes(tensor: int, pipeline: int, data: int, micro: int, steps: int) -> None:
    work = workload(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        micro_batch_size=micro,
        global_batch=micro * data * steps,
    )
    assert work.gpus == tensor * pipeline * data == work.layout.world_size
    assert work.num_micro == steps
    assert work.tokens_per_step == work.local_tokens * steps * data
    assert sum(stage.layers for stage in work.stages()) == 40


def test_of_a_configuration() -> None:
    config = load_config("preset:baichuan2-13b").config
    config = replace(
        config,
        train=replace(config.train, global_batch_size=1024, micro_batch_size=2, precision="bf16"),
        parallel=replace(config.parallel, engine="deepspeed", tensor=4, pipeline=2, zero_stage=1),
    )
    work = Workload.of(config, gpus=1024)
    assert (work.tensor, work.pipeline, work.data, work.num_micro) == (4, 2, 128, 4)
    assert work.parameters == config.model.num_parameters
    assert not work.overlap_data  # DeepSpeed reduces after the last micro-batch at stage 1
    with pytest.raises(ConfigError, match=r"gpus = 1023 .* 4 x 1 x 2 = 8"):
        Workload.of(config, gpus=1023)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tensor": 0}, "tensor = 0 must be 1 or more"),
        ({"tensor": 3}, "shape.num_heads = 40 is no multiple of tensor = 3: use a tensor size that divides"),
        ({"tensor": 16}, "shape.num_heads = 40 is no multiple of tensor = 16"),
        ({"global_batch": 1000}, "global_batch = 1000 is no multiple of micro_batch_size x data = 1 x 128"),
        ({"pipeline": 64}, "need a layer each, but the model has 40"),
        ({"pipeline": 4, "zero_stage": 3}, "zero_stage = 3 with pipeline = 4 .* use zero_stage 0 or 1"),
        ({"pipeline": 4, "data": 1024, "tensor": 1}, "1 micro-batches are fewer than 4 pipeline ranks"),
        ({"pipeline": 2, "virtual_stages": 2}, 'schedule "1f1b" has 1 chunk a rank, not 2'),
        ({"context": 3}, "seq_len = 4096 is no multiple of context = 3"),
        ({"zero_stage": 4}, "zero_stage = 4 is no ZeRO stage"),
    ],
)
def test_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        workload(**changes)


def test_shape_refused() -> None:
    with pytest.raises(ConfigError, match="hidden_size = 5120 is no multiple of num_heads = 48"):
        replace(BAICHUAN_13B, num_heads=48)
    with pytest.raises(ConfigError, match="kv_heads = 3 does not divide num_heads = 40"):
        replace(BAICHUAN_13B, kv_heads=3)
    with pytest.raises(ConfigError, match="num_layers = 0 must be 1 or more"):
        replace(BAICHUAN_13B, num_layers=0)
