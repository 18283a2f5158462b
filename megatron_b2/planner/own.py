"""Our own runs: what the code of this project keeps and sends, for the plan.

Memory and collectives are those of `b2 layout check` (layouts/), which tests compare with live tensors and
with the calls of real ranks. The plan adds what no formula sees as one declared constant (fragmentation, the
CUDA context, buffers of libraries), and how long the collectives take.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_b2.config.deepspeed_keys import zero_settings
from megatron_b2.config.schema import RunConfig
from megatron_b2.layouts.memory import (
    bucket_bytes,
    keeps_fp32_gradients,
    rank_memory,
    recompute_of,
    working_bytes,
)
from megatron_b2.layouts.report import Position, step_traffic
from megatron_b2.layouts.stages import rank_parts
from megatron_b2.layouts.traffic import Traffic, micro_batch_traffic
from megatron_b2.layouts.zero_traffic import zero_traffic
from megatron_b2.model.split import StageLayers
from megatron_b2.parallel.layout import Layout
from megatron_b2.pipeline.schedule import Schedule, ScheduleName
from megatron_b2.planner.constants import Constants, load_constants
from megatron_b2.planner.hardware import Cluster
from megatron_b2.planner.kernels import Device, Passes, block_passes, head_passes
from megatron_b2.planner.memory import MemoryPlan, RankBytes
from megatron_b2.planner.network import Links, Ring
from megatron_b2.planner.pipeline import schedule_of
from megatron_b2.planner.step import StepTime, predict_step
from megatron_b2.planner.workload import Workload


def own_memory(
    config: RunConfig, cluster: Cluster, *, gpus: int, constants: Constants | None = None
) -> MemoryPlan:
    """Bytes of each pipeline rank of one of our runs, by kind; `constants` default to the frozen ones."""
    constants = constants or load_constants()
    layout = Layout.of(config.parallel, world_size=gpus)
    parts, orders = rank_parts(config), _orders(config, layout)
    ranks = []
    for held, order in zip(parts, orders, strict=True):
        memory = rank_memory(config, layout, held, order)
        buckets = bucket_bytes(config, memory.parameters)
        blocks = working_bytes(config, layout, [replace(part, has_head=False) for part in held])
        working = memory.working - buckets
        ranks.append(
            RankBytes(
                parameters=memory.weights,
                gradients=memory.gradients,
                optimizer=memory.optimizer,
                activations=memory.activations,
                working=min(working, blocks),
                head=max(0, working - blocks),
                communication=buckets,
                allocator=constants.allocator("deepspeed", cluster.gpu.memory_bytes),
            )
        )
    return MemoryPlan(ranks=tuple(ranks), band=constants.memory_band)


def own_positions(config: RunConfig, *, gpus: int) -> tuple[Position, ...]:
    """What each pipeline rank holds, keeps and sends, as `b2 layout check` says."""
    layout = Layout.of(config.parallel, world_size=gpus)
    parts, orders = rank_parts(config), _orders(config, layout)
    return tuple(
        Position(
            pp=rank,
            parts=held,
            memory=rank_memory(config, layout, held, order),
            traffic=tuple(step_traffic(config, layout, held, rank=rank)),
        )
        for rank, (held, order) in enumerate(zip(parts, orders, strict=True))
    )


def own_step(
    config: RunConfig, cluster: Cluster, *, gpus: int, constants: Constants | None = None
) -> StepTime:
    """Time of a step of one of our runs: `predict_step`, with the collectives that our code and DeepSpeed
    make in place of those of an ideal program. `constants` default to the frozen ones."""
    constants = constants or load_constants()
    workload = Workload.of(config, gpus=gpus)
    time = predict_step(workload, cluster, constants)
    sent = _Sent(config, workload, cluster, constants)
    time = replace(time, tensor=sent.tensor(), context=sent.context())
    return replace(time, data=sent.data(time.compute + time.tensor + time.context))


def estimated_seconds(
    config: RunConfig, cluster: Cluster, *, gpus: int, constants: Constants | None = None
) -> float:
    """`own_step` without simulating the pipeline, for ranking layouts quickly: the busiest rank, and the
    bubble of equal stages, (p - 1) / (v m) of their work; a zero bubble hides two thirds of it."""
    constants = constants or load_constants()
    workload = Workload.of(config, gpus=gpus)
    sent = _Sent(config, workload, cluster, constants)
    device = Device.of(cluster.gpu, workload, constants)
    block, head = (_whole(passes(workload, device)) for passes in (block_passes, head_passes))
    stages = [stage.layers * block + stage.has_head * head for stage in workload.stages()]
    ranks = (sum(stages[rank :: workload.pipeline]) for rank in range(workload.pipeline))
    busy = workload.num_micro * max(ranks)
    exchanged = sent.tensor() + sent.context()
    bubble = (workload.pipeline - 1) / (workload.virtual_stages * workload.num_micro)
    if workload.schedule == "zero_bubble":
        bubble /= 3
    return (busy + exchanged) * (1 + bubble) + sent.data(busy + exchanged)


@dataclass(frozen=True)
class _Sent:
    """Seconds of the collectives of one step."""

    config: RunConfig
    workload: Workload
    cluster: Cluster
    constants: Constants

    @cached_property
    def links(self) -> Links:
        return Links(self.cluster, self.constants)

    @cached_property
    def parts(self) -> tuple[tuple[StageLayers, ...], ...]:
        """Virtual stages of the pipeline ranks, of ranks that hold alike only one."""
        alike: dict[tuple[object, ...], tuple[StageLayers, ...]] = {}
        for held in rank_parts(self.config):
            key = tuple(
                (
                    part.has_embedding,
                    part.has_head,
                    *sorted(recompute_of(self.config, n) for n in part.layers),
                )
                for part in held
            )
            alike.setdefault(key, held)
        return tuple(alike.values())

    @cached_property
    def micro_batch(self) -> list[list[Traffic]]:
        """Of the model's code on these ranks, for one micro-batch."""
        layout = self.workload.layout
        return [
            [item for part in held for item in micro_batch_traffic(self.config, layout, part)]
            for held in self.parts
        ]

    def tensor(self) -> float:
        """Tensor-parallel collectives of the rank that sends most: they stand between the products."""
        ring = self.links.tensor(self.workload)
        return self.workload.num_micro * max(
            _seconds((item for item in items if item.group == "tp"), ring) for items in self.micro_batch
        )

    def context(self) -> float:
        """Context-parallel ones."""
        ring = self.links.context(self.workload)
        return self.workload.num_micro * max(
            _seconds((item for item in items if item.group == "cp"), ring) for items in self.micro_batch
        )

    def data(self, busy: float) -> float:
        """Exposed seconds of gradients and parameters on the rank that waits longest, where forwards and
        backwards take `busy` seconds in all."""
        layout, micro = self.workload.layout, self.workload.num_micro
        if layout.data_context == 1 or self.config.parallel.engine != "deepspeed":
            return 0.0
        return max(
            self.exposed(zero_traffic(self.config, layout, held, num_micro=micro), busy)
            for held in self.parts
        )

    def exposed(self, items: Sequence[Traffic], busy: float) -> float:
        """What DeepSpeed overlaps runs beside forward or backward; all else is waited for."""
        ring = self.links.data(self.workload)
        node = self.links.ring(max(1, self.config.parallel.hpz), stride=self.workload.tensor)
        seconds = {"forward": 0.0, "backward": 0.0, "": 0.0}
        for item in items:
            if item.group in ("data_context", "hpz"):
                beside = self.beside(item)
                seconds[beside] += _seconds([item], node if item.group == "hpz" else ring)
        forward, backward = self.passes(busy)
        hidden = self.hidden(seconds["forward"], forward) + self.hidden(seconds["backward"], backward)
        return seconds[""] + hidden

    def beside(self, item: Traffic) -> str:
        """Which pass a collective runs beside; none where DeepSpeed waits for it."""
        if item.purpose == "parameters, forward":
            return "forward"
        if item.purpose == "parameters, backward":
            return "backward"
        waits = self.config.parallel.zero_stage == 0 or keeps_fp32_gradients(self.config)
        overlaps = zero_settings(self.config)["overlap_comm"] and not waits
        return "backward" if item.purpose == "gradients" and overlaps else ""

    def passes(self, busy: float) -> tuple[float, float]:
        """Of `busy` seconds those of all forwards, and of all backwards that something can run beside."""
        block = block_passes(self.workload, Device.of(self.cluster.gpu, self.workload, self.constants))
        whole = _whole(block)
        backward = busy * (block.backward + block.again) / whole
        if self.config.parallel.zero_stage == 1:  # only beside the last micro-batch
            backward /= self.workload.num_micro
        return busy * block.forward / whole, backward

    def hidden(self, sent: float, beside: float) -> float:
        """What a communication adds to the work that it runs beside: what does not fit, and at least the
        share by which it slows the work down."""
        return max(sent - beside, self.constants.interference * sent)


def _whole(passes: Passes) -> float:
    return passes.forward + passes.backward + passes.again


def _seconds(items: Iterable[Traffic], ring: Ring) -> float:
    """One after the other."""
    total = 0.0
    for item in items:
        each = item.bytes / item.count
        match item.operation:
            case "all_reduce":
                once = ring.all_reduce(each)
            case "send":  # to the neighbour in the ring
                once = each / ring.bandwidth + ring.step_latency / max(1, ring.size - 1)
            case _:
                once = ring.gather(each)
        total += item.count * once
    return total


def _orders(config: RunConfig, layout: Layout) -> Schedule:
    """The beginning of the schedule of a step, long enough for the most micro-batches in flight."""
    parallel, micro = config.parallel, config.train.accumulation_steps(layout.data)
    name: ScheduleName = parallel.schedule if parallel.pipeline > 1 else "1f1b"
    if name != "gpipe":  # it keeps all micro-batches; the others have begun backward after two rounds
        micro = min(micro, 2 * parallel.pipeline)
    return schedule_of(name, parallel.pipeline, micro, parallel.virtual_stages)
