"""The training data as one endless sequence of samples: position -> packed sample, a pure function.

Of each source a split takes a contiguous range of documents (as Megatron-LM does) and sees it as one stream
of tokens. Sample i of a split is the window of seq_len + 1 tokens that starts at token i * seq_len of the
stream: the last label of a sample is the first input of the next. A window needs no index: it is found by
arithmetic, its documents by binary search in the mapped `.idx`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from megatron_b2.config.schema import DataConfig
from megatron_b2.data.batch import Batch
from megatron_b2.data.indexed import IndexedDataset
from megatron_b2.data.manifest import check_sizes, check_tokenizer, origin
from megatron_b2.data.order import Blend, IntArray, derive_key, permute
from megatron_b2.errors import ConfigError, DataError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class SourceSplit:
    """The part of one source that belongs to one split."""

    dataset: IndexedDataset
    index: int
    """Number of the source in the configuration: it seeds the source's order."""
    weight: float
    first_document: int
    last_document: int
    """One past the end."""
    first_token: int
    num_tokens: int
    num_samples: int
    """Samples an epoch."""
    origin: str | None
    """What the data was made from, see `manifest.origin`."""

    @property
    def name(self) -> str:
        """Prefix of the files."""
        return str(self.dataset.prefix)


def split_bounds(num_documents: int, shares: Sequence[float]) -> tuple[int, ...]:
    """First document of each split and, last, the end: rounded cumulative shares, normalised to 1.

    Raises ConfigError for negative shares or shares that are all 0.
    """
    if any(not share >= 0 for share in shares) or not 0 < sum(shares) < float("inf"):
        raise ConfigError(f"data.split {list(shares)}: must be >= 0 and not all 0, as [0.98, 0.02, 0]")
    total, reached, bounds = sum(shares), 0.0, [0]
    for share in shares:
        reached += share
        bounds.append(min(num_documents, round(num_documents * (reached / total))))
    return (*bounds[:-1], num_documents)


class BlendedDataset:
    """All sources of one split, blended by weight, shuffled anew in every epoch of each source."""

    def __init__(
        self,
        sources: Sequence[SourceSplit],
        *,
        split: Split,
        seq_len: int,
        seed: int,
        document_masking: bool,
        vocab_size: int | None,
        shares: Sequence[float],
    ) -> None:
        self.sources = tuple(sources)
        self.split: Split = split
        self.seq_len = seq_len
        self.seed = seed
        self.document_masking = document_masking
        self.num_samples = sum(source.num_samples for source in self.sources)
        """Samples of one epoch over every source."""
        self._vocab_size = vocab_size if vocab_size is not None else 2**62
        self._shares = tuple(shares)
        self._blend = Blend([source.weight for source in self.sources])

    @classmethod
    def build(
        cls,
        data: DataConfig,
        *,
        split: Split,
        seed: int,
        expected_tokenizer: str | None = None,
        vocab_size: int | None = None,
    ) -> BlendedDataset:
        """Open the sources of `data` for one split.

        `expected_tokenizer` is the fingerprint of the run's tokenizer, `vocab_size` that of the model: a
        source made with another tokenizer, or (when a sample is read) a token id outside the vocabulary, is a
        DataError. A source too small to have a single sample in the split is an error for "train"; for
        "valid" and "test" it is left out, and only a split without any sample is an error.
        """
        if not data.sources:
            raise ConfigError('data.sources is empty: add [[data.sources]], prefix = "path without .bin"')
        if data.seq_len < 1:
            raise ConfigError(f"data.seq_len = {data.seq_len} must be at least 1")
        opened = []
        for index, source in enumerate(data.sources):
            dataset = IndexedDataset(source.prefix)
            check_sizes(source.prefix)
            if expected_tokenizer is not None:
                check_tokenizer(source.prefix, expected_tokenizer)
            opened.append(_cut(dataset, index=index, weight=source.weight, data=data, split=split))
        used = [source for source in opened if source.num_samples > 0]
        if not used or (split == "train" and len(used) < len(opened)):
            raise DataError(_too_small(opened, data, split))
        return cls(
            used,
            split=split,
            seq_len=data.seq_len,
            seed=seed,
            document_masking=data.document_masking,
            vocab_size=vocab_size,
            shares=data.split,
        )

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides which tokens stand at which position, as JSON values."""
        return {
            "split": self.split,
            "shares": list(self._shares),
            "seq_len": self.seq_len,
            "seed": self.seed,
            "sources": [
                {
                    "index": source.index,
                    "content": source.dataset.fingerprint,
                    "origin": source.origin,
                    "weight": weight,
                }
                for source, weight in zip(self.sources, self._blend.weights, strict=True)
            ],
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `identity`: equal fingerprints mean the same sample at every position."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Source (index into `sources`), epoch of that source and sample within its split; int64 [n] each."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and int(positions.min()) < 0:
            raise DataError(f"sample position {int(positions.min())} is negative")
        sources, drawn = self._blend.locate(positions)
        epochs, samples = np.empty_like(drawn), np.empty_like(drawn)
        for number in np.unique(sources):
            source, rows = self.sources[number], np.flatnonzero(sources == number)
            epochs[rows], index = np.divmod(drawn[rows], source.num_samples)
            key = derive_key(self.seed, SPLITS.index(self.split), source.index, epochs[rows])
            samples[rows] = permute(index, size=source.num_samples, key=key)
        return sources, epochs, samples

    def sample_batch(self, positions: IntArray) -> Batch:
        """The samples at `positions` [B], in that order."""
        sources, _, samples = self.locate(positions)
        shape = (sources.size, self.seq_len)
        input_ids, labels = np.empty(shape, np.int64), np.empty(shape, np.int64)
        segment_ids, position_ids = np.empty(shape, np.int32), np.empty(shape, np.int32)
        for number in np.unique(sources):
            source, rows = self.sources[number], np.flatnonzero(sources == number)
            try:
                source.dataset.stream.gather(
                    starts=source.first_token + samples[rows] * self.seq_len,
                    rows=rows,
                    vocab_size=self._vocab_size,
                    document_masking=self.document_masking,
                    input_ids=input_ids,
                    labels=labels,
                    segment_ids=segment_ids,
                    position_ids=position_ids,
                )
            except (RuntimeError, IndexError) as error:
                raise DataError(
                    f"{source.name}: {error}; the files are damaged or belong to another tokenizer: "
                    "run `b2 preprocess` with the tokenizer of this model"
                ) from error
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            segment_ids=torch.from_numpy(segment_ids),
            position_ids=torch.from_numpy(position_ids),
        )


def _cut(
    dataset: IndexedDataset, *, index: int, weight: float, data: DataConfig, split: Split
) -> SourceSplit:
    bounds = split_bounds(dataset.num_documents, data.split)
    first, last = bounds[SPLITS.index(split)], bounds[SPLITS.index(split) + 1]
    first_token = dataset.document_start(first)
    num_tokens = dataset.document_start(last) - first_token
    if num_tokens < 0:
        raise DataError(f"{dataset.prefix}.idx: damaged: document {last} starts before document {first}")
    return SourceSplit(
        dataset=dataset,
        index=index,
        weight=weight,
        first_document=first,
        last_document=last,
        first_token=first_token,
        num_tokens=num_tokens,
        num_samples=max(0, num_tokens - 1) // data.seq_len,
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
