"""What a rule between settings yields when it is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from megatron_b2.config.schema import RunConfig


@dataclass(frozen=True)
class Problem:
    """A violated rule: the settings it concerns, and what to change."""

    keys: tuple[str, ...]
    message: str


Problems: TypeAlias = Iterator[Problem]
Rule: TypeAlias = Callable[[RunConfig], Problems]
WorldRule: TypeAlias = Callable[[RunConfig, int], Problems]
