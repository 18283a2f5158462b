"""The picture of a schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_b2.pipeline.schedule import build_schedule
from megatron_b2.pipeline.timetable import draw_timetable


@pytest.mark.parametrize(("name", "chunks"), [("interleaved", 2), ("zero_bubble", 1)])
def test_a_png_is_written(tmp_path: Path, name: str, chunks: int) -> None:
    schedule = build_schedule(name, num_ranks=4, num_micro=8, num_chunks=chunks)
    path = draw_timetable(schedule, tmp_path / "timetable.png", title=name)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
