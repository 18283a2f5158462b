"""A pipeline in this process, for tests that look at it from outside."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_b2.corpus.pipeline.config import ALL_STAGES, PipelineConfig
from megatron_b2.corpus.pipeline.executor import Finished
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.run import Run, run_pipeline
from megatron_b2.corpus.pipeline.tasks import Limits, Task, run_task
from megatron_b2.corpus.stages.embed import Embed


class Inline:
    """Runs tasks in this process, in an order of its own."""

    def __init__(self, scratch: Path, seed: int = 0) -> None:
        self._limits = Limits(1 << 28, scratch)
        self._chance = random.Random(seed)

    def run(self, tasks: Sequence[Task]) -> Iterator[Finished]:
        for task in self._chance.sample(list(tasks), len(tasks)):
            run_task(task, self._limits)
            yield Finished(task)


def run_here(
    folder: Path, *, work: str = "work", stages: tuple[Any, ...] = ALL_STAGES, seed: int = 0, **options: Any
) -> Run:
    """All of FOLDER/in, with records of 1 MB and units of 1 MB."""
    inputs = Input(paths=(str(folder / "in"),), max_record_mb=1, **{"unit_mb": 1, **options})
    config = PipelineConfig(work=str(folder / work), input=inputs, stages=stages, embed=Embed(dimension=8))
    return run_pipeline(inputs, config.chosen(), work=folder / work, executor=Inline(folder, seed))
