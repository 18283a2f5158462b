"""All legal layouts of a run on a number of GPUs: which fit, how long a step takes, which are worth having.

Tensor parallelism stays inside a node, as does tensor x context. A layout is worth having if no other is both
faster and leaves more memory (the Pareto front). The exact memory of our code (own.py) filters first. What
fits is ranked by a quick estimate, and the pipeline is simulated only where that comes near to the best of
the same family: ZeRO alone by stage, or with tensor parallelism, pipeline stages, or both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, Literal, NamedTuple

from megatron_b2.config.checks import find_problems
from megatron_b2.config.schema import ParallelConfig, RunConfig
from megatron_b2.errors import ConfigError
from megatron_b2.layouts.memory import GIB
from megatron_b2.pipeline.schedule import ScheduleName
from megatron_b2.planner.constants import Constants, load_constants
from megatron_b2.planner.hardware import Cluster
from megatron_b2.planner.memory import MemoryPlan
from megatron_b2.planner.own import estimated_seconds, own_memory, own_step
from megatron_b2.planner.step import StepTime
from megatron_b2.planner.workload import Workload

RECOMPUTE: Final[tuple[Literal["none", "selective", "full"], ...]] = ("none", "selective", "full")
STAGES: Final[tuple[Literal[1, 2, 3], ...]] = (1, 2, 3)
SLACK: Final = 0.1
"""Relative error of the quick estimate against the prediction that the search allows for."""
MAX_MICRO_BATCH: Final = 32
"""Sequences; powers of two up to it are tried."""
MAX_VIRTUAL_STAGES: Final = 8
"""Chunks a pipeline rank; powers of two up to it are tried."""


Family = Literal[
    "ZeRO-1 alone",
    "ZeRO-2 alone",
    "ZeRO-3 alone",
    "ZeRO with tensor",
    "ZeRO-1 with pipeline",
    "ZeRO-1 with both",
]
"""What a layout splits beside the batch; context counts as tensor."""


class Order(NamedTuple):
    """How a pipeline runs."""

    schedule: ScheduleName
    virtual_stages: int

    def is_filled_by(self, micro: int, pipeline: int) -> bool:
        """Whether the schedule can run so many micro-batches."""
        return micro >= pipeline and (self.schedule != "interleaved" or micro % pipeline == 0)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout."""

    config: RunConfig
    """To run."""
    workload: Workload
    memory: MemoryPlan
    time: StepTime
    headroom: float
    """Bytes that the fullest rank leaves free, of the device's."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found."""

    legal: int
    """Layouts that follow every rule."""
    fit: int
    """Of them, those that fit the memory."""
    candidates: tuple[Candidate, ...]
    """Of them, those whose step was predicted, the fastest first."""
    front: tuple[Candidate, ...]
    """Those that no other beats in both time and headroom, the fastest first."""

    @property
    def best(self) -> Candidate:
        """The fastest."""
        return self.candidates[0]

    @property
    def families(self) -> dict[Family, Candidate]:
        """The fastest of each family, the fastest first."""
        found: dict[Family, Candidate] = {}
        for item in self.candidates:
            found.setdefault(family_of(item.config.parallel), item)
        return found


def search(
    config: RunConfig, cluster: Cluster, *, gpus: int, constants: Constants | None = None
) -> SearchResult:
    """Predict every legal layout of a run.

    Args:
        config: model, sequence length, global batch and precision; its layout is replaced.
        cluster: the nodes.
        gpus: how many of their devices.
        constants: of the model; the frozen ones unless given.

    Raises:
        ConfigError: no layout is legal, or none fits the memory (names what comes closest).
    """
    constants = constants or load_constants()
    budget = cluster.gpu.memory_bytes
    fitting: list[_Fitting] = []
    closest: tuple[float, RunConfig] | None = None
    legal = 0
    for option in legal_layouts(config, gpus=gpus, gpus_per_node=cluster.node.gpus, memory_bytes=budget):
        legal += 1
        memory = own_memory(option, cluster, gpus=gpus, constants=constants)
        if closest is None or memory.total < closest[0]:
            closest = (memory.total, option)
        if memory.fits(budget):
            seconds = estimated_seconds(option, cluster, gpus=gpus, constants=constants)
            fitting.append(_Fitting(seconds, budget - memory.total, option, memory))
    if not fitting:
        raise ConfigError(_nothing(config, cluster, gpus, closest))
    found = [
        Candidate(
            config=item.config,
            workload=Workload.of(item.config, gpus=gpus),
            memory=item.memory,
            time=own_step(item.config, cluster, gpus=gpus, constants=constants),
            headroom=item.headroom,
        )
        for item in _promising(fitting)
    ]
    found.sort(key=lambda item: (item.time.total, -item.headroom))
    return SearchResult(legal=legal, fit=len(fitting), candidates=tuple(found), front=tuple(_front(found)))


class _Fitting(NamedTuple):
    """A layout that fits."""

    seconds: float
    """Estimated."""
    headroom: float
    config: RunConfig
    memory: MemoryPlan


def _promising(fitting: Sequence[_Fitting]) -> Iterator[_Fitting]:
    """What no other layout of the family beats by more than `SLACK` without needing more memory."""
    families: dict[Family, list[_Fitting]] = {}
    for item in sorted(fitting, key=lambda item: (item.seconds, -item.headroom)):
        families.setdefault(family_of(item.config.parallel), []).append(item)
    for members in families.values():
        ahead = iter(members)
        passed, most = next(ahead), float("-inf")
        for item in members:  # by seconds: `most` is the headroom of all that are faster by the slack
            while passed.seconds * (1 + SLACK) <= item.seconds:
                most = max(most, passed.headroom)
                passed = next(ahead)
            if item.headroom > most:
                yield item


def family_of(parallel: ParallelConfig) -> Family:
    """The family of a layout that a search tries."""
    splits_layers = parallel.tensor * parallel.context > 1
    if parallel.pipeline > 1:
        return "ZeRO-1 with both" if splits_layers else "ZeRO-1 with pipeline"
    if splits_layers:
        return "ZeRO with tensor"
    alone: tuple[Family, ...] = ("ZeRO-1 alone", "ZeRO-2 alone", "ZeRO-3 alone")
    return alone[parallel.zero_stage - 1]


def legal_layouts(
    config: RunConfig, *, gpus: int, gpus_per_node: int, memory_bytes: float
) -> Iterator[RunConfig]:
    """Every layout that passes all rules of the configuration on `gpus` ranks.

    ZeRO-0 is left out (it keeps what ZeRO-1 shards and saves nothing), as are gpipe (it keeps more and idles
    as long as 1F1B), and what a search cannot judge: hpZ, quantization, offloading, single blocks recomputed.
    """
    node = min(gpus, gpus_per_node)
    for tensor, context in product(_divisors(node), repeat=2):
        if node % (tensor * context) or config.data.seq_len % (tensor * context):
            continue
        ranks = gpus // (tensor * context)
        for pipeline in _divisors(ranks):
            if pipeline > config.model.num_layers:
                break
            base = _written(config, memory_bytes, tensor=tensor, context=context, pipeline=pipeline)
            if _is_legal(base, gpus):
                yield from _variants(base, gpus)


def _written(
    config: RunConfig, memory_bytes: float, *, tensor: int, context: int, pipeline: int
) -> RunConfig:
    """The plainest run of these sizes."""
    parallel = replace(
        config.parallel,
        engine="deepspeed",
        zero_stage=1,
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        sequence_parallel=False,
        context_method="auto",
        schedule="1f1b",
        virtual_stages=1,
        hpz=1,
        offload_optimizer=False,
        quantized_weights=False,
        quantized_gradients=False,
        whole_parameters=0,
        auto=False,
        memory_gb=round(memory_bytes / GIB, 2),
    )
    train = replace(config.train, micro_batch_size=1, recompute="none", recompute_layers=())
    return replace(config, parallel=parallel, train=train)


def _variants(base: RunConfig, gpus: int) -> Iterator[RunConfig]:
    """Micro-batch, schedule, ZeRO stage, sequence parallelism and recomputation of given sizes."""
    parallel = base.parallel
    share = base.train.global_batch_size // parallel.data_size(gpus)
    sizes = [size for size in _powers(MAX_MICRO_BATCH) if share % size == 0]
    for order in _orders(parallel.pipeline, base.model.num_layers):
        for size, stage, is_sequence, recompute in product(
            sizes,
            STAGES[:1] if parallel.pipeline > 1 else STAGES,
            (False, True) if parallel.tensor > 1 else (False,),
            RECOMPUTE,
        ):
            if not order.is_filled_by(share // size, parallel.pipeline):
                continue
            yield replace(
                base,
                train=replace(base.train, micro_batch_size=size, recompute=recompute),
                parallel=replace(
                    parallel,
                    zero_stage=stage,
                    sequence_parallel=is_sequence,
                    schedule=order.schedule,
                    virtual_stages=order.virtual_stages,
                ),
            )


def _orders(pipeline: int, layers: int) -> Iterator[Order]:
    """Schedules that so many layers can fill."""
    yield Order("1f1b", 1)
    if pipeline > 1:
        yield Order("zero_bubble", 1)
        chunks = [count for count in _powers(MAX_VIRTUAL_STAGES) if count > 1 and count * pipeline <= layers]
        yield from (Order("interleaved", count) for count in chunks)


def _is_legal(config: RunConfig, gpus: int) -> bool:
    return not find_problems(config, world_size=gpus)


def _front(candidates: Sequence[Candidate]) -> Iterator[Candidate]:
    """Of candidates by time: each that leaves more memory than all before it."""
    most = float("-inf")
    for item in candidates:
        if item.headroom > most:
            most = item.headroom
            yield item


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2


def _nothing(config: RunConfig, cluster: Cluster, gpus: int, closest: tuple[float, RunConfig] | None) -> str:
    if closest is None:
        plain = _written(config, cluster.gpu.memory_bytes, tensor=1, context=1, pipeline=1)
        why = find_problems(plain, world_size=gpus)
        return f"{config.name} has no legal layout on {gpus} GPUs; with data parallelism alone: {why[0]}"
    total, option = closest
    budget = cluster.gpu.memory_bytes
    return (
        f"{config.name} fits no layout on {gpus} x {cluster.gpu.name}: the smallest, "
        f"{Workload.of(option, gpus=gpus).describe()}, needs {total / GIB:.1f} of {budget / GIB:.1f} GiB; "
        "use more GPUs, GPUs with more memory, or a shorter data.seq_len"
    )
