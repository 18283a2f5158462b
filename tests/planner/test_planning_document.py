"""docs/planning.md shows what its commands print now, and its text speaks of those figures."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from megatron_b2.config import load_config
from megatron_b2.layouts.memory import GIB
from megatron_b2.planner.hardware import load_hardware
from megatron_b2.planner.report import make_plan
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("planning_outputs")


def shown(tool: ModuleType, *, several: bool) -> tuple[str, str]:
    """The command of the document for one number of nodes, or for several, and its output."""
    ((command, output),) = (
        item for item in tool.outputs(TEXT).items() if bool(re.search(r"--nodes \d+,", item[0])) is several
    )
    return command, output


def test_the_search_of_13b_on_1024_is_current(tool: ModuleType, tmp_path: Path) -> None:
    """`python tools/planning_outputs.py` has been run after the last change of the model."""
    command, output = shown(tool, several=False)
    assert tool.printed(command, tmp_path) == output
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == [
        *("best.toml", "plan.json", "search.json", "search.png")
    ]


@pytest.mark.slow
def test_the_crossover_is_current(tool: ModuleType, tmp_path: Path) -> None:
    command, output = shown(tool, several=True)
    assert tool.printed(command, tmp_path, first=True) == output


def test_the_text_speaks_of_what_is_printed(tool: ModuleType) -> None:
    """Every "148 ± 12" between the blocks."""
    prose, blocks = tool.BLOCK.sub("", TEXT), "".join(tool.outputs(TEXT).values())
    figures = re.findall(r"\d+ ± \d+", prose)
    assert len(figures) >= 3
    assert [figure for figure in figures if not re.search(rf"\b{figure}\b", blocks)] == []


def test_both_tables_agree_on_the_fastest_at_1024(tool: ModuleType) -> None:
    """The families of the search, and the last column of the crossover."""
    families = shown(tool, several=False)[1].partition("the fastest of each family")[2]
    rates = dict(re.findall(r"^(ZeRO[\w -]*?)  +[\d.]+ s ± \d+ % +(\d+)", families, re.MULTILINE))
    table = shown(tool, several=True)[1]
    last = dict(re.findall(r"^(ZeRO[\w -]*?)  .* (\d+)$", table, re.MULTILINE))
    assert len(rates) == 5
    assert rates == {name: last[name] for name in rates}


def test_what_a_plan_leaves_of_the_device_is_said() -> None:
    """The two figures of the section on memory, for 80 GB."""
    plan = make_plan(load_config("preset:baichuan2-7b").config, load_hardware("a800-80g"), gpus=8)
    free = plan.cluster.gpu.memory_bytes / (1 + plan.memory.band) - plan.memory.ranks[0].allocator
    section = " ".join(TEXT.partition("## Does it fit")[2].split())
    assert f"leaves {free / GIB:.1f} for what the formulas count" in section
    assert f"both agree, {plan.auto_memory_gb:g} for this device" in section
