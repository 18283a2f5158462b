"""Where this rank is: the trail that the watchdog publishes and a report of a hang shows.

Setting a breadcrumb is one small object and one attribute (a microsecond or two), so every operation that may
wait for another rank can have one. Nothing here knows of threads or of other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple


class Crumb(NamedTuple):
    """One position of a rank."""

    step: int = 0
    """Optimizer step being worked on, 1-based; 0 before the first."""
    micro: int | None = None
    """Micro-batch of the step, 0-based."""
    operation: str = "starting"
    """What the rank does or waits in."""
    peers: tuple[int, ...] = ()
    """Global ranks the operation needs, for point-to-point; collectives are counted on their own."""
    patient: bool = True
    """Whether the longer limit of the first step holds."""
    progress: int = 0
    """Breadcrumbs set so far: while it stands still, the rank makes no progress."""

    def text(self) -> str:
        """`step 12, micro-batch 3, in receive activations`."""
        place = f"step {self.step}" if self.step else "before the first step"
        micro = "" if self.micro is None else f", micro-batch {self.micro}"
        return f"{place}{micro}, in {self.operation!r}"


class Breadcrumbs:
    """The position of one rank, set by its main thread and read by its watchdog thread."""

    def __init__(self) -> None:
        self.current = Crumb()
        """The newest position; replaced as a whole, so that a reader never sees half of one."""

    def mark(
        self,
        operation: str,
        *,
        step: int | None = None,
        micro: int | None = None,
        peers: Sequence[int] = (),
        patient: bool = False,
    ) -> None:
        """Be in `operation` from now on; `step` none keeps the step."""
        now = self.current
        self.current = Crumb(
            now.step if step is None else step, micro, operation, tuple(peers), patient, now.progress + 1
        )

    def tick(self) -> None:
        """Progress inside one operation, for instance one more tensor written."""
        now = self.current
        self.current = now._replace(progress=now.progress + 1)

    def operation(
        self, name: str, *, micro: int | None = None, peers: Sequence[int] = (), patient: bool | None = None
    ) -> Operation:
        """Context manager: be in `name`, then back in what was before.

        `micro` and `patient` none keep what they are; `peers` are the global ranks it waits for. After an
        error the position stays, so that a report shows where it happened.
        """
        return Operation(self, name, micro, tuple(peers), patient)


class Operation:
    """The context of `Breadcrumbs.operation`."""

    __slots__ = ("_before", "_crumbs", "_inside")

    def __init__(
        self,
        crumbs: Breadcrumbs,
        name: str,
        micro: int | None,
        peers: tuple[int, ...],
        patient: bool | None,
    ) -> None:
        before = crumbs.current
        self._crumbs = crumbs
        self._before = before
        self._inside = Crumb(
            before.step,
            before.micro if micro is None else micro,
            name,
            peers,
            before.patient if patient is None else patient,
        )

    def __enter__(self) -> None:
        step, micro, name, peers, patient, _ = self._inside
        self._crumbs.current = Crumb(step, micro, name, peers, patient, self._crumbs.current.progress + 1)

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is None:
            step, micro, name, peers, patient, _ = self._before
            self._crumbs.current = Crumb(step, micro, name, peers, patient, self._crumbs.current.progress + 1)
