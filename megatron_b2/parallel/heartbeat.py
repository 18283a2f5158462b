"""Heartbeats over TCP: every rank tells rank 0 where it is, rank 0 decides, everybody hears the verdict.

Each rank keeps one connection to rank 0 and sends one short line an interval; rank 0 answers. That is
constant work a rank, and a thousand short lines every few seconds on rank 0 of a thousand. A killed process
is known at once by the end of its connection, a stopped one or a broken network by silence, on both sides.
All waiting is done with time-outs of our own, because a connection whose network is gone blocks for a quarter
of an hour otherwise. The lines are JSON objects with a `kind`; a connection starts with the token of the run.
"""

from __future__ import annotations

import json
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from megatron_b2.errors import LaunchError
from megatron_b2.parallel.breadcrumbs import Breadcrumbs, Crumb
from megatron_b2.parallel.diagnosis import (
    SILENCE,
    Collective,
    Diagnosis,
    Fate,
    Limits,
    RankState,
    diagnose,
    fault_of,
    is_in_trouble,
    summary,
)

CONNECT_SECONDS = 60.0
"""How long a rank tries to reach rank 0."""
SETTLE_SECONDS = 1.0
"""How long rank 0 listens on after a first finding: the others answer where they are, or die as well."""
ERROR_GRACE_SECONDS = 5.0
"""How long ranks may still report an error of their own after the first one did: often all have the same."""
ALARM_FACTOR = 2.0
"""The kernel's alarm ends a rank whose watchdog thread has not run for this many limits."""
MAX_LINE = 1 << 22
Message = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """How it ends."""

    text: str
    """Summary for people."""
    failed: tuple[int, ...] = ()
    """Blamed ranks that raised an error: they leave by it."""


@dataclass(frozen=True)
class Witness:
    """What a rank can tell of itself when asked."""

    collectives: Callable[[], Sequence[Collective]]
    frames: Callable[[], str]


class Channel:
    """Lines of JSON over one socket; sends may come from two threads."""

    def __init__(self, sock: socket.socket, *, send_seconds: float) -> None:
        sock.settimeout(send_seconds)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._lock = threading.Lock()
        self._pending = b""

    def send(self, kind: str, **content: Any) -> bool:
        """Send a line; false when the connection is gone."""
        line = json.dumps({"kind": kind, **content}).encode() + b"\n"
        try:
            with self._lock:
                self.sock.sendall(line)
        except OSError:
            return False
        return True

    def receive(self) -> list[Message]:
        """Lines that are there, after the socket was found readable. Raises ConnectionError at the end."""
        try:
            data = self.sock.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError as error:
            raise ConnectionError(str(error)) from error
        if not data:
            raise ConnectionError("its connection was closed")
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > MAX_LINE:
            raise ConnectionError("it does not speak the watchdog's language")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ConnectionError("it does not speak the watchdog's language") from error
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionError("it does not speak the watchdog's language")
        return messages

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()


class Beater(threading.Thread):
    """What the thread of every rank has in common."""

    def __init__(
        self,
        *,
        rank: int,
        crumbs: Breadcrumbs,
        witness: Witness,
        limits: Limits,
        interval: float,
        alarm: Callable[[float], None],
        on_verdict: Callable[[Verdict], None],
    ) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank = rank
        self.crumbs = crumbs
        self.witness = witness
        self.limits = limits
        self.interval = interval
        self.alarm = alarm
        self.on_verdict = on_verdict
        self.decided = threading.Event()
        """Set once there is a verdict, after `on_verdict` returned."""

    def run(self) -> None:
        try:
            self.watch()
        except Exception as error:  # a fault of our own must not be silent either
            self.alarm(0)
            self.on_verdict(Verdict(f"the watchdog itself failed: {error!r}"))

    def watch(self) -> None:
        """Body of the thread."""
        raise NotImplementedError

    def leave(self, error: str | None) -> None:
        """Say goodbye, or report an error and wait until it is known who is to blame."""
        raise NotImplementedError


class Member(Beater):
    """The thread of a rank other than 0."""

    def __init__(self, *, server: str, host: str, port: int, token: str, **common: Any) -> None:
        super().__init__(**common)
        try:
            sock = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        except OSError as error:
            raise LaunchError(
                f"rank {self.rank}: cannot reach the watchdog of rank 0 at {host}:{port} ({error}); ranks "
                "must reach each other on all ports; parallel.watchdog_seconds = 0 runs without a watchdog"
            ) from error
        self._server = f"rank 0 ({server}, {host})"
        self._channel = Channel(sock, send_seconds=self.interval)
        self._channel.send("hello", rank=self.rank, token=token)
        self._leaving = self._done = False

    def watch(self) -> None:
        heard = beat = time.monotonic()
        poll = selectors.DefaultSelector()
        poll.register(self._channel.sock, selectors.EVENT_READ)
        while not self._done:
            now = time.monotonic()
            if now >= beat:
                self.alarm(ALARM_FACTOR * self.limits.seconds)
                self._channel.send("beat", crumb=self.crumbs.current)
                beat = now + self.interval
            if poll.select(max(0.0, beat - time.monotonic())):
                try:
                    messages = self._channel.receive()
                except ConnectionError as error:
                    self._lost(f"died: {error} without a goodbye, as after a kill or a crash")
                    break
                heard = time.monotonic()
                for message in messages:
                    self._handle(message)
            elif time.monotonic() - heard > self.limits.seconds:
                self._lost(f"has been silent for {time.monotonic() - heard:.1f} s: {SILENCE}")
                break
        self._channel.close()

    def leave(self, error: str | None) -> None:
        if error is None:
            self._leaving = True
            self._channel.send("bye")
            with suppress(OSError):
                self._channel.sock.shutdown(socket.SHUT_WR)
            self.join(self.interval)
        else:
            # If this cannot be sent, rank 0 is gone: then the thread hears that, and decides.
            self._channel.send("failed", error=error, crumb=self.crumbs.current)
            self.decided.wait(ERROR_GRACE_SECONDS + 3 * SETTLE_SECONDS)

    def _handle(self, message: Message) -> None:
        if message["kind"] == "question":
            self._channel.send("answer", **answer(self.witness, self.crumbs.current))
        elif message["kind"] == "verdict":
            self._done = True
            self.alarm(0)
            self.on_verdict(Verdict(message["text"], tuple(message["failed"])))
            self.decided.set()
        elif message["kind"] == "bye":
            self._done = True
            self.alarm(0)

    def _lost(self, what: str) -> None:
        self.alarm(0)
        if not self._leaving:
            self._channel.send("lost", error=f"{what} (so says rank {self.rank}, which has left)")
            self.on_verdict(Verdict(f"{self._server} {what}"))
            self.decided.set()


class Monitor(Beater):
    """The thread of rank 0: hears all, decides, and tells."""

    def __init__(self, *, bind: str, world_size: int, **common: Any) -> None:
        super().__init__(**common)
        self.token = secrets.token_hex(16)
        self.states: list[RankState] = []
        self.diagnosis: Diagnosis | None = None
        """Set with the verdict."""
        allow_open_files(world_size)
        self._listener = listen(bind, backlog=world_size)
        self._channels: dict[int, Channel] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._wake, self._waker = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ, self._woken)
        self._leaving = False
        self._own_error: str | None = None
        self._decide_at = float("inf")

    @property
    def port(self) -> int:
        """Where the others connect."""
        port: int = self._listener.getsockname()[1]
        return port

    def expect(self, states: Sequence[RankState]) -> None:
        """The ranks of the run, before the thread starts."""
        self.states = list(states)

    def watch(self) -> None:
        tick = before = time.monotonic()
        while not self._leaving:
            for key, _ in self._selector.select(max(0.0, min(tick, self._decide_at) - time.monotonic())):
                key.data(key.fileobj)
            now = time.monotonic()
            if now - before > max(self.limits.seconds, 2 * self.interval):
                before = now  # this process itself stood still: hear what has piled up before judging
                continue
            before = now
            if now >= tick:
                self.alarm(ALARM_FACTOR * self.limits.seconds)
                self._update(0, self.crumbs.current, now=now)
                self._judge(now)
                tick = now + self.interval
            if now >= self._decide_at:
                return self._decide(now)
        self.alarm(0)
        self._farewell("bye")
        return None

    def leave(self, error: str | None) -> None:
        if error is None:
            self._leaving = True
            self._waker.send(b"l")
            self.join(self.interval + SETTLE_SECONDS)
            return
        self._own_error = error
        self._waker.send(b"f")
        self.decided.wait(ERROR_GRACE_SECONDS + 3 * SETTLE_SECONDS)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # gone again; without a free file descriptor that rank stays silent, and is named
            return
        channel = Channel(sock, send_seconds=self.interval)
        self._selector.register(sock, selectors.EVENT_READ, lambda _: self._greet(channel))

    def _greet(self, channel: Channel) -> None:
        """The first line of a connection says who it is; anything without the token is cut off."""
        try:
            first, *rest = channel.receive() or [{"kind": "nothing"}]
        except ConnectionError:
            first, rest = {"kind": "nothing"}, []
        if first.get("kind") != "hello" or first.get("token") != self.token:
            self._selector.unregister(channel.sock)
            channel.close()
            return
        rank = int(first["rank"])
        self._channels[rank] = channel
        self._selector.modify(channel.sock, selectors.EVENT_READ, lambda _: self._hear(rank, channel))
        for message in rest:
            self._handle(rank, message)

    def _hear(self, rank: int, channel: Channel) -> None:
        try:
            messages = channel.receive()
        except ConnectionError as error:
            self._selector.unregister(channel.sock)
            self._channels.pop(rank).close()
            if self.states[rank].fate == "running":
                self._end(rank, "died", f"{error} without a goodbye, as after a kill or a crash")
            return
        for message in messages:
            self._handle(rank, message)

    def _handle(self, rank: int, message: Message) -> None:
        state, now = self.states[rank], time.monotonic()
        state.heard = now
        if "crumb" in message:
            self._update(rank, crumb_of(message["crumb"]), now=now)
        if message["kind"] == "beat":
            self._channels[rank].send("heard")
        elif message["kind"] == "answer":
            read_answer(state, message)
        elif message["kind"] == "bye":
            state.fate = "left"
        elif message["kind"] == "failed":
            self._end(rank, "failed", message["error"])
        elif message["kind"] == "lost":  # this process was stopped, and the others have gone
            state.fate = "left"
            self._end(0, "silent", message["error"])

    def _woken(self, wake: socket.socket) -> None:
        wake.recv(16)
        if self._own_error is not None and self.states[0].fate == "running":
            self._update(0, self.crumbs.current, now=time.monotonic())
            self._end(0, "failed", self._own_error)

    def _update(self, rank: int, crumb: Crumb, *, now: float) -> None:
        state = self.states[rank]
        if crumb.progress != state.crumb.progress:
            state.moved = now
        state.crumb, state.heard = crumb, now

    def _end(self, rank: int, fate: Fate, error: str) -> None:
        state = self.states[rank]
        state.fate, state.error, state.heard = fate, error, time.monotonic()
        self._judge(state.heard)

    def _judge(self, now: float) -> None:
        """At the first finding ask everybody and set the time of the verdict; later ones may hasten it."""
        if not is_in_trouble(self.states, now=now, limits=self.limits):
            self._decide_at = float("inf")  # a rank that was only slow
            return
        if self._decide_at == float("inf"):
            for channel in self._channels.values():
                channel.send("question")
        faults = {fault_of(state, now=now, limits=self.limits) for state in self.states} - {None}
        short = min(SETTLE_SECONDS, self.limits.seconds / 4)
        if all(state.fate in ("failed", "left") for state in self.states):
            wait = 0.0
        elif faults == {"failed"}:
            wait = max(short, min(ERROR_GRACE_SECONDS, self.limits.seconds))
        else:
            wait = short
        self._decide_at = min(self._decide_at, now + wait)

    def _decide(self, now: float) -> None:
        read_answer(self.states[0], answer(self.witness, self.crumbs.current))
        self.diagnosis = diagnose(self.states, now=now, limits=self.limits)
        failed = tuple(culprit.rank for culprit in self.diagnosis.culprits if culprit.fault == "failed")
        verdict = Verdict(summary(self.diagnosis, self.states), failed)
        self.alarm(0)
        self._farewell("verdict", text=verdict.text, failed=failed)
        self.on_verdict(verdict)
        self.decided.set()

    def _farewell(self, kind: str, **content: Any) -> None:
        """Tell all, then read on until they have gone.

        Closing with unread lines would reset the connections, and the last message with them. A stopped rank
        gets it when it goes on.
        """
        waiting = selectors.DefaultSelector()
        for channel in self._channels.values():
            channel.send(kind, **content)
            waiting.register(channel.sock, selectors.EVENT_READ, channel)
        deadline = time.monotonic() + min(SETTLE_SECONDS, self.limits.seconds / 4)
        while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in waiting.select(left):
                try:
                    key.data.receive()
                except ConnectionError:
                    waiting.unregister(key.fileobj)


def listen(bind: str, *, backlog: int) -> socket.socket:
    """A listener on a free port of `bind`, all interfaces when empty."""
    if bind:
        return socket.create_server((bind, 0), backlog=backlog)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def allow_open_files(more: int) -> None:
    """Raise the soft limit of open files of this process, as far as the hard limit lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + more if hard == resource.RLIM_INFINITY else min(hard, soft + more)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def answer(witness: Witness, crumb: Crumb) -> Message:
    """What a rank says of itself when rank 0 asks."""
    shared = [[c.group, _pack(c.members), c.count] for c in witness.collectives()]
    return {"crumb": crumb, "collectives": shared, "frames": witness.frames()}


def read_answer(state: RankState, message: Mapping[str, Any]) -> None:
    """Put an answer into what is known of its rank."""
    state.collectives = tuple(
        Collective(name, _unpack(members), count) for name, members, count in message["collectives"]
    )
    state.frames = message["frames"]


def crumb_of(fields: Sequence[Any]) -> Crumb:
    """A crumb that came as a JSON list."""
    step, micro, operation, peers, patient, progress = fields
    return Crumb(step, micro, operation, tuple(peers), patient, progress)


def _pack(ranks: Sequence[int]) -> Sequence[int] | Message:
    """Groups of a regular layout are arithmetic series: three numbers instead of a thousand."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    series = range(ranks[0], ranks[0] + step * len(ranks), step) if step else range(0)
    if list(series) == list(ranks):
        return {"first": series.start, "stop": series.stop, "step": series.step}
    return list(ranks)


def _unpack(packed: Sequence[int] | Message) -> tuple[int, ...]:
    if isinstance(packed, Mapping):
        return tuple(range(packed["first"], packed["stop"], packed["step"]))
    return tuple(packed)
