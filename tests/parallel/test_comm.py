"""What ranks can tell each other."""

from __future__ import annotations

from typing import Any

from megatron_b2.parallel.comm import Comm, ProcessGroupComm, SingleComm
from megatron_b2.testing.fork import run_ranks


def talk(comm: Comm) -> tuple[Any, ...]:
    return (
        comm.all_gather_object({"rank": comm.rank}),
        comm.gather_object((comm.rank, "x")),
        comm.broadcast_object([f"from {comm.rank}"]),
        comm.all_reduce_max(comm.rank),
    )


def test_ranks_of_a_process_group() -> None:
    everyone = [{"rank": rank} for rank in range(3)]
    gathered = [(rank, "x") for rank in range(3)]
    assert run_ranks(3, lambda: talk(ProcessGroupComm())) == [
        (everyone, gathered, ["from 0"], 2),
        (everyone, None, ["from 0"], 2),
        (everyone, None, ["from 0"], 2),
    ]


def test_one_process() -> None:
    assert talk(SingleComm()) == ([{"rank": 0}], [(0, "x")], ["from 0"], 0)
