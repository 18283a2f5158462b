"""What an engine adds to the bare math of a training step, on one process.

Bare: forward and backward of every micro-batch through BaichuanModel, torch's clipping and torch's AdamW, as
one would write it by hand. The single engine and the DeepSpeed engine (ZeRO, one gloo rank) also count
targets, watch for non-finite values, leave breadcrumbs for the watchdog and keep losses; DeepSpeed also
copies gradients into its own buffers. Same weights, same token ids, in turns, each in its own process; before
the clock starts, three steps of all must have the same losses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import tyro
from torch import nn

from megatron_b2.config import load_config
from megatron_b2.config.schema import ParallelConfig, RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.build import build_engine, initialize_engine
from megatron_b2.model.init import initial_value
from megatron_b2.model.model import BaichuanModel
from megatron_b2.parallel.comm import Comm, SingleComm
from megatron_b2.parallel.launch import LaunchEnvironment, initialize_distributed
from megatron_b2.testing.fork import run_ranks
from megatron_b2.testing.measure import compare, machine, markdown_table, write_report

SEED, LR = 0, 1e-3
BARE, SINGLE = "bare", "single"


@dataclass(frozen=True)
class Options:
    """Shapes beside the toy preset's (4 layers, hidden 256, sequences of 256 tokens)."""

    micro_batch: int = 4
    micro_batches: int = 2
    zero_stages: tuple[int, ...] = (1,)
    rounds: int = 15
    out: Path = Path("runs/bench/engine_overhead.json")


def run_config(options: Options, zero_stage: int | None = None) -> RunConfig:
    toy = load_config("preset:toy").config
    rows = options.micro_batch * options.micro_batches
    parallel = (
        ParallelConfig(engine="single")
        if zero_stage is None
        else ParallelConfig(engine="deepspeed", zero_stage=zero_stage)
    )
    train = replace(toy.train, global_batch_size=rows, micro_batch_size=options.micro_batch)
    return replace(toy, train=train, parallel=parallel)


def batches(config: RunConfig) -> list[Batch]:
    """The micro-batches of a step: one document a row."""
    shape = (config.train.global_batch_size, config.data.seq_len + 1)
    ids = torch.randint(0, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(config.data.seq_len, dtype=torch.int32)
    return [
        Batch(
            rows[:, :-1].contiguous(),
            rows[:, 1:].contiguous(),
            torch.zeros(len(rows), config.data.seq_len, dtype=torch.int32),
            positions.expand(len(rows), -1),
        )
        for rows in ids.split(config.train.micro_batch_size)
    ]


def bare(config: RunConfig) -> Callable[[], float]:
    model = BaichuanModel(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, parameter.shape, std=config.model.init_std, seed=SEED))
    norms = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": norms, "weight_decay": 0.0}],
        lr=LR,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    micro = batches(config)
    scale = 1 / sum(batch.labels.numel() for batch in micro)
    z_scale = config.train.max_z_weight * scale

    def call() -> float:
        loss = torch.zeros(())
        for batch in micro:
            out = model(
                batch.input_ids,
                batch.labels,
                segment_ids=batch.segment_ids,
                position_ids=batch.position_ids,
                ce_scale=scale,
                z_scale=z_scale,
            )
            out.total.backward()
            loss += out.total.detach()
        nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return call


def engine(config: RunConfig) -> Callable[[], float]:
    comm: Comm = SingleComm()
    if config.parallel.engine == "deepspeed":
        alone = LaunchEnvironment.detect({})
        alone.export()
        comm = initialize_distributed(alone, timeout=timedelta(minutes=5))
    built = build_engine(config, comm=comm, device=torch.device("cpu"))
    initialize_engine(built, seed=SEED)
    micro = batches(config)
    return lambda: built.train_step(micro, lr=LR, step=1).loss.item()


def candidates(options: Options) -> dict[str, Callable[[], Callable[[], float]]]:
    calls = {
        BARE: lambda: bare(run_config(options)),
        SINGLE: lambda: engine(run_config(options)),
    }
    for stage in options.zero_stages:
        calls[f"deepspeed ZeRO-{stage}"] = lambda stage=stage: engine(run_config(options, stage))
    return calls


def check_losses(options: Options) -> None:
    """Three steps of every candidate, each in its own process, have the same losses."""

    def losses(prepare: Callable[[], Callable[[], float]]) -> torch.Tensor:
        call = prepare()
        return torch.tensor([call() for _ in range(3)])

    found = {name: run_ranks(1, losses, prepare)[0] for name, prepare in candidates(options).items()}
    for name, values in found.items():
        torch.testing.assert_close(values, found[BARE], rtol=1e-5, atol=0, msg=f"{name}: {found}")


def main() -> None:
    """Run the benchmark, print the table, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    check_losses(options)
    rows = compare(candidates(options), rounds=options.rounds, warmup=2)
    facts, config = machine("torch", "deepspeed"), run_config(options)
    seq_len = config.data.seq_len
    title = (
        f"{options.micro_batches} micro-batches of {options.micro_batch} x {seq_len} tokens, "
        f"{options.rounds} rounds, {config.model}"
    )
    tokens = config.train.global_batch_size * seq_len
    print(f"{title} · {facts}\n\n{markdown_table(rows, baseline=BARE, tokens=tokens)}")
    write_report(options.out, facts=facts, rows={title: rows})


if __name__ == "__main__":
    main()
