"""What DeepSpeed 0.19.8 calls in an optimizer step: gradients, parameters, norms. Read from its source.

Counts are exact, also those of buckets, for a step that follows others: the first forward passes of a run
gather module by module. Not exact is what needs CUDA kernels: quantized weights (their scales are not
counted) and quantized gradients. tests/layouts/test_step_calls.py compares with the calls of real steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import ceil
from typing import Any, Final

from megatron_b2.config.deepspeed_keys import zero_settings
from megatron_b2.config.schema import RunConfig
from megatron_b2.layouts.gathers import Gather, step_gathers
from megatron_b2.layouts.memory import WHOLE_MODEL_BUCKET, keeps_fp32_gradients
from megatron_b2.layouts.parameters import LocalParameter, part_parameters, zero_3_whole
from megatron_b2.layouts.traffic import Group, Operation, Traffic, total_traffic
from megatron_b2.model.split import StageLayers
from megatron_b2.optim.adamw import has_weight_decay
from megatron_b2.parallel.layout import Layout

ALIGNMENT: Final = 2
"""Partitions of ZeRO-1 and 2 have a multiple of so many elements."""


def zero_traffic(
    config: RunConfig, layout: Layout, parts: Sequence[StageLayers], *, num_micro: int
) -> list[Traffic]:
    """Calls of one step on one rank that holds `parts`, over groups of more than one rank."""
    if config.parallel.engine != "deepspeed":
        return []
    step = _Step(config, layout, tuple(parts), num_micro)
    stage = config.parallel.zero_stage
    shared = [*(step.partitioned() if stage == 3 else step.unpartitioned()), *step.norms("data_context")]
    found = shared if layout.data_context > 1 else []
    found += step.norms("model") if layout.tensor * layout.pipeline > 1 else []
    return total_traffic(found)


@dataclass(frozen=True)
class _Step:
    """A step of one rank."""

    config: RunConfig
    layout: Layout
    parts: tuple[StageLayers, ...]
    num_micro: int

    @cached_property
    def parameters(self) -> list[LocalParameter]:
        """In the order of the model."""
        model, tensor = self.config.model, self.layout.tensor
        return [p for part in self.parts for p in part_parameters(model, part, tensor=tensor)]

    @cached_property
    def by_decay(self) -> list[list[LocalParameter]]:
        """The optimizer's groups."""
        groups = [
            [p for p in self.parameters if has_weight_decay(p.name) == decays] for decays in (True, False)
        ]
        return [group for group in groups if group]

    @cached_property
    def padded_sizes(self) -> dict[str, int]:
        """Elements of each parameter as ZeRO-3 cuts it."""
        return {parameter.name: self.padded(parameter.size) for parameter in self.parameters}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """zero_optimization of the DeepSpeed JSON."""
        return zero_settings(self.config)

    @property
    def stage(self) -> int:
        return self.config.parallel.zero_stage

    @property
    def is_bf16(self) -> bool:
        return self.config.train.precision == "bf16"

    @property
    def width(self) -> int:
        """Bytes of a working weight."""
        return 2 if self.is_bf16 else 4

    def padded(self, size: int, *, to: int = 1) -> int:
        """Elements of a tensor cut into equal parts, each a multiple of `to`."""
        unit = self.layout.data_context * to
        return ceil(size / unit) * unit

    def made(
        self, purpose: str, operation: Operation, count: int, size: int, *, group: Group = "data_context"
    ) -> Traffic:
        ranks = {
            "data_context": self.layout.data_context,
            "hpz": self.config.parallel.hpz,
            "model": self.layout.tensor * self.layout.pipeline,
        }[group]
        return Traffic(purpose=purpose, group=group, size=ranks, operation=operation, count=count, bytes=size)

    def unpartitioned(self) -> Iterator[Traffic]:
        """ZeRO-0 to 2. Gradients are summed with all-reduce, also where a rank keeps only a part of them."""
        size = sum(parameter.size for parameter in self.parameters)
        times = self.num_micro if self.stage == 2 else 1
        yield self.made("gradients", "all_reduce", times * self.gradient_calls(), times * 4 * size)
        if self.stage:
            gathered = sum(self.padded(_size(group), to=ALIGNMENT) for group in self.by_decay)
            yield self.made("updated weights", "all_gather", len(self.by_decay), self.width * gathered)

    def gradient_calls(self) -> int:
        """All-reduces of all gradients once."""
        in_groups = [parameter for group in self.by_decay for parameter in group]
        if self.stage == 0:
            return _filled([parameter.size for parameter in self.parameters], WHOLE_MODEL_BUCKET)
        if keeps_fp32_gradients(self.config):
            return _filled([parameter.size for parameter in in_groups], WHOLE_MODEL_BUCKET)
        limit = int(self.settings["reduce_bucket_size"])
        as_they_come = self.stage == 2 or self.settings["overlap_comm"]
        order = self.parameters[::-1] if as_they_come else in_groups
        return sum(
            _filled(self.slices(bucket[0]), limit) if _size(bucket) > limit else 1
            for bucket in _buckets(order, limit)
        )

    def slices(self, parameter: LocalParameter) -> list[int]:
        """Elements of a parameter in each partition of its group: one that is larger than a bucket is reduced
        by them."""
        group = next(group for group in self.by_decay if parameter in group)
        start = _size(group[: group.index(parameter)])
        partition = self.padded(_size(group), to=ALIGNMENT) // self.layout.data_context
        first, last = start // partition + 1, (start + parameter.size - 1) // partition + 1
        cuts = [start, *(partition * index for index in range(first, last)), start + parameter.size]
        return [high - low for low, high in pairwise(cuts)]

    def partitioned(self) -> Iterator[Traffic]:
        """ZeRO-3."""
        whole = zero_3_whole(self.config, self.parameters)
        gathers = step_gathers(
            self.config,
            self.parts[0],
            self.parameters,
            whole=whole,
            settings=self.settings,
            num_micro=self.num_micro,
        )
        for times, gather in gathers:
            yield self.gathered(gather).times(times)
        buckets = _buckets(self.parameters[::-1], int(self.settings["reduce_bucket_size"]))
        padded = sum(self.padded_sizes.values())
        if self.config.parallel.quantized_gradients:
            sent = self.made("gradients", "all_to_all", len(buckets), padded // 2)
            yield replace(sent, exact=False).times(self.num_micro)
        else:
            yield self.made("gradients", "reduce_scatter", len(buckets), 4 * padded).times(self.num_micro)
        if whole:
            size = sum(self.padded_sizes[parameter.name] for parameter in whole)
            yield self.made("whole parameters", "all_gather", len(whole), self.width * size)

    def gathered(self, gather: Gather) -> Traffic:
        elements = sum(self.padded_sizes[name] for name in gather.names)
        quantized = self.config.parallel.quantized_weights
        call = self.made(
            f"parameters, {gather.phase}",
            "all_gather",
            1,
            elements * (1 if quantized else self.width),
            group="hpz" if gather.is_second else "data_context",
        )
        return replace(call, exact=not quantized)

    def norms(self, group: Group) -> Iterator[Traffic]:
        """The gradient norm, and DeepSpeed's own search for overflows in bf16."""
        is_shared = group == "data_context"
        if self.stage == 0:
            clips = self.config.optim.grad_clip > 0
            ours = 0 if is_shared else 1  # before DeepSpeed clips without telling the norm
            yield self.made("gradient norm", "all_reduce", clips + ours, 4 * (clips + ours), group=group)
            return
        if keeps_fp32_gradients(self.config):
            calls = 0 if is_shared else 1
            yield self.made("gradient norm", "all_reduce", calls, 4 * calls, group=group)
            return
        calls = self.sub_groups() if self.stage == 3 else len(self.by_decay)
        width = 8 if self.stage == 3 and not self.config.parallel.offload_optimizer else 4
        yield self.made("gradient norm", "all_reduce", calls, width * calls, group=group)
        if self.is_bf16 and self.stage < 3:
            yield self.made("overflow", "all_reduce", 1, 1, group=group)

    def sub_groups(self) -> int:
        """Parts of the optimizer's groups that ZeRO-3 steps one after the other."""
        limit = int(self.settings["sub_group_size"])
        found = 0
        for group in self.by_decay:
            sizes = [self.padded(parameter.size) // self.layout.data_context for parameter in group]
            found += 1 if sum(sizes) <= limit else _filled(sizes, limit - 1)
        return found


def _size(parameters: Sequence[LocalParameter]) -> int:
    return sum(parameter.size for parameter in parameters)


def _filled(sizes: Sequence[int], limit: int) -> int:
    """Bins, if one is closed as soon as it holds more than `limit`."""
    bins = total = 0
    for size in sizes:
        total += size
        if total > limit:
            bins, total = bins + 1, 0
    return bins + (total > 0)


def _buckets(parameters: Sequence[LocalParameter], limit: int) -> list[list[LocalParameter]]:
    """Buckets that hold at most `limit` elements, or one parameter that is larger."""
    found: list[list[LocalParameter]] = []
    total = 0
    for parameter in parameters:
        if not found or total + parameter.size > limit:
            found.append([])
            total = 0
        found[-1].append(parameter)
        total += parameter.size
    return found
