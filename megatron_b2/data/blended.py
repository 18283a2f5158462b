"""The training data as one sequence of samples: position -> packed sample, a pure function.

Which sample stands where is decided by one of two orders: `stateless_order.py`, ours, or `megatron_order.py`,
that of a Megatron-LM run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_b2.config.schema import DataConfig
from megatron_b2.data.batch import Batch, BatchArrays
from megatron_b2.data.identity import fingerprint
from megatron_b2.data.indexed import IndexedDataset
from megatron_b2.data.manifest import check_sizes, check_tokenizer
from megatron_b2.data.megatron_order import MegatronOrder
from megatron_b2.data.order import IntArray
from megatron_b2.data.splits import Split
from megatron_b2.data.stateless_order import StatelessOrder
from megatron_b2.errors import ConfigError, DataError


class BlendedDataset:
    """All sources of one split, blended by weight and shuffled by the order of the run."""

    def __init__(
        self,
        order: StatelessOrder | MegatronOrder,
        *,
        seq_len: int,
        document_masking: bool,
        vocab_size: int | None,
    ) -> None:
        self.order = order
        self.sources = order.sources
        """The pairs of files, with what each gives to the split."""
        self.seq_len = seq_len
        self.document_masking = document_masking
        self.num_samples = order.num_samples
        """Samples of one epoch over every source; all that were planned of a Megatron-LM order."""
        self._vocab_size = vocab_size if vocab_size is not None else 2**62

    @classmethod
    def build(
        cls,
        data: DataConfig,
        *,
        split: Split,
        seed: int,
        expected_tokenizer: str | None = None,
        vocab_size: int | None = None,
        global_batch_size: int | None = None,
        planned_samples: int | None = None,
    ) -> BlendedDataset:
        """Open the sources of `data` for one split.

        `expected_tokenizer` is the fingerprint of the run's tokenizer, `vocab_size` that of the model: a
        source made with another tokenizer, or (when a sample is read) a token id outside the vocabulary, is a
        DataError. A source too small to have a single sample in the split is an error for "train"; for
        "valid" and "test" it is left out, and only a split without any sample is an error.
        `global_batch_size`, the samples of a step, places data.phases, which only "train" has;
        `planned_samples`, what the run takes from this split, decides the order of data.order = "megatron".
        """
        if not data.sources:
            raise ConfigError('data.sources is empty: add [[data.sources]], prefix = "path without .bin"')
        if data.seq_len < 1:
            raise ConfigError(f"data.seq_len = {data.seq_len} must be at least 1")

        def open_pair(prefix: str) -> IndexedDataset:
            dataset = IndexedDataset(prefix)
            check_sizes(prefix)
            if expected_tokenizer is not None:
                check_tokenizer(prefix, expected_tokenizer)
            return dataset

        order: StatelessOrder | MegatronOrder
        if data.order == "megatron":
            if planned_samples is None:
                raise ValueError('data.order = "megatron" needs planned_samples')
            order = MegatronOrder.open(
                data, split=split, seed=seed, planned_samples=planned_samples, open_pair=open_pair
            )
        else:
            order = StatelessOrder.open(
                data, split=split, seed=seed, global_batch_size=global_batch_size, open_pair=open_pair
            )
        return cls(order, seq_len=data.seq_len, document_masking=data.document_masking, vocab_size=vocab_size)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides which tokens stand at which position, as JSON values.

        Of a run with phases: before the first of them. `state` has the phases.
        """
        return self.order.identity

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of `identity`: equal fingerprints mean the same sample at every position."""
        return fingerprint(self.identity)

    def state(self, step: int) -> Mapping[str, Any] | None:
        """What a checkpoint after `step` steps keeps beside `fingerprint`: JSON values, or None."""
        return self.order.state(step)

    def require_consumed(self, state: Mapping[str, Any] | None, *, step: int, checkpoint: Path) -> None:
        """Raise CheckpointError if the data that `step` steps consumed, by `state`, is not this data."""
        self.order.require_consumed(state, step=step, checkpoint=checkpoint)

    def locate(self, positions: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Source (index into `sources`), epoch of that source and sample within its split; int64 [n] each."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and int(positions.min()) < 0:
            raise DataError(f"sample position {int(positions.min())} is negative")
        return self.order.locate(positions)

    def sample_batch(self, positions: IntArray) -> Batch:
        """The samples at `positions` [B], in that order."""
        sources, _, samples = self.locate(positions)
        arrays = BatchArrays.empty(sources.size, self.seq_len)
        for number in np.unique(sources):
            source, rows = self.sources[number], np.flatnonzero(sources == number)
            try:
                source.gather(
                    samples[rows],
                    rows=rows,
                    arrays=arrays,
                    vocab_size=self._vocab_size,
                    document_masking=self.document_masking,
                )
            except (RuntimeError, IndexError) as error:
                raise DataError(
                    f"{source.name}: {error}; the files are damaged or belong to another tokenizer: "
                    "run `b2 preprocess` with the tokenizer of this model"
                ) from error
        return arrays.batch()
