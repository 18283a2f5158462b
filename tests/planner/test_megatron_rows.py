"""Rows of Megatron-LM's tables where the source is silent: layout, micro-batch, chunks, program of the time."""

from __future__ import annotations

import pytest

from megatron_b2.planner.published import Prediction, predict_run, read_row
from megatron_b2.planner.workload import Workload

GPT_175B = {"hidden": "12288", "layers": "96", "heads": "96", "vocab": "51200"}


def predicted(**cells: str) -> Prediction:
    """A prediction for a row of 175B whose other cells are empty."""
    row = {"source": "x", "gpu": "A100-80", "model": "GPT", "seq": "2048", "recompute": ""} | GPT_175B | cells
    return predict_run(read_row("megatron", 2, row))


def work_of(prediction: Prediction) -> Workload:
    assert prediction.run.workload is not None, prediction.reason
    return prediction.run.workload


def layout(work: Workload) -> tuple[int, int, int]:
    return work.tensor, work.pipeline, work.data


LLAMA_65B = {"model": "LLaMA-65B", "hidden": "8192", "layers": "80", "heads": "64", "vocab": "32000"}


def test_sharded_parameters_have_no_other_split() -> None:
    """LLaMA 65B on 2,048 A100: 380 tokens/s a GPU (arXiv 2302.13971), which a tensor size of 8 and one sequence
    a micro-batch would miss by a factor of six."""
    one = predicted(**LLAMA_65B, gpus="2048", gbs="2048", iter_s="5.39", notes="FSDP")
    assert layout(work_of(one)) == (1, 1, 2048)
    assert "tensor 1 x pipeline 1" in one.run.assumed
    assert one.time_error == pytest.approx(0, abs=0.5)


def test_micro_batch_of_sharded_parameters_is_the_largest_that_fits() -> None:
    """OPT-175B: 147 TFLOP/s on 992 A100, FSDP with tensor 8 (arXiv 2205.01068). They count recomputation: 300B
    tokens in 33 days are 106 a second and GPU, or 111 TFLOP/s of model FLOPs."""
    cells = {"gpus": "992", "gbs": "992", "tp": "8", "recompute": "full", "tflops_per_gpu": "147"}
    one = predicted(**cells, notes="FSDP, arXiv 2205.01068")
    assert layout(work_of(one)) == (8, 1, 124)
    assert (work_of(one).micro_batch_size, work_of(one).num_micro) == (8, 1)
    assert "micro-batch 8" in one.run.assumed
    assert one.run.measured_time == pytest.approx(992 * 2048 / 992 / 106, rel=0.05)
    assert one.time_error == pytest.approx(0, abs=0.1)
    long = predicted(**cells | {"seq": "8192"}, notes="FSDP")
    assert work_of(long).micro_batch_size < 8
    assert long.memory is not None
    assert long.memory.total <= 80 * 2**30


def test_other_rows_get_the_fewest_ranks_of_the_model_that_fit() -> None:
    small = predicted(hidden="4096", layers="32", heads="32", gpus="256", gbs="2048")
    assert layout(work_of(small)) == (1, 1, 256)
    assert work_of(small).micro_batch_size > 1
    large = predicted(gpus="4608", gbs="1152", gpu="H100-80", seq="4096")
    t, p, _ = layout(work_of(large))
    assert (t, work_of(large).micro_batch_size) == (8, 1)
    assert f"tensor {t} x pipeline {p}" in large.run.assumed
    assert large.memory is not None
    assert large.memory.total <= 80 * 2**30
    fewer = predicted(
        gpus="4608", gbs="1152", gpu="H100-80", seq="4096", tp="8", pp=str(p // 2), recompute="none"
    )
    assert fewer.memory is not None
    assert fewer.memory.total > 80 * 2**30
    assert layout(work_of(predicted(gpus="4608", gbs="1152", pp="16")))[1] == 16
    assert layout(work_of(predicted(gpus="4608", gbs="1152", tp="4")))[0] == 4


def test_no_layout_fits() -> None:
    """The last choice is taken, and does not fit."""
    one = predicted(gpus="8", gbs="64")
    assert one.fits is False
    none = predicted(gpus="7", gbs="64", heads="96", tp="2")
    assert none.reason.startswith("gpus = 7 is no multiple of tensor x pipeline x context = 2 x 1 x 1")


@pytest.mark.parametrize(
    ("layers", "pipeline", "gbs", "chunks"),
    [
        ("96", "8", "1152", 6),
        ("112", "16", "1536", 7),
        ("96", "16", "1536", 3),
        ("96", "48", "1536", 1),
        ("96", "8", "100", 1),
    ],
)
def test_chunks_of_recent_rows(layers: str, pipeline: str, gbs: str, chunks: int) -> None:
    """Two layers a chunk, or one where the layers of a stage are odd; none with few layers or an uneven batch."""
    cells = {"layers": layers, "tp": "8", "pp": pipeline, "mbs": "1", "gbs": gbs}
    one = predicted(**cells, gpus=str(8 * int(pipeline)))
    assert work_of(one).virtual_stages == chunks
    early = predicted(**cells, gpus=str(8 * int(pipeline)), notes="arXiv 2201.11990")
    assert work_of(early).virtual_stages == 1


def test_program_by_the_year_of_the_paper() -> None:
    """MT-NLG 530B (arXiv 2201.11990) ran before sequence parallelism, fp32 sums and the sharded optimizer of
    Megatron-LM."""
    cells = {"tp": "8", "pp": "12", "gpus": "768", "gbs": "1536", "mbs": "1"}
    early, late = (
        work_of(predicted(**cells, notes=f"arXiv {paper}")) for paper in ("2201.11990", "2402.15627")
    )
    assert (early.sequence_parallel, early.gradient_bytes, early.zero_engine) == (False, 2, "deepspeed")
    assert (late.sequence_parallel, late.gradient_bytes, late.zero_engine) == (True, 4, "megatron")
    assert work_of(predicted(**cells, notes="6144.12345 tokens")).sequence_parallel
    two = predicted(**cells, source="SC21-T2")
    assert work_of(two).zero_stage == 0


def test_recent_hopper_rows_overlap_tensor_parallel_sums() -> None:
    cells = {"tp": "8", "pp": "8", "gpus": "3072", "gbs": "1152", "mbs": "1"}
    work = work_of(predicted(**cells, gpu="H100"))
    assert work.overlap_tensor
    assert not work_of(predicted(**cells)).overlap_tensor
    llama = {"model": "Llama 3 405B", "hidden": "16384", "layers": "126", "heads": "128", "vocab": "128256"}
    meta = work_of(predicted(**cells | llama | {"pp": "16", "gpus": "8192", "gbs": "2048"}, gpu="H100"))
    assert (meta.overlap_tensor, meta.recompute, meta.virtual_stages) == (False, "none", 7)


def test_only_llama_3_is_interleaved_layer_by_layer() -> None:
    cells = {"tp": "8", "pp": "4", "gpus": "1024", "gbs": "1024", "mbs": "1"}
    old = work_of(predicted(**LLAMA_65B, **cells))
    assert (old.shape.kv_heads, old.virtual_stages, old.recompute) == (0, 10, "selective")


MT_NLG = {
    **{"source": "MT-NLG", "hidden": "20480", "layers": "105", "heads": "128", "tp": "8", "pp": "35"},
    **{"gpus": "2240", "gbs": "1920", "mbs": "1", "recompute": "full", "notes": "arXiv 2201.11990"},
}


def test_rates_before_2023_count_recomputation() -> None:
    """MT-NLG gives both: 60.1 s are 126 TFLOP/s a GPU by equation 3 of SC21. As model FLOPs they would be 45 s."""
    one = predicted(**MT_NLG, tflops_per_gpu="126")
    assert one.run.measured_time == pytest.approx(60.1, rel=0.005)
    share = predicted(**MT_NLG, mfu_or_pct="30")
    late = predicted(**MT_NLG | {"notes": "arXiv 2402.15627"}, tflops_per_gpu="93.6")
    assert share.run.measured_time == pytest.approx(late.run.measured_time)


def test_the_error_of_deepspeed_is_its_own() -> None:
    """MT-NLG is predicted a fifth too fast: the band of NVIDIA's programs is not one for it."""
    one = predicted(**MT_NLG, iter_s="60.1")
    assert one.time is not None
    assert one.time.regime == "zero-1 deepspeed"
    assert one.time.low <= 60.1 <= one.time.high
    assert predicted(**MT_NLG | {"notes": "arXiv 2205.05198"}).time is not None
    nvidia = predicted(**MT_NLG | {"notes": "arXiv 2205.05198"}).time
    assert nvidia is not None
    assert nvidia.regime == "model parallel"


def test_written_year() -> None:
    assert work_of(predicted(**MT_NLG | {"notes": "DeepSpeed 2022"})).zero_engine == "deepspeed"
    assert work_of(predicted(**MT_NLG | {"notes": "2024"})).zero_engine == "megatron"


def test_what_notes_say_of_the_program() -> None:
    cells = {
        "hidden": "4096",
        "layers": "32",
        "heads": "32",
        "gpus": "64",
        "gbs": "512",
        "tp": "1",
        "pp": "1",
    }
    plain = predicted(**cells)
    assert work_of(plain).attention == "unfused"
    assert "unfused attention" in plain.run.assumed
    flash = predicted(**cells, notes="FlashAttention-2")
    assert work_of(flash).attention == "fused"
    assert "unfused attention" not in flash.run.assumed
    two = predicted(**cells, notes="ZeRO-2")
    assert (work_of(two).zero_stage, work_of(two).zero_engine) == (2, "deepspeed")
    assert work_of(predicted(**cells, notes="DDP")).zero_stage == 0
    assert predicted(**cells, gpu="H100", notes="FP8").reason == "fp8 is not modelled"


def test_full_recomputation_with_sequence_parallelism() -> None:
    """ "full+SP" was read as nothing, so as the least that fits."""
    cells = {"tp": "8", "pp": "8", "gpus": "64", "gbs": "64", "mbs": "1"}
    work = work_of(predicted(**cells | {"recompute": "full+SP"}))
    assert (work.recompute, work.sequence_parallel) == ("full", True)


def test_public_models_have_their_own_shape() -> None:
    """Their columns alone would be a GPT of 4 h with a head for each query."""
    cells = {"gpus": "64", "gbs": "512", "tp": "1", "pp": "1", "gpu": "H100"}
    mistral = {"model": "Mistral-7B", "hidden": "4096", "layers": "32", "heads": "32", "vocab": "32000"}
    shape = work_of(predicted(**cells | mistral)).shape
    assert (shape.gated, shape.kv_heads, shape.ffn_hidden_size) == (True, 8, 14_336)
    ours = {"model": "Baichuan2-13B", "hidden": "5120", "layers": "40", "heads": "40", "vocab": ""}
    assert work_of(predicted(**cells | ours)).parameters == 13_896_668_160
    other = work_of(predicted(**cells | mistral | {"layers": "31"})).shape
    assert (other.gated, other.num_layers) == (False, 31)
    assert work_of(predicted(**cells, kv_heads="8")).shape.kv_heads == 8


def test_llama_3_with_a_batch_that_interleaving_cannot_run() -> None:
    llama = {"model": "Llama 3 405B", "hidden": "16384", "layers": "126", "heads": "128", "vocab": "128256"}
    cells = {"tp": "8", "pp": "16", "gpus": "1024", "mbs": "1", "seq": "8192", "gpu": "H100"}
    assert work_of(predicted(**cells | llama, gbs="256")).virtual_stages == 7
    assert work_of(predicted(**cells | llama, gbs="160")).virtual_stages == 1
