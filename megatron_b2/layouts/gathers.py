"""When ZeRO-3 gathers parameters: DeepSpeed's fetches, prefetches and releases, played without a tensor.

DeepSpeed 0.19.8 (PartitionedParameterCoordinator) records in which order the modules of one micro-batch run,
recomputation included. From then on a module that begins fetches, in one call, what it needs and is not
there, and then, in another, parameters of the modules that follow, until a bucket is full or enough are
gathered. A module that ends releases its parameters, unless one is needed again within the reuse distance.
So a model that fits into these limits is gathered once a micro-batch, one of many times their size twice.

tests/layouts/test_step_calls.py compares this with the calls of real steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from megatron_b2.config.schema import RunConfig
from megatron_b2.layouts.memory import recompute_of
from megatron_b2.layouts.parameters import LocalParameter
from megatron_b2.model.split import StageLayers

Phase = Literal["forward", "backward"]


@dataclass(frozen=True)
class Gather:
    """One all-gather."""

    phase: Phase
    """In which it begins: a forward that ends prefetches what the backward begins with."""
    is_second: bool
    """Whether it reads the copies that hpZ keeps in the node."""
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Event:
    """A module begins or ends."""

    phase: Phase
    begins: bool
    names: tuple[str, ...]
    """Parameters of the module itself."""


def step_gathers(
    config: RunConfig,
    part: StageLayers,
    parameters: Sequence[LocalParameter],
    *,
    whole: Sequence[LocalParameter],
    settings: Mapping[str, Any],
    num_micro: int,
) -> list[tuple[int, Gather]]:
    """How often each all-gather happens in an optimizer step.

    Args:
        config: the run.
        part: the layers, all of the model.
        parameters: of a rank.
        whole: those that are not partitioned.
        settings: zero_optimization of the DeepSpeed JSON.
        num_micro: micro-batches of the step.
    """
    held = frozenset(parameter.name for parameter in whole)
    coordinator = _Coordinator(
        {parameter.name: parameter.size for parameter in parameters},
        events=tuple(_micro_batch(config, part, held)),
        whole=held,
        settings=settings,
    )
    coordinator.micro_batch()  # decides what is released
    coordinator.optimizer_step()
    calls = [(1, gather) for gather in coordinator.micro_batch()]
    if num_micro > 1:
        calls += [(num_micro - 1, gather) for gather in coordinator.micro_batch()]
    return calls


class _Coordinator:
    """What is gathered, and why; names as in DeepSpeed."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        events: tuple[_Event, ...],
        whole: frozenset[str],
        settings: Mapping[str, Any],
    ) -> None:
        self._sizes, self._events, self._whole = sizes, events, whole
        self._max_live = int(settings["stage3_max_live_parameters"])
        self._max_reuse = int(settings["stage3_max_reuse_distance"])
        self._bucket = int(settings["stage3_prefetch_bucket_size"])
        self._has_second_copies = int(settings["zero_hpz_partition_size"]) > 1
        begun = [event.names for event in events if event.begins]
        self._order = [(name, step) for step, names in enumerate(begun) for name in names]
        self._before = [0, *accumulate(sum(sizes[name] for name in names) for names in begun)]
        """Elements of the modules before each step."""
        self._uses: dict[str, list[int]] = {}
        for name, step in self._order:
            self._uses.setdefault(name, []).append(step)
        self._released: dict[int, tuple[str, ...]] = {}
        """Event -> what it releases, decided once, as DeepSpeed does."""
        self._available = set(whole)
        self._second: set[str] = set()
        self._live = 0

    def optimizer_step(self) -> None:
        """Everything is partitioned again, and the copies in the node are of the weights before."""
        self._available = set(self._whole)
        self._second.clear()

    def micro_batch(self) -> list[Gather]:
        """Play one forward and backward."""
        calls: list[Gather] = []
        asked: dict[str, int] = {}
        self._live = queue = step = 0
        for index, event in enumerate(self._events):
            if not event.begins:
                self._release(self._to_release(index, event.names, step, asked))
                continue
            calls += self._gather(event.phase, [n for n in event.names if n not in self._available])
            for name in event.names:  # taken off the queue, unless prefetched
                if asked.get(name, -1) < step:
                    asked[name] = step
                    queue += 1
            ahead: dict[str, None] = {}
            room = min(self._max_live - self._live, self._bucket)
            size = 0
            while queue < len(self._order) and size < room:
                name, use = self._order[queue]
                queue += 1
                asked[name] = max(use, asked.get(name, -1))
                if name not in self._available and name not in ahead:
                    ahead[name] = None
                    size += self._sizes[name]
            calls += self._gather(event.phase, list(ahead))
            step += 1
        self._release([name for name in self._available if name not in self._whole])
        return calls

    def _gather(self, phase: Phase, names: Sequence[str]) -> Iterator[Gather]:
        self._live += sum(self._sizes[name] for name in names)
        self._available.update(names)
        for is_second in (True, False):
            chosen = tuple(name for name in names if (name in self._second) == is_second)
            if chosen:
                yield Gather(phase, is_second, chosen)

    def _to_release(
        self, index: int, names: Sequence[str], step: int, asked: Mapping[str, int]
    ) -> tuple[str, ...]:
        if index not in self._released:
            self._released[index] = tuple(
                name
                for name in names
                if name not in self._whole and asked[name] <= step and not self._is_reused(name, step)
            )
        return self._released[index]

    def _is_reused(self, name: str, step: int) -> bool:
        following = next((use for use in self._uses[name] if use >= step), None)
        return following is not None and self._before[following] - self._before[step] < self._max_reuse

    def _release(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self._available:
                self._available.remove(name)
                self._live -= self._sizes[name]
                if self._has_second_copies:
                    self._second.add(name)


def _micro_batch(config: RunConfig, part: StageLayers, whole: frozenset[str]) -> Iterator[_Event]:
    """The modules of a forward and backward, in order (model/model.py, block.py, attention.py, mlp.py)."""
    yield _Event("forward", True, ())  # the model
    yield from _leaf("forward", "embedding")
    for layer in part.layers:
        yield from _block_forward("forward", layer, whole)
    yield from _leaf("forward", "final_norm")
    yield from _leaf("forward", "head")
    yield _Event("forward", False, ())
    yield _Event("backward", True, ())
    yield from _leaf("backward", "head")
    yield from _leaf("backward", "final_norm")
    for layer in reversed(part.layers):
        yield from _block_backward(config, layer, whole)
    yield _Event(
        "backward", True, ("embedding.weight",)
    )  # ends with the micro-batch: token ids have no gradient


def _leaf(phase: Phase, *modules: str) -> Iterator[_Event]:
    for module in modules:
        yield _Event(phase, True, (f"{module}.weight",))
        yield _Event(phase, False, (f"{module}.weight",))


def _own(layer: int, whole: frozenset[str]) -> tuple[str, ...]:
    """What DeepSpeed counts to the block itself: the norm that is called as `add`, once it is partitioned."""
    name = f"layers.{layer}.post_attention_norm.weight"
    return () if name in whole else (name,)


def _block_forward(phase: Phase, layer: int, whole: frozenset[str]) -> Iterator[_Event]:
    block, own = f"layers.{layer}", _own(layer, whole)
    yield _Event(phase, True, own)
    yield from _leaf(phase, f"{block}.input_norm")
    yield _Event(phase, True, ())
    yield from _leaf(phase, f"{block}.attention.qkv", f"{block}.attention.output")
    yield _Event(phase, False, ())
    yield _Event(phase, True, ())
    yield from _leaf(phase, f"{block}.mlp.gate_up", f"{block}.mlp.down")
    yield _Event(phase, False, ())
    yield _Event(phase, False, own)


def _block_backward(config: RunConfig, layer: int, whole: frozenset[str]) -> Iterator[_Event]:
    block, own = f"layers.{layer}", _own(layer, whole)
    down = (f"{block}.mlp.down.weight",)
    yield _Event("backward", True, own)
    yield _Event("backward", True, ())
    yield _Event("backward", True, down)
    kind = recompute_of(config, layer)
    if kind == "full":  # ends inside `down`, with the last tensor that backward needs
        again = list(_block_forward("backward", layer, whole))
        yield from again[: again.index(_Event("backward", False, down))]
    elif kind == "selective":
        yield _Event("backward", True, down)
    yield _Event("backward", False, down)
    yield from _leaf("backward", f"{block}.mlp.gate_up")
    yield _Event("backward", False, ())
    yield _Event("backward", True, ())
    yield from _leaf("backward", f"{block}.attention.output", f"{block}.attention.qkv")
    yield _Event("backward", False, ())
    yield from _leaf("backward", f"{block}.input_norm")
    yield _Event("backward", False, own)
