"""The watchdog: who is named, who ends, how fast, and that a healthy run does not notice it."""

from __future__ import annotations

import ctypes
import json
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_b2.parallel.breadcrumbs import Breadcrumbs, Crumb
from megatron_b2.parallel.comm import ProcessGroupComm, SingleComm
from megatron_b2.parallel.diagnosis import (
    Limits,
    RankState,
)
from megatron_b2.parallel.heartbeat import Monitor, Witness, allow_open_files
from megatron_b2.parallel.launch import LOOPBACK
from megatron_b2.parallel.watchdog import EXIT_WATCHDOG, REPORT_FILE, Watchdog
from tests.dist.support import ERROR, Ranks

SECONDS = 2.0
LIMITS = Limits(SECONDS, SECONDS)
ENOUGH = SECONDS + 8
"""Limit, settling and a busy machine."""

# Breadcrumbs.


def test_operations_nest_and_always_move() -> None:
    crumbs = Breadcrumbs()
    crumbs.mark("forward", step=3, micro=1)
    seen = [crumbs.current.progress]
    with crumbs.operation("send", peers=(2,)):
        assert crumbs.current[:4] == (3, 1, "send", (2,))
        seen.append(crumbs.current.progress)
        crumbs.tick()
        seen.append(crumbs.current.progress)
    assert crumbs.current[:4] == (3, 1, "forward", ())
    seen.append(crumbs.current.progress)
    assert seen == sorted(set(seen))
    assert crumbs.current.text() == "step 3, micro-batch 1, in 'forward'"


def test_after_an_error_the_place_remains() -> None:
    crumbs = Breadcrumbs()
    with pytest.raises(ZeroDivisionError), crumbs.operation("divide"):
        1 / 0  # noqa: B018
    assert crumbs.current.operation == "divide"


def test_breadcrumbs_cost_microseconds() -> None:
    crumbs, start = Breadcrumbs(), time.perf_counter()
    for micro in range(10_000):
        with crumbs.operation("all-reduce", micro=micro):
            pass
    assert (time.perf_counter() - start) / 10_000 < 50e-6  # measured 2 us; the machine may be busy


# Many connections.


def test_a_thousand_connections() -> None:
    """A monitor hears 1,023 members a round; the end of one connection reaches all the others."""
    size = 1_024
    crumbs, verdicts = Breadcrumbs(), []
    monitor = Monitor(
        bind=LOOPBACK,
        world_size=size,
        rank=0,
        crumbs=crumbs,
        witness=Witness(list, str),
        limits=Limits(60, 60),
        interval=0.5,
        alarm=lambda _: None,
        on_verdict=verdicts.append,
    )
    now = time.monotonic()
    monitor.expect([RankState(rank=rank, host="n", pid=rank, heard=now, moved=now) for rank in range(size)])
    allow_open_files(size)
    members = [socket.create_connection((LOOPBACK, monitor.port)) for _ in range(1, size)]
    monitor.start()
    for rank, member in enumerate(members, 1):
        hello = json.dumps({"kind": "hello", "rank": rank, "token": monitor.token})
        beat = json.dumps({"kind": "beat", "crumb": Crumb(step=9, progress=rank)})
        member.sendall(f"{hello}\n{beat}\n".encode())
    for member in members:
        assert b"heard" in member.recv(100)
    assert all(state.crumb.step == 9 for state in monitor.states[1:])
    members[0].settimeout(30)
    before, rounds = time.process_time(), 5
    for number in range(rounds):
        for member in members:
            member.sendall(json.dumps({"kind": "beat", "crumb": Crumb(progress=number)}).encode() + b"\n")
        for member in members:
            assert b"heard" in member.recv(100)
    assert (time.process_time() - before) / rounds < 1.0  # measured 0.05 s, both ends
    members[699].close()
    with members[0].makefile() as lines:
        told = next(line for line in lines if "verdict" in line)
    assert "rank 700 (n, pid 700) died" in told
    members[0].close()
    for member in members[1:]:
        member.close()
    assert monitor.decided.wait(10)
    assert "died" in verdicts[0].text


# Real processes.


def watched(folder: Path, step: object, *, limits: Limits = LIMITS) -> object:
    """A training loop of all-reduces under a watchdog; `step(watchdog, rank, number)` is called inside each."""

    def body(rank: int) -> None:
        with Watchdog(ProcessGroupComm(), host=LOOPBACK, limits=limits, folder=folder / "dog") as watchdog:
            for number in range(1, 100_000):
                watchdog.crumbs.mark("training step", step=number, micro=0)
                if step(watchdog, rank, number) == "end":  # type: ignore[operator]
                    return
                with watchdog.crumbs.operation("all-reduce of gradients"):
                    dist.all_reduce(torch.ones(4))
                if number == 20 and rank == 0:
                    (folder / "running").touch()

    return body


def nothing(_watchdog: Watchdog, _rank: int, number: int) -> str:
    time.sleep(0.001)
    return "end" if number == 300 else ""


def for_ever(_watchdog: Watchdog, _rank: int, _number: int) -> str:
    time.sleep(0.001)
    return ""


def test_a_healthy_run_leaves_no_trace(tmp_path: Path) -> None:
    with Ranks(3, watched(tmp_path, nothing), tmp_path / "ranks") as ranks:
        assert ranks.wait(30) == [0, 0, 0], ranks.log(0)
        assert [ranks.log(rank) for rank in range(3)] == ["", "", ""]
    assert not (tmp_path / "dog").exists()


def test_one_process_and_limit_zero_are_not_watched(tmp_path: Path) -> None:
    with Watchdog(SingleComm(), host=LOOPBACK, limits=LIMITS, folder=tmp_path / "dog") as watchdog:
        watchdog.crumbs.mark("anything")
        assert not watchdog.is_on
    assert not (tmp_path / "dog").exists()


def test_a_rank_that_sleeps_is_named_with_place_and_waiting_peers(tmp_path: Path) -> None:
    def step(watchdog: Watchdog, rank: int, number: int) -> None:
        if rank == 1 and number == 7:
            with watchdog.crumbs.operation("reading data"):
                time.sleep(1_000)

    start = time.monotonic()
    with Ranks(3, watched(tmp_path, step), tmp_path / "ranks") as ranks:
        assert ranks.wait(ENOUGH) == [EXIT_WATCHDOG] * 3
        assert time.monotonic() - start > SECONDS
        told = ranks.log(0)
        assert "made no progress for" in told
        assert "step 7, micro-batch 0, in 'reading data'" in told
        assert "ranks 0, 2: step 7, micro-batch 0, in 'all-reduce of gradients', waiting for rank 1" in told
        assert f"pid {ranks.processes[1].pid}" in ranks.log(2)
        assert "this rank was in step 7, micro-batch 0, in 'all-reduce of gradients'" in ranks.log(2)
    assert "in step" in (tmp_path / "dog" / "rank-00001.txt").read_text()
    assert "all_reduce" in (tmp_path / "dog" / "rank-00002.txt").read_text()
    assert len((tmp_path / "dog" / REPORT_FILE).read_text().strip().splitlines()) >= 5


@pytest.mark.parametrize("victim", [0, 2])
def test_kill(tmp_path: Path, victim: int) -> None:
    with Ranks(3, watched(tmp_path, for_ever), tmp_path / "ranks") as ranks:
        ranks.when(tmp_path / "running")
        ranks.send(victim, signal.SIGKILL)
        codes = ranks.wait(6)  # long before the limit: the connection tells
        expected = [EXIT_WATCHDOG] * 3
        expected[victim] = -signal.SIGKILL
        assert codes == expected, ranks.log(1)
        for rank in {0, 1, 2} - {victim}:
            assert f"rank {victim} (" in ranks.log(rank)
            assert "died: " in ranks.log(rank)


def cannot_send(watchdog: Watchdog, rank: int, number: int) -> str:
    """From the third step on, rank 1 cannot tell rank 0 anything, and hears late that it is dead."""
    if rank == 1 and number == 3:
        channel = watchdog._beater._channel  # type: ignore[union-attr]
        receive = channel.receive
        channel.send = lambda *_args, **_content: False
        channel.receive = lambda: (time.sleep(0.5), receive())[1]
    return for_ever(watchdog, rank, number)


def test_an_error_waits_for_the_verdict_though_rank_0_cannot_be_told(tmp_path: Path) -> None:
    with Ranks(2, watched(tmp_path, cannot_send), tmp_path / "ranks") as ranks:
        ranks.when(tmp_path / "running")
        ranks.send(0, signal.SIGKILL)
        assert ranks.wait(6) == [-signal.SIGKILL, EXIT_WATCHDOG], ranks.log(1)
        assert "rank 0 (" in ranks.log(1)


@pytest.mark.parametrize("victim", [0, 1])
def test_stop_and_continue(tmp_path: Path, victim: int) -> None:
    with Ranks(3, watched(tmp_path, for_ever), tmp_path / "ranks") as ranks:
        ranks.when(tmp_path / "running")
        ranks.send(victim, signal.SIGSTOP)
        start = time.monotonic()
        codes = ranks.wait(ENOUGH, besides=(victim,))
        assert time.monotonic() - start < ENOUGH
        expected: list[int | None] = [EXIT_WATCHDOG] * 3
        expected[victim] = None
        assert codes == expected
        other = 2 if victim == 0 else 0
        assert f"rank {victim} (" in ranks.log(other)
        assert "silent for" in ranks.log(other)
        ranks.send(victim, signal.SIGCONT)
        assert ranks.wait(SECONDS + 2)[victim] in (EXIT_WATCHDOG, -signal.SIGALRM, ERROR)


def test_a_short_stop_is_forgiven(tmp_path: Path) -> None:
    def step(_watchdog: Watchdog, _rank: int, _number: int) -> str:
        time.sleep(0.001)
        return "end" if time.monotonic() > end else ""

    end = time.monotonic() + 4
    with Ranks(2, watched(tmp_path, for_ever), tmp_path / "ranks") as ranks:
        ranks.when(tmp_path / "running")
        for victim in (0, 1):
            ranks.send(victim, signal.SIGSTOP)
            time.sleep(SECONDS / 3)
            ranks.send(victim, signal.SIGCONT)
            time.sleep(SECONDS / 3)
        assert ranks.wait(0) == [None, None], ranks.log(0)


def test_a_rank_that_holds_the_interpreter_is_ended_by_the_kernel(tmp_path: Path) -> None:
    def step(_watchdog: Watchdog, rank: int, number: int) -> None:
        if rank == 1 and number == 7:
            ctypes.PyDLL(None).sleep(1_000)

    with Ranks(2, watched(tmp_path, step), tmp_path / "ranks") as ranks:
        assert ranks.wait(2 * SECONDS + 6) == [EXIT_WATCHDOG, -signal.SIGALRM]
        assert "rank 1 (" in ranks.log(0)
        assert "silent for" in ranks.log(0)
    assert "in step" in (tmp_path / "dog" / "rank-00001.txt").read_text()


def test_an_error_on_one_rank_ends_the_others_and_is_told(tmp_path: Path) -> None:
    def step(_watchdog: Watchdog, rank: int, number: int) -> None:
        if rank == 1 and number == 7:
            raise MemoryError("no 3 GiB left")

    with Ranks(3, watched(tmp_path, step), tmp_path / "ranks") as ranks:
        assert ranks.wait(ENOUGH) == [EXIT_WATCHDOG, ERROR, EXIT_WATCHDOG]
        for rank in (0, 2):
            assert "failed: MemoryError: no 3 GiB left; it was in step 7" in ranks.log(rank)
        assert "Traceback" in ranks.log(1)


def test_an_error_on_all_ranks_stays_their_own(tmp_path: Path) -> None:
    def step(_watchdog: Watchdog, rank: int, number: int) -> None:
        if number == 7:
            time.sleep(0.2 * rank)
            raise FloatingPointError("the loss is NaN")

    start = time.monotonic()
    with Ranks(3, watched(tmp_path, step), tmp_path / "ranks") as ranks:
        assert ranks.wait(ENOUGH) == [ERROR] * 3, ranks.log(1)
        assert all("FloatingPointError: the loss is NaN" in ranks.log(rank) for rank in range(3))
    assert time.monotonic() - start < ENOUGH - 2


def test_the_first_step_has_its_own_limit(tmp_path: Path) -> None:
    def step(watchdog: Watchdog, rank: int, number: int) -> str:
        watchdog.crumbs.mark("training step", step=number, patient=number == 1)
        if rank == 1 and number == 1:
            time.sleep(1.5 * SECONDS)
        return nothing(watchdog, rank, number)

    limits = Limits(SECONDS, 10 * SECONDS)
    with Ranks(2, watched(tmp_path, step, limits=limits), tmp_path / "ranks") as ranks:
        assert ranks.wait(30) == [0, 0], ranks.log(0)


def test_strangers_are_cut_off(tmp_path: Path) -> None:
    def step(watchdog: Watchdog, rank: int, number: int) -> str:
        if rank == 1 and number in (3, 4, 5):
            port = watchdog._beater._channel.sock.getpeername()[1]  # type: ignore[union-attr]
            with socket.create_connection((LOOPBACK, port)) as stranger:
                stranger.sendall(
                    {
                        3: b"GET / HTTP/1.1\r\n\r\n",
                        4: b'{"kind": "hello", "rank": 1, "token": "x"}\n{"kind": "failed", "error": ""}\n',
                        5: b"[1]\n",
                    }[number]
                )
                assert stranger.recv(1) == b""
        return nothing(watchdog, rank, number)

    with Ranks(2, watched(tmp_path, step), tmp_path / "ranks") as ranks:
        assert ranks.wait(30) == [0, 0], ranks.log(0) + ranks.log(1)


def test_group_timeouts_change_while_running(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        watchdog = Watchdog(ProcessGroupComm(), host=LOOPBACK, limits=LIMITS, folder=tmp_path / "dog")
        group = dist.new_group()
        watchdog.set_timeouts(0.5)
        dist.barrier()
        if rank == 0:
            for used in (None, group):
                start = time.monotonic()
                with pytest.raises(RuntimeError, match="Timed out"):
                    dist.all_reduce(torch.ones(1), group=used)
                assert time.monotonic() - start < 3
        else:
            time.sleep(3)

    with Ranks(2, body, tmp_path / "ranks") as ranks:
        assert ranks.wait(20) == [0, 0], ranks.log(0)
