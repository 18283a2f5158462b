"""How often a run is interrupted, how often to save, and what both cost.

Failures are counted on one published run and scale with the number of GPUs. Between them a run saves every
`interval` seconds of work and stands still for `stall` seconds each time; a failure costs the work since the
last checkpoint and the restart. Sources: Young, "A first order approximation to the optimum checkpoint
interval" (CACM 17(9), 1974); Daly, "A higher order estimate of the optimum checkpoint interval for restart
dumps" (FGCS 22(3), 2006).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, expm1, sqrt
from typing import Final

from megatron_b2.config.schema import ModelConfig

HOUR: Final = 3_600.0
DAY: Final = 24 * HOUR
STATE_BYTES: Final = 12
"""Bytes of a parameter in our checkpoints: the weight and both moments in fp32 (docs/checkpoints.md)."""
RESTART_SECONDS: Final = 900.0
"""From a failure to training again (our choice: MegaScale's bounds are 10 minutes to find a fault and 15 to
catch up, section 6 of arXiv 2402.15627; the work since the last checkpoint is counted apart)."""


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """Interruptions counted on a published run."""

    source: str
    gpus: int
    days: float
    interruptions: int
    """Unexpected ones."""

    def mtbf(self, gpus: int) -> float:
        """Mean seconds between failures of a run on `gpus` GPUs: failures are proportional to GPUs."""
        if gpus < 1:
            raise ValueError(f"a run has 1 GPU or more, not {gpus}")
        return self.days * DAY / self.interruptions * self.gpus / gpus


LLAMA_3: Final = FailureRecord(
    source="Llama 3 (arXiv 2407.21783, table 5): 419 unexpected interruptions in 54 days on 16,384 H100",
    gpus=16_384,
    days=54.0,
    interruptions=419,
)


@dataclass(frozen=True, kw_only=True)
class StorageRate:
    """How fast checkpoints are written."""

    source: str
    node_bytes_per_second: float
    """Of one node to the shared file system, while all nodes write."""


BLOOM_STORAGE: Final = StorageRate(
    source="BLOOM: 48 nodes wrote 2.3 TB in 40 s (bigscience, train/tr11-176B-ml)",
    node_bytes_per_second=2.3e12 / 40 / 48,
)


def young_interval(stall: float, mtbf: float) -> float:
    """Seconds of work between checkpoints that take `stall` seconds, to first order: sqrt(2 stall MTBF)."""
    _check(stall, mtbf)
    return sqrt(2 * stall * mtbf)


def daly_interval(stall: float, mtbf: float) -> float:
    """Daly's higher-order estimate (equation 37), seconds of work; the MTBF where saving takes twice it."""
    _check(stall, mtbf)
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    return sqrt(2 * stall * mtbf) * (1 + sqrt(ratio) / 3 + ratio / 9) - stall


def first_order_waste(interval: float, *, stall: float, mtbf: float) -> float:
    """Share of the time spent on saving and, half an interval a failure, on lost work (0 to 1 and above)."""
    _check(stall, mtbf)
    return stall / interval + interval / (2 * mtbf)


def expected_waste(interval: float, *, stall: float, mtbf: float, restart: float = 0.0) -> float:
    """Share of the wall time that is not new work, for exponentially distributed failures.

    Daly's equation 20: the wall time of a second of work is MTBF exp(restart / MTBF)
    (exp((interval + stall) / MTBF) - 1) / interval; failures also strike while saving and restarting.
    """
    _check(stall, mtbf)
    wall = mtbf * exp(restart / mtbf) * expm1((interval + stall) / mtbf) / interval
    return 1 - 1 / wall


def _check(stall: float, mtbf: float) -> None:
    if stall <= 0 or mtbf <= 0:
        raise ValueError(f"stall and MTBF are seconds above 0, not {stall:g} and {mtbf:g}")


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Failures and checkpoints of a run."""

    failure_source: str
    """Of the failure rate."""
    storage_source: str
    """Of the rate at which checkpoints are written."""
    gpus: int
    mtbf_hours: float
    checkpoint_bytes: int
    stall_seconds: float
    """Of one checkpoint, which our ranks write while they stand still."""
    interval_steps: int
    """Optimizer steps between checkpoints nearest Daly's interval."""
    young_hours: float
    daly_hours: float
    waste: float
    """Expected share of the wall time, restarts included, at `interval_steps`."""
    waste_first_order: float
    """Young's estimate at Young's interval: saving and lost work, no restarts."""
    failures: float
    """Expected during the whole run."""
    lost_days: float
    """Wall time beyond that of a run that never fails and never saves."""


def checkpoint_bytes(model: ModelConfig) -> int:
    """Bytes of a whole checkpoint; the manifest and random-number states come to it (under 1 %)."""
    return STATE_BYTES * model.num_parameters


def plan_reliability(
    model: ModelConfig,
    *,
    gpus: int,
    nodes: int,
    step_seconds: float,
    steps: int,
    record: FailureRecord = LLAMA_3,
    storage: StorageRate = BLOOM_STORAGE,
    restart: float = RESTART_SECONDS,
) -> Reliability:
    """Failures of a run of `steps` steps, and how often to save.

    Args:
        model: its checkpoint is written by all nodes together.
        gpus: of the run.
        nodes: of the run.
        step_seconds: of one optimizer step.
        steps: of the whole run.
        record: where the failure rate comes from.
        storage: how fast one node writes.
        restart: seconds from a failure to training again.
    """
    mtbf = record.mtbf(gpus)
    size = checkpoint_bytes(model)
    stall = size / (storage.node_bytes_per_second * nodes)
    young, daly = young_interval(stall, mtbf), daly_interval(stall, mtbf)
    interval = max(1, round(daly / step_seconds))
    waste = expected_waste(interval * step_seconds, stall=stall, mtbf=mtbf, restart=restart)
    work = steps * step_seconds
    wall = work / (1 - waste)
    return Reliability(
        failure_source=record.source,
        storage_source=storage.source,
        gpus=gpus,
        mtbf_hours=mtbf / HOUR,
        checkpoint_bytes=size,
        stall_seconds=stall,
        interval_steps=interval,
        young_hours=young / HOUR,
        daly_hours=daly / HOUR,
        waste=waste,
        waste_first_order=first_order_waste(young, stall=stall, mtbf=mtbf),
        failures=wall / mtbf,
        lost_days=(wall - work) / DAY,
    )
