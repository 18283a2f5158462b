"""The layout matrix: train a tiny model in every legal layout and compare it with one process.

Compared are, over 5 optimizer steps, loss, cross-entropy, max-z and gradient norm; after the first step every
parameter's gradient (AdamW's first moment then is (1 - beta1) times the clipped gradient, in every layout);
after the last step every parameter. All fp32, on forked CPU processes.

What must be refused is written down here a second time (`broken_rules`), so that a rule of `config` that was
lost is noticed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal

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
STEPS, GLOBAL_BATCH, SEQ_LEN = 5, 8, 32
FFN, LAYERS, VOCAB = 48, 8, 128
HPZ = 2
LEARNING_RATE = 3e-4
EPSILON = 1e-6
"""Of AdamW. With 1e-8, an element whose gradient is almost 0 moves by how its sum was rounded: up to 9e-6."""

Style = Literal["7b", "13b"]

HEADS: Final[Mapping[Style, int]] = {"7b": 8, "13b": 40}


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
    context_method: Literal["auto", "ulysses", "ring"] = "auto"
    recompute: Literal["none", "selective", "full"] = "none"
    micro_batch: int = 1
    """Sequences a forward pass; the reference always runs one."""

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def virtual_stages(self) -> int:
        """Chunks of layers a pipeline rank holds."""
        return 2 if self.schedule == "interleaved" else 1

    @property
    def heads(self) -> int:
        """Attention heads of the model."""
        return HEADS[self.style]

    @property
    def global_batch(self) -> int:
        """Sequences a step: twice as many where else no schedule would have a steady state."""
        micro_batches = GLOBAL_BATCH // (self.micro_batch * self.data)
        return GLOBAL_BATCH if self.pipeline == 1 or micro_batches > self.pipeline else 2 * GLOBAL_BATCH

    @property
    def name(self) -> str:
        """Short text for tables."""
        parts = [self.style, f"tp{self.tensor}", f"pp{self.pipeline}", f"dp{self.data}", f"cp{self.context}"]
        parts += ["sp"] if self.sequence_parallel else []
        parts += [self.schedule] if self.pipeline > 1 or self.schedule != "1f1b" else []
        parts += [f"zero{self.zero_stage}" + ("+hpz" if self.hpz else "")]
        parts += [self.context_method] if self.context_method != "auto" else []
        parts += [f"recompute-{self.recompute}"] if self.recompute != "none" else []
        parts += [f"mb{self.micro_batch}"] if self.micro_batch > 1 else []
        return " ".join(parts)

    def config(self, *, seed: int) -> RunConfig:
        """The run of this case."""
        whole = reference_config(self.style, seed=seed, global_batch=self.global_batch)
        return replace(
            whole,
            train=replace(whole.train, recompute=self.recompute, micro_batch_size=self.micro_batch),
            parallel=ParallelConfig(
                engine="deepspeed",
                zero_stage=self.zero_stage,  # type: ignore[arg-type]
                tensor=self.tensor,
                context=self.context,
                pipeline=self.pipeline,
                sequence_parallel=self.sequence_parallel,
                context_method=self.context_method,
                schedule=self.schedule,
                virtual_stages=self.virtual_stages,
                hpz=HPZ if self.hpz else 1,
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
        """Whether all are within the tolerance; NaN is not."""
        found = (self.losses, self.grad_norm, self.gradients, self.parameters)
        return all(difference <= TOLERANCE for difference in found)

    def describe(self) -> str:
        """One line for people."""
        if self.failure:
            return f"FAILED: {self.failure}"
        verdict = "ok" if self.passed else f"DIFFERS in {self.worst_parameter}"
        return (
            f"loss {self.losses:.1e}  norm {self.grad_norm:.1e}  gradients {self.gradients:.1e}  "
            f"parameters {self.parameters:.1e}  {verdict}"
        )


def reference_config(style: Style, *, seed: int, global_batch: int = GLOBAL_BATCH) -> RunConfig:
    """The same run on one process."""
    heads = HEADS[style]
    return RunConfig(
        model=ModelConfig(
            hidden_size=4 * heads,
            ffn_hidden_size=FFN,
            num_layers=LAYERS,
            num_heads=heads,
            vocab_size=VOCAB,
            position="rope" if style == "7b" else "alibi",
        ),
        data=DataConfig(seq_len=SEQ_LEN),
        optim=OptimConfig(max_lr=LEARNING_RATE, warmup_steps=1, eps=EPSILON),
        train=TrainConfig(steps=STEPS, global_batch_size=global_batch, micro_batch_size=1, seed=seed),
    )


EXTRA_CASES: Final = (
    # Ring attention, of packed documents as all of the matrix.
    Case("7b", 2, 1, 1, 2, True, 1, False, "1f1b", context_method="ring", micro_batch=2),
    Case("13b", 2, 1, 1, 4, True, 2, False, "1f1b", context_method="ring"),
    Case("7b", 1, 1, 1, 4, False, 3, False, "1f1b", context_method="ring"),
    # Secondary shards over context-parallel ranks.
    Case("13b", 1, 1, 2, 2, False, 3, True, "1f1b"),
    # Recomputation where parameters are gathered again, where ranks talk again, where backward is split.
    Case("7b", 1, 1, 2, 1, False, 3, False, "1f1b", recompute="full"),
    Case("13b", 1, 1, 2, 1, False, 3, False, "1f1b", recompute="selective"),
    Case("7b", 2, 1, 1, 1, True, 0, False, "1f1b", recompute="full"),
    Case("13b", 2, 1, 1, 1, True, 1, False, "1f1b", recompute="selective", micro_batch=2),
    Case("13b", 1, 1, 1, 2, False, 1, False, "1f1b", context_method="ring", recompute="full"),
    Case("7b", 1, 1, 1, 2, False, 2, False, "1f1b", recompute="selective"),
    Case("7b", 1, 2, 1, 1, False, 1, False, "zero_bubble", recompute="full"),
    Case("13b", 1, 2, 1, 1, False, 0, False, "zero_bubble", recompute="selective"),
)
"""Beside the full product: settings that would multiply it."""


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
        schedule_matters = case.pipeline > 1 or case.schedule != "gpipe"  # then it means nothing
        if case.world_size <= MAX_RANKS and schedule_matters:
            yield case


def refusals(case: Case, *, seed: int = 0) -> list[str]:
    """Why a case is not legal; empty if it is."""
    return find_problems(case.config(seed=seed), world_size=case.world_size)


def broken_rules(case: Case) -> list[str]:
    """Rules of docs/layouts.md that a case breaks, from nothing but the case: `refusals` must agree."""
    micro, rest = divmod(case.global_batch, case.micro_batch * case.data)
    length, broken_context = divmod(SEQ_LEN, case.context)
    replicas, heads = case.data * case.context, case.heads // case.tensor
    broken = {
        "tensor divides heads, FFN and vocabulary": any(n % case.tensor for n in (case.heads, FFN, VOCAB)),
        "sequence parallelism needs tensor": case.sequence_parallel and case.tensor == 1,
        "sequence parallelism splits equally": case.sequence_parallel and length % case.tensor > 0,
        "context divides the sequence": broken_context > 0,
        "ulysses divides heads": case.context_method == "ulysses" and heads % case.context > 0,
        "a pipeline needs ZeRO-0 or 1": case.pipeline > 1 and case.zero_stage > 1,
        "a pipeline needs micro-batches": micro < case.pipeline,
        "every stage needs a layer": case.pipeline * case.virtual_stages > LAYERS,
        "interleaved needs a pipeline": case.schedule == "interleaved" and case.pipeline == 1,
        "interleaved needs whole rounds": case.schedule == "interleaved" and micro % case.pipeline > 0,
        "zero-bubble needs a pipeline": case.schedule == "zero_bubble" and case.pipeline == 1,
        "hpZ needs ZeRO-3": case.hpz and case.zero_stage != 3,
        "hpZ needs pipeline = 1": case.hpz and case.pipeline > 1,
        "hpZ needs tensor = 1": case.hpz and case.tensor > 1,
        "hpZ divides data x context": case.hpz and replicas % HPZ > 0,
        "micro-batches divide the batch": rest > 0,
    }
    return [rule for rule, is_broken in broken.items() if is_broken]


def wrong_refusals() -> list[str]:
    """Cases that should be refused and are not, or are and should not be; empty if all is well."""
    found = []
    for case in (*cases(), *EXTRA_CASES):
        broken, refused = broken_rules(case), refusals(case)
        if broken and not refused:
            found.append(f"{case.name} is not refused, but: {', '.join(broken)}")
        if refused and not broken:
            found.append(f"{case.name} breaks no rule and is refused: {'; '.join(refused)}")
    return found


def legal_cases() -> list[Case]:
    """The cases that must work."""
    product = [case for case in cases() if case.world_size > 1 and not refusals(case)]
    return [*product, *(case for case in EXTRA_CASES if case not in product)]


def covering_cases(candidates: Sequence[Case], *, seed: int) -> list[Case]:
    """A subset in which every pair of values that occurs together in `candidates` occurs at least once, and
    every candidate that is in EXTRA_CASES."""
    pool = list(candidates)
    random.Random(seed).shuffle(pool)
    chosen = [case for case in pool if case in EXTRA_CASES]
    missing = set().union(*map(_pairs, candidates)) - set().union(*map(_pairs, chosen))
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


def reference_traces(chosen: Iterable[Case], *, seed: int) -> dict[tuple[Style, int], Trace]:
    """What `chosen` cases are compared with, by style and global batch."""
    return {
        (style, size): trace_run(reference_config(style, seed=seed, global_batch=size))
        for style, size in sorted({(case.style, case.global_batch) for case in chosen})
    }


def clip_factor(norm: float, config: RunConfig) -> float:
    """What clipping multiplied the gradient by."""
    return min(1.0, config.optim.grad_clip / (norm + 1e-6))


def global_batch(config: RunConfig, step: int) -> Batch:
    """Packed documents of random lengths, with different numbers of targets in each sequence."""
    rows, length = config.train.global_batch_size, config.data.seq_len
    generator = torch.Generator().manual_seed(1_000 * config.train.seed + step)
    ids = torch.randint(0, config.model.vocab_size, (rows, length + 1), generator=generator)
    density = torch.linspace(0, 0.3, rows).unsqueeze(1)
    ends = torch.rand(rows, length, generator=generator) < density
    segments = torch.zeros(rows, length, dtype=torch.int32)
    segments[:, 1:] = ends[:, :-1].int().cumsum(dim=1)
    is_start = torch.nn.functional.pad(ends[:, :-1], (1, 0))
    places = torch.arange(length)
    starts = torch.where(is_start, places, 0).cummax(dim=1).values
    return Batch(
        input_ids=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].masked_fill(ends, -100),
        segment_ids=segments,
        position_ids=(places - starts).int(),
    )


def micro_batches(engine: Engine, step: int) -> list[Batch]:
    """The micro-batches of the engine's rank."""
    whole, train = global_batch(engine.config, step), engine.config.train
    share = train.global_batch_size // engine.dp_size
    first = engine.dp_rank * share
    return [
        Batch(
            *(getattr(whole, field)[i : i + train.micro_batch_size] for field in Batch.__dataclass_fields__)
        )
        for i in range(first, first + share, train.micro_batch_size)
    ]


def compare(case: Case, references: Mapping[tuple[Style, int], Trace], *, seed: int) -> Comparison:
    """Run one case on forked ranks and compare it with its trace of `reference_traces`."""
    from megatron_b2.engine import deepspeed as _imported_before_the_fork  # noqa: F401

    reference = references[case.style, case.global_batch]
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
        losses=_largest(difference[..., :3]),
        grad_norm=_largest(difference[..., 3]),
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


def _largest(difference: Tensor) -> float:
    """Of differences; NaN is an infinite one, since comparisons with NaN are lost on `max`."""
    return float(difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max())


def _differences(
    ranks: Sequence[dict[str, list[tuple[tuple[int, ...], Tensor]]]],
    reference: dict[str, list[tuple[tuple[int, ...], Tensor]]],
) -> dict[str, float]:
    """Largest difference of each parameter; NaN, or an element that no rank or two hold, is infinite."""
    found = {}
    for name, [(_, expected)] in reference.items():
        value, count = torch.zeros_like(expected), torch.zeros_like(expected)
        for offsets, tensor in itertools.chain.from_iterable(rank[name] for rank in ranks):
            index = tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
            value[index] = tensor
            count[index] += 1
        covered = bool((count == 1).all())
        found[name] = _largest((value - expected).abs()) if covered else float("inf")
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
