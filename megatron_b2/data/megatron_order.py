"""Megatron-LM's order of samples, so that a run begun there goes on here with the same samples.

`megatron_index.py` has the arrays of each source. A blend takes, position by position, the source that is
furthest below its share. The arrays depend on the number of samples that the run was planned for: to go on
with a run, data.megatron.train_samples says what it was. They are built once and kept beside the data.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatron_b2.config.schema import DataConfig, RunConfig
from megatron_b2.data.batch import BatchArrays
from megatron_b2.data.identity import fingerprint
from megatron_b2.data.indexed import IndexedDataset
from megatron_b2.data.manifest import origin
from megatron_b2.data.megatron_index import (
    IndexArrays,
    Progress,
    build_blend,
    build_index,
    plan_index,
)
from megatron_b2.data.order import IntArray
from megatron_b2.data.splits import SPLITS, Split
from megatron_b2.errors import DataError
from megatron_b2.files.atomic import atomic_folder, write_json
from megatron_b2.files.progress import ProgressBar

_FORMAT = "megatron_b2.megatron_order/1"
_IGNORED_LABEL = -100
_DAMAGED = "the index of the order does not fit the documents; delete its folder to build it again"


def planned_samples(config: RunConfig, split: Split) -> int:
    """Samples that Megatron-LM plans for a split of this run: steps, validations and their global batches."""
    train = config.train
    samples = config.data.megatron.train_samples or train.steps * train.global_batch_size
    if split == "train":
        return samples
    steps = samples // train.global_batch_size
    validations = 1 + (steps // train.eval_interval if train.eval_interval else 0)
    return train.eval_batches * train.global_batch_size * (validations if split == "valid" else 1)


def document_range(num_documents: int, shares: Sequence[float], split: Split) -> tuple[int, int]:
    """First document of a split and one past its last, as --split 969,30,1 cuts them."""
    normalised = np.asarray(shares, dtype=np.float64)
    normalised /= normalised.sum()
    bounds = [0.0]
    for share in normalised.tolist():
        bounds.append(bounds[-1] + share)
    number = SPLITS.index(split)
    return round(bounds[number] * num_documents), round(bounds[number + 1] * num_documents)


@dataclass(frozen=True)
class MegatronSource:
    """What one source gives to one split."""

    dataset: IndexedDataset
    index: int
    """Number of the source in the configuration."""
    first_document: int
    last_document: int
    """One past the end."""
    seq_len: int
    arrays: IndexArrays

    @property
    def name(self) -> str:
        """Prefix of the files."""
        return str(self.dataset.prefix)

    @property
    def num_samples(self) -> int:
        """Samples of the index: at least as many as were planned."""
        return self.arrays.shuffle.size

    def gather(
        self,
        samples: IntArray,
        *,
        rows: IntArray,
        arrays: BatchArrays,
        vocab_size: int,
        document_masking: bool,
    ) -> None:
        """Write rows `samples` [n] of the sample index into `rows` [n] of the arrays."""
        pieces = self._pieces(samples)
        owner = np.repeat(np.arange(pieces.size.size), pieces.size)
        inside = np.arange(owner.size) - np.repeat(np.cumsum(pieces.size) - pieces.size, pieces.size)
        shape = (samples.size, self.seq_len + 1)
        padding = (pieces.document[owner] < 0).reshape(shape)
        window = self._tokens(pieces, owner, inside, vocab_size=vocab_size).reshape(shape)
        window[padding] = 0
        labels = np.where(padding[:, 1:], _IGNORED_LABEL, window[:, 1:])
        if document_masking:
            owner, inside = owner.reshape(shape), inside.reshape(shape)
            labels[owner[:, 1:] != owner[:, :-1]] = _IGNORED_LABEL
            arrays.segment_ids[rows] = (owner - owner[:, :1])[:, :-1]
            arrays.position_ids[rows] = inside[:, :-1]
        else:
            arrays.segment_ids[rows], arrays.position_ids[rows] = 0, np.arange(self.seq_len)
        arrays.input_ids[rows], arrays.labels[rows] = window[:, :-1], labels

    def _pieces(self, samples: IntArray) -> _Pieces:
        """The parts of documents that make up each sample, then its padding; empty ones are left out."""
        index = self.arrays.samples
        begin, offset = index[samples].T.astype(np.int64)
        end, last = index[samples + 1].T.astype(np.int64)
        if samples.size and not ((begin >= 0) & (begin <= end) & (end < self.arrays.documents.size)).all():
            raise IndexError(_DAMAGED)
        counts = end - begin + 2  # the documents, and the padding behind them
        row = np.repeat(np.arange(samples.size), counts)
        entry = np.arange(row.size) - np.repeat(np.cumsum(counts) - counts - begin, counts)
        is_padding = entry > end[row]
        document = self.arrays.documents[np.minimum(entry, end[row])].astype(np.int64)
        start = np.where(entry == begin[row], offset[row], 0)
        length = self.dataset.sequence_lengths[document].astype(np.int64)
        size = np.where(is_padding, 0, np.where(entry == end[row], last[row] + 1, length) - start)
        filled = np.zeros(samples.size, np.int64)
        np.add.at(filled, row, size)
        if (size < 0).any() or (filled > self.seq_len + 1).any():
            raise IndexError(_DAMAGED)
        size = np.where(is_padding, self.seq_len + 1 - filled[row], size)
        kept = size > 0
        pointers = self.dataset.sequence_pointers[document] // self.dataset.dtype.itemsize
        return _Pieces(
            size=size[kept],
            document=np.where(is_padding, -1, document)[kept],
            offset=start[kept],
            token=np.where(is_padding, 0, pointers + start)[kept],
        )

    def _tokens(self, pieces: _Pieces, owner: IntArray, inside: IntArray, *, vocab_size: int) -> IntArray:
        """The tokens of the pieces one after the other; padding gets any."""
        index = np.where(pieces.document[owner] < 0, 0, pieces.token[owner] + inside)
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < self.dataset.num_tokens:
            raise IndexError(f"documents outside of the {self.dataset.num_tokens} tokens of the file")
        tokens: IntArray = self.dataset.tokens[index].astype(np.int64)
        wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
        if wrong.size:
            piece = owner[wrong[0]]
            raise RuntimeError(
                f"token id {tokens[wrong[0]]} at token {pieces.offset[piece] + inside[wrong[0]]} of document "
                f"{pieces.document[piece]} is outside the vocabulary of {vocab_size}"
            )
        return tokens


@dataclass(frozen=True)
class _Pieces:
    """Consecutive tokens, int64 [P] each: how many, of which document (-1 is padding), from where on."""

    size: IntArray
    document: IntArray
    offset: IntArray
    """First token, counted in the document."""
    token: IntArray
    """First token, counted in the file."""


class MegatronOrder:
    """Order of one split; see `BlendedDataset.build` for the arguments of `open`."""

    def __init__(
        self,
        sources: Sequence[MegatronSource],
        blend: tuple[NDArray[np.int16], NDArray[np.int64]] | None,
        *,
        planned: int,
        identity: Mapping[str, Any],
    ) -> None:
        """`blend` is None for a single source without a weight."""
        self.sources = tuple(sources)
        self._blend = blend
        self.num_samples = sources[0].num_samples if blend is None else blend[0].size
        """Samples that there are, at least as many as planned."""
        self._planned = planned
        self.identity = identity
        """What decides the samples, as JSON values."""

    @classmethod
    def open(
        cls,
        data: DataConfig,
        *,
        split: Split,
        seed: int,
        planned_samples: int,
        open_pair: Callable[[str], IndexedDataset],
    ) -> Self:
        """Open every source and load its index; one process builds it where there is none, others wait."""
        datasets = [open_pair(source.prefix) for source in data.sources]
        weights = _normalised([source.weight for source in data.sources])
        is_blend = len(datasets) > 1 or data.megatron.blend_single
        targets = [ceil(planned_samples * weight) for weight in weights] if is_blend else [planned_samples]
        surplus = 1 + data.megatron.surplus if is_blend else 1
        opener = partial(_open_source, data=data, split=split, seed=seed)
        sources = [
            opener(dataset, number, requested=ceil(target * surplus))
            for number, (dataset, target) in enumerate(zip(datasets, targets, strict=True))
        ]
        blend = None
        if is_blend:
            dealt = np.array(_normalised(weights))  # Megatron-LM normalises twice
            blend = _open_blend(dealt, sum(targets), folder=_cache_folder(data, data.sources[0].prefix))
            _check_enough(sources, blend[0])
        identity = {
            "order": "megatron",
            "split": split,
            "shares": list(data.split),
            "seq_len": data.seq_len,
            "seed": seed,
            "planned": planned_samples,
            "settings": [is_blend, surplus, data.megatron.drop_last, data.megatron.exact],
            "sources": [
                {"content": dataset.fingerprint, "origin": origin(dataset.prefix), "weight": weight}
                for dataset, weight in zip(datasets, weights, strict=True)
            ],
        }
        return cls(sources, blend, planned=planned_samples, identity=identity)

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Source, pass over its documents and row of its sample index; int64 [n] each.

        Passes are counted where a sample begins: epochs that were shuffled together do not follow each other.
        """
        if positions.size and int(positions.max()) >= self.num_samples:
            raise DataError(
                f"sample {int(positions.max())} of a Megatron-LM order of {self.num_samples} samples, "
                f"planned for {self._planned}: it ends there; lower train.steps, or start a run of order "
                '"stateless" from this checkpoint with checkpoint.init_from'
            )
        if self._blend is None:
            numbers, drawn = np.zeros_like(positions), positions
        else:
            numbers, drawn = self._blend[0][positions].astype(np.int64), self._blend[1][positions]
        passes, samples = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers):
            source, rows = self.sources[number], np.flatnonzero(numbers == number)
            samples[rows] = source.arrays.shuffle[drawn[rows]]
            entries = source.arrays.samples[samples[rows], 0]
            passes[rows] = entries // (source.last_document - source.first_document)
        return numbers, passes, samples

    def state(self, step: int) -> Mapping[str, Any] | None:
        """Nothing beside the step: there are no phases."""
        return None

    def require_consumed(self, stored: Mapping[str, Any] | None, *, step: int, checkpoint: Path) -> None:
        """`identity` says all."""


def _normalised(weights: Sequence[float]) -> list[float]:
    values = np.array(weights, dtype=np.float64)
    normalised: list[float] = (values / np.sum(values)).tolist()
    return normalised


def _open_source(
    dataset: IndexedDataset, number: int, *, data: DataConfig, split: Split, seed: int, requested: int
) -> MegatronSource:
    first, last = document_range(dataset.num_sequences, data.split, split)
    tokens = int(dataset.sequence_lengths[first:last].sum(dtype=np.int64))
    settings = data.megatron
    drop_last = split != "valid" or settings.drop_last
    if tokens > 0:
        plan = plan_index(
            tokens, seq_len=data.seq_len, requested=requested, drop_last=drop_last, exact=settings.exact
        )
    if tokens == 0 or plan.num_samples < 1:
        raise DataError(
            f"no sample of {data.seq_len + 1} tokens in the {split} split {list(data.split)} of "
            f"{dataset.prefix}: {last - first} documents, {tokens} tokens; give the split a larger share in "
            "data.split, or add data"
        )
    key = {
        "content": dataset.fingerprint,
        "documents": [first, last],
        "seq_len": data.seq_len,
        "seed": seed,
        "plan": [plan.num_epochs, plan.num_samples, plan.separate_from],
    }

    def build(progress: Progress) -> Mapping[str, NDArray[Any]]:
        lengths = np.array(dataset.sequence_lengths[:last])  # a copy: those of the file are not aligned
        arrays = build_index(
            lengths, first, last, plan=plan, seq_len=data.seq_len, seed=seed, progress=progress
        )
        return {"documents": arrays.documents, "samples": arrays.samples, "shuffle": arrays.shuffle}

    arrays = _cached(
        _cache_folder(data, str(dataset.prefix)),
        key,
        build,
        title=f"{dataset.prefix}: order of Megatron-LM, {split}",
        entries=(last - first) * plan.num_epochs + 2 * plan.num_samples,
    )
    return MegatronSource(
        dataset=dataset,
        index=number,
        first_document=first,
        last_document=last,
        seq_len=data.seq_len,
        arrays=IndexArrays(**arrays),
    )


def _open_blend(
    weights: NDArray[np.float64], size: int, *, folder: Path
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    def build(progress: Progress) -> Mapping[str, NDArray[Any]]:
        sources, drawn = build_blend(weights, size)
        progress(size)
        return {"sources": sources, "drawn": drawn}

    key = {"weights": weights.tolist(), "size": size}
    arrays = _cached(folder, key, build, title="blend of Megatron-LM", entries=size)
    return arrays["sources"], arrays["drawn"]


def _check_enough(sources: Sequence[MegatronSource], blend: NDArray[np.int16]) -> None:
    """Megatron-LM refuses a blend that takes more of a source than was planned with the surplus."""
    counts = np.bincount(blend, minlength=len(sources))
    for source, count in zip(sources, counts.tolist(), strict=True):
        if count > source.num_samples:
            raise DataError(
                f"the blend takes {count} samples of {source.name}, which was planned for "
                f"{source.num_samples}: data.megatron.surplus must be that of the Megatron-LM run "
                "(mid_level_dataset_surplus)"
            )


def _cache_folder(data: DataConfig, prefix: str) -> Path:
    return Path(data.megatron.cache or f"{prefix}.order")


def _cached(
    folder: Path,
    key: Mapping[str, Any],
    build: Callable[[Progress], Mapping[str, NDArray[Any]]],
    *,
    title: str,
    entries: int,
) -> Mapping[str, NDArray[Any]]:
    """The arrays of `key`, memory-mapped; built first if they are not in `folder`, by one process of all."""
    path = folder / fingerprint({"format": _FORMAT, **key})[:24]
    try:
        if not path.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / ".lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.is_dir():
                    _build(path, key, build, title=title, entries=entries)
    except OSError as error:
        raise DataError(
            f"{path}: the index of the order cannot be written: {error.strerror or error}; "
            "set data.megatron.cache to a folder that can be written"
        ) from error
    try:
        return {file.stem: np.load(file, mmap_mode="r", allow_pickle=False) for file in path.glob("*.npy")}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged index ({error}); delete it to build it again") from error


def _build(
    path: Path,
    key: Mapping[str, Any],
    build: Callable[[Progress], Mapping[str, NDArray[Any]]],
    *,
    title: str,
    entries: int,
) -> None:
    with ProgressBar(title, total=entries, unit="entries") as bar:
        arrays = build(bar.advance)
    with atomic_folder(path, error=DataError) as temporary:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        write_json(temporary / "key.json", {"format": _FORMAT, **key}, error=DataError)
