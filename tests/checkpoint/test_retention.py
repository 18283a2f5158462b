"""Retention: properties of the pure functions, and pruning on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2.checkpoint import list_checkpoints, prune_checkpoints
from megatron_b2.checkpoint.retention import milestone_steps, which_to_delete
from tests.checkpoint.support import save_small

step_sets = st.sets(st.integers(0, 200), max_size=30)


@given(steps=step_sets, keep_last=st.integers(1, 5), keep_every=st.integers(0, 30), milestones=step_sets)
def test_what_is_kept(steps: set[int], keep_last: int, keep_every: int, milestones: set[int]) -> None:
    def decide(present: set[int]) -> list[int]:
        return which_to_delete(present, keep_last=keep_last, keep_every=keep_every, milestones=milestones)

    doomed = decide(steps)
    kept = steps - set(doomed)
    assert doomed == sorted(set(doomed))
    assert set(sorted(steps)[-keep_last:]) <= kept
    assert steps & milestones <= kept
    assert all(step in kept for step in steps if keep_every and step > 0 and step % keep_every == 0)
    assert decide(kept) == []
    for step in doomed:
        assert step < min(sorted(steps)[-keep_last:])


@given(
    growth=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    every=st.integers(1, 60),
    keep_last=st.integers(1, 3),
)
def test_milestones_stay_while_a_run_prunes_as_it_goes(growth: list[int], every: int, keep_last: int) -> None:
    tokens, seen, present = 0, {}, set[int]()
    for step, more in enumerate(growth, 1):
        tokens += more
        seen[step] = tokens
        present.add(step)
        milestones = milestone_steps({s: seen[s] for s in present}, every_tokens=every)
        present -= set(which_to_delete(present, keep_last=keep_last, milestones=milestones))
    first_after = {
        next(step for step in seen if seen[step] >= multiple)
        for multiple in range(every, tokens + 1, every)
        if any(multiple <= t < multiple + every for t in seen.values())
    }
    assert first_after <= present


def test_milestones_by_hand() -> None:
    tokens = {10: 90, 20: 180, 30: 270, 40: 360, 50: 450}
    assert milestone_steps(tokens, every_tokens=200) == {30, 50}
    assert milestone_steps(tokens, every_tokens=0) == set()


@pytest.mark.parametrize(("keep_last", "keep_every"), [(0, 0), (1, -1)])
def test_nonsense_is_refused(keep_last: int, keep_every: int) -> None:
    with pytest.raises(ValueError, match="keep_last"):
        which_to_delete([1], keep_last=keep_last, keep_every=keep_every)


def test_pruning_keeps_count_multiples_and_milestones(tmp_path: Path) -> None:
    for step in range(1, 11):  # 100 tokens a step
        save_small(tmp_path, step)
    removed = prune_checkpoints(tmp_path, keep_last=2, keep_every=4, milestone_tokens=300)
    assert [info.step for info in list_checkpoints(tmp_path)] == [3, 4, 6, 8, 9, 10]
    assert [path.name for path in removed] == [f"step_{s:08d}" for s in (1, 2, 5, 7)]
    assert len(list(tmp_path.iterdir())) == 6


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_small(tmp_path, step)
    for step in (2, 3):
        (tmp_path / f"step_{step:08d}" / "rank_00000.safetensors").write_bytes(b"short")
    assert prune_checkpoints(tmp_path, keep_last=1) == []
    assert [(i.step, i.problem is None) for i in list_checkpoints(tmp_path)] == [
        (1, True),
        (2, False),
        (3, False),
    ]
