"""The rank table, the report and the command."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_b2.cli.main import main
from megatron_b2.config import load_config
from megatron_b2.layouts.ranks import group_summaries, node_rows, rank_rows, span
from megatron_b2.layouts.report import layout_report, report_json
from megatron_b2.parallel.layout import Layout

ROOT = Path(__file__).resolve().parents[2]


def test_rank_rows() -> None:
    layout = Layout(tensor=2, context=2, data=2, pipeline=2)
    rows = rank_rows(layout, ranks_per_node=4)
    assert [(row.rank, row.node) for row in rows] == [(rank, rank // 4) for rank in range(16)]
    assert (rows[13].tp, rows[13].cp, rows[13].dp, rows[13].pp) == (1, 0, 1, 1)
    assert node_rows(rows)[3] == {
        "node": "3",
        "rank": "12-15",
        "tp": "0-1",
        "cp": "0-1",
        "dp": "1",
        "pp": "1",
    }


def test_groups_over_nodes() -> None:
    found = {
        item.kind: item for item in group_summaries(Layout(tensor=8, data=4, pipeline=2), ranks_per_node=8)
    }
    assert set(found) == {"tp", "data_context", "pp", "model"}
    assert [(kind, found[kind].max_nodes) for kind in found] == [
        ("tp", 1), ("data_context", 4), ("pp", 2), ("model", 2),
    ]  # fmt: skip
    assert found["pp"].first == (0, 32)


def test_span() -> None:
    assert span([3, 1, 2, 7, 7]) == "1-3,7"
    assert span([]) == ""


def test_report_of_13b_on_1024_ranks() -> None:
    config = load_config("preset:baichuan2-13b", ["--parallel.tensor", "8"]).config
    report = layout_report(config, world_size=1024)
    assert report.num_micro == 8
    assert report.fits
    assert len(report.rows) == 1024
    assert {name: round(value / 1e9, 2) for name, value in report.flops_per_token.items()} == {
        "6N": 83.38,
        "causal": 84.55,
        "full": 89.58,
        "causal with recomputation": 111.45,
    }
    plain = json.loads(json.dumps(report_json(report)))
    assert plain["ranks"][1023] == {"rank": 1023, "node": 127, "tp": 7, "cp": 0, "dp": 127, "pp": 0}
    assert plain["positions"][0]["memory"]["parameters"] == (13_896_668_160 - 81 * 5_120) // 8 + 81 * 5_120
    assert plain["deepspeed"]["gradient_accumulation_steps"] == 8


def test_the_schedule_is_proven() -> None:
    arguments = ["--parallel.pipeline", "4", "--parallel.zero-stage", "1"]
    report = layout_report(load_config("preset:baichuan2-13b", arguments).config, world_size=64)
    assert report.schedule is not None
    assert report.schedule.peak_in_flight == (4, 3, 2, 1)
    assert report_json(report)["pipeline"]["messages"] == 2 * 3 * 64


def run_check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["layout", "check", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_prints_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "timetable.png"
    status, out, _ = run_check(
        capsys, "preset:baichuan2-13b", "--world", "1024", "--timetable", str(picture),
        "--parallel.tensor", "8", "--parallel.pipeline", "4", "--parallel.auto",
    )  # fmt: skip
    assert status == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    for text in (
        "legal on 1,024 ranks = tensor 8 x context 1 x data 32 x pipeline 4, ZeRO-1",
        "1016-1023",
        "embedding, blocks 0-",
        "GFLOP a token",
        "planned with",
        "head_loss triton",
        "finite check, stop signals",
        "parallel.auto",
        "bubble",
        "activation gradients",
        '"train_micro_batch_size_per_gpu": 1',
    ):
        assert text in out


def test_command_reports_every_problem_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run_check(
        capsys,
        "preset:baichuan2-13b",
        "--world",
        "1000",
        "--parallel.tensor",
        "16",
        "--parallel.pipeline",
        "2",
    )
    assert status == 2
    assert "3 configuration errors" in err
    assert "1000 ranks is not a multiple of" in err
    assert "model.num_heads = 40 is not a multiple of parallel.tensor = 16" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "CONFIG is missing"),
        (("preset:toy",), "--world N is missing"),
        (("preset:toy", "--world", "none"), "--world must be a whole number"),
    ],
)
def test_wrong_arguments(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run_check(capsys, *arguments)
    assert status == 2
    assert message in err


def test_json_has_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run_check(capsys, "preset:toy", "--world", "1", "--json")
    report: dict[str, Any] = json.loads(out)
    assert (len(report["ranks"]), report["timetable"], report["deepspeed"]) == (1, None, None)


def test_is_quick_and_needs_no_gpu() -> None:
    start = time.monotonic()
    subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "megatron_b2",
                "layout",
                "check",
                "preset:baichuan2-13b",
                "--world",
                "1024",
            ),
            *("--parallel.tensor", "8", "--parallel.auto", "--parallel.memory-gb", "10"),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    assert time.monotonic() - start < 30
