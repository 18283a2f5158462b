"""The stateless order of a run whose data changes: position -> (source, epoch, sample), a pure function.

A phase says from which position on which sources are drawn, by what weights, and how many samples each has by
then. What stands before a phase does not depend on it. Every source goes on where it was left, also after
phases without it: its draws are counted over the whole run.

Samples that join a source during one of its epochs become part of that epoch: what the epoch still has to
give and the new samples are shuffled together. So each sample is drawn exactly once an epoch, whenever it
came, and every later epoch shuffles all of them. Design: our choice; the report gives none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_b2.data.order import Blend, IntArray, derive_key, permute


@dataclass(frozen=True)
class PhaseSource:
    """One source as a phase draws it."""

    number: int
    """Of the source in the run: it seeds the source's order."""
    weight: float
    num_samples: int
    """Samples of the source by now; it may grow from phase to phase, never shrink."""


@dataclass(frozen=True)
class Phase:
    """The blend from one position on."""

    start: int
    """First position."""
    sources: tuple[PhaseSource, ...]


@dataclass(frozen=True)
class _Stretch:
    """The draws of one source from number `start` on, while it has `size` samples."""

    key: tuple[int, int, int]
    """Seed, split, source."""
    start: int
    size: int
    rest: int
    """Draws that the running epoch still has at the start, joined samples included; 0 if none runs."""
    epoch: int
    """First epoch after the rest; the rest belongs to the one before."""
    number: int = 0
    previous: _Stretch | None = None

    def locate(self, draws: IntArray) -> tuple[IntArray, IntArray]:
        """Epoch and sample of each draw, int64 [n]; the draws are not before `start`."""
        local = draws - self.start
        epochs, samples = np.empty_like(local), np.empty_like(local)
        whole = np.flatnonzero(local >= self.rest)
        since, index = np.divmod(local[whole] - self.rest, self.size)
        epochs[whole] = self.epoch + since
        samples[whole] = permute(index, size=self.size, key=derive_key(*self.key, epochs[whole]))
        if self.previous is not None and whole.size < local.size:
            joined = np.flatnonzero(local < self.rest)
            epochs[joined] = self.epoch - 1
            samples[joined] = self._rest(local[joined], self.previous)
        return epochs, samples

    def _rest(self, index: IntArray, previous: _Stretch) -> IntArray:
        """Samples of the running epoch: what `previous` would have given, mixed with those that joined."""
        key = derive_key(*self.key, self.epoch - 1, self.number)
        image = permute(index, size=self.rest, key=key)
        left = self.rest - (self.size - previous.size)
        samples = previous.size + image - left
        old = np.flatnonzero(image < left)
        samples[old] = previous.locate(self.start + image[old])[1]
        return samples

    def grown(self, size: int, *, draws: int) -> _Stretch:
        """The stretch that follows when the source has `size` samples after `draws` draws."""
        local = draws - self.start
        if local < self.rest:
            left, epoch = self.rest - local, self.epoch
        else:
            since, index = divmod(local - self.rest, self.size)
            left = self.size - index if index else 0
            epoch = self.epoch + since + (index > 0)
        return _Stretch(
            key=self.key,
            start=draws,
            size=size,
            rest=left + size - self.size if left else 0,
            epoch=epoch,
            number=self.number + 1,
            previous=self,
        )


@dataclass(frozen=True)
class _Row:
    """A phase with what came before it: draws so far and stretch of each of its sources."""

    blend: Blend
    numbers: tuple[int, ...]
    drawn: tuple[int, ...]
    stretches: tuple[_Stretch, ...]


class PhasedOrder:
    """The order of a whole run; one phase that starts at 0 is a run whose data never changes."""

    def __init__(self, phases: Sequence[Phase], *, seed: int, split: int) -> None:
        starts = [phase.start for phase in phases]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"phases start at {starts}: the first at 0, each later than the one before")
        self._starts = np.array(starts, dtype=np.int64)
        self._rows: list[_Row] = []
        drawn: dict[int, int] = {}
        stretches: dict[int, _Stretch] = {}
        for phase in phases:
            if self._rows:
                drawn |= self.drawn(phase.start)
            for source in phase.sources:
                known = stretches.get(source.number)
                if source.num_samples < (known.size if known else 1):
                    raise ValueError(
                        f"source {source.number}: {source.num_samples} samples, fewer than before"
                    )
                if known is None:
                    key = (seed, split, source.number)
                    known = _Stretch(key, start=0, size=source.num_samples, rest=0, epoch=0)
                elif source.num_samples > known.size:
                    known = known.grown(source.num_samples, draws=drawn[source.number])
                stretches[source.number] = known
            numbers = tuple(source.number for source in phase.sources)
            self._rows.append(
                _Row(
                    blend=Blend([source.weight for source in phase.sources]),
                    numbers=numbers,
                    drawn=tuple(drawn.get(number, 0) for number in numbers),
                    stretches=tuple(stretches[number] for number in numbers),
                )
            )

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Number of the source, its epoch and the sample in it of each position >= 0; int64 [n] each."""
        numbers, epochs, samples = (np.empty_like(positions) for _ in range(3))
        phases = np.searchsorted(self._starts, positions, side="right") - 1
        for phase in np.unique(phases):
            row, there = self._rows[phase], np.flatnonzero(phases == phase)
            sources, counts = row.blend.locate(positions[there] - self._starts[phase])
            for source in np.unique(sources):
                mine = np.flatnonzero(sources == source)
                rows = there[mine]
                numbers[rows] = row.numbers[source]
                epochs[rows], samples[rows] = row.stretches[source].locate(row.drawn[source] + counts[mine])
        return numbers, epochs, samples

    def drawn(self, position: int) -> dict[int, int]:
        """Number of each source that is in a phase before `position`, and how often it was drawn by then."""
        totals: dict[int, int] = {}
        ends = [*self._starts[1:].tolist(), position]
        for row, start, end in zip(self._rows, self._starts.tolist(), ends, strict=False):
            if start > position:
                break
            counts = row.blend.counts(min(end, position) - start)
            totals |= {n: before + c for n, before, c in zip(row.numbers, row.drawn, counts, strict=True)}
        return totals

    def weights(self, phase: int) -> tuple[float, ...]:
        """Normalised weights of a phase's sources, exactly as they are dealt."""
        return self._rows[phase].blend.weights
