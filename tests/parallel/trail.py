"""Breadcrumbs that remember."""

from __future__ import annotations

from megatron_b2.parallel.breadcrumbs import Breadcrumbs, Crumb


class Trail(Breadcrumbs):
    """Keeps (operation, micro-batch, peers) of every position after the first."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int | None, tuple[int, ...]]] = []
        super().__init__()

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if isinstance(value, Crumb) and value.operation != Crumb().operation:
            self.seen.append((value.operation, value.micro, value.peers))
