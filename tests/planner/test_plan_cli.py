"""`b2 plan` as a person uses it: what it prints and writes, and what it says to bad input."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from megatron_b2.cli.main import main
from megatron_b2.config import load_config
from megatron_b2.planner.fit import all_runs
from megatron_b2.planner.flops import tflops_per_gpu
from megatron_b2.planner.hardware import load_hardware
from megatron_b2.planner.report import make_plan
from megatron_b2.training.flops import flops_per_token

HERE = ("--gpu", "a800-80g", "--nodes", "2")
SMALL = ("preset:baichuan2-7b", "--model.num-layers=4", "--train.global-batch-size=64")


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--help")
    for piece in ("--search", "--rows", "calibrate", "hardware", "best.toml", "b2 layout check"):
        assert piece in text
    assert "--peak-tflops" in output(capsys, "calibrate", "--help")
    assert "--parallel.tensor" in output(capsys, "preset:toy", "--help")


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(
        capsys, *SMALL, *HERE, "--parallel.tensor=2", "--parallel.pipeline=2", "--parallel.zero-stage=1"
    )
    for piece in (
        *("2 nodes = 16 x a800-80g", "t2 p2", "± ", "6N", "megatron", "llm-foundry", "bubble", "fits"),
        *("blocks 0-1", "head", "allocator", "data_context", "MWh", "Llama 3", "Daly", "NVLink of a800-80g"),
    ):
        assert piece.replace("bubble", "waiting for other pipeline stages") in text


def test_a_plan_for_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    text = output(capsys, *SMALL, *HERE, "--tokens=1e11", "--json", "--out", str(folder))
    plan = json.loads(text)["plan"]
    assert json.loads((folder / "plan.json").read_text()) == plan
    step, run = plan["step"], plan["run"]
    assert sum(step["parts"].values()) == pytest.approx(step["seconds"])
    assert step["low"] < step["seconds"] < step["high"]
    assert plan["tokens_per_second"] * step["seconds"] == pytest.approx(64 * 4_096)
    assert run["days"] == pytest.approx(1e11 / plan["tokens_per_second"] / 86_400)
    assert run["energy_mwh"] == pytest.approx(16 * 400 * run["days_with_failures"] * 24 / 1e6)
    for rank in plan["memory"]["ranks"]:
        kinds = [value for name, value in rank.items() if name not in ("pp", "holds", "total")]
        assert sum(kinds) == pytest.approx(rank["total"])


def test_conventions_are_those_of_the_training_loop() -> None:
    config = load_config(SMALL[0], (*SMALL[1:], "--train.recompute=full")).config
    plan = make_plan(config, load_hardware("a800-80g"), gpus=16)
    rates = {rate.convention: rate for rate in plan.rates}
    for ours, theirs in (("causal", "megatron"), ("6N", "6N"), ("full", "sc21-model")):
        expected = flops_per_token(config.model, seq_len=4_096, convention=ours)  # type: ignore[arg-type]
        rate = rates[theirs]  # type: ignore[index]
        assert rate.flops_per_token == pytest.approx(expected, rel=1e-12)
        assert rate.tflops_per_gpu * 16 * 1e12 == pytest.approx(expected * plan.tokens_per_second)
        assert rate.utilization == pytest.approx(rate.tflops_per_gpu / 312)
    assert "sc21" in {rate.convention for rate in plan.rates}
    assert rates["sc21"].tflops_per_gpu == tflops_per_gpu(plan.workload, plan.time.total, "sc21")


@pytest.mark.parametrize(
    ("gpu", "settings", "note"),
    [
        ("a800-80g", (), "NVLink of a800-80g"),
        ("h200-141g", (), "H200: no published row"),
        ("h100-80g", (), "Hopper GPUs with this program"),
        ("a100-80g", ("--parallel.zero-stage=1",), "DeepSpeed's ZeRO-1 over InfiniBand"),
        ("a100-80g", ("--parallel.zero-stage=2",), "ZeRO-2: in no published row"),
        ("a100-80g", ("--parallel.context=2",), "context parallelism"),
        (
            "a100-80g",
            ("--parallel.pipeline=2", "--parallel.schedule=zero_bubble", "--parallel.zero-stage=1"),
            "zero-bubble",
        ),
        ("a100-80g", ("--train.precision=fp32",), "fp32: every published row"),
        ("a100-80g", ("--train.recompute=full", "--train.recompute-layers=1"), "train.recompute_layers"),
        ("a100-80g", ("--parallel.offload-optimizer",), "parallel.offload_optimizer"),
    ],
)
def test_what_nothing_validates_is_said(gpu: str, settings: tuple[str, ...], note: str) -> None:
    base = (*SMALL[1:], "--parallel.zero-stage=3")
    *known, last = make_plan(load_config(SMALL[0], base).config, load_hardware("a100-80g"), gpus=16).notes
    assert known == []
    assert "this project's own code" in last
    notes = make_plan(load_config(SMALL[0], (*base, *settings)).config, load_hardware(gpu), gpus=16).notes
    assert any(note in item for item in notes)


def test_what_is_said_of_published_rows_is_so() -> None:
    """The notes speak of rows that are not there."""
    runs = [(run.source, run.workload, run.cluster) for _, run in all_runs()]
    known = [item for item in runs if item[1] is not None and item[2] is not None]
    assert len(known) > 100
    for source, work, cluster in known:
        assert work is not None
        assert cluster is not None
        assert work.zero_stage != 2
        assert work.context == 1
        assert work.schedule != "zero_bubble"
        assert work.precision == "bf16"
        assert cluster.gpu.name in ("a100-40g", "a100-80g", "h100-80g")
        if work.zero_stage == 1 and work.zero_engine == "deepspeed":
            assert cluster.node.fabric == "omnipath" or source == "MT-NLG"
        if cluster.gpu.architecture == "hopper":
            assert (work.zero_stage, work.zero_engine) == (3, "fsdp")


def test_whose_error_stands_beside_the_time_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def line(*extra: str) -> str:
        text = output(capsys, *SMALL, *HERE, *extra)
        return next(line for line in text.splitlines() if line.startswith("step time"))

    assert "error of nine in ten runs that the model was not fitted to, zero-3 deepspeed" in line(
        "--parallel.zero-stage=3"
    )
    assert "no published run is like it (zero-2): the widest error of all kinds" in line(
        "--parallel.zero-stage=2"
    )


@pytest.mark.parametrize(("gpu", "nodes"), [("a100-40g", 8), ("a800-80g", 2), ("h200-141g", 8)])
def test_what_auto_chooses_within_the_memory_that_a_plan_names_fits(
    capsys: pytest.CaptureFixture[str], gpu: str, nodes: int
) -> None:
    """parallel.auto leaves less of a device free than a plan does; the plan says how much it may fill."""
    here = ("preset:baichuan2-13b", "--gpu", gpu, "--nodes", str(nodes), "--parallel.auto")
    memory = load_hardware(gpu).gpu.memory_bytes / 2**30
    refused = output(capsys, *here, f"--parallel.memory-gb={memory:.1f}")
    found = re.search(r"does NOT fit.*\n.*parallel.auto with parallel.memory_gb = ([\d.]+)", refused)
    assert found is not None
    text = output(capsys, *here, f"--parallel.memory-gb={found[1]}")
    assert "fits: the fullest rank" in text


def test_own_failures_network_and_storage(capsys: pytest.CaptureFixture[str]) -> None:
    def values(*extra: str) -> dict[str, float]:
        found = json.loads(output(capsys, *SMALL, *HERE, "--json", *extra))["plan"]
        return {**found["reliability"], "seconds": found["step"]["seconds"]}

    plain, slow = values(), values("--network", "10")
    assert slow["seconds"] > plain["seconds"]
    assert values("--network", "hdr200x4")["seconds"] > plain["seconds"]
    own = values("--mtbf", "12", "--storage", "0.5")
    assert own["mtbf_hours"] == pytest.approx(12)
    assert own["stall_seconds"] == pytest.approx(plain["checkpoint_bytes"] / 1e9)


def test_the_storage_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def line(*extra: str) -> str:
        text = output(capsys, *SMALL, *HERE, *extra)
        return next(line for line in text.splitlines() if line.startswith("checkpoint "))

    assert "BLOOM: 48 nodes wrote 2.3 TB in 40 s" in line()
    slow = line("--storage", "0.01")
    assert "BLOOM" not in slow
    assert "(--storage: 0.01 GB/s a node)" in slow


def test_search_writes_a_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "found"
    text = output(capsys, *SMALL, "--gpu", "a800-80g", "--nodes", "1,2", "--search", "--out", str(folder))
    assert "legal layouts" in text
    assert "ZeRO-3 alone" in text
    assert "8 GPUs" in text
    assert "16 GPUs" in text
    names = ("best.toml", "plan.json", "search.json", "search.png")
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert main(["config", "check", str(folder / "best.toml")]) == 0
    picture = str(tmp_path / "t.png")
    assert main(["layout", "check", str(folder / "best.toml"), "--world", "16", "--timetable", picture]) == 0
    assert "does NOT fit" not in capsys.readouterr().out
    best = json.loads((folder / "search.json").read_text())["16"]["front"][0]
    assert json.loads((folder / "plan.json").read_text())["step"]["seconds"] == best["seconds"]


def test_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source = tmp_path / "runs.csv"
    source.write_text(
        "source,gpu,model,hidden,layers,heads,vocab,seq,tp,pp,vpp,dp,gpus,mbs,gbs,recompute,seqpar,"
        "tflops_per_gpu,mfu_or_pct,iter_s,notes\n"
        "SC21-T1,A100-80,1.7B,2304,24,24,51200,2048,1,1,1,32,32,16,512,full,0,137,44%,,\n"
    )
    target = tmp_path / "predictions.csv"
    text = output(capsys, "--rows", str(source), "--out", str(target))
    assert "time: 1 rows measured" in text
    (row,) = csv.DictReader(target.open())
    assert float(row["predicted_time"]) == pytest.approx(float(row["measured_time"]), rel=0.2)


def test_rows_that_ran_out_of_memory_say_so_beside_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source, target = tmp_path / "runs.csv", tmp_path / "predictions.csv"
    source.write_text(
        "line,section,size,nodes,dp,tp,pp,mbs,gbs,mem,sec_it,tflops,nheads,hidden,layers,zs,notes\n"
        "1,Log,181B,48,48,8,1,1,2016,OOM,,,64,14336,72,1,02-25\n"
        "2,Log,181B,48,6,8,8,4,2016,52GB,113.16,140.24,64,14336,72,1,02-25\n"
        "3,Log,181B,48,x,8,8,4,,OOM,,,64,14336,72,1,02-25\n"
    )
    output(capsys, "--rows", str(source), "--out", str(target))
    rows = list(csv.DictReader(target.open()))
    assert [row["out_of_memory"] for row in rows] == ["yes", "no", "yes"]
    assert [row["fits"] for row in rows] == ["no", "yes", ""]
    names = list(rows[0])
    assert names.index("out_of_memory") == names.index("fits") + 1


def test_hardware_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "hardware")
    for name in ("a100-40g", "a800-80g", "h800-80g", "h200-141g", "hdr200x8"):
        assert name in text


def test_calibrate_writes_what_plan_reads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.2.toml"
    text = output(
        capsys, "calibrate", "--out", str(path), "--ranks", "1", "--device", "cpu", "--network", "1"
    )
    assert "TFLOP/s" in text
    assert load_hardware(str(path)).gpu.name == "mine.2"
    planned = output(capsys, "preset:toy", "--gpu", str(path), "--nodes", "1")
    assert "described by your own file" in planned
    assert "no published run is like it (own hardware)" in planned


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*SMALL, "--nodes", "1"), "--gpu GPU is missing: give one of a100-40g,"),
        ((*SMALL, "--gpu", "b300", "--nodes", "1"), 'GPU "b300" is unknown; use one of a100-40g,'),
        ((*SMALL, "--gpu", "none.toml", "--nodes", "1"), "none.toml cannot be read"),
        ((*SMALL, "--gpu", "a800-80g"), "--nodes N is missing"),
        (
            (*SMALL, "--gpu", "a800-80g", "--nodes", "two"),
            "--nodes must be a whole number, 1 or more, got 'two'",
        ),
        ((*SMALL, "--gpu", "a800-80g", "--nodes", "1,2"), "--nodes 1,2 compares searches: add --search"),
        ((*SMALL, *HERE, "--network", "slow"), 'node "slow" of GPU "a800-80g" is unknown'),
        ((*SMALL, *HERE, "--network", "1x"), "--network must be a number above 0, got '1x'"),
        ((*SMALL, *HERE, "--tokens", "-1"), "--tokens must be a number above 0, got '-1'"),
        (
            (*SMALL, *HERE, "--parallel.tensor=3"),
            "model.num_heads = 32 is not a multiple of parallel.tensor = 3",
        ),
        ((*SMALL, *HERE, "--parallel.pipeline=8"), "model.num_layers = 4 is less than parallel.pipeline"),
        (
            ("preset:baichuan2-13b", "--gpu", "a800-40g", "--nodes", "1", "--search"),
            "fits no layout on 8 x a800-40g",
        ),
        (("--search",), "CONFIG is missing"),
        (("--rows", "none.csv", "--out", "x.csv"), "none.csv cannot be read"),
        (("--rows", "runs.csv"), "--out FILE is missing"),
        (("--rows", "runs.csv", "--to", "x.csv"), "has no '--to'; its flags are --rows, --out"),
        (("--rows",), "--rows needs a value"),
        (("calibrate",), "--out FILE is missing: give a file that ends with .toml"),
        (("calibrate", "--out", "x.toml", "--device", "tpu"), "--device must be cpu or cuda, got 'tpu'"),
        (("calibrate", "--out", "x.toml", "--ranks", "0"), "--ranks must be a whole number"),
    ],
)
def test_bad_input_is_one_clear_message(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    text = error(capsys, *arguments)
    assert text.startswith("error: ")
    assert message in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpus = 1", "gpus must hold tables"),
        ("[gpus.x", "is no TOML"),
        ("[gpus.x]\npeak_flops = -1\nnode = 'hdr200x8'", "peak_flops = -1 must be a number above 0"),
        ("[gpus.x]\nspeed = 1\nnode = 'hdr200x8'", "[gpus.x] speed is unknown"),
        ("[nodes.y]\ngpus = 8", "must have one [gpus.NAME] table"),
    ],
)
def test_a_wrong_hardware_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    found = error(capsys, *SMALL, "--gpu", str(path), "--nodes", "1")
    assert str(path) in found
    assert message in found


def test_a_run_that_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(
        capsys, "preset:baichuan2-13b", "--gpu", "a800-40g", "--nodes", "1", "--parallel.zero-stage=1"
    )
    assert "does NOT fit" in text
