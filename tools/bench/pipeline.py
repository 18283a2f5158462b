"""Our pipeline runner against torch.distributed.pipelining on two ranks with the same stages.

Both run the same two stages of the toy model, forward and backward of all micro-batches without an optimizer,
on two forked gloo ranks of one thread each, in turns. Before the clock starts their gradients are compared.
The last row has no pipeline: each rank computes its own stage on inputs it already has and sends nothing; a
1F1B schedule of M micro-batches on 2 stages cannot take less than (M + 1) / M of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from layouts.turns import in_turns, markdown_table, write_json
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from megatron_b2.config import load_config
from megatron_b2.config.schema import ModelConfig
from megatron_b2.model.init import initial_value
from megatron_b2.model.model import BaichuanModel
from megatron_b2.pipeline.partition import stage_layers
from megatron_b2.pipeline.runner import PipelineRunner
from megatron_b2.pipeline.schedule import ScheduleName
from megatron_b2.testing.fork import run_ranks
from megatron_b2.testing.measure import machine

RANKS = 2
THEIRS, OURS, ZERO_BUBBLE = "torch 1F1B", "ours 1F1B", "ours zero bubble"
ALONE = "stages alone, no messages"


@dataclass(frozen=True)
class Options:
    """Shapes beside the toy preset's."""

    micro_batches: tuple[int, ...] = (4, 16)
    """Micro-batches of a step; one table each."""
    micro_batch_size: int = 1
    seq_len: int = 256
    rounds: int = 9
    out: Path = Path("runs/bench/pipeline.json")


class Problem:
    """This rank's stage and the micro-batches of a step."""

    def __init__(self, model: ModelConfig, options: Options, num_micro: int) -> None:
        self.rank = dist.get_rank()
        self.is_last = self.rank == RANKS - 1
        self.stage = BaichuanModel(model, stage=stage_layers(model, RANKS)[self.rank])
        with torch.no_grad():
            for name, parameter in self.stage.named_parameters():
                parameter.copy_(initial_value(name, parameter.shape, std=model.init_std, seed=0))
        rows = options.micro_batch_size * num_micro
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.vocab_size, (rows, options.seq_len + 1), generator=generator)
        self.ids, self.labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        self.num_micro, self.scale = num_micro, 1 / self.ids.numel()
        self.shape = (options.micro_batch_size, options.seq_len, model.hidden_size)

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of the last stage's output."""
        total: Tensor = self.stage.head(hidden, labels, self.scale, 0.0).total
        return total

    def forget_gradients(self) -> None:
        for parameter in self.stage.parameters():
            parameter.grad = None

    def gradients(self, call: Callable[[], object]) -> dict[str, Tensor]:
        call()
        return {name: p.grad for name, p in self.stage.named_parameters() if p.grad is not None}


Prepared = tuple[Problem, Callable[[], object]]


class Hidden(nn.Module):
    """The stage as torch.distributed.pipelining wants it: one tensor in, one out, the loss outside."""

    def __init__(self, stage: BaichuanModel) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        return self.stage.hidden_states(x)


def theirs(problem: Problem) -> Callable[[], object]:
    hidden = torch.zeros(problem.shape, requires_grad=True)
    first = problem.ids[: problem.shape[0]]
    stage = PipelineStage(
        Hidden(problem.stage),
        problem.rank,
        RANKS,
        torch.device("cpu"),
        input_args=(hidden if problem.rank else first,),
        output_args=(hidden,),
    )
    schedule = Schedule1F1B(stage, n_microbatches=problem.num_micro, loss_fn=problem.loss, scale_grads=False)
    inputs = () if problem.rank else (problem.ids,)
    target = problem.labels if problem.is_last else None
    return lambda: schedule.step(*inputs, target=target, return_outputs=False)


def forward_of(problem: Problem) -> Callable[[int, int, Tensor | None], Tensor]:
    ids, labels = problem.ids.chunk(problem.num_micro), problem.labels.chunk(problem.num_micro)

    def forward(_chunk: int, micro: int, x: Tensor | None) -> Tensor:
        out = problem.stage.hidden_states(ids[micro] if x is None else x)
        return problem.loss(out, labels[micro]) if problem.is_last else out

    return forward


def ours(problem: Problem, schedule: ScheduleName) -> Callable[[], object]:
    runner = PipelineRunner(
        schedule=schedule,
        rank=problem.rank,
        num_ranks=RANKS,
        group=dist.group.WORLD,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    forward = forward_of(problem)
    return lambda: runner.run(forward, num_micro=problem.num_micro, shape=problem.shape)


def alone(problem: Problem) -> Callable[[], object]:
    forward = forward_of(problem)
    given = torch.randn(problem.shape)

    def call() -> None:
        for micro in range(problem.num_micro):
            x = given.clone().requires_grad_() if problem.rank else None
            out = forward(0, micro, x)
            out.backward(None if problem.is_last else given)

    return call


def candidates(model: ModelConfig, options: Options, num_micro: int) -> dict[str, Callable[[], Prepared]]:
    """What a rank runs, by name: functions that make the problem and its step."""

    def prepare(make: Callable[[Problem], Callable[[], object]]) -> Callable[[], Prepared]:
        def prepared() -> Prepared:
            problem = Problem(model, options, num_micro)
            return problem, make(problem)

        return prepared

    return {
        THEIRS: prepare(theirs),
        OURS: prepare(lambda problem: ours(problem, "1f1b")),
        ZERO_BUBBLE: prepare(lambda problem: ours(problem, "zero_bubble")),
        ALONE: prepare(alone),
    }


def check_gradients(made: Mapping[str, Callable[[], Prepared]]) -> None:
    """The three pipelines must compute the same."""

    def gradients(prepare: Callable[[], Prepared]) -> dict[str, Tensor]:
        problem, call = prepare()
        return problem.gradients(call)

    expected = run_ranks(RANKS, gradients, made[THEIRS])
    for name in (OURS, ZERO_BUBBLE):
        for found, reference in zip(run_ranks(RANKS, gradients, made[name]), expected, strict=True):
            assert found.keys() == reference.keys()
            for parameter, gradient in reference.items():
                torch.testing.assert_close(found[parameter], gradient, rtol=1e-5, atol=1e-7, msg=parameter)


def forgetting(prepare: Callable[[], Prepared]) -> Callable[[], Callable[[], None]]:
    """The step alone; it leaves no gradients."""

    def prepared() -> Callable[[], None]:
        problem, call = prepare()

        def step() -> None:
            call()
            problem.forget_gradients()

        return step

    return prepared


def main() -> None:
    """Run the benchmark, print the tables, write the JSON."""
    options = tyro.cli(Options, description=__doc__)
    model = load_config("preset:toy").config.model
    facts, tables = machine("torch"), {}
    print(facts)
    for num_micro in options.micro_batches:
        made = candidates(model, options, num_micro)
        check_gradients(made)
        rows = in_turns(
            RANKS, {name: forgetting(prepare) for name, prepare in made.items()}, rounds=options.rounds
        )
        title = (
            f"{RANKS} ranks, {num_micro} micro-batches of {options.micro_batch_size} x {options.seq_len} "
            f"tokens, {options.rounds} rounds, {model}"
        )
        tables[title] = rows
        tokens = num_micro * options.micro_batch_size * options.seq_len
        print(f"\n{title}\n\n{markdown_table(rows, baseline=THEIRS, tokens=tokens)}")
    write_json(options.out, facts=facts, tables=tables)


if __name__ == "__main__":
    main()
