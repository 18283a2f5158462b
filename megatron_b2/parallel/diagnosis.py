"""Who is to blame when a run stops: pure functions over what the ranks last said of themselves.

A dead or silent rank is named at once. When all are alive and none moves, a rank waits for those that have
not issued a collective that it has (every group counts its collectives) and for the peers of its
point-to-point operation; the culprits are the ranks that others wait for and that wait for nobody. If there
are none, some wait in a circle: all of them are to blame, and the text says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from megatron_b2.parallel.breadcrumbs import Crumb

Fate = Literal["running", "left", "died", "silent", "failed"]
Fault = Literal["died", "silent", "failed", "stalled"]

SILENCE = "the process is stopped, its host is down or the network to it is broken"
CONSEQUENCES = ("connection closed", "connection reset", "broken pipe", "timed out waiting", "nccl")
"""Parts of the error texts (in lower case) of a rank whose peer has gone, for gloo and NCCL."""
MAX_NAMED = 8
"""Culprits and groups of waiting ranks that the summary names; the report file has all."""


@dataclass(frozen=True)
class Limits:
    """Seconds without a sign of progress."""

    seconds: float
    """Of any step; also without any sign of life."""
    first_seconds: float
    """Of the first step and of other patient operations."""

    def of(self, crumb: Crumb) -> float:
        """The limit at this position."""
        return max(self.seconds, self.first_seconds) if crumb.patient else self.seconds


@dataclass(frozen=True)
class Collective:
    """How many collectives a rank has issued on one of its groups."""

    group: str
    members: tuple[int, ...]
    """Global ranks."""
    count: int


@dataclass(kw_only=True)
class RankState:
    """What is known of one rank."""

    rank: int
    host: str
    pid: int
    heard: float
    """Clock time of its last sign of life."""
    moved: float
    """Clock time of its last progress."""
    crumb: Crumb = field(default_factory=Crumb)
    fate: Fate = "running"
    error: str = ""
    """Its exception, or how its connection ended."""
    collectives: tuple[Collective, ...] = ()
    frames: str = ""
    """The innermost Python frames of its main thread."""

    @property
    def name(self) -> str:
        """`rank 3 (gpu007, pid 4711)`."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


@dataclass(frozen=True)
class Culprit:
    """One rank to blame."""

    rank: int
    fault: Fault
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """Who is to blame, and which peers every other rank misses."""

    culprits: tuple[Culprit, ...]
    missing: Mapping[int, tuple[int, ...]]
    """Rank -> the ranks it waits for."""


def is_in_trouble(states: Iterable[RankState], *, now: float, limits: Limits) -> bool:
    """Whether any rank is dead, failed, silent or without progress for too long."""
    return any(fault_of(state, now=now, limits=limits) is not None for state in states)


def fault_of(state: RankState, *, now: float, limits: Limits) -> Fault | None:
    """What is wrong with one rank as seen from outside."""
    if state.fate in ("died", "silent", "failed"):
        return state.fate
    if state.fate == "left":
        return None
    if now - state.heard > limits.seconds:
        return "silent"
    return "stalled" if now - state.moved > limits.of(state.crumb) else None


def diagnose(states: Sequence[RankState], *, now: float, limits: Limits) -> Diagnosis:
    """Blame the dead, else the silent, else the first that failed, else those that the others wait for."""
    faults = {state.rank: fault_of(state, now=now, limits=limits) for state in states}
    missing = _missing_peers(states, faults)
    fault, blamed = _blame(states, faults, missing)
    culprits = tuple(
        Culprit(state.rank, fault, _describe(state, fault, now=now))
        for state in states
        if state.rank in blamed
    )
    return Diagnosis(culprits, missing)


def summary(diagnosis: Diagnosis, states: Sequence[RankState]) -> str:
    """A few lines for the terminal, whatever the number of ranks."""
    culprits, size = diagnosis.culprits, len(states)
    lines = [culprit.text for culprit in culprits[:MAX_NAMED]]
    if len(culprits) > MAX_NAMED:
        lines.append(f"and {len(culprits) - MAX_NAMED} more: ranks {spans(c.rank for c in culprits)}")
    hosts = {states[culprit.rank].host for culprit in culprits}
    if 1 < len(culprits) < size and len(hosts) == 1:
        lines.append(f"all {len(culprits)} of them are on {hosts.pop()}: suspect that host or its network")
    blamed = {culprit.rank for culprit in culprits}
    if circle := _circle_text(diagnosis, blamed):
        lines.append(circle)
    elif len(culprits) == size > 1 and culprits[0].fault == "stalled":
        lines.append("no rank is behind the others: suspect the network, or calls in a different order")
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for state in states:
        if state.rank not in blamed and state.fate in ("running", "failed"):
            key = (state.crumb.text(), diagnosis.missing.get(state.rank, ()))
            groups.setdefault(key, []).append(state.rank)
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))
    for (place, peers), ranks in largest[:MAX_NAMED]:
        waits = f", waiting for {name_ranks(peers)}" if peers else ""
        lines.append(f"{name_ranks(ranks)}: {place}{waits}")
    if len(largest) > MAX_NAMED:
        lines.append(f"and {len(largest) - MAX_NAMED} more positions")
    return "\n".join(lines)


def table(diagnosis: Diagnosis, states: Sequence[RankState], *, now: float) -> str:
    """One line a rank, for the report file."""
    blamed = {culprit.rank: culprit.fault for culprit in diagnosis.culprits}
    lines = []
    for state in states:
        peers = diagnosis.missing.get(state.rank, ())
        parts = [
            f"{state.name}: {blamed.get(state.rank, state.fate)}; {state.crumb.text()}",
            f"heard {now - state.heard:.1f} s ago, moved {now - state.moved:.1f} s ago",
            f"waits for {name_ranks(peers)}" if peers else "",
            "collectives " + ", ".join(f"{c.group}:{c.count}" for c in state.collectives)
            if state.collectives
            else "",
            f"at {state.frames}" if state.frames else "",
            state.error,
        ]
        lines.append("; ".join(part for part in parts if part))
    return "\n".join(lines)


def spans(ranks: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    found: list[tuple[int, int]] = []
    for rank in sorted(set(ranks)):
        if found and rank == found[-1][1] + 1:
            found[-1] = (found[-1][0], rank)
        else:
            found.append((rank, rank))
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def name_ranks(ranks: Collection[int]) -> str:
    """`rank 3`, or `ranks 0-3, 7`."""
    return f"rank {next(iter(ranks))}" if len(ranks) == 1 else f"ranks {spans(ranks)}"


def _blame(
    states: Sequence[RankState],
    faults: Mapping[int, Fault | None],
    missing: Mapping[int, tuple[int, ...]],
) -> tuple[Fault, set[int]]:
    ranks: dict[Fault, set[int]] = {fault: set() for fault in get_args(Fault)}
    for rank, fault in faults.items():
        if fault is not None:
            ranks[fault].add(rank)
    if ranks["died"]:
        return "died", ranks["died"]
    if ranks["silent"]:
        return "silent", ranks["silent"]
    own = {r for r in ranks["failed"] if not _is_consequence(states[r].error)}
    if own:
        return "failed", own
    blocking = _blocking(missing)
    if ranks["failed"] and not blocking:
        return "failed", ranks["failed"]
    return "stalled", blocking or _furthest_behind(states) or ranks["stalled"]


def _is_consequence(error: str) -> bool:
    """Whether it is the error of a rank whose peer has gone."""
    return any(part in error.lower() for part in CONSEQUENCES)


def _missing_peers(
    states: Sequence[RankState], faults: Mapping[int, Fault | None]
) -> dict[int, tuple[int, ...]]:
    """Rank -> ranks it waits for: its peers, those behind it in a shared group, dead and silent members."""
    counts: dict[tuple[str, tuple[int, ...]], dict[int, int]] = {}
    for state in states:
        for shared in state.collectives:
            counts.setdefault((shared.group, shared.members), {})[state.rank] = shared.count
    waits: dict[int, set[int]] = {state.rank: set(state.crumb.peers) for state in states}
    for (_, members), issued in counts.items():
        gone = {rank for rank in members if faults.get(rank) in ("died", "silent")}
        behind = {
            count: gone | {rank for rank in members if issued.get(rank, count) < count}
            for count in set(issued.values())
        }
        for rank, count in issued.items():
            waits[rank] |= behind[count]
    alive = {
        state.rank
        for state in states
        if state.fate in ("running", "failed") and faults[state.rank] != "silent"
    }
    return {rank: tuple(sorted(waits[rank] - {rank})) for rank in sorted(alive) if waits[rank] - {rank}}


def _blocking(missing: Mapping[int, tuple[int, ...]]) -> set[int]:
    """Ranks that are waited for and wait for nobody; where there are none, those that wait in a circle."""
    awaited = {rank for peers in missing.values() for rank in peers}
    return awaited - set(missing) or _circle(missing)


def _circle(missing: Mapping[int, tuple[int, ...]]) -> set[int]:
    """What is left when ranks for which nobody waits are taken away, again and again."""
    waiting = Counter(peer for peers in missing.values() for peer in peers)
    free = [rank for rank in missing if not waiting[rank]]
    while free:
        for peer in missing[free.pop()]:
            waiting[peer] -= 1
            if not waiting[peer]:
                free.append(peer)
    return {rank for rank in missing if waiting[rank]}


def _circle_text(diagnosis: Diagnosis, blamed: Collection[int]) -> str:
    """Who of the blamed waits for whom, if they all wait for each other; else empty."""
    waits = {
        rank: [peer for peer in diagnosis.missing.get(rank, ()) if peer in blamed] for rank in sorted(blamed)
    }
    is_stalled = all(culprit.fault == "stalled" for culprit in diagnosis.culprits)
    if not (waits and is_stalled and all(waits.values())):
        return ""
    pairs = [f"rank {rank} for {name_ranks(peers)}" for rank, peers in waits.items()]
    more = f" and {len(pairs) - MAX_NAMED} more" if len(pairs) > MAX_NAMED else ""
    named = ", ".join(pairs[:MAX_NAMED]) + more
    return f"waiting in a circle: {named}: calls in a different order, or a lost message"


def _furthest_behind(states: Sequence[RankState]) -> set[int]:
    """Ranks in an earlier step than the others; none when all are in the same."""
    steps = {state.rank: state.crumb.step for state in states if state.fate == "running"}
    behind = {rank for rank, step in steps.items() if step == min(steps.values())}
    return behind if len(behind) < len(steps) else set()


def _describe(state: RankState, fault: Fault, *, now: float) -> str:
    place = state.crumb.text()
    if fault == "died":
        return f"{state.name} died: {state.error}; it was last known in {place}"
    if fault == "silent":
        silence = state.error or f"has been silent for {now - state.heard:.1f} s: {SILENCE}"
        return f"{state.name} {silence}; it was last known in {place}"
    if fault == "failed":
        return f"{state.name} failed: {state.error}; it was in {place}"
    frames = f" at {state.frames}" if state.frames else ""
    return f"{state.name} made no progress for {now - state.moved:.1f} s: {place}{frames}"
