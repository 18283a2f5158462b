"""Tiny runs for the engine tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_b2.checkpoint.logical import LogicalState
from megatron_b2.config.schema import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.base import Engine
from megatron_b2.engine.build import build_engine, initialize_engine
from megatron_b2.parallel.comm import ProcessGroupComm, SingleComm

STEPS, GLOBAL_BATCH, SEQ_LEN, VOCAB = 10, 8, 24, 128
MAX_LR = 5e-4


def run_config(
    *, position: str = "rope", zero: int | None = None, layout: dict[str, Any] | None = None, **train: Any
) -> RunConfig:
    """zero is none for the single engine; layout: settings of ParallelConfig."""
    parallel = (
        ParallelConfig()
        if zero is None
        else ParallelConfig(engine="deepspeed", zero_stage=zero, **(layout or {}))
    )
    settings = dict(steps=STEPS, global_batch_size=GLOBAL_BATCH, micro_batch_size=2, seed=7) | train
    return RunConfig(
        model=ModelConfig(
            hidden_size=40, ffn_hidden_size=56, num_layers=2, num_heads=5, vocab_size=VOCAB, position=position
        ),
        optim=OptimConfig(max_lr=MAX_LR, warmup_steps=4),
        train=TrainConfig(**settings),
        parallel=parallel,
    )


def global_batch(step: int) -> Batch:
    """Packed documents with ignored targets: uneven numbers of targets in the micro-batches."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    ends = (
        torch.rand(GLOBAL_BATCH, SEQ_LEN, generator=generator) < torch.linspace(0, 0.4, GLOBAL_BATCH)[:, None]
    )
    labels = ids[:, 1:].masked_fill(ends, -100)
    segments = torch.zeros_like(labels, dtype=torch.int32)
    segments[:, 1:] = ends[:, :-1].int().cumsum(1)
    starts = (
        torch.where(torch.nn.functional.pad(ends[:, :-1], (1, 0)), torch.arange(SEQ_LEN), 0).cummax(1).values
    )
    return Batch(ids[:, :-1].contiguous(), labels, segments, (torch.arange(SEQ_LEN) - starts).int())


def micro_batches(step: int, engine: Engine) -> list[Batch]:
    batch, share = global_batch(step), GLOBAL_BATCH // engine.dp_size
    first = engine.dp_rank * share
    size = engine.config.train.micro_batch_size
    return [
        Batch(
            *(getattr(batch, f)[i : i + size] for f in ("input_ids", "labels", "segment_ids", "position_ids"))
        )
        for i in range(first, first + share, size)
    ]


@dataclass
class Trace:
    """What a run left: per-step (loss, ce, max_z, grad norm) and this rank's pieces of the final state."""

    steps: list[tuple[float, float, float, float]]
    state: dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], Tensor]]]]


def make_engine(config: RunConfig) -> Engine:
    comm = SingleComm() if config.parallel.engine == "single" else ProcessGroupComm()
    engine = build_engine(config, comm=comm, device=torch.device("cpu"))
    initialize_engine(engine, seed=config.train.seed)
    return engine


def train(engine: Engine, first: int, last: int) -> list[tuple[float, float, float, float]]:
    """Steps first..last inclusive, 1-based."""
    rows = []
    for step in range(first, last + 1):
        out = engine.train_step(micro_batches(step, engine), lr=MAX_LR * min(1, step / 4), step=step)
        rows.append(tuple(float(x) for x in (out.loss, out.ce, out.max_z, out.grad_norm)))
    return rows


def pieces(state: LogicalState) -> dict[str, Any]:
    return {
        name: (
            tensor.shape,
            [(piece.offsets, piece.tensor.clone()) for piece in tensor.pieces if piece.write],
        )
        for name, tensor in state.items()
    }


def run(config: RunConfig) -> Trace:
    engine = make_engine(config)
    steps = train(engine, 1, config.train.steps)
    return Trace(steps, pieces(engine.logical_state()))


def assemble(traces: list[Trace]) -> dict[str, Tensor]:
    """Full tensors from the pieces of all ranks; every element must be there exactly once."""
    full: dict[str, Tensor] = {}
    for name in traces[0].state:
        shape = traces[0].state[name][0]
        value, count = torch.zeros(shape), torch.zeros(shape)
        for trace in traces:
            for offsets, tensor in trace.state[name][1]:
                index = tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
                value[index] = tensor
                count[index] += 1
        assert bool((count == 1).all()), f"{name}: elements written {count.unique().tolist()} times"
        full[name] = value
    return full
