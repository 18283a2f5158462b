"""The ladder: the report's sizes, configurations that run, an array script that resumes, a manifest."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_b2.cli.main import main
from megatron_b2.config import load_config
from megatron_b2.errors import ConfigError, InputError, OutputError
from megatron_b2.scaling.budgets import Budget
from megatron_b2.scaling.ladder import Cluster, plan_ladder, read_manifest, write_ladder
from megatron_b2.scaling.rungs import TABLE_10, read_rungs
from tests.scaling.laws import TABLE_10 as PRINTED

PRESETS = (
    "ladder-11m",
    "ladder-51m",
    "ladder-108m",
    "ladder-307m",
    "ladder-835m",
    "ladder-1.5b",
    "ladder-3b",
)


def ladder(out: Path, *options: str) -> int:
    return main(["scaling", "ladder", "--out", str(out), *options])


def test_sizes_are_those_of_the_report() -> None:
    assert [round(rung.num_parameters / 1e6, 2) for rung in TABLE_10] == [size / 1e6 for size in PRINTED]


def test_configurations_are_the_presets_of_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ladder(tmp_path / "out", "--budget", "1e12") == 0
    runs = read_manifest(tmp_path / "out" / "ladder.json")["runs"]
    assert len(runs) == 7
    for item, preset in zip(runs, PRESETS, strict=True):
        path = tmp_path / "out" / item["config"]
        config, ours = load_config(path).config, load_config(f"preset:{preset}").config
        assert (config.model, config.optim, config.train) == (ours.model, ours.optim, ours.train)
        assert config.output_dir == str(tmp_path / "out" / item["output_dir"])
        assert main(["config", "check", str(path), "--world-size", "8"]) == 0
    assert "no problems" in capsys.readouterr().out


def test_manifest_counts_tokens_and_flops(tmp_path: Path) -> None:
    assert ladder(tmp_path / "out", "--budget", "1e12") == 0
    first = json.loads((tmp_path / "out" / "ladder.json").read_text())["runs"][0]
    assert first["tokens"] == 238_419 * 4_194_304
    h, f, layers, v, s = 384, 1_152, 6, 125_696, 4_096
    blocks = layers * (4 * h * h + 3 * h * f)
    assert first["flops"]["6ND"] == 6 * (blocks + layers * 2 * h + h) * first["tokens"]
    scores = (
        3 * layers * 2 * 2 * s * h
    )  # forward and twice backward; two products, a multiply and an add each
    assert first["flops"]["training"] == pytest.approx((6 * (blocks + v * h) + scores) * first["tokens"])


def test_several_budgets_and_an_own_table(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("# mine\nhidden, layers, heads, max_lr\n64, 3, 4, 2e-3\n32, 2, 2,\n")
    options = (
        "--table",
        str(table),
        "--base",
        "preset:toy",
        "--gpus-per-node",
        "1",
        "--budget",
        "20x",
        "1e6",
        "--budget",
        "2e6",
    )
    assert ladder(tmp_path / "out", *options) == 0
    runs = read_manifest(tmp_path / "out" / "ladder.json")["runs"]
    assert [run["name"] for run in runs] == [
        f"{size}-d{budget}" for size in ("h32-l2", "h64-l3") for budget in ("20x", "1e06", "2e06")
    ]
    small, large = (load_config(tmp_path / "out" / runs[index]["config"]).config for index in (0, 3))
    assert (small.optim.max_lr, large.optim.max_lr) == (3e-3, 2e-3)
    assert (small.model.ffn_hidden_size, large.model.ffn_hidden_size) == (96, 192)
    size = 2 * (4 * 32**2 + 3 * 32 * 96 + 2 * 32) + 32
    assert 20 * size <= runs[0]["tokens"] < 20 * size + 8 * 256


def test_a_relative_base_is_found_from_the_configurations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text('extends = ["preset:toy"]\n[optim]\nmax_lr = 1e-3\n')
    Path("table.csv").write_text("hidden,layers,heads\n32,2,2\n")
    options = ("--table", "table.csv", "--base", "mine.toml", "--budget", "1e6")
    assert ladder(Path("some/where"), *options, "--gpus-per-node", "1") == 0
    config = load_config("some/where/configs/h32-l2-d1e06.toml").config
    assert config.optim.max_lr == 1e-3
    assert config.output_dir == "some/where/runs/h32-l2-d1e06"


def test_the_same_ladder_again_is_well_and_another_is_refused(tmp_path: Path) -> None:
    assert ladder(tmp_path, "--budget", "1e12") == 0
    before = (tmp_path / "ladder.json").read_bytes()
    assert ladder(tmp_path, "--budget", "1e12") == 0
    runs = plan_ladder(TABLE_10, [Budget.parse("2e12")], out=tmp_path, base="preset:_ladder")
    with pytest.raises(OutputError, match=r"ladder.json is another ladder, whose runs may lie beside it"):
        write_ladder(runs, out=tmp_path, base="preset:_ladder", cluster=Cluster())
    assert (tmp_path / "ladder.json").read_bytes() == before


FAKES = {
    "scontrol": '#!/bin/bash\nif [[ $1 == requeue ]]; then echo "requeue $2" >> "$CALLS"\n'
    'elif [[ $2 == hostnames ]]; then echo node1\nelse echo "NodeName=node1 NodeAddr=10.0.0.1 "; fi\n',
    "srun": '#!/bin/bash\necho "srun $MASTER_ADDR $*" >> "$CALLS"\nexit "$STATUS"\n',
}


@pytest.mark.parametrize("status", [0, 75, 1])
def test_array_script_runs_its_configuration_and_requeues_itself(tmp_path: Path, status: int) -> None:
    out = tmp_path / "a ladder"
    assert ladder(out, "--budget", "1e12", "--nodes", "2", "--gpus-per-node", "4") == 0
    script = (out / "ladder.sbatch").read_text()
    for line in ("--array=0-6", "--nodes=2", "--ntasks-per-node=4", "--requeue", "--signal=USR1@300"):
        assert f"#SBATCH {line}\n" in script
    for name, text in FAKES.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "STATUS": str(status),
        "SLURM_ARRAY_TASK_ID": "5",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "77",
    }
    command = ["bash", str(out / "ladder.sbatch"), "--train.seed", "2"]
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == status
    first, *rest = (tmp_path / "calls").read_text().splitlines()
    assert first.startswith("srun 10.0.0.1 ")
    assert first.endswith(f"megatron_b2.cli.pretrain {out}/configs/h2240-l24-d1e12.toml --train.seed 2")
    assert rest == (["requeue 77"] if status == 75 else [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hidden,layers\n32,2\n", "the header lacks heads"),
        ("hidden,layers,heads,ffn\n32,2,2,9\n", "has the unknown ffn"),
        ("hidden,layers,heads\n", "no sizes"),
        ("hidden,layers,heads\n32,2,2\n32,zwei,2\n", "size 2, layers: 'zwei' is not a positive number"),
        ("hidden,layers,heads\n32,2.5,2\n", "size 1, layers: '2.5' is not a whole number"),
        ("hidden,layers,heads\n32,-1,2\n", "layers: '-1' is not a positive number"),
        ("hidden,layers,heads\n32,2\n", "heads: None is not a positive number"),
        ("hidden,layers,heads\n32,2,2,1e-3\n", "size 1 has more values than the header"),
        ("hidden,layers,heads\n32,2,3\n", "hidden = 32 is not a multiple of heads = 3"),
        ("hidden,layers,heads\n32,2,2\n32,2,2\n", "size 2 stands twice"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_rungs(path)


def test_a_missing_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ladder(tmp_path, "--budget", "1e9", "--table", str(tmp_path / "no.csv")) == 2
    assert "no.csv: no such table" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "many", "-1e9", "0", "1e12 tokens", "x", "nan", "1.2.3"])
def test_bad_budgets(text: str) -> None:
    with pytest.raises(InputError, match="--budget"):
        Budget.parse(text)


def test_ranks_that_the_layout_cannot_use_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        ladder(tmp_path / "out", "--budget", "1e12", "--base", "preset:_ladder", "--gpus-per-node", "6") == 2
    )
    assert "train.global_batch_size = 1024" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_budget_below_the_warm_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="warmup_steps"):
        plan_ladder(TABLE_10[:1], [Budget.parse("1e9")], out=tmp_path, base="preset:_ladder")
