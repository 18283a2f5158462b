"""docs/planner.md holds the figures of the code, and the tool that writes them says when it does not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from megatron_b2.errors import InputError
from megatron_b2.planner.constants import load_constants
from megatron_b2.planner.fit import judge
from tests.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("planner_tables")


def test_tables_are_current(tool: ModuleType, tmp_path: Path) -> None:
    """`python tools/planner_tables.py` has been run after the last change of the model."""
    judged = judge(load_constants())
    text = tool.DOCUMENT.read_text(encoding="utf-8")
    assert tool.filled(text, tool.tables(judged)) == text
    tool.draw(judged, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_table_without_a_place(tool: ModuleType) -> None:
    text = "<!-- begin a -->\nold\n<!-- end a -->\n"
    assert tool.filled(text, {"a": "new"}) == "<!-- begin a -->\nnew\n<!-- end a -->\n"
    with pytest.raises(InputError, match="has no <!-- begin b -->"):
        tool.filled(text, {"b": "new"})
