"""parallel.auto: which blocks recompute and which parameters ZeRO partitions, within a memory budget (report
section 2.7: ZeRO-3 and activation checkpointing for chosen layers).

Every ZeRO stage is tried with every way of recomputing. Of each, the least recomputation that fits the memory
model is taken; under ZeRO-3, what memory is left keeps the first parameters whole. The cheapest by a simple
time model wins. Its constants only rank alternatives; they predict no throughput.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final, Literal

from megatron_b2.config.checks import check
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import ConfigError
from megatron_b2.layouts.memory import GIB, RankMemory, Recompute, rank_memory, recompute_of, usable_bytes
from megatron_b2.layouts.parameters import part_parameters
from megatron_b2.layouts.ranks import span
from megatron_b2.layouts.stages import rank_parts, run_schedule
from megatron_b2.layouts.traffic import micro_batch_traffic
from megatron_b2.layouts.zero_traffic import zero_traffic
from megatron_b2.model.split import StageLayers
from megatron_b2.parallel.layout import Layout
from megatron_b2.pipeline.schedule import Schedule

ZeroStage = Literal[1, 2, 3]

PEAK_TFLOPS: Final = 312.0
"""Of a device where train.peak_tflops is not given (A800, bf16)."""
EFFICIENCY: Final = 0.5
"""Share of the peak at which blocks are recomputed (our choice)."""
NODE_BANDWIDTH: Final = 150e9
"""Bytes a second of a tensor-parallel rank, inside a node (our choice: A800 NVLink, 200e9 each way)."""
NETWORK_BANDWIDTH: Final = 20e9
"""Bytes a second of a rank between nodes (our choice: 200 Gb/s InfiniBand a GPU)."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run: what is chosen, what it needs and what it costs a step."""

    zero_stage: ZeroStage
    recompute: Recompute
    recompute_layers: tuple[int, ...]
    whole_parameters: int
    memory: RankMemory
    """Of the pipeline rank that needs most."""
    fits: bool
    recompute_seconds: float
    """Blocks computed again, on the slowest rank."""
    zero_seconds: float
    """Gradients and parameters between data-parallel ranks, without overlap."""

    @property
    def seconds(self) -> float:
        """What a step takes beyond the work that every candidate does."""
        return self.recompute_seconds + self.zero_seconds

    def describe(self) -> str:
        """For people."""
        what = "no recomputation"
        if self.recompute != "none":
            count = len(self.recompute_layers)
            what = f"{self.recompute} recomputation of {count} blocks ({span(self.recompute_layers)})"
        whole = f", {self.whole_parameters:,} parameters whole" if self.whole_parameters else ""
        return f"ZeRO-{self.zero_stage}{whole}, {what}"


@dataclass(frozen=True, kw_only=True)
class AutoChoice:
    """The decision."""

    config: RunConfig
    """With the choice written in and parallel.auto off."""
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    """The best of every ZeRO stage and way of recomputing."""

    def reasons(self) -> list[str]:
        """Why, one line each."""
        usable = usable_bytes(self.config) / GIB
        lines = [
            f"budget: parallel.memory_gb = {self.config.parallel.memory_gb:g} GiB, of which "
            f"{usable:.1f} may be filled"
        ]
        for item in self.candidates:
            cost = (
                f"{item.seconds * 1e3:,.0f} ms a step (recomputation {item.recompute_seconds * 1e3:,.0f}, "
                f"ZeRO {item.zero_seconds * 1e3:,.0f})"
            )
            mark = "chosen " if item is self.chosen else "       "
            fit = f"fits, {cost}" if item.fits else "does not fit"
            lines.append(f"{mark}{item.describe()}: {item.memory.total / GIB:.1f} GiB, {fit}")
        return lines


def resolve_auto(
    config: RunConfig, *, world_size: int, provenance: Mapping[str, str] | None = None
) -> AutoChoice:
    """Choose parallel.zero_stage, parallel.whole_parameters, train.recompute and train.recompute_layers.

    `provenance` (key -> where it was set) makes messages point at the setting.

    Raises:
        ConfigError: every broken rule; or nothing fits: names what comes closest and what would help.
    """
    check(config, world_size=world_size, provenance=provenance)
    search = _Search(config, Layout.of(config.parallel, world_size=world_size))
    candidates = tuple(search.candidates())
    fitting = [item for item in candidates if item.fits]
    if not fitting:
        raise ConfigError(_nothing_fits(config, candidates))
    chosen = min(fitting, key=lambda item: (item.seconds, item.zero_stage))
    return AutoChoice(config=search.applied(chosen), chosen=chosen, candidates=candidates)


class _Search:
    """The alternatives for one run."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config = config
        self.layout = layout
        self.parts = rank_parts(config)
        self.schedule: Schedule = run_schedule(config, layout)
        self.usable = usable_bytes(config)

    def candidates(self) -> Iterator[Candidate]:
        """The best of every ZeRO stage and way of recomputing; without recomputation only once."""
        parallel = self.config.parallel
        stages: tuple[ZeroStage, ...] = (1, 2, 3) if self.layout.pipeline == 1 else (1,)
        if parallel.hpz > 1 or parallel.quantized_weights or parallel.quantized_gradients:
            stages = (3,)
        for stage in stages:
            plain = self.candidate(stage, "none", ())
            if plain.fits:
                yield plain
            if plain.fits and plain.whole_parameters == (self.num_parameters if stage == 3 else 0):
                continue  # recomputation could buy nothing
            yield from self.recomputing(stage, "selective")
            yield from self.recomputing(stage, "full")

    def recomputing(self, stage: ZeroStage, kind: Recompute) -> Iterator[Candidate]:
        """The least recomputation that fits; under ZeRO-3 also the amount whose cost with whole parameters
        is lowest. What needs least memory if nothing fits."""
        numbers = [self.fewest(stage, kind, rank) for rank in range(self.layout.pipeline)]
        if stage < 3:
            yield self.candidate(stage, kind, self.first_layers(numbers))
            return
        layers = self.config.model.num_layers
        every = [
            self.candidate(stage, kind, self.first_layers([number]))
            for number in range(numbers[0], layers + 1)
        ]
        yield min(every, key=lambda item: (not item.fits, item.seconds))

    def fewest(self, stage: ZeroStage, kind: Recompute, rank: int) -> int:
        """Blocks of a pipeline rank that must recompute; all of them if that is still not enough."""
        total = sum(len(part.layers) for part in self.parts[rank])
        for number in range(total):
            layers = self.rank_layers(rank)[:number]
            if self.memory(self.written(stage, kind, layers, 0), rank).total <= self.usable:
                return number
        return total

    def most_whole(self, kind: Recompute, layers: Sequence[int]) -> int:
        """Under ZeRO-3, elements of as many parameters as can be kept whole."""
        parts = self.parts[0]
        parameters = [
            p for part in parts for p in part_parameters(self.config.model, part, tensor=self.layout.tensor)
        ]
        prefixes = [0, *accumulate(parameter.size for parameter in parameters)]
        low, high = 0, len(prefixes) - 1
        while low < high:
            middle = (low + high + 1) // 2
            config = self.written(3, kind, layers, prefixes[middle])
            if self.memory(config, 0).total <= self.usable:
                low = middle
            else:
                high = middle - 1
        return prefixes[low]

    def candidate(self, stage: ZeroStage, kind: Recompute, layers: tuple[int, ...]) -> Candidate:
        """Memory and cost of one choice."""
        kind = kind if layers else "none"
        whole = self.most_whole(kind, layers) if stage == 3 else 0
        config = self.written(stage, kind, layers, whole)
        memory = max(
            (self.memory(config, rank) for rank in range(self.layout.pipeline)), key=lambda m: m.total
        )
        return Candidate(
            zero_stage=stage,
            recompute=kind,
            recompute_layers=layers,
            whole_parameters=whole,
            memory=memory,
            fits=memory.total <= self.usable,
            recompute_seconds=max(self.recompute_seconds(config, parts) for parts in self.parts),
            zero_seconds=max(self.zero_seconds(config, parts) for parts in self.parts),
        )

    def memory(self, config: RunConfig, rank: int) -> RankMemory:
        """Of one pipeline rank."""
        return rank_memory(config, self.layout, self.parts[rank], self.schedule[rank])

    def written(self, stage: ZeroStage, kind: Recompute, layers: Sequence[int], whole: int) -> RunConfig:
        """The configuration with a choice written in."""
        config = self.config
        every = len(layers) == config.model.num_layers
        train = replace(
            config.train,
            recompute=kind if layers else "none",
            recompute_layers=() if every else tuple(layers),
        )
        parallel = replace(config.parallel, zero_stage=stage, whole_parameters=whole, auto=False)
        return replace(config, train=train, parallel=parallel)

    def applied(self, item: Candidate) -> RunConfig:
        """The configuration to run."""
        return self.written(item.zero_stage, item.recompute, item.recompute_layers, item.whole_parameters)

    def rank_layers(self, rank: int) -> tuple[int, ...]:
        """Blocks of a pipeline rank, by chunk: those of earlier chunks are in flight longest."""
        return tuple(layer for part in self.parts[rank] for layer in part.layers)

    def first_layers(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """The first so many blocks of each pipeline rank."""
        return tuple(
            sorted(layer for rank, number in enumerate(numbers) for layer in self.rank_layers(rank)[:number])
        )

    def recompute_seconds(self, config: RunConfig, parts: Sequence[StageLayers]) -> float:
        """Forward work done twice, and the tensor- and context-parallel communication in it."""
        tokens = config.train.micro_batch_size * config.data.seq_len / self.layout.context
        peak = (config.train.peak_tflops or PEAK_TFLOPS) * 1e12 * EFFICIENCY
        seconds = 0.0
        for part in parts:
            kinds = [recompute_of(config, layer) for layer in part.layers]
            flops = sum(_recomputed_flops(config, kind) for kind in kinds) / self.layout.tensor
            again = micro_batch_traffic(config, self.layout, part)
            wire = sum(item.wire_bytes for item in again if item.purpose.startswith("recomputed"))
            seconds += tokens * flops / peak + wire / NODE_BANDWIDTH
        return seconds * self.num_micro

    def zero_seconds(self, config: RunConfig, parts: Sequence[StageLayers]) -> float:
        """What is sent between the ranks that share parameters; hpZ stays inside a node."""
        items = zero_traffic(config, self.layout, parts, num_micro=self.num_micro)
        return sum(
            item.wire_bytes / (NODE_BANDWIDTH if item.group == "hpz" else NETWORK_BANDWIDTH) for item in items
        )

    @property
    def num_parameters(self) -> int:
        """Elements on the first pipeline rank."""
        parts, tensor = self.parts[0], self.layout.tensor
        return sum(p.size for part in parts for p in part_parameters(self.config.model, part, tensor=tensor))

    @property
    def num_micro(self) -> int:
        """Micro-batches of a step."""
        return self.config.train.accumulation_steps(self.layout.data)


def _recomputed_flops(config: RunConfig, kind: Recompute) -> float:
    """FLOPs a token that a block does again: causal attention scores, and with "full" all products but the
    last (recomputation stops at the last tensor that backward needs)."""
    h, f = config.model.hidden_size, config.model.ffn_hidden_size
    scores = 2.0 * config.data.seq_len * h
    return {"none": 0.0, "selective": scores, "full": scores + 2.0 * (4 * h * h + 2 * h * f)}[kind]


def _nothing_fits(config: RunConfig, candidates: Sequence[Candidate]) -> str:
    best = min(candidates, key=lambda item: item.memory.total)
    memory = best.memory
    parts = ", ".join(
        f"{name} {getattr(memory, name) / GIB:.1f}"
        for name in ("weights", "gradients", "optimizer", "activations", "working")
    )
    fixes = ["parallel.tensor or parallel.pipeline higher", "train.micro_batch_size lower"]
    fixes += [] if config.parallel.offload_optimizer else ["parallel.offload_optimizer = true"]
    return (
        f"parallel.auto = true finds nothing that fits parallel.memory_gb = {config.parallel.memory_gb:g} "
        f"({usable_bytes(config) / GIB:.1f} GiB may be filled). Closest: {best.describe()} needs "
        f"{memory.total / GIB:.1f} GiB ({parts}): try {', '.join(fixes[:-1])} or {fixes[-1]}"
    )
