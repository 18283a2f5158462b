"""The layout matrix: train a tiny model in every legal layout and compare it with one process.

Compared are, over 5 optimizer steps, loss, cross-entropy, max-z and gradient norm; after the first step every
parameter's gradient (AdamW's first moment then is (1 - beta1) times the clipped gradient, in every layout);
after the last step every parameter. All fp32, on forked CPU processes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_b2.checkpoint.logical import LogicalState
from megatron_b2.config.checks import find_problems
from megatron_b2.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_b2.data.batch import Batch
from megatron_b2.engine.base import Engine
from megatron_b2.engine.build import build_engine, initialize_engine
from megatron_b2.parallel.comm import ProcessGroupComm, SingleComm
from megatron_b2.testing.fork import run_ranks

TOLERANCE = 1e-5
"""Largest difference allowed: relative for losses and norms, absolute for gradients and parameters."""
MAX_RANKS = 8
STEPS, GLOBAL_BATCH, MICRO_BATCH, SEQ_LEN, VOCAB = 5, 16, 1, 32, 128
LEARNING_RATE = 3e-4

Style = Literal["7b", "13b"]
Problem = tuple[str, ...]


@dataclass(frozen=True, order=True)
class Case:
    """One layout of the matrix."""

    style: Style
    """7b: RoPE, 8 heads. 13b: ALiBi, 40 heads."""
    tensor: int
    pipeline: int
    data: int
    context: int
    sequence_parallel: bool
    zero_stage: int
    hpz: bool
    """ZeRO-3 with a second copy over two ranks."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def name(self) -> str:
        """Short text for tables."""
        parts = [self.style, f"tp{self.tensor}", f"pp{self.pipeline}", f"dp{self.data}", f"cp{self.context}"]
        parts += ["sp"] if self.sequence_parallel else []
        parts += [self.schedule] if self.pipeline > 1 else []
        return " ".join([*parts, f"zero{self.zero_stage}" + ("+hpz" if self.hpz else "")])

    def config(self, *, seed: int) -> RunConfig:
        """The run of this case."""
        return replace(
            reference_config(self.style, seed=seed),
            parallel=ParallelConfig(
                engine="deepspeed",
                zero_stage=self.zero_stage,  # type: ignore[arg-type]
                tensor=self.tensor,
                context=self.context,
                pipeline=self.pipeline,
                sequence_parallel=self.sequence_parallel,
                schedule=self.schedule,
                virtual_stages=2 if self.schedule == "interleaved" else 1,
                hpz=2 if self.hpz else 1,
            ),
        )


@dataclass(frozen=True)
class Comparison:
    """Largest differences of one case from one process."""

    case: Case
    losses: float
    """Relative: loss, ce, max_z over all steps and ranks."""
    grad_norm: float
    """Relative, over all steps and ranks."""
    gradients: float
    """Absolute, over every parameter."""
    parameters: float
    """Absolute, over every parameter after the last step."""
    worst_parameter: str = ""
    """Where the largest of the last two is."""
    failure: str = ""
    """Why it did not run."""

    @property
    def passed(self) -> bool:
        """Whether all are within the tolerance."""
        return max(self.losses, self.grad_norm, self.gradients, self.parameters) <= TOLERANCE

    def describe(self) -> str:
        """One line for people."""
        if self.failure:
            return f"FAILED: {self.failure}"
        verdict = "ok" if self.passed else f"DIFFERS in {self.worst_parameter}"
        return (
            f"loss {self.losses:.1e}  norm {self.grad_norm:.1e}  gradients {self.gradients:.1e}  "
            f"parameters {self.parameters:.1e}  {verdict}"
        )


def reference_config(style: Style, *, seed: int) -> RunConfig:
    """The same run on one process."""
    heads = 8 if style == "7b" else 40
    return RunConfig(
        model=ModelConfig(
            hidden_size=4 * heads,
            ffn_hidden_size=48,
            num_layers=8,
            num_heads=heads,
            vocab_size=VOCAB,
            position="rope" if style == "7b" else "alibi",
        ),
        data=DataConfig(seq_len=SEQ_LEN),
        optim=OptimConfig(max_lr=LEARNING_RATE, warmup_steps=1),
        train=TrainConfig(
            steps=STEPS, global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, seed=seed
        ),
    )


def cases() -> Iterator[Case]:
    """Every combination of the matrix that fits the ranks, legal or not."""
    for case in itertools.starmap(
        Case,
        itertools.product(
            ("7b", "13b"),
            (1, 2, 4),
            (1, 2, 4),
            (1, 2),
            (1, 2),
            (False, True),
            (0, 1, 2, 3),
            (False, True),
            ("1f1b", "gpipe", "interleaved", "zero_bubble"),
        ),
    ):
        schedule_matters = case.pipeline > 1 or case.schedule == "1f1b"
        if case.world_size <= MAX_RANKS and schedule_matters:
            yield case


def refusals(case: Case, *, seed: int = 0) -> list[str]:
    """Why a case is not legal; empty if it is."""
    return find_problems(case.config(seed=seed), world_size=case.world_size)


def legal_cases() -> list[Case]:
    """The cases that must work."""
    return [case for case in cases() if case.world_size > 1 and not refusals(case)]


def covering_cases(candidates: Sequence[Case], *, seed: int) -> list[Case]:
    """A subset in which every pair of values that occurs together in `candidates` occurs at least once."""
    missing = set().union(*(_pairs(case) for case in candidates))
    pool = list(candidates)
    random.Random(seed).shuffle(pool)
    chosen = []
    while missing:
        # Small worlds first among equals: they are cheap.
        best = max(pool, key=lambda case: (len(_pairs(case) & missing), -case.world_size))
        chosen.append(best)
        missing -= _pairs(best)
    return sorted(chosen)


def _pairs(case: Case) -> set[tuple[tuple[str, object], tuple[str, object]]]:
    return set(itertools.combinations(sorted(asdict(case).items()), 2))


@dataclass(frozen=True)
class Trace:
    """What one rank saw, with its pieces of gradients and final parameters."""

    steps: Tensor
    """fp64 [STEPS, 4]: loss, ce, max_z, gradient norm."""
    gradients: dict[str, list[tuple[tuple[int, ...], Tensor]]]
    parameters: dict[str, list[tuple[tuple[int, ...], Tensor]]]


def trace_run(config: RunConfig) -> Trace:
    """Train `config` on this process, or on this rank of the initialised group."""
    comm = SingleComm() if config.parallel.engine == "single" else ProcessGroupComm()
    engine = build_engine(config, comm=comm, device=torch.device("cpu"))
    initialize_engine(engine, seed=config.train.seed)
    rows = []
    for step in range(1, config.train.steps + 1):
        out = engine.train_step(micro_batches(engine, step), lr=config.optim.max_lr, step=step)
        rows.append([float(x) for x in (out.loss, out.ce, out.max_z, out.grad_norm)])
        if step == 1:
            factor = clip_factor(rows[0][3], config) * (1 - config.optim.beta1)
            moments = _pieces(engine.logical_state(), "optim/exp_avg/")
    gradients = {name: [(o, t / factor) for o, t in parts] for name, parts in moments.items()}
    parameters = _pieces(engine.logical_state(), "model/")
    return Trace(torch.tensor(rows, dtype=torch.float64), gradients, parameters)


def clip_factor(norm: float, config: RunConfig) -> float:
    """What clipping multiplied the gradient by."""
    return min(1.0, config.optim.grad_clip / (norm + 1e-6))


def global_batch(seed: int, step: int) -> Batch:
    """Packed documents of random lengths, with different numbers of targets in each sequence."""
    generator = torch.Generator().manual_seed(1_000 * seed + step)
    ids = torch.randint(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    density = torch.linspace(0, 0.3, GLOBAL_BATCH).unsqueeze(1)
    ends = torch.rand(GLOBAL_BATCH, SEQ_LEN, generator=generator) < density
    segments = torch.zeros(GLOBAL_BATCH, SEQ_LEN, dtype=torch.int32)
    segments[:, 1:] = ends[:, :-1].int().cumsum(dim=1)
    is_start = torch.nn.functional.pad(ends[:, :-1], (1, 0))
    places = torch.arange(SEQ_LEN)
    starts = torch.where(is_start, places, 0).cummax(dim=1).values
    return Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].masked_fill(ends, -100),
        segment_ids=segments,
        position_ids=(places - starts).int(),
    )


def micro_batches(engine: Engine, step: int) -> list[Batch]:
    """The micro-batches of the engine's rank."""
    whole, train = global_batch(engine.config.train.seed, step), engine.config.train
    share = GLOBAL_BATCH // engine.dp_size
    first = engine.dp_rank * share
    return [
        Batch(
            *(getattr(whole, field)[i : i + train.micro_batch_size] for field in Batch.__dataclass_fields__)
        )
        for i in range(first, first + share, train.micro_batch_size)
    ]


def compare(case: Case, reference: Trace, *, seed: int) -> Comparison:
    """Run one case on forked ranks and compare it with the reference trace."""
    from megatron_b2.engine import deepspeed as _imported_before_the_fork  # noqa: F401

    try:
        traces = run_ranks(case.world_size, trace_run, case.config(seed=seed), timeout=180)
    except AssertionError as error:
        infinite = float("inf")
        return Comparison(case, infinite, infinite, infinite, infinite, failure=str(error))
    difference = torch.stack([((t.steps - reference.steps) / reference.steps).abs() for t in traces])
    gradients = _differences([t.gradients for t in traces], reference.gradients)
    parameters = _differences([t.parameters for t in traces], reference.parameters)
    worst = max([*gradients.items(), *parameters.items()], key=lambda item: item[1])
    return Comparison(
        case=case,
        losses=float(difference[..., :3].max()),
        grad_norm=float(difference[..., 3].max()),
        gradients=max(gradients.values()),
        parameters=max(parameters.values()),
        worst_parameter=worst[0],
    )


def _pieces(state: LogicalState, prefix: str) -> dict[str, list[tuple[tuple[int, ...], Tensor]]]:
    return {
        name.removeprefix(prefix): [(p.offsets, p.tensor.clone()) for p in tensor.pieces if p.write]
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def _differences(
    ranks: Sequence[dict[str, list[tuple[tuple[int, ...], Tensor]]]],
    reference: dict[str, list[tuple[tuple[int, ...], Tensor]]],
) -> dict[str, float]:
    """Largest difference of each parameter; an element that no rank or two ranks hold is an infinite one."""
    found = {}
    for name, [(_, expected)] in reference.items():
        value, count = torch.zeros_like(expected), torch.zeros_like(expected)
        for offsets, tensor in itertools.chain.from_iterable(rank[name] for rank in ranks):
            index = tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
            value[index] = tensor
            count[index] += 1
        covered = bool((count == 1).all())
        found[name] = float((value - expected).abs().max()) if covered else float("inf")
    return found


def markdown_table(results: Sequence[Comparison]) -> str:
    """The measured largest differences, a row a layout."""
    lines = [
        "| layout | ranks | loss, ce, max-z (relative) | gradient norm (relative) | gradients | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(
            f"| {result.case.name} | {result.case.world_size} | {result.losses:.1e} | {result.grad_norm:.1e} "
            f"| {result.gradients:.1e} | {result.parameters:.1e} |"
        )
    return "\n".join(lines) + "\n"
