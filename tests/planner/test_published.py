"""Published rows: read in all three forms, filled in where sources are silent, and never a crash."""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_b2.errors import InputError
from megatron_b2.planner.flops import step_flops
from megatron_b2.planner.published import (
    ADDED,
    evaluate_rows,
    predict_run,
    published_runs,
    read_row,
    read_runs,
)
from megatron_b2.planner.rows import PublishedRun, RowError, cluster_of

MEGATRON = (
    "source,gpu,model,hidden,layers,heads,vocab,seq,tp,pp,vpp,dp,gpus,mbs,gbs,recompute,seqpar,"
    "tflops_per_gpu,mfu_or_pct,iter_s,notes"
)
BLOOM = "line,section,size,nodes,dp,tp,pp,mbs,gbs,mem,sec_it,tflops,nheads,hidden,layers,zs,notes"
FSDP = "source,gpu,interconnect,model,params,gpus,seq,mbs,gradaccum,gbs,act_ckpt,tok_s_gpu,mfu,hfu,parallel,notes"


def read(tmp_path: Path, header: str, *rows: str) -> list[PublishedRun]:
    path = tmp_path / "runs.csv"
    path.write_text("\n".join((header, *rows)) + "\n")
    return read_runs(path)


def one(tmp_path: Path, header: str, row: str) -> PublishedRun:
    (run,) = read(tmp_path, header, row)
    return run


def test_every_published_row_is_read() -> None:
    for name, count in (
        ("megatron", 22),
        ("megatron_more", 19),
        ("bloom", 76),
        ("bloom_more", 22),
        ("fsdp", 17),
        ("fsdp_more", 68),
    ):
        runs = published_runs(name)
        assert len(runs) == count
        assert [run.reason for run in runs if run.workload is None] == []
        assert all(run.measured_time or run.out_of_memory for run in runs)


def test_split_that_is_only_in_the_notes() -> None:
    """MP = 96 is 8 x 12."""
    run = published_runs("megatron")[10]
    assert run.workload is not None
    assert (run.workload.tensor, run.workload.pipeline, run.workload.data) == (8, 12, 4)
    assert run.assumed == ("tensor 8 x pipeline 12",)
    # 174.6B, batch 1,536, 153 TFLOP/s by equation 3 on 384 GPUs.
    flops = 96 * 1536 * 2048 * 96 * 12_288**2 * (1 + 2048 / 6 / 12_288 + 51_200 / 16 / 96 / 12_288)
    assert run.measured_time == pytest.approx(flops / 384 / 153e12)


def test_missing_fields_of_megatron_rows(tmp_path: Path) -> None:
    run = one(
        tmp_path,
        MEGATRON,
        "MegaScale T2,Ampere,175B,12288,96,128,64000,2048,8,8,6,,256,,768,,,,53.0%,,Megatron-LM",
    )
    work = run.workload
    assert work is not None
    assert (work.data, work.micro_batch_size, work.recompute, work.virtual_stages) == (4, 1, "selective", 6)
    assert (work.sequence_parallel, work.zero_stage, work.zero_engine) == (True, 1, "megatron")
    assert run.assumed == (
        "sequence parallelism on",
        "ZeRO-1, fp32 gradients",
        "unfused attention",
        "micro-batch 1",
        "recompute selective",
    )
    assert not work.overlap_tensor
    assert run.measured_time == pytest.approx(40.0, rel=0.01)  # as the paper prints it


def test_llama_3_rows(tmp_path: Path) -> None:
    run = one(
        tmp_path, MEGATRON, "Llama 3,H100-80,405B,16384,126,128,,8192,8,16,,128,16384,,2048,,,400,41%,,"
    )
    work = run.workload
    assert work is not None
    assert (work.shape.kv_heads, work.shape.gated, work.parameters) == (8, True, 405_853_388_800)
    assert (work.recompute, work.attention, work.schedule) == ("none", "fused", "interleaved")
    long = one(
        tmp_path, MEGATRON, "Llama 3,H100-80,405B,16384,126,128,,131072,8,16,,4,16384,,128,,,380,38%,,CP16"
    )
    assert long.workload is not None
    assert (long.workload.context, long.workload.data) == (16, 8)
    assert "data 8 instead of 4, by the number of GPUs" in long.assumed


def test_layers_of_bloom_rows_are_those_of_the_size() -> None:
    """The heading says 80; a pipeline of 12 had 72, of 6 78, of 7 77, of 9 81."""
    layers = {}
    for run in published_runs("bloom")[:9]:
        assert run.workload is not None
        layers[run.workload.pipeline] = run.workload.shape.num_layers
    assert layers == {4: 80, 5: 80, 6: 78, 7: 77, 8: 80, 9: 81, 10: 80, 11: 77, 12: 72}


def test_work_of_bloom_rows_is_what_the_log_says() -> None:
    """Seconds times TFLOP/s are the FLOPs of the row as we read it: equation 3 from 02-21 on; before, 8 N
    without the table, which is a few percent less."""
    for run in published_runs("bloom"):
        work, cells = run.workload, run.cells
        assert work is not None
        stated = float(cells["sec_it"]) * float(cells["tflops"]) * 1e12 * work.gpus
        early = cells["notes"].startswith("02-20")
        assert stated == pytest.approx(step_flops(work, "sc21") * (0.96 if early else 1), rel=0.01)


def test_swapped_columns_and_impossible_cells(tmp_path: Path) -> None:
    tail = "64,14336,72,1,02-21"
    runs = read(
        tmp_path,
        BLOOM,
        f"608,x,181B,48,4,8,12,2,2048,37GB,134.02,120.29,{tail}",
        f"669,x,181B,48,4,8,12,2,2048,37GB,120.29,134.02,{tail}",
        "648,x,187B,40,8,8,10,4,2048,GB,147.04,135.92,96,13824,80,1,02-21",
        "607,x,181B,48,4,8,12,1,2048,29GB,143.31,112.49,96,14336,72,1,02-21",
        "656,x,18B,1,,8,1,2,2048,54GB,119.19,157.02,64,14336,6,1,02-21",
        "807,x,181B,48,32,2,6,1,2048,OOM,,,64,14336,72,1,02-25",
        "520,x,200B,40,4,8,10,8,2048,76GB,229.69,90.91,96,14400,80,1,02-20 too close to OOM",
    )
    assert [run.measured_time for run in runs[:2]] == [134.02, 134.02]
    assert runs[2].measured_memory is None
    assert runs[2].workload is not None
    assert runs[2].workload.data == 4  # 40 nodes, not the column's 8
    assert runs[3].assumed == ("64 heads instead of 96, which do not divide 14336",)
    assert runs[4].workload is not None
    assert runs[4].workload.global_batch == 512  # its heading's batch, found by the work
    assert [run.out_of_memory for run in runs] == [False] * 5 + [True, False]
    assert runs[6].measured_memory == 76


@pytest.mark.parametrize(
    ("size", "layers", "pipeline", "hidden", "read"),
    [
        ("13B", 40, 2, 5120, 40),  # two digits: the heading is right
        ("1.3B", 24, 1, 2048, 24),
        ("13B", 39, 2, 5120, 38),  # no multiple of the pipeline
        ("200B", 80, 12, 14_400, 84),
        ("176B", 70, 10, 14_336, 70),
        ("181B", 70, 12, 14_336, 72),  # three digits, and 176.3B is not 181B
        ("", 40, 2, 5120, 40),
    ],
)
def test_layers_of_a_heading_and_of_a_size(
    tmp_path: Path, size: str, layers: int, pipeline: int, hidden: int, read: int
) -> None:
    row = f"1,x,{size},,8,1,{pipeline},1,512,,10,,{hidden // 64},{hidden},{layers},1,02-25"
    run = one(tmp_path, BLOOM, row)
    assert run.workload is not None, run.reason
    assert run.workload.shape.num_layers == read
    assert any("layers, by the size" in note for note in run.assumed) == (read != layers)


def test_gradients_of_bloom_by_date(tmp_path: Path) -> None:
    row = "947,x,176B,48,8,4,12,2,2048,59GB,102.03,153.68,64,14336,70,1,{}"
    early, late = (one(tmp_path, BLOOM, row.format(date)) for date in ("02-27", "02-28"))
    assert early.workload is not None
    assert late.workload is not None
    assert (early.workload.gradient_bytes, late.workload.gradient_bytes) == (2, 4)


def test_fsdp_rows(tmp_path: Path) -> None:
    runs = read(
        tmp_path,
        FSDP,
        "llm-foundry,A100-40,1600Gbps/node,13b,12853954560,128,2048,16,1,2048,1,1972,51.93,69.24,FULL_SHARD,",
        "torchtitan,H100-96(500W),400Gbps/GPU,Llama3.1-70B,,256,8192,16,1,512,full,829,,,FSDP32xTP8,mem 72.0 GiB",
        "torchtitan,H100-80,400Gbps/GPU,Llama3.1-8B,,8,8192,2,1,16,sel,6667,,,FSDP8,float8",
        "x,H100-80,,nemo-9b,9000000000,8,8192,2,1,16,sel,6667,,,FSDP8,",
    )
    first, second = runs[0].workload, runs[1].workload
    assert first is not None
    assert second is not None
    assert runs[0].measured_time == pytest.approx(16 * 2048 / 1972)
    assert runs[0].cluster is not None
    assert runs[0].cluster.gpu_network_bandwidth == 25e9
    assert (first.recompute, first.gradient_bytes, first.zero_engine) == ("full", 2, "fsdp")
    assert (second.tensor, second.data, second.shape.kv_heads) == (8, 32, 8)
    assert runs[1].measured_memory == 72
    assert runs[1].cluster is not None
    assert runs[1].cluster.gpu.peak_flops == pytest.approx(989.4e12 * 5 / 7)
    assert runs[1].cluster.gpu.memory_bytes / 2**30 == pytest.approx(95, abs=1)
    assert runs[2].reason == "fp8 is not modelled"
    assert (
        runs[3].reason
        == "model 'nemo-9b' is not in published/models.csv: add columns hidden, layers and heads"
    )


def test_fsdp_rows_that_are_silent(tmp_path: Path) -> None:
    """No micro-batch: the largest that fits, with the least recomputation."""
    runs = read(
        tmp_path,
        FSDP,
        "x,A100-80,,LLaMA-65B,,2048,2048,,,2048,,380,,,FSDP,",
        "x,A100-80,,Llama-2-7B,,128,4096,,,,1,3000,,,FSDP,",
        "x,A100-80,,Llama-70B,,128,4096,1,,,1,300,,,FSDP,",
    )
    works = [run.workload for run in runs]
    assert [work and work.micro_batch_size for work in works] == [1, 16, 1]
    assert [work and work.recompute for work in works] == ["none", "full", "full"]
    assert runs[0].assumed == ("micro-batch 1", "recompute none")
    assert runs[1].assumed == ("micro-batch 16",)
    assert runs[2].assumed == ("the oldest Llama of this size",)


def test_rates_of_fsdp_rows(tmp_path: Path) -> None:
    """Tokens/s, MFU in percent or as a share, HFU: of the data sheet's peak, also under a power limit."""
    cells = "A100-80,,13b,12853954560,8,2048,2,3,48,0,{},{},{},FULL_SHARD,"
    rates = ("2262,,", ",59.57,", ",.5957,", ",,59.57", "2.262k,,")
    runs = read(tmp_path, FSDP, *(f"x,{cells.format(*rate.split(','))}" for rate in rates))
    times = [run.measured_time for run in runs]
    assert times == pytest.approx([times[0]] * len(times), rel=0.01)
    limited, full = read(
        tmp_path,
        FSDP,
        "x,H100-80(500W),,7b,6658859008,8,2048,2,3,48,0,,40,,FULL_SHARD,",
        "x,H100-80,,7b,6658859008,8,2048,2,3,48,0,,40,,FULL_SHARD,",
    )
    assert limited.measured_time == full.measured_time


def test_sharding_of_fsdp_rows(tmp_path: Path) -> None:
    """7B in plain data parallelism has 16 bytes a parameter on each device, and never fits 80 GB."""
    row = "x,A100-80,,7b,6658859008,8,2048,2,1,,0,3000,,,{},"
    kinds = ("DDP", "NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HSDP 8x8")
    found = [predict_run(run) for run in read(tmp_path, FSDP, *map(row.format, kinds))]
    assert [item.run.workload and item.run.workload.zero_stage for item in found] == [0, 0, 2, 3, 3]
    assert [item.fits for item in found] == [False, False, True, True, True]
    assert "parameters sharded over all data ranks" in found[4].run.assumed


def test_batch_of_a_data_rank_in_a_pipeline(tmp_path: Path) -> None:
    """torchtitan's local batch goes through the pipeline one sequence at a time."""
    run = one(tmp_path, FSDP, "x,H100,,Llama3.1-405B,,512,8192,32,1,,full,100,,,FSDP4xTP8xPP16,")
    work = run.workload
    assert work is not None
    assert (work.micro_batch_size, work.num_micro, work.global_batch, work.zero_stage) == (1, 32, 128, 1)
    assert "micro-batch 1" in run.assumed


def test_models_of_fsdp_rows(tmp_path: Path) -> None:
    """By name; by columns; by parameters alone, which is said."""
    head = f"{FSDP},hidden,layers,heads,ffn"
    named, columns, sized = read(
        tmp_path,
        head,
        "x,H100,,Qwen2.5-7B,7.6B,8,4096,1,,,0,10000,,,FSDP,,,,,",
        "x,H100,,ours,,8,4096,1,,,0,10000,,,FSDP,,2048,24,16,5504",
        "x,H100,,ours,13.9B,8,4096,1,,,1,2000,,,FSDP,,,,,",
    )
    assert named.workload is not None
    assert named.workload.shape.kv_heads == 4
    assert columns.workload is not None
    assert (columns.workload.shape.hidden_size, columns.workload.shape.ffn_hidden_size) == (2048, 5504)
    assert sized.workload is not None
    assert sized.workload.parameters == 13_896_668_160
    assert "the shape of a public model with as many parameters" in sized.assumed


def test_programs_of_fsdp_rows() -> None:
    """llm-foundry of 2023: the first FlashAttention, a fused loss, bf16 gradients."""
    for run in (*published_runs("fsdp"), *published_runs("fsdp_more")):
        work = run.workload
        assert work is not None
        program = (work.attention, work.fused_loss, work.gradient_bytes)
        assert program == (("flash-1", True, 2) if run.source == "llm-foundry" else ("fused", False, 4))


@pytest.mark.parametrize(
    ("text", "name", "gib"),
    [
        ("A100-SXM4-40GB", "a100-40g", 40),
        ("NVIDIA A100-SXM4-80GB", "a100-80g", 80),
        ("8xA100-40GB", "a100-40g", 40),
        ("A100 (80 GB)", "a100-80g", 80),
        ("A100-40", "a100-40g", 40),
        ("a100_40gb", "a100-40g", 40),
        ("Ampere", "a100-80g", 80),
        ("A800-SXM4-80GB", "a800-80g", 80),
        ("NVIDIA H100 80GB HBM3", "h100-80g", 80),
        ("H100-96(500W)", "h100-80g", 96),
        ("H100-SXM5", "h100-80g", 80),
        ("H100 SXM 700W", "h100-80g", 80),
        ("H200 141GB", "h200-141g", 141),
        *[
            (text, "", 0)
            for text in ("H100 PCIe", "A100-PCIE-40GB", "H100 NVL", "GH200", "H20", "V100-32", "")
        ],
    ],
)
def test_names_of_gpus(text: str, name: str, gib: int) -> None:
    if not name:
        with pytest.raises(RowError, match="is none of the presets"):
            cluster_of({"gpu": text})
        return
    gpu = cluster_of({"gpu": text}).gpu
    assert gpu.name == name
    assert gpu.memory_bytes / 2**30 == pytest.approx(gib, rel=0.02)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a,V100,x,1024,8,8,51200,2048,1,1,1,8,8,1,8,full,0,30,,,", "GPU 'V100' is none of the presets"),
        ("a,A100,x,,8,8,51200,2048,1,1,1,8,8,1,8,full,0,30,,,", "hidden is missing"),
        ("a,A100,x,1024,8,8,51200,2048,1,1,1,8,8,1,,full,0,30,,,", "gbs is missing"),
        ("a,A100,x,1024,8,8,51200,2048,4,4,1,1,8,1,8,full,0,30,,,", "gpus = 8 is no multiple of tensor x"),
        ("a,A100,x,1024,8,8,51200,2048,1,8,1,1,8,1,4,full,0,30,,,", "4 micro-batches are fewer than 8"),
        (
            "a,A100,x,1024,8,8,51200,2048,1.5,1,1,8,8,1,8,full,0,30,,,",
            "tp = '1.5' is no positive whole number",
        ),
        ("a,A100,x,1000,8,7,51200,2048,1,1,1,8,8,1,8,full,0,30,,,", "hidden_size = 1000 is no multiple of"),
        ("a,A100,,,,,,,,,,,,,,,,,,,", "hidden is missing"),
        ("a,,x,1024,8,8,51200,2048,1,1,1,8,8,1,8,full,0,30,,,", "GPU '' is none of the presets"),
    ],
)
def test_rows_that_cannot_be_evaluated(tmp_path: Path, row: str, reason: str) -> None:
    run = one(tmp_path, MEGATRON, row)
    assert run.workload is None
    assert run.reason.startswith(reason)


CELLS = (
    "",
    "1",
    "2",
    "4",
    "8",
    "96",
    "1024",
    "1.5",
    "0",
    "-1",
    "x",
    "full",
    "OOM",
    "47GB",
    "1e3",
    "A100-80",
    "7b",
    *("13,75", "8k", "1e400", ".5", "DDP ZeRO-2", "FSDP8xTP2xPP4"),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), header=st.sampled_from([MEGATRON, BLOOM, FSDP]))
def test_no_row_is_a_crash(data: st.DataObject, header: str) -> None:
    """Whatever the cells hold: a workload with a prediction, or a reason."""
    cells = {name: data.draw(st.sampled_from(CELLS), label=name) for name in header.split(",")}
    form = {MEGATRON: "megatron", BLOOM: "bloom", FSDP: "fsdp"}[header]
    if data.draw(st.booleans(), label="plausible GPU"):
        cells["gpu"] = "H100"
    prediction = predict_run(read_row(form, 2, cells))  # type: ignore[arg-type]
    assert (prediction.time is None) == (prediction.memory is None) == bool(prediction.reason)


def test_predictions_beside_the_rows(tmp_path: Path) -> None:
    path, out = tmp_path / "runs.csv", tmp_path / "out" / "predictions.csv"
    path.write_text(
        f"{MEGATRON}\n"
        "SC21-T1,A100-80,18.4B,6144,40,48,51200,2048,8,1,1,32,256,8,1024,full,0,135,43%,,\n"
        "x,V100,y,1024,8,8,51200,2048,1,1,1,8,8,1,8,full,0,30,,,\n"
    )
    evaluate_rows(path, out)
    with out.open() as file:
        good, bad = csv.DictReader(file)
    assert [*good] == [*MEGATRON.split(","), *ADDED]
    assert good["hidden"] == "6144"
    low, time, high = (
        float(good[name]) for name in ("predicted_time_low", "predicted_time", "predicted_time_high")
    )
    assert low < time < high
    assert time == pytest.approx(float(good["measured_time"]), rel=0.1)
    assert good["reason"] == ""
    assert bad["predicted_time"] == bad["predicted_memory"] == ""
    assert bad["reason"] == "GPU 'V100' is none of the presets"


def test_other_forms_are_written(tmp_path: Path) -> None:
    for name in ("bloom_more", "fsdp"):
        with resources.as_file(resources.files("megatron_b2.planner") / f"published/{name}.csv") as path:
            found = evaluate_rows(path, tmp_path / f"{name}.csv")
        assert all(item.time is not None for item in found)
        assert (tmp_path / f"{name}.csv").read_text().count("\n") == len(found) + 1


def test_tables_of_no_known_form(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"runs.csv: the columns are of no known form .* are missing"):
        read_runs(path)
    with pytest.raises(InputError, match="cannot be read as CSV"):
        read_runs(tmp_path / "none.csv")
    path.write_text("")
    with pytest.raises(InputError, match="no known form"):
        read_runs(path)
