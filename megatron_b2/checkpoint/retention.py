"""Which checkpoints to keep: pure arithmetic on step numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def which_to_delete(
    steps: Iterable[int], *, keep_last: int, keep_every: int = 0, milestones: Iterable[int] = ()
) -> list[int]:
    """Steps whose checkpoints may go, oldest first.

    Kept: the newest `keep_last` (at least one), every step that is a positive multiple of `keep_every`
    (0: none), and the steps in `milestones`. Deciding again after the deletion deletes nothing more.
    """
    if keep_last < 1 or keep_every < 0:
        raise ValueError(f"keep_last = {keep_last} must be at least 1, keep_every = {keep_every} at least 0")
    ordered = sorted(set(steps))
    kept = set(ordered[-keep_last:]) | set(milestones)
    return [
        step for step in ordered if step not in kept and not (keep_every and step and step % keep_every == 0)
    ]


def milestone_steps(tokens_by_step: Mapping[int, int], *, every_tokens: int) -> set[int]:
    """Steps of the first checkpoint at or after each positive multiple of `every_tokens` (0: none).

    The report names such checkpoints by tokens, every 220e9 of them (`train_00220B`). Deleting other
    checkpoints does not change the answer.
    """
    if every_tokens <= 0:
        return set()
    first: dict[int, int] = {}
    for step in sorted(tokens_by_step):
        first.setdefault(tokens_by_step[step] // every_tokens, step)
    return {step for multiple, step in first.items() if multiple > 0}
