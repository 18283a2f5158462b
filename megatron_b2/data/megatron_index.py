"""The index arrays of Megatron-LM's GPTDataset and BlendedDataset (core 0.16.1), bit for bit.

For one source, from one numpy.random.RandomState(seed) and in this order of draws:

1. document index [epochs * documents]: the documents of the split once an epoch, shuffled over all epochs
   together; a last epoch of which less than 80 % of the samples are needed is shuffled on its own;
2. sample index [N + 1, 2]: where each sample of seq_len + 1 tokens starts in these documents laid end to end;
3. shuffle index [N]: the samples shuffled, those of a last epoch on its own among themselves.

A "document" is a sequence of the `.idx`, as there. Written from the formulas; the shuffles and the sample
index are in csrc/cpu/order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_b2._cpu import MersenneTwister, megatron_blend_index, megatron_sample_index
from megatron_b2.errors import ConfigError, DataError

Progress = Callable[[int], None]
"""Called with the number of array entries just finished."""

_SEPARATE_BELOW = 0.80
_INT32_MAX = 2**31 - 1
_UINT32_SAMPLES = 2**32 - 2
"""From this many samples on the shuffle index is int64."""


@dataclass(frozen=True)
class IndexPlan:
    """Sizes of the arrays of one source."""

    num_epochs: int
    num_samples: int
    separate_from: int | None
    """First sample of a last epoch that is shuffled on its own."""


@dataclass(frozen=True)
class IndexArrays:
    """The arrays of one source; they may be memory-mapped."""

    documents: NDArray[np.integer]
    """[epochs * documents], int32; int64 for files of over 2^31 sequences, which Megatron-LM cannot use."""
    samples: NDArray[np.integer]
    """[N + 1, 2]: entry of `documents`, token inside that document; int32, or int64 from 2^31 entries on."""
    shuffle: NDArray[np.integer]
    """[N]: uint32, or int64 from 2^32 - 2 samples on."""


def plan_index(
    tokens: int, *, seq_len: int, requested: int, drop_last: bool = True, exact: bool = False
) -> IndexPlan:
    """Epochs and samples that serve `requested` samples from `tokens` tokens an epoch.

    Without `drop_last` a last sample that the tokens do not fill counts too. Megatron-LM counts those in
    float32, which can be off from 2^24 tokens on; `exact` counts in integers.
    """
    num_epochs = max(1, -(-(requested * seq_len + 1) // tokens))
    steps = num_epochs * tokens - 1
    if drop_last:
        num_samples = steps // seq_len
    elif exact:
        num_samples = -(-steps // seq_len)
    else:
        num_samples = int(np.ceil(np.array(steps, np.int64).astype(np.float32) / np.float32(seq_len)))
    separate_from = None
    if num_epochs > 1:
        before = ((num_epochs - 1) * tokens - 1) // seq_len
        if requested - before < int(_SEPARATE_BELOW * ((tokens - 1) // seq_len)):
            separate_from = before
    return IndexPlan(num_epochs=num_epochs, num_samples=num_samples, separate_from=separate_from)


def build_index(
    lengths: NDArray[np.int32],
    first: int,
    last: int,
    *,
    plan: IndexPlan,
    seq_len: int,
    seed: int,
    progress: Progress,
) -> IndexArrays:
    """The arrays of the documents `first` .. `last` - 1 of a file with document `lengths` in tokens."""
    twister = legacy_generator(seed)
    document_type: type[np.integer] = np.int32 if last <= _INT32_MAX + 1 else np.int64
    documents = np.tile(np.arange(first, last, dtype=document_type), plan.num_epochs)
    together = documents.size if plan.separate_from is None else documents.size - (last - first)
    for part in (documents[:together], documents[together:]):
        twister.shuffle(part)
        progress(part.size)
    samples = np.empty(
        (plan.num_samples + 1, 2), dtype=np.int32 if documents.size <= _INT32_MAX else np.int64
    )
    megatron_sample_index(lengths=lengths, documents=documents, seq_len=seq_len, rows=samples)
    if samples[-1, 1] < 0:
        raise DataError("the last, partial sample begins in an empty document, where Megatron-LM fails too")
    progress(plan.num_samples)
    shuffle_type: type[np.integer] = np.uint32 if plan.num_samples < _UINT32_SAMPLES else np.int64
    shuffle = np.arange(plan.num_samples, dtype=shuffle_type)
    together = plan.num_samples if plan.separate_from is None else plan.separate_from
    for part in (shuffle[:together], shuffle[together:]):
        twister.shuffle(part)
        progress(part.size)
    return IndexArrays(documents=documents, samples=samples, shuffle=shuffle)


def build_blend(weights: NDArray[np.float64], size: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Source of each of `size` positions and how often it was taken before; `weights` sum to 1."""
    sources, drawn = np.empty(size, np.int16), np.empty(size, np.int64)
    megatron_blend_index(weights=weights, sources=sources, drawn=drawn)
    return sources, drawn


def legacy_generator(seed: int) -> MersenneTwister:
    """The generator of numpy.random.RandomState(seed). Raises ConfigError for seeds that it cannot take."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f'train.seed = {seed}: data.order = "megatron" needs a seed in 0 .. 2^32 - 1')
    _, state, position, *_ = np.random.RandomState(seed).get_state(legacy=True)
    return MersenneTwister(state=np.asarray(state, dtype=np.uint32), position=int(position))
