"""Who is to blame for what the ranks say, and how it is told: pure functions."""

from __future__ import annotations

import time

from megatron_b2.parallel.breadcrumbs import Crumb
from megatron_b2.parallel.diagnosis import (
    Collective,
    Limits,
    RankState,
    diagnose,
    fault_of,
    spans,
    summary,
    table,
)
from megatron_b2.parallel.heartbeat import Witness, answer, read_answer


def state(rank: int, *, counts: dict[str, int] | None = None, **changes: object) -> RankState:
    """A rank of four that was heard just now and has not moved for 100 s."""
    shared = tuple(Collective(name, (0, 1, 2, 3), count) for name, count in (counts or {}).items())
    settings = {"host": f"n{rank // 2}", "pid": 100 + rank, "heard": 100.0, "moved": 0.0} | changes
    settings.setdefault("crumb", Crumb(step=5, operation="training step", patient=False))
    return RankState(rank=rank, collectives=shared, **settings)


def blame(states: list[RankState]) -> tuple[str, list[int], dict[int, tuple[int, ...]]]:
    found = diagnose(states, now=100.0, limits=Limits(10, 20))
    assert len({culprit.fault for culprit in found.culprits}) == 1
    return found.culprits[0].fault, [c.rank for c in found.culprits], dict(found.missing)


def test_limits() -> None:
    limits = Limits(10, 20)
    now = 100.0
    early = Crumb(patient=True)
    assert fault_of(state(0, moved=89), now=now, limits=limits) == "stalled"
    assert fault_of(state(0, moved=91), now=now, limits=limits) is None
    assert fault_of(state(0, moved=81, crumb=early), now=now, limits=limits) is None
    assert fault_of(state(0, moved=79, crumb=early), now=now, limits=limits) == "stalled"
    assert fault_of(state(0, heard=89, crumb=early), now=now, limits=limits) == "silent"
    assert fault_of(state(0, fate="left", heard=0), now=now, limits=limits) is None


def test_who_has_not_entered_the_collective_is_to_blame() -> None:
    states = [state(rank, counts={"0": 7 if rank == 2 else 8}) for rank in range(4)]
    assert blame(states) == ("stalled", [2], {0: (2,), 1: (2,), 3: (2,)})


def test_chains_lead_to_their_end() -> None:
    """3 waits for 1 in a collective, 1 waits for 0 point to point, 2 for 3."""
    crumbs = [Crumb(step=5, peers=peers, patient=False) for peers in ((), (0,), (3,), ())]
    states = [state(rank, crumb=crumbs[rank], counts={"0": 8 if rank == 3 else 7}) for rank in range(4)]
    fault, ranks, missing = blame(states)
    assert (fault, missing[1], missing[2]) == ("stalled", (0,), (3,))
    assert ranks == [0]


def test_who_is_missing_among_ranks_that_name_all_others_is_to_blame() -> None:
    """A sum over a group whose calls are not counted."""
    peers = [tuple({0, 1, 2, 3} - {rank}) if rank != 2 else () for rank in range(4)]
    states = [state(rank, crumb=Crumb(step=5, peers=peers[rank], patient=False)) for rank in range(4)]
    assert blame(states)[:2] == ("stalled", [2])


def told(states: list[RankState]) -> str:
    return summary(diagnose(states, now=100.0, limits=Limits(10, 20)), states)


def waiting_for(*peers: tuple[int, ...]) -> list[RankState]:
    return [state(rank, crumb=Crumb(step=5, peers=them, patient=False)) for rank, them in enumerate(peers)]


def test_a_ring_that_waits_for_itself_is_named_as_a_whole() -> None:
    states = waiting_for((1,), (2,), (3,), (0,))
    assert blame(states)[:2] == ("stalled", [0, 1, 2, 3])
    lines = told(states).splitlines()
    assert lines[4:] == [
        "waiting in a circle: rank 0 for rank 1, rank 1 for rank 2, rank 2 for rank 3, rank 3 for rank 0: "
        "calls in a different order, or a lost message"
    ]


def test_who_only_waits_for_a_circle_is_not_in_it() -> None:
    """3 waits for 2, and 2 for two ranks that wait for each other."""
    states = waiting_for((1,), (0,), (0,), (2,))
    assert blame(states)[:2] == ("stalled", [0, 1])
    *_, circle, second, third = told(states).splitlines()
    assert circle.startswith("waiting in a circle: rank 0 for rank 1, rank 1 for rank 0: ")
    assert second == "rank 2: step 5, in 'starting', waiting for rank 0"
    assert third == "rank 3: step 5, in 'starting', waiting for rank 2"


def test_ranks_that_all_wait_for_all_others_are_a_circle() -> None:
    states = waiting_for(*(tuple({0, 1, 2, 3} - {rank}) for rank in range(4)))
    assert blame(states)[:2] == ("stalled", [0, 1, 2, 3])
    assert "waiting in a circle: rank 0 for ranks 1-3, rank 1 for ranks 0, 2-3, " in told(states)


def test_a_large_circle_is_told_briefly() -> None:
    states = [
        RankState(rank=rank, host="n", pid=rank, heard=100.0, moved=0.0, crumb=crumb)
        for rank, crumb in enumerate(
            Crumb(step=5, peers=((rank + 1) % 1_024,), patient=False) for rank in range(1_024)
        )
    ]
    text = told(states)
    assert ", rank 7 for rank 8 and 1016 more: " in text
    assert len(text) < 1_500


def test_ranks_without_a_reason_to_wait_are_no_circle() -> None:
    text = told([state(rank, counts={"0": 8}) for rank in range(4)])
    assert "circle" not in text
    assert text.endswith("no rank is behind the others: suspect the network, or calls in a different order")


def test_without_other_evidence_the_earlier_step_is_to_blame() -> None:
    states = [state(rank, crumb=Crumb(step=4 if rank == 1 else 5, patient=False)) for rank in range(4)]
    assert blame(states)[:2] == ("stalled", [1])


def test_the_dead_come_before_the_silent_and_those_before_errors() -> None:
    states = [
        state(0, counts={"0": 8}),
        state(1, fate="failed", error="RuntimeError: connection closed by peer"),
        state(2, heard=0.0, counts={"0": 8}),
        state(3, fate="died", error="its connection was closed"),
    ]
    fault, ranks, missing = blame(states)
    assert (fault, ranks) == ("died", [3])
    assert missing[0] == (2, 3)
    states[3].fate = "left"
    assert blame(states)[:2] == ("silent", [2])
    states[2].heard = 100.0
    states[2].fate, states[2].error = "failed", "OutOfMemoryError: 3 GiB"
    assert blame(states)[:2] == ("failed", [2])


def test_an_error_about_a_missing_peer_points_at_the_peer() -> None:
    states = [
        state(rank, counts={"0": 8}, fate="failed", error="RuntimeError: Timed out waiting 4000ms for recv")
        for rank in range(4)
    ]
    states[1] = state(1, counts={"0": 7})
    assert blame(states)[:2] == ("stalled", [1])


def test_a_thousand_ranks_are_judged_fast_and_told_briefly() -> None:
    members, start = tuple(range(1_024)), time.perf_counter()
    states = []
    for rank in members:
        other = RankState(rank=rank, host=f"n{rank // 8}", pid=rank, heard=100.0, moved=0.0)
        node = tuple(range(rank - rank % 8, rank - rank % 8 + 8))
        witness_like = [Collective("0", members, 40 - (rank == 700)), Collective("1", node, 9)]
        read_answer(other, answer_of(witness_like))
        other.crumb = Crumb(step=5, operation="all-reduce", patient=False)
        states.append(other)
    found = diagnose(states, now=100.0, limits=Limits(10, 20))
    text = summary(found, states)
    assert [culprit.rank for culprit in found.culprits] == [700]
    assert "ranks 0-699, 701-1023: step 5, in 'all-reduce', waiting for rank 700" in text
    assert len(text) < 500
    assert len(table(found, states, now=100.0).splitlines()) == 1_024
    assert time.perf_counter() - start < 5  # measured 0.2 s


def answer_of(collectives: list[Collective]) -> dict[str, object]:
    message = answer(Witness(lambda: collectives, lambda: ""), Crumb())
    assert len(str(message)) < 300
    return message


def test_a_whole_host_is_recognised() -> None:
    states = [state(rank, heard=0.0 if rank >= 2 else 100.0) for rank in range(4)]
    found = diagnose(states, now=100.0, limits=Limits(10, 20))
    assert "all 2 of them are on n1: suspect that host or its network" in summary(found, states)


def test_spans() -> None:
    assert spans([7, 0, 1, 2, 3, 3]) == "0-3, 7"
