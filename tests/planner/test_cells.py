"""Cells of published tables as people write them: units, groups of three, decimal commas, and what cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_b2.errors import OutputError
from megatron_b2.planner.published import evaluate_rows, predict_run, read_row
from megatron_b2.planner.rows import (
    GIBIBYTES,
    SECONDS,
    THOUSANDS,
    PublishedRun,
    RowError,
    cluster_of,
    memory_of,
    number,
    ran_out,
    recompute_of,
    stage_of,
    whole,
)

KORTHIKANTI = {
    **{"source": "Korthikanti-T5", "gpu": "A100-80", "model": "22B", "hidden": "6144", "layers": "48"},
    **{"heads": "64", "vocab": "51200", "seq": "2048", "tp": "8", "pp": "1", "gpus": "8", "mbs": "4"},
    **{"gbs": "4", "recompute": "sel", "seqpar": "1", "iter_s": "1.10"},
}


def read(**cells: str) -> PublishedRun:
    return read_row("megatron", 2, KORTHIKANTI | cells)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1,024", 1024), ("6,658,859,008", 6_658_859_008), ("1,024.5", 1024.5), ("47GB", 47)],
        *[(".57", 0.57), ("1e3", 1000), ("~16", 16), ("-1", -1), ("", None), ("n/a", None)],
    ],
)
def test_numbers(text: str, value: float | None) -> None:
    assert number(text) == value


@pytest.mark.parametrize("text", ["13,75", "102,03 s", "1,0240"])
def test_decimal_commas_are_refused(text: str) -> None:
    """13,75 s was read as 1,375 s."""
    with pytest.raises(RowError, match="comma"):
        number(text)


def test_numbers_without_end_are_refused() -> None:
    with pytest.raises(RowError, match="'1e400' is too large"):
        whole({"gbs": "1e400"}, "gbs")


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [
        *[("1100 ms", SECONDS, 1.1), ("13.75s", SECONDS, 13.75), ("1.5 min", SECONDS, 90)],
        *[("4.6k", THOUSANDS, 4600), ("6.7B", THOUSANDS, 6.7e9), ("373 tokens/s", THOUSANDS, 373)],
        *[("48128 MiB", GIBIBYTES, 47), ("47 GB", GIBIBYTES, 47)],
    ],
)
def test_units(text: str, units: dict[str, float], value: float) -> None:
    assert number(text, units) == pytest.approx(value)


@pytest.mark.parametrize("text", ["8k", "4M", "2K tokens"])
def test_sizes_in_thousands_are_refused(text: str) -> None:
    """A sequence of "8k" was one of 8 tokens."""
    with pytest.raises(RowError, match="has a unit: write the number in full"):
        whole({"seq": text}, "seq")
    assert whole({"gpus": "64 GPUs"}, "gpus") == 64


def test_seconds_and_memory_of_a_row() -> None:
    assert read(iter_s="1100 ms").measured_time == pytest.approx(read().measured_time)
    assert memory_of({"mem": "48128MiB"}) == 47
    assert memory_of({"notes": "mem 77.0 GiB"}) == 77


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *[("full+SP", "full"), ("Full recompute", "full"), ("sel+SP", "selective"), ("none+SP", "none")],
        *[("selective op", "selective"), ("FALSE", "none"), ("unstated", None), ("", None)],
    ],
)
def test_recomputation(text: str, kind: str | None) -> None:
    assert recompute_of(text) == kind


def test_a_run_that_says_no_oom_fitted() -> None:
    assert ran_out({"notes": "OOM"})
    assert not ran_out({"notes": "no OOM"})
    assert not ran_out({"notes": "too close to OOM"})


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        *[("ZeRO-2", 2), ("zero stage 1", 1), ("ZeRO3 no MP", 3), ("SHARD_GRAD_OP", 2), ("NO_SHARD", 0)],
        *[
            ("DDP", 0),
            ("DDP, ZeRO-1", 1),
            ("FULL_SHARD", None),
            ("FSDP8xTP8", None),
            ("HSDP", None),
            ("", None),
        ],
    ],
)
def test_stages_of_zero(text: str, stage: int | None) -> None:
    assert stage_of(text) == stage


@pytest.mark.parametrize(
    ("text", "bytes_per_gpu"),
    [
        *[("1600Gbps/node", 25e9), ("1.6Tbps/node", 25e9), ("200 Gb/s per GPU", 25e9)],
        *[("400Gbps/GPU", 50e9), ("1,600 Gbps/node", 25e9), ("0 Gbps/node", 25e9), ("InfiniBand", 25e9)],
    ],
)
def test_networks(text: str, bytes_per_gpu: float) -> None:
    """A100 nodes have 25 GB/s a GPU where nothing is said."""
    assert cluster_of({"gpu": "A100-80", "interconnect": text}).gpu_network_bandwidth == bytes_per_gpu


def test_a_batch_that_the_layout_cannot_run_is_refused() -> None:
    """4 sequences became 64, and the prediction that of 16 times the work."""
    run = read(gpus="128", gbs="4")
    assert run.reason == "global batch 4 is no multiple of micro-batch x data = 4 x 16"
    assert read(gpus="16", gbs="100", iter_s="").assumed[-1] == "global batch 96 instead of 100"


def test_a_batch_in_tokens_is_refused() -> None:
    run = read(gbs="4194304")
    assert run.workload is None
    assert run.reason.endswith("tokens a step: give the global batch in sequences")


def test_a_measurement_above_the_peak_is_left_out() -> None:
    """1.1 read as milliseconds would be a thousand times the speed; the prediction stays."""
    good, bad = read(), read(iter_s="0.0011")
    assert good.measured_time == 1.1
    assert bad.measured_time is None
    assert bad.assumed[-1].startswith("measured time left out: ")
    assert predict_run(bad).time == predict_run(good).time


def test_output_that_is_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("gpu,model,hidden,layers,heads,seq,gpus,gbs,recompute\n")
    for out in (tmp_path, Path()):
        with pytest.raises(OutputError, match="is a folder: give the CSV to write"):
            evaluate_rows(path, out)
