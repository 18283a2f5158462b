"""Everything that `b2 plan` says about a run, as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import ceil, floor
from typing import Any, Final

from megatron_b2.config.schema import RunConfig
from megatron_b2.layouts.memory import GIB, RESERVED_SHARE
from megatron_b2.layouts.report import Position
from megatron_b2.planner.constants import Constants, load_constants
from megatron_b2.planner.flops import Convention, flops_per_token, tflops_per_gpu, utilization
from megatron_b2.planner.hardware import Cluster, gpu_names
from megatron_b2.planner.memory import MemoryPlan, RankBytes
from megatron_b2.planner.own import own_memory, own_positions, own_step
from megatron_b2.planner.reliability import (
    BLOOM_STORAGE,
    DAY,
    LLAMA_3,
    FailureRecord,
    Reliability,
    StorageRate,
    plan_reliability,
)
from megatron_b2.planner.search import Candidate, SearchResult
from megatron_b2.planner.step import StepTime
from megatron_b2.planner.workload import Workload

CONVENTIONS: Final[tuple[Convention, ...]] = ("6N", "megatron", "sc21-model", "llm-foundry")
TIME_PARTS: Final = ("compute", "tensor", "context", "pipeline", "data", "bubble", "optimizer")
MEMORY_KINDS: Final = (
    *("parameters", "gradients", "optimizer", "activations"),
    *("working", "head", "communication", "allocator"),
)


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Speed by one FLOP convention."""

    convention: Convention
    flops_per_token: float
    tflops_per_gpu: float
    utilization: float
    """Of the peak: MFU, or HFU where the convention counts recomputation."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a cluster."""

    config: RunConfig
    cluster: Cluster
    workload: Workload
    memory: MemoryPlan
    positions: tuple[Position, ...]
    """What each pipeline rank holds and sends, as `b2 layout check` says."""
    time: StepTime
    time_error: str
    """Whose error the band of the time is."""
    rates: tuple[Rate, ...]
    tokens: float
    """Of the whole run."""
    reliability: Reliability
    notes: tuple[str, ...]
    """What no published run has validated."""

    @property
    def gpus(self) -> int:
        return self.workload.gpus

    @property
    def fits(self) -> bool:
        """Whether the upper end of the memory's band is within the device."""
        return self.memory.fits(self.cluster.gpu.memory_bytes)

    @property
    def auto_memory_gb(self) -> float:
        """parallel.memory_gb (GiB) within which parallel.auto chooses what fits by this plan: auto leaves
        RESERVED_SHARE free, a plan the allocator's bytes and the band; 0 where those fill the device."""
        allocator = self.memory.ranks[0].allocator
        free = self.cluster.gpu.memory_bytes / (1 + self.memory.band) - allocator
        return max(0.0, floor(10 * free / (1 - RESERVED_SHARE) / GIB) / 10)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run."""
        return self.workload.tokens_per_step / self.time.total

    @property
    def days(self) -> float:
        """Of a run that never fails and never saves."""
        return self.tokens / self.tokens_per_second / DAY

    @property
    def days_with_failures(self) -> float:
        """With checkpoints, failures and restarts."""
        return self.days + self.reliability.lost_days

    @property
    def energy_mwh(self) -> float:
        """Of the GPUs at their design power, MWh; hosts, network and cooling come to it."""
        return self.gpus * self.cluster.gpu.tdp_watts * self.days_with_failures * 24 / 1e6


def make_plan(
    config: RunConfig,
    cluster: Cluster,
    *,
    gpus: int,
    tokens: float | None = None,
    failures: FailureRecord = LLAMA_3,
    storage: StorageRate = BLOOM_STORAGE,
    constants: Constants | None = None,
) -> Plan:
    """Predict a run.

    Args:
        config: a run without parallel.auto.
        cluster: the nodes.
        gpus: how many of their devices.
        tokens: of the whole run; those of train.steps unless given.
        failures: where the failure rate comes from.
        storage: how fast one node writes a checkpoint.
        constants: of the model; the frozen ones unless given.

    Raises:
        ConfigError: the layout breaks a rule on so many ranks.
    """
    constants = constants or load_constants()
    workload = Workload.of(config, gpus=gpus)
    time = own_step(config, cluster, gpus=gpus, constants=constants)
    total = tokens or float(config.train.steps * config.tokens_per_step)
    return Plan(
        config=config,
        cluster=cluster,
        workload=workload,
        memory=own_memory(config, cluster, gpus=gpus, constants=constants),
        positions=own_positions(config, gpus=gpus),
        time=time,
        time_error=_time_error(time, constants),
        rates=tuple(_rate(workload, cluster, time, convention) for convention in _conventions(workload)),
        tokens=total,
        reliability=plan_reliability(
            config.model,
            gpus=gpus,
            nodes=ceil(gpus / cluster.node.gpus),
            step_seconds=time.total,
            steps=ceil(total / config.tokens_per_step),
            record=failures,
            storage=storage,
        ),
        notes=tuple(unvalidated(config, workload, cluster)),
    )


def _time_error(time: StepTime, constants: Constants) -> str:
    if time.regime in constants.bands:
        return f"error of nine in ten runs that the model was not fitted to, {time.regime}"
    return f"no published run is like it ({time.regime}): the widest error of all kinds"


def _conventions(workload: Workload) -> tuple[Convention, ...]:
    """SC21's hardware FLOPs are those of a run that recomputes every block."""
    return (*CONVENTIONS, "sc21") if workload.recompute == "full" else CONVENTIONS


def _rate(workload: Workload, cluster: Cluster, time: StepTime, convention: Convention) -> Rate:
    return Rate(
        convention=convention,
        flops_per_token=flops_per_token(workload, convention),
        tflops_per_gpu=tflops_per_gpu(workload, time.total, convention),
        utilization=utilization(workload, cluster, time.total, convention),
    )


def unvalidated(config: RunConfig, workload: Workload, cluster: Cluster) -> Iterator[str]:
    """What no row of the published runs covers, or the time leaves out, one sentence each."""
    gpu, parallel = cluster.gpu.name, config.parallel
    if gpu.startswith(("a800", "h800")):
        yield f"NVLink of {gpu} (400 GB/s both ways): no published row used it; the A100's was scaled"
    elif gpu.startswith("h200"):
        yield "H200: no published row used it; the H100's efficiency is assumed"
    elif gpu not in gpu_names():
        yield f"{gpu}: described by your own file; the efficiencies of published runs are assumed"
    if cluster.gpu.architecture == "hopper":
        yield "Hopper GPUs with this program: the published rows are of FSDP"
    if workload.data_context > 1 and workload.zero_stage == 2:
        yield "ZeRO-2: in no published row"
    elif workload.data_context > 1 and workload.zero_stage == 1 and cluster.node.fabric != "omnipath":
        yield "DeepSpeed's ZeRO-1 over InfiniBand: the rows of MT-NLG are predicted a fifth too short"
    if parallel.context > 1:
        yield "context parallelism: formulas only"
    if parallel.schedule == "zero_bubble":
        yield "the zero-bubble schedule: simulated, in no published row"
    if config.train.precision == "fp32":
        yield "fp32: every published row is bf16 or fp16"
    if config.train.recompute_layers:
        yield "train.recompute_layers: the time is that of recomputing every block"
    for name in ("offload_optimizer", "quantized_weights", "quantized_gradients"):
        if getattr(parallel, name):
            yield f"parallel.{name}: the time does not know its work"
    yield "this project's own code on such a cluster: the rows are of Megatron-LM, DeepSpeed and FSDP"


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    gpu = plan.cluster.gpu
    return {
        "name": plan.config.name,
        "cluster": asdict(plan.cluster),
        "gpus": plan.gpus,
        "nodes": ceil(plan.gpus / plan.cluster.node.gpus),
        "layout": plan.workload.describe(),
        "step": {
            "seconds": plan.time.total,
            "low": plan.time.low,
            "high": plan.time.high,
            "band": plan.time.band,
            "regime": plan.time.regime,
            "band_source": plan.time_error,
            "parts": {name: getattr(plan.time, name) for name in TIME_PARTS},
        },
        "tokens_per_second": plan.tokens_per_second,
        "rates": [asdict(rate) for rate in plan.rates],
        "memory": {
            "device_bytes": gpu.memory_bytes,
            "band": plan.memory.band,
            "fits": plan.fits,
            "ranks": [
                {"pp": position.pp, "holds": position.holds, **memory_json(rank)}
                for rank, position in zip(plan.memory.ranks, plan.positions, strict=True)
            ],
        },
        "traffic": [
            [{**asdict(item), "wire_bytes": item.wire_bytes} for item in position.traffic]
            for position in plan.positions
        ],
        "run": {
            "tokens": plan.tokens,
            "days": plan.days,
            "days_with_failures": plan.days_with_failures,
            "energy_mwh": plan.energy_mwh,
        },
        "reliability": asdict(plan.reliability),
        "not_validated": list(plan.notes),
    }


def memory_json(rank: RankBytes) -> dict[str, float]:
    """Bytes by kind and their sum."""
    return {**{name: getattr(rank, name) for name in MEMORY_KINDS}, "total": rank.total}


def search_json(result: SearchResult) -> dict[str, Any]:
    """The counts and the front of a search as plain values."""
    return {
        "legal": result.legal,
        "fit": result.fit,
        "predicted": len(result.candidates),
        "families": {name: candidate_json(item) for name, item in result.families.items()},
        "front": [candidate_json(item) for item in result.front],
    }


def candidate_json(item: Candidate) -> dict[str, Any]:
    """One layout of a search."""
    work = item.workload
    names = (
        *("tensor", "context", "pipeline", "virtual_stages", "schedule", "data", "zero_stage"),
        *("sequence_parallel", "micro_batch_size", "num_micro", "recompute"),
    )
    return {
        **{name: getattr(work, name) for name in names},
        "seconds": item.time.total,
        "low": item.time.low,
        "high": item.time.high,
        "memory_bytes": item.memory.total,
        "headroom_bytes": item.headroom,
    }


def nearly_best(result: SearchResult) -> Sequence[Candidate]:
    """Layouts whose band reaches the fastest one's prediction: the model cannot tell them from it."""
    return [item for item in result.candidates if item.time.low <= result.best.time.total]
