"""Rules of data that changes during a run, and of the order of a Megatron-LM run (docs/data.md)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Final

from megatron_b2.config.problem import Problem, Problems, Rule
from megatron_b2.config.schema import RunConfig, SourceConfig


def blends(config: RunConfig) -> Iterator[tuple[str, tuple[SourceConfig, ...]]]:
    """Key and sources of the blend that a run begins with and of those of its phases."""
    yield "data.sources", config.data.sources
    for index, phase in enumerate(config.data.phases):
        yield f"data.phases[{index}].sources", phase.sources


def phases_follow(config: RunConfig) -> Problems:
    """Phases begin one after the other, each with a blend."""
    steps = [0, *(phase.from_step for phase in config.data.phases)]
    for index, (before, step) in enumerate(pairwise(steps)):
        key = f"data.phases[{index}].from_step"
        if step <= before:
            than = f"that of the phase before, {before}" if index else "0: data.sources hold until then"
            yield Problem((key,), f"{key} = {step} must be greater than {than}")
        if not config.data.phases[index].sources:
            key = f"data.phases[{index}].sources"
            message = f"{key} is empty: list the whole blend from step {step} on as [[data.phases.sources]]"
            yield Problem((key,), message)


def sources_only_grow(config: RunConfig) -> Problems:
    """What was appended to a source stays part of it."""
    known: dict[str, tuple[str, ...]] = {}
    for table, sources in blends(config):
        for index, source in enumerate(sources):
            before, key = known.get(source.prefix, ()), f"{table}[{index}].append"
            if source.append[: len(before)] != before:
                yield Problem(
                    (key,),
                    f"{key} = {list(source.append)} must begin with {list(before)}, which {source.prefix!r} "
                    "has by then: pairs are added at the end and never removed",
                )
            known[source.prefix] = max(before, source.append, key=len)


def megatron_order_is_alone(config: RunConfig) -> Problems:
    """The order of a Megatron-LM run is fixed from its first sample to its last."""
    data = config.data
    if data.order != "megatron":
        return
    if data.phases or any(source.append for source in data.sources):
        key = "data.phases" if data.phases else "data.sources"
        yield Problem(
            ("data.order", key),
            'data.order = "megatron" repeats a Megatron-LM run, whose data cannot change: remove data.phases '
            'and append, or start a run of order "stateless" with checkpoint.init_from',
        )
    planned, samples = data.megatron.train_samples, config.train.steps * config.train.global_batch_size
    if 0 < planned < samples:
        yield Problem(
            ("data.megatron.train_samples", "train.steps"),
            f"data.megatron.train_samples = {planned} is less than train.steps * train.global_batch_size = "
            f"{samples}: lower train.steps to {planned // config.train.global_batch_size}",
        )


def megatron_settings(config: RunConfig) -> Problems:
    """Counts and shares of the Megatron-LM run are not negative, its seed is one of numpy's."""
    for key, value in (
        ("data.megatron.train_samples", config.data.megatron.train_samples),
        ("data.megatron.surplus", config.data.megatron.surplus),
    ):
        if value < 0:
            yield Problem((key,), f"{key} = {value:g} must be 0 or more")
    if config.data.order == "megatron" and config.train.seed >= 2**32:
        yield Problem(
            ("train.seed", "data.order"),
            f'train.seed = {config.train.seed} must be less than 2^32 with data.order = "megatron"',
        )


DATA_RULES: Final[tuple[Rule, ...]] = (
    phases_follow,
    sources_only_grow,
    megatron_order_is_alone,
    megatron_settings,
)
