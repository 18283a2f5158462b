"""Validation: mean losses over a fixed set of held-out batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_b2.config.schema import RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.data.blended import BlendedDataset
from megatron_b2.data.loader import eval_batches
from megatron_b2.engine.base import Engine
from megatron_b2.errors import DataError
from megatron_b2.training.events import Validation


@dataclass(frozen=True)
class Validator:
    """The same `num_batches` global batches every time, so that the values of a run can be compared."""

    engine: Engine
    batches: Callable[[int], Sequence[Batch]]
    """Index of a global batch -> this rank's micro-batches of it."""
    num_batches: int

    @classmethod
    def of_dataset(cls, dataset: BlendedDataset, *, config: RunConfig, engine: Engine) -> Validator:
        """The first `train.eval_batches` global batches of the split, or as many as it holds."""
        train = config.train

        def batches(index: int) -> Sequence[Batch]:
            return eval_batches(
                dataset,
                index=index,
                global_batch_size=train.global_batch_size,
                micro_batch_size=train.micro_batch_size,
                dp_rank=engine.dp_rank,
                dp_size=engine.dp_size,
            )

        return cls(engine, batches, count_batches(dataset, config=config))

    def run(self) -> Validation:
        """Evaluate. Cross-entropy is averaged over targets, max-z over positions. Collective."""
        start = time.perf_counter()
        weighted_ce = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        max_z, extra = torch.zeros_like(weighted_ce), torch.zeros_like(weighted_ce)
        num_targets = 0
        for index in range(self.num_batches):
            result = self.engine.eval_step(self.batches(index))
            weighted_ce += result.ce.double() * result.num_targets
            max_z += result.max_z.double() / self.num_batches
            extra += (result.loss - result.ce).double() / self.num_batches
            num_targets += result.num_targets
        ce = weighted_ce / max(1, num_targets)
        loss_value, ce_value, max_z_value = torch.stack([ce + extra, ce, max_z]).tolist()
        return Validation(
            loss=loss_value,
            ce=ce_value,
            max_z=max_z_value,
            num_targets=num_targets,
            seconds=time.perf_counter() - start,
        )


def count_batches(dataset: BlendedDataset, *, config: RunConfig) -> int:
    """Global batches of a validation: `train.eval_batches`, or as many as the split holds without repeating.

    Raises DataError when it holds not even one.
    """
    train = config.train
    whole = dataset.num_samples // train.global_batch_size
    if whole == 0:
        raise DataError(
            f"the validation split has {dataset.num_samples} samples of {config.data.seq_len} tokens, "
            f"fewer than one global batch of train.global_batch_size = {train.global_batch_size}: "
            "make data.split[1] larger, or 0 to train without validation"
        )
    return min(train.eval_batches, whole)
