"""Our own order of samples: nothing is built, nothing is stored but the step.

Of each source a split takes a contiguous range of documents (as Megatron-LM does) and sees it as one stream
of tokens. Sample i of a split is the window of seq_len + 1 tokens that starts at token i * seq_len of the
stream: the last label of a sample is the first input of the next. A window needs no index: it is found by
arithmetic, its documents by binary search in the mapped `.idx`. `phases.py` says which sample stands at which
position. A source of several pairs has the samples of one pair after those of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_b2.config.schema import DataConfig, SourceConfig
from megatron_b2.data.batch import BatchArrays
from megatron_b2.data.identity import fingerprint
from megatron_b2.data.indexed import IndexedDataset
from megatron_b2.data.manifest import origin
from megatron_b2.data.order import IntArray
from megatron_b2.data.phases import Phase, PhasedOrder, PhaseSource
from megatron_b2.data.splits import SPLITS, Split, split_bounds
from megatron_b2.errors import CheckpointError, DataError


@dataclass(frozen=True)
class SourceSplit:
    """What one pair of files gives to one split."""

    dataset: IndexedDataset
    index: int
    """Number of the source in the configuration: it seeds the source's order."""
    first_document: int
    last_document: int
    """One past the end."""
    first_token: int
    num_tokens: int
    num_samples: int
    """Samples an epoch."""
    seq_len: int
    origin: str | None
    """What the data was made from, see `manifest.origin`."""

    @property
    def name(self) -> str:
        """Prefix of the files."""
        return str(self.dataset.prefix)

    @property
    def identity(self) -> Mapping[str, Any]:
        """Content of the files, as JSON values."""
        return {"content": self.dataset.fingerprint, "origin": self.origin}

    def gather(
        self,
        samples: IntArray,
        *,
        rows: IntArray,
        arrays: BatchArrays,
        vocab_size: int,
        document_masking: bool,
    ) -> None:
        """Write `samples` [n] into `rows` [n] of the arrays."""
        self.dataset.stream.gather(
            starts=self.first_token + samples * self.seq_len,
            rows=rows,
            vocab_size=vocab_size,
            document_masking=document_masking,
            input_ids=arrays.input_ids,
            labels=arrays.labels,
            segment_ids=arrays.segment_ids,
            position_ids=arrays.position_ids,
        )


class StatelessOrder:
    """Order of one split of the sources of `data`; see `BlendedDataset.build` for the arguments of `open`."""

    def __init__(
        self,
        data: DataConfig,
        parts: Mapping[int, Sequence[SourceSplit]],
        *,
        split: Split,
        seed: int,
        global_batch_size: int,
    ) -> None:
        """`parts` has the pairs of each source that has any sample, by its number, in order."""
        self._data = data
        self._parts = parts
        self._split: Split = split
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._numbers = {prefix: number for number, prefix in enumerate(source_prefixes(data))}
        self.sources = tuple(part for group in parts.values() for part in group)
        """All pairs."""
        self.num_samples = sum(source.num_samples for source in self.sources)
        """Samples of one epoch over every source."""
        self._first_part = dict(zip(parts, np.cumsum([0, *map(len, parts.values())]).tolist(), strict=False))
        self._ends = {n: np.cumsum([part.num_samples for part in group]) for n, group in parts.items()}
        self._changes = data.phases if split == "train" else ()
        blends = [data.sources, *(phase.sources for phase in self._changes)]
        starts = [0, *(phase.from_step * global_batch_size for phase in self._changes)]
        phases = [
            Phase(start, tuple(self._phase_source(source) for source in blend if self._used(source)))
            for start, blend in zip(starts, blends, strict=True)
        ]
        self._order = PhasedOrder(phases, seed=seed, split=SPLITS.index(split))
        self._phases = tuple(phases)

    @classmethod
    def open(
        cls,
        data: DataConfig,
        *,
        split: Split,
        seed: int,
        global_batch_size: int | None,
        open_pair: Callable[[str], IndexedDataset],
    ) -> Self:
        """Open the pairs of every source and cut them to the split.

        A pair too small to have a single sample in the split is an error for "train"; for "valid" and "test"
        it is left out, and only a split without any sample is an error (DataError).
        """
        if split == "train" and data.phases and global_batch_size is None:
            raise ValueError("data.phases begin at steps: global_batch_size is needed to place them")
        pairs = source_pairs(data, split=split)
        opened = [
            _cut(open_pair(prefix), index=number, data=data, split=split)
            for number, prefixes in enumerate(pairs)
            for prefix in prefixes
        ]
        used = [part for part in opened if part.num_samples > 0]
        if not used or (split == "train" and len(used) < len(opened)):
            raise DataError(_too_small(opened, data, split))
        parts: dict[int, list[SourceSplit]] = {}
        for part in used:
            parts.setdefault(part.index, []).append(part)
        return cls(data, parts, split=split, seed=seed, global_batch_size=global_batch_size or 1)

    def _used(self, source: SourceConfig) -> bool:
        return self._numbers[source.prefix] in self._parts

    def _pairs(self, source: SourceConfig) -> Sequence[SourceSplit]:
        """The pairs that a blend lists for a source. (Where one is left out there are no phases.)"""
        return self._parts[self._numbers[source.prefix]][: 1 + len(source.append)]

    def _phase_source(self, source: SourceConfig) -> PhaseSource:
        return PhaseSource(
            number=self._numbers[source.prefix],
            weight=source.weight,
            num_samples=sum(part.num_samples for part in self._pairs(source)),
        )

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Pair (index into `sources`), epoch of its source and sample in the pair; int64 [n] each."""
        numbers, epochs, samples = self._order.locate(positions)
        pairs = np.empty_like(numbers)
        for number in np.unique(numbers).tolist():
            rows, ends = np.flatnonzero(numbers == number), self._ends[number]
            part = np.searchsorted(ends, samples[rows], side="right")
            pairs[rows] = self._first_part[number] + part
            samples[rows] -= np.concatenate([[0], ends])[part]
        return pairs, epochs, samples

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the samples before the first phase, as JSON values."""
        return {
            "split": self._split,
            "shares": list(self._data.split),
            "seq_len": self._data.seq_len,
            "seed": self._seed,
            "sources": self._blend_identity(0),
        }

    def _blend_identity(self, phase: int) -> list[Mapping[str, Any]]:
        blend = self._data.sources if phase == 0 else self._changes[phase - 1].sources
        result: list[Mapping[str, Any]] = []
        used = [source for source in blend if self._used(source)]
        for source, weight in zip(used, self._order.weights(phase), strict=True):
            first, *more = (part.identity for part in self._pairs(source))
            joined = {"append": more} if more else {}
            result.append({"index": self._numbers[source.prefix], **first, "weight": weight, **joined})
        return result

    def state(self, step: int) -> Mapping[str, Any] | None:
        """What a checkpoint of a run with phases keeps beside the step: JSON values; None without phases."""
        if not self._changes:
            return None
        drawn = self._order.drawn(step * self._global_batch_size)
        return {
            "drawn": [drawn.get(number, 0) for number in self._numbers.values()],
            "phases": [
                {"from_step": phase.from_step, "fingerprint": fingerprint(self._blend_identity(index))}
                for index, phase in enumerate(self._changes, 1)
            ],
        }

    def require_consumed(self, stored: Mapping[str, Any] | None, *, step: int, checkpoint: Path) -> None:
        """Raise CheckpointError if a phase that begins before `step` is not what `stored`, a state, says.

        Phases from `step` on may differ: nothing of them is consumed.
        """
        nothing: Mapping[str, Any] = {"phases": [], "drawn": []}
        was, now = stored or nothing, self.state(step) or nothing
        consumed = [[p for p in state["phases"] if p["from_step"] < step] for state in (was, now)]
        for index, (old, new) in enumerate(zip_longest(*consumed)):
            if old != new:
                what = _changed_phase(old, new, index=index)
                raise CheckpointError(
                    f"{checkpoint}: {what}, but the run has consumed its data up to step {step}: keep the "
                    f"phases before step {step}, their sources, weights and files as in its config.toml; "
                    f"a new phase may begin at step {step} or later"
                )
        if any(old != new for old, new in zip(was["drawn"], now["drawn"], strict=False)):
            raise CheckpointError(
                f"{checkpoint}: at step {step} the sources had given {was['drawn']} samples, by these "
                f"settings {now['drawn']}: restore data.sources and train.global_batch_size"
            )


def source_prefixes(data: DataConfig) -> tuple[str, ...]:
    """Every source of the run once, in the order of appearance: its place is its number."""
    blends = (data.sources, *(phase.sources for phase in data.phases))
    return tuple(dict.fromkeys(source.prefix for blend in blends for source in blend))


def source_pairs(data: DataConfig, *, split: Split) -> list[tuple[str, ...]]:
    """Prefixes of the pairs of each source, by its number; only "train" has what phases add."""
    pairs: dict[str, tuple[str, ...]] = {prefix: () for prefix in source_prefixes(data)}
    for blend in (data.sources, *(phase.sources for phase in data.phases if split == "train")):
        for source in blend:
            pairs[source.prefix] = max(pairs[source.prefix], (source.prefix, *source.append), key=len)
    return list(pairs.values())


def _cut(dataset: IndexedDataset, *, index: int, data: DataConfig, split: Split) -> SourceSplit:
    bounds = split_bounds(dataset.num_documents, data.split)
    first, last = bounds[SPLITS.index(split)], bounds[SPLITS.index(split) + 1]
    first_token = dataset.document_start(first)
    num_tokens = dataset.document_start(last) - first_token
    if num_tokens < 0:
        raise DataError(f"{dataset.prefix}.idx: damaged: document {last} starts before document {first}")
    return SourceSplit(
        dataset=dataset,
        index=index,
        first_document=first,
        last_document=last,
        first_token=first_token,
        num_tokens=num_tokens,
        num_samples=max(0, num_tokens - 1) // data.seq_len,
        seq_len=data.seq_len,
        origin=origin(dataset.prefix),
    )


def _too_small(sources: Sequence[SourceSplit], data: DataConfig, split: Split) -> str:
    rows = "; ".join(
        f"{source.name}: {source.last_document - source.first_document} documents, {source.num_tokens} tokens"
        for source in sources
        if source.num_samples == 0
    )
    return (
        f"no sample of {data.seq_len + 1} tokens in the {split} split {list(data.split)} of {rows}; "
        "give the split a larger share in data.split, lower data.seq_len, or add data"
    )


def _changed_phase(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, *, index: int) -> str:
    name = f"data.phases[{index}]"
    if old is None:
        assert new is not None
        return f"{name}, which begins at step {new['from_step']}, is new"
    if new is None:
        return f"{name}, which began at step {old['from_step']}, is gone"
    moved = f" and begins at step {new['from_step']} now" if old["from_step"] != new["from_step"] else ""
    return f"{name}, which began at step {old['from_step']}, has changed{moved}"
