"""Batches of one data-parallel rank: step -> positions -> micro-batches, assembled ahead by one thread.

Step t of a run takes the positions t*G .. (t+1)*G - 1 of the data set, G = global_batch_size. Rank r of R
takes the r-th of R equal contiguous parts, micro-batch m the m-th part of that. So the global sequence is the
same for any R and any micro-batch size, and a run resumes exactly at any step with no state but the step.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import numpy as np

from megatron_b2.data.batch import Batch
from megatron_b2.data.blended import BlendedDataset
from megatron_b2.data.order import IntArray
from megatron_b2.errors import ConfigError


def micro_positions(
    step: int, *, global_batch_size: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> list[IntArray]:
    """Positions, int64 [micro_batch_size], of each micro-batch of one rank at one step.

    Raises ConfigError if the global batch does not divide into micro-batches over the ranks.
    """
    if not 0 <= dp_rank < dp_size:
        raise ConfigError(f"data-parallel rank {dp_rank} of {dp_size}")
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            f"train.global_batch_size = {global_batch_size} must be a positive multiple of "
            f"train.micro_batch_size * data-parallel ranks = {micro_batch_size} * {dp_size}"
        )
    per_rank = global_batch_size // dp_size
    start = step * global_batch_size + dp_rank * per_rank
    positions = np.arange(start, start + per_rank, dtype=np.int64)
    return list(positions.reshape(-1, micro_batch_size))


def eval_batches(
    dataset: BlendedDataset,
    *,
    index: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
) -> list[Batch]:
    """Micro-batches of this rank in the `index`-th global batch of a validation."""
    positions = micro_positions(
        index,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
    )
    return [dataset.sample_batch(part) for part in positions]


class TrainLoader:
    """Endless iterator of steps; each item is the list of this rank's micro-batches.

    A thread (not a process: nothing inherits signal handlers, the native code releases the GIL) keeps up to
    `prefetch` steps ready. What it raises is raised by `next`. Close it, or use it in a with statement.
    """

    def __init__(
        self,
        dataset: BlendedDataset,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
        prefetch: int = 2,
    ) -> None:
        if prefetch < 1:
            raise ConfigError(f"data.prefetch = {prefetch} must be at least 1")
        self._dataset = dataset
        self._layout = {
            "global_batch_size": global_batch_size,
            "micro_batch_size": micro_batch_size,
            "dp_rank": dp_rank,
            "dp_size": dp_size,
        }
        micro_positions(start_step, **self._layout)  # a wrong layout is an error here, not in the thread
        self.next_step = start_step
        """Step of the next item."""
        self._ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=prefetch)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._assemble, args=(start_step,), name="b2-data", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._closing.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        self.next_step += 1
        return item

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for it; further `next` calls end the iteration."""
        self._closing.set()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)

    def _assemble(self, step: int) -> None:
        try:
            while not self._closing.is_set():
                positions = micro_positions(step, **self._layout)
                self._ready.put([self._dataset.sample_batch(part) for part in positions])
                step += 1
        except BaseException as error:  # handed to the caller of next()
            self._ready.put(error)
