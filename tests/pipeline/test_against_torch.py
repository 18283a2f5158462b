"""torch.distributed.pipelining, given the same stages, gives the same losses and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from megatron_b2.testing.fork import run_ranks
from tests.pipeline.test_runner import Rank, make_runner
from tests.pipeline.toy import SHAPE, gradients, micro_batches

THEIRS = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}


class OneInput(torch.nn.Module):
    """Their stages hand over tensors only and compute the loss outside, so the labels are looked up here."""

    def __init__(self, stage: torch.nn.Module, num_micro: int) -> None:
        super().__init__()
        self.stage, self.labels, self.count = stage, micro_batches(num_micro), 0

    def forward(self, x: Tensor) -> Tensor:
        labels = self.labels[self.count % len(self.labels)][1]
        self.count += 1
        out: Tensor = self.stage(x, labels)
        return out.reshape(1) if self.stage.last else out


def theirs(schedule: str, num_ranks: int, num_chunks: int, num_micro: int) -> tuple[list, dict[str, Tensor]]:
    rank = Rank(num_ranks, num_chunks, num_micro)
    stages = []
    for chunk, stage in enumerate(rank.stages):
        index = chunk * num_ranks + dist.get_rank()
        ids = torch.zeros(SHAPE[:2], dtype=torch.int64)
        inputs = ids if stage.first else torch.zeros(SHAPE, requires_grad=True)
        outputs = torch.zeros(1 if stage.last else SHAPE, requires_grad=True)
        stages.append(
            PipelineStage(
                OneInput(stage, num_micro), index, num_ranks * num_chunks, torch.device("cpu"),
                input_args=(inputs,), output_args=(outputs,),
            )
        )  # fmt: skip
    runner = THEIRS[schedule](
        stages if schedule == "interleaved" else stages[0],
        n_microbatches=num_micro,
        loss_fn=lambda out, target: out.sum(),
        scale_grads=False,
    )
    losses: list[Tensor] = []
    ids = torch.cat([ids for ids, _ in micro_batches(num_micro)])
    inputs = (ids,) if dist.get_rank() == 0 else ()
    target = torch.zeros(num_micro) if dist.get_rank() == num_ranks - 1 else None
    runner.step(*inputs, target=target, losses=losses if target is not None else None)
    return [loss.detach() for loss in losses], gradients(rank.stages)


def ours(schedule: str, num_ranks: int, num_chunks: int, num_micro: int) -> tuple[list, dict[str, Tensor]]:
    rank = Rank(num_ranks, num_chunks, num_micro)
    losses = make_runner(schedule, num_ranks, num_chunks).run(rank, num_micro=num_micro, shape=SHAPE)
    return losses, gradients(rank.stages)


@pytest.mark.parametrize(
    ("schedule", "num_ranks", "num_chunks"),
    [("gpipe", 2, 1), ("1f1b", 2, 1), ("interleaved", 2, 2), ("1f1b", 4, 1), ("interleaved", 4, 2)],
)
def test_same_losses_and_gradients(schedule: str, num_ranks: int, num_chunks: int) -> None:
    def both():
        arguments = (schedule, num_ranks, num_chunks, 8)
        return theirs(*arguments), ours(*arguments)

    for (their_losses, their_gradients), (our_losses, our_gradients) in run_ranks(num_ranks, both):
        assert our_gradients.keys() == their_gradients.keys()
        for name, gradient in their_gradients.items():
            assert torch.equal(our_gradients[name], gradient), name
        assert torch.equal(torch.tensor(our_losses), torch.tensor(their_losses))
