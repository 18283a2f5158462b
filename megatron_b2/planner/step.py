"""Time of a training step: predict_step(workload, cluster) -> StepTime.

Blocks and the head cost what kernels.py says, collectives what network.py says, and the stages of the
pipeline run in our own simulator (pipeline.py). Tensor-parallel collectives stand between the products;
they, gradients and gathers overlap as the workload says. docs/planner.md describes the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_b2.planner.constants import Constants, load_constants
from megatron_b2.planner.hardware import Cluster
from megatron_b2.planner.kernels import (
    Device,
    Passes,
    block_passes,
    embedding_passes,
    head_passes,
    optimizer_seconds,
)
from megatron_b2.planner.network import Links, Ring
from megatron_b2.planner.pipeline import makespan
from megatron_b2.planner.workload import StageSlice, Workload


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by what the busiest pipeline rank spends them on. The parts add up to
    `total`: what overlaps with something else is counted once, with that."""

    compute: float
    """Forward, backward and recomputation of all micro-batches: products, attention, memory traffic."""
    tensor: float
    """Exposed tensor-parallel communication."""
    context: float
    """Exposed context-parallel communication."""
    pipeline: float
    """Exposed sends between pipeline stages."""
    data: float
    """Exposed gradient reduction and parameter gathers (data parallelism and ZeRO)."""
    bubble: float
    """Idle time of the pipeline with free sends."""
    optimizer: float
    """Adam, gradient norm and casts."""
    regime: str
    """Which published runs the error is from (`constants.toml`, [bands])."""
    band: float
    """Relative error that nine in ten held-out published runs of the regime kept: total x (1 +- band)."""

    @property
    def total(self) -> float:
        """The step."""
        return (
            self.compute
            + self.tensor
            + self.context
            + self.pipeline
            + self.data
            + self.bubble
            + self.optimizer
        )

    @property
    def low(self) -> float:
        """Lower end of the band, seconds."""
        return self.total * (1 - self.band)

    @property
    def high(self) -> float:
        """Upper end of the band, seconds."""
        return self.total * (1 + self.band)

    def describe(self) -> str:
        """12.1 s ± 9 %."""
        return f"{self.total:.3g} s ± {100 * self.band:.0f} %"


def predict_step(workload: Workload, cluster: Cluster, constants: Constants | None = None) -> StepTime:
    """Time of a step of `workload` on `cluster`; `constants` default to the frozen ones."""
    return _Step(workload, cluster, constants or load_constants()).time()


def regime_of(workload: Workload, cluster: Cluster) -> str:
    """Which published runs are the nearest: their error is the prediction's. Where none are near, what is
    unlike all of them: then `Constants.band` has the widest error."""
    if cluster.gpu.architecture == "measured":
        return "own hardware"
    if workload.precision == "fp32":
        return "fp32"
    if workload.context > 1:
        return "context parallel"
    if workload.schedule == "zero_bubble":
        return "zero bubble"
    if workload.zero_stage == 2:
        return "zero-2"
    kind = f"zero-3 {workload.zero_engine}" if workload.zero_stage == 3 else "model parallel"
    if cluster.gpu.architecture == "hopper":
        return "hopper" if kind == "zero-3 fsdp" else f"hopper, {kind}"
    if workload.zero_stage == 3:
        return kind
    if workload.gpus > cluster.node.gpus and cluster.node.fabric == "omnipath":
        return "omnipath"
    if workload.zero_stage == 1 and workload.zero_engine != "megatron":
        return f"zero-1 {workload.zero_engine}"
    return kind


class _Step:
    """The parts of one prediction."""

    def __init__(self, workload: Workload, cluster: Cluster, constants: Constants) -> None:
        self.work, self.cluster, self.constants = workload, cluster, constants
        self.device = Device.of(cluster.gpu, workload, constants)
        self.links = Links(cluster, constants)
        self.stages = workload.stages()
        self.block = block_passes(workload, self.device)
        self.block_sent = self.block_collectives()
        self.block_context = self.context_exchange()

    def time(self) -> StepTime:
        """All parts, on the pipeline rank that works longest."""
        work = self.work
        compute = [self.computed(stage) for stage in self.stages]
        sent = [self.collectives(stage) for stage in self.stages]
        exchanged = [self.block_context.times(stage.layers) for stage in self.stages]
        passes = [a.plus(b).plus(c) for a, b, c in zip(compute, sent, exchanged, strict=True)]
        busy = [_seconds(passes[rank :: work.pipeline]) for rank in range(work.pipeline)]
        rank = busy.index(max(busy))
        ideal, length = self.pipeline_lengths(passes)
        return StepTime(
            compute=work.num_micro * _seconds(compute[rank :: work.pipeline]),
            tensor=work.num_micro * _seconds(sent[rank :: work.pipeline]),
            context=work.num_micro * _seconds(exchanged[rank :: work.pipeline]),
            pipeline=length - ideal,
            data=self.data_exchange(passes),
            bubble=ideal - work.num_micro * busy[rank],
            optimizer=max(
                optimizer_seconds(work, self.device, parameters) for parameters in self.rank_parameters()
            ),
            regime=regime_of(work, self.cluster),
            band=self.constants.band(regime_of(work, self.cluster)),
        )

    def rank_parameters(self) -> list[int]:
        """Parameters that each pipeline rank computes with."""
        sizes = [self.work.stage_parameters(stage) for stage in self.stages]
        return [sum(sizes[rank :: self.work.pipeline]) for rank in range(self.work.pipeline)]

    def pipeline_lengths(self, passes: list[Passes]) -> tuple[float, float]:
        """Seconds of all micro-batches with free sends, and with sends."""
        work = self.work
        stages = tuple((item.forward, item.backward, item.again) for item in passes)
        message = work.local_tokens * work.shape.hidden_size * work.element_bytes
        lengths = [
            makespan(
                work.schedule,
                stages,
                num_ranks=work.pipeline,
                num_micro=work.num_micro,
                transfer=transfer,
            )
            for transfer in ((0.0, self.links.send(work, message)) if work.pipeline > 1 else (0.0,))
        ]
        return lengths[0], lengths[-1]

    def computed(self, stage: StageSlice) -> Passes:
        """Kernels of a virtual stage, one micro-batch."""
        passes = self.block.times(stage.layers)
        if stage.has_embedding:
            passes = passes.plus(embedding_passes(self.work, self.device))
        if stage.has_head:
            passes = passes.plus(head_passes(self.work, self.device))
        return passes

    def tensor_sum(self) -> float:
        """Seconds of one tensor-parallel sum of activations."""
        work = self.work
        message = work.local_tokens * work.shape.hidden_size * work.element_bytes
        return self.links.tensor(work).all_reduce(message)

    def block_collectives(self) -> Passes:
        """Tensor-parallel sums of a block: two in forward, two in backward, and again where all of the block
        is computed again. Sequence parallelism sends as much, in two halves."""
        both, block = 2 * self.tensor_sum(), self.block
        again = both if self.work.recompute == "full" else 0.0
        if not self.work.overlap_tensor:
            return Passes(both, both, again)
        beside = ((both, block.forward), (both, block.backward), (again, block.again))
        return Passes(*(self.exposed(sent, work) for sent, work in beside))

    def collectives(self, stage: StageSlice) -> Passes:
        """Tensor-parallel sums of a virtual stage: those of blocks, of the embedding, and of the gradient of
        the head's input."""
        one, sent = self.tensor_sum(), self.block_sent.times(stage.layers)
        return sent.plus(Passes(one * stage.has_embedding, one * stage.has_head))

    def context_exchange(self) -> Passes:
        """Keys and values of a block that go around the ring of context-parallel ranks, and their gradients
        on the way back. Nothing published was compared with this."""
        work = self.work
        message = 2 * work.context * work.local_tokens * work.shape.kv_width / work.tensor
        once = self.links.context(work).gather(message * work.element_bytes)
        return Passes(once, 2 * once, once if work.recompute != "none" else 0.0)

    def data_exchange(self, passes: list[Passes]) -> float:
        """Exposed seconds of gradients and parameters between ranks with the same parameters."""
        work, ring = self.work, self.links.data(self.work)
        if work.zero_stage == 3:
            return self.zero_3_exchange(passes[0], ring)
        return max(
            self.rank_exchange(parameters, passes[rank :: work.pipeline], ring)
            for rank, parameters in enumerate(self.rank_parameters())
        )

    def rank_exchange(self, parameters: int, own: list[Passes], ring: Ring) -> float:
        """Stages 0 to 2, on one pipeline rank."""
        work = self.work
        is_scattered = work.zero_stage >= 1 and work.zero_engine != "deepspeed"
        reduce = (1 if is_scattered else 2) * ring.gather(parameters * work.gradient_bytes)
        back = ring.gather(parameters * work.element_bytes) if work.zero_stage else 0.0
        if work.overlap_data:
            reduce = self.exposed(reduce, sum(item.backward + item.again for item in own))
        if work.overlap_data and is_scattered:
            back = self.exposed(back, sum(item.forward for item in own))
        return reduce * (work.num_micro if work.zero_stage == 2 else 1) + back

    def zero_3_exchange(self, passes: Passes, ring: Ring) -> float:
        """ZeRO-3 gathers a block's weights before its forward and its backward, and scatters its gradients
        after. With overlap a pass takes the longer of work and communication, block by block."""
        work = self.work
        parameters, layers = self.rank_parameters()[0], work.shape.num_layers
        gather = layers * ring.gather(parameters / layers * work.element_bytes)
        scatter = layers * ring.gather(parameters / layers * work.gradient_bytes)
        if not work.overlap_data:
            return work.num_micro * (2 * gather + scatter)
        forward = self.exposed(gather, passes.forward)
        backward = self.exposed(gather + scatter, passes.backward + passes.again)
        return work.num_micro * (forward + backward)

    def exposed(self, sent: float, beside: float) -> float:
        """What a communication adds to the work that it runs beside: the part that is longer, and at least
        the share by which it slows the work down."""
        return max(sent - beside, self.constants.interference * sent)


def _seconds(passes: list[Passes]) -> float:
    return sum(item.forward + item.backward + item.again for item in passes)
