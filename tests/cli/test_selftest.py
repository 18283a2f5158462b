"""`b2 selftest layouts`: one real case, and what makes it fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_b2.cli.main import main
from megatron_b2.config import checks
from megatron_b2.testing import layouts

NAME = "7b tp1 pp1 dp1 cp2 zero2 recompute-selective"


def run(*options: str) -> int:
    return main(["selftest", "layouts", *options])


def test_one_layout_of_two_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, table = tmp_path / "results.json", tmp_path / "table.md"
    assert run("--quick", "--only", NAME, "--json", str(results), "--markdown", str(table)) == 0
    lines = capsys.readouterr().out.splitlines()
    illegal = sum(bool(layouts.broken_rules(case)) for case in layouts.cases())
    assert lines[0] == f"{illegal} illegal layouts: none treated wrongly"
    assert lines[1] == f"{len(layouts.legal_cases())} legal layouts on up to 8 processes; 1 to run"
    assert lines[-1] == "1 of 1 equal one process to 1e-05"
    (result,) = json.loads(results.read_text())
    assert result["passed"]
    assert result["case"]["recompute"] == "selective"
    assert f"| {NAME} | 2 |" in table.read_text()


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(case: layouts.Case, references: Any, *, seed: int) -> layouts.Comparison:
        return layouts.Comparison(case, 0.0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(layouts, "compare", compare)
    monkeypatch.setattr(layouts, "reference_traces", lambda chosen, *, seed: {})


@pytest.mark.usefixtures("nothing_runs")
def test_a_layout_that_is_not_refused_fails_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--quick", "--only", NAME) == 0
    kept = [rule for rule in checks.RULES if rule.__name__ != "node_groups_need_no_tensor"]
    monkeypatch.setattr(checks, "RULES", kept)
    assert run("--quick", "--only", NAME) == 1
    out = capsys.readouterr().out
    assert "7b tp2 pp1 dp2 cp1 zero3+hpz is not refused, but: hpZ needs tensor = 1" in out


@pytest.mark.usefixtures("nothing_runs")
def test_a_layout_that_is_refused_for_nothing_fails_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "RULES", (*checks.RULES, checks.has_sources))
    assert run("--quick", "--only", NAME) == 1
    out = capsys.readouterr().out
    assert "7b tp1 pp1 dp2 cp1 zero1 breaks no rule and is refused: data.sources is empty" in out


@pytest.mark.parametrize("which", ["--quick", "--full"])
def test_a_text_that_is_in_no_name_is_an_error(which: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(which, "--only", "tp3") == 2
    assert capsys.readouterr().err.startswith("error: --only 'tp3' is in the name of no ")


def test_either_quick_or_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert run("--quick", "--full") == 2
    assert "takes either --quick or --full" in capsys.readouterr().err
