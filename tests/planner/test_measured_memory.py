"""The plan's memory against every byte that is alive in real training steps of the toy model.

A mode in front of torch's dispatcher remembers every storage that the engine, DeepSpeed and autograd make.
Those alive are told apart by identity: parameters, gradients, optimizer state, communication buckets; what a
step has added beside them when a stage's forward ends are its activations.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megatron_b2.config import RunConfig, load_config
from megatron_b2.config.schema import OpsConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine.base import Engine
from megatron_b2.engine.build import build_engine, initialize_engine
from megatron_b2.engine.deepspeed import DeepSpeedEngine
from megatron_b2.layouts.memory import RankMemory, rank_memory
from megatron_b2.layouts.stages import rank_parts, run_schedule
from megatron_b2.model.model import BaichuanModel
from megatron_b2.parallel.comm import ProcessGroupComm, SingleComm
from megatron_b2.parallel.layout import Layout
from megatron_b2.pipeline.split_backward import SplitBackward
from megatron_b2.testing.fork import run_ranks
from tests.layouts.support import Live

BUCKET = 600_000
"""Elements: more than the embedding's, few against those of all parameters."""
STATE = ("weights", "gradients", "optimizer")


def toy_config(**given: Any) -> RunConfig:
    """preset:toy with a small vocabulary, short sequences and micro-batches of one."""
    train = {name: given.pop(name) for name in ("precision", "recompute") if name in given}
    layers = 8 if "pipeline" in given else 4  # a stage's messages are few against its blocks
    config = load_config("preset:toy").config
    engine = {"engine": "deepspeed"} if given else {}
    return replace(
        config,
        model=replace(config.model, vocab_size=1_024, num_layers=layers),
        data=replace(config.data, seq_len=32, document_masking=False),
        train=replace(config.train, micro_batch_size=1, global_batch_size=4, **train),
        ops=OpsConfig(backend="reference"),
        parallel=replace(config.parallel, **engine, **given),
        deepspeed={"zero_optimization": {"reduce_bucket_size": BUCKET}} if given else {},
    )


@dataclass
class Alive:
    """Bytes of one rank, each kind at its most in a step."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0


class Scale:
    """Weighs what is alive in an engine."""

    def __init__(self, live: Live, engine: Engine) -> None:
        self.live, self.engine = live, engine
        self.found = Alive()
        self.before: set[int] = set()
        """Alive when the step began."""
        self.optimizer = storages(tree_leaves([dict(self.adam.state), self.masters]))
        """Moments and fp32 master weights."""

    @property
    def adam(self) -> torch.optim.Optimizer:
        if isinstance(self.engine, DeepSpeedEngine):
            return self.engine._engine.basic_optimizer
        return self.engine._optimizer

    @property
    def masters(self) -> list[Tensor]:
        if isinstance(self.engine, DeepSpeedEngine):
            return self.engine._zero_state._flat_masters()
        return list(self.engine._masters.values())

    def weights(self) -> set[int]:
        """Parameters as the model computes with them, and their ZeRO-3 partitions."""
        parameters = list(self.engine.module.parameters())
        return storages([*parameters, *(getattr(parameter, "ds_tensor", None) for parameter in parameters)])

    def buffers(self) -> set[int]:
        """What DeepSpeed gathers gradients in to reduce them."""
        zero = self.engine._engine.optimizer if isinstance(self.engine, DeepSpeedEngine) else None
        buckets = getattr(zero, "ipg_buckets", {}).values()
        return storages(tree_leaves([bucket.buffer for bucket in buckets]))

    def begin(self, *_: Any) -> None:
        self.before = self.live.alive()

    def after_forward(self, *_: Any) -> None:
        """A stage has gone forward: what it has kept is alive, and what other micro-batches keep."""
        weights = self.weights()
        self.found.weights = max(self.found.weights, self.live.bytes_of(weights))
        gradients = storages([parameter.grad for parameter in self.engine.module.parameters()])
        kept = self.live.alive() - self.before - weights - gradients - self.buffers()
        self.found.activations = max(self.found.activations, self.live.bytes_of(kept))

    def after_backward(self, *_: Any) -> None:
        """The first parameter has its gradient, which is the last of a backward pass: what is left is
        gradients."""
        found = self.live.bytes_of(self.live.alive() - self.optimizer - self.weights() - self.buffers())
        self.found.gradients = max(found, self.found.gradients)

    def before_update(self) -> None:
        """Some gradients have only been gathered now, others are gone."""
        self.found.optimizer = self.live.bytes_of(self.optimizer - self.weights())
        self.after_backward()


def storages(tensors: Iterable[Any]) -> set[int]:
    return {item.untyped_storage()._cdata for item in tensors if isinstance(item, Tensor)}


def measured_step(config: RunConfig) -> Alive:
    """The second step of a run on this rank."""
    comm = ProcessGroupComm() if config.parallel.engine == "deepspeed" else SingleComm()
    gc.freeze()  # what was there before is not searched for garbage
    with Live() as live:
        engine = build_engine(config, comm=comm, device=torch.device("cpu"))
        initialize_engine(engine, seed=0)
        count = config.train.accumulation_steps(engine.layout.data)
        for step in (1, 2):
            micro = [batch(config) for _ in range(count)]
            if step == 2:
                scale = Scale(live, engine)
                watch(scale)
            engine.train_step(micro, lr=1e-4, step=step)
    gc.unfreeze()
    return scale.found


def watch(scale: Scale) -> None:
    """Weigh after every forward of a stage and every first half of a split backward, after the last gradient of
    a backward, and before the update."""
    engine = scale.engine
    stages = [module for module in engine.module.modules() if isinstance(module, BaichuanModel)]
    for stage in stages:
        stage.register_forward_hook(scale.after_forward)
    if engine.layout.pipeline == 1:  # nothing else is in flight
        stages[0].register_forward_pre_hook(scale.begin)
        next(stages[0].parameters()).register_post_accumulate_grad_hook(scale.after_backward)
    patch(SplitBackward, "input_gradient", after=scale.after_forward)
    patch(engine, "_update", before=scale.before_update)
    scale.begin()


def patch(owner: Any, name: str, *, before: Any = None, after: Any = None) -> None:
    original = getattr(owner, name)

    def patched(*args: Any) -> Any:
        if before is not None:
            before()
        out = original(*args)
        if after is not None:
            after()
        return out

    setattr(owner, name, patched)


def batch(config: RunConfig) -> Batch:
    shape = (config.train.micro_batch_size, config.data.seq_len)
    ids = torch.randint(1, config.model.vocab_size, shape)
    positions = torch.arange(shape[1], dtype=torch.int32).expand(shape)
    return Batch(ids, ids, torch.zeros_like(positions), positions)


def predicted(config: RunConfig, ranks: int, rank: int) -> RankMemory:
    layout = Layout.of(config.parallel, world_size=ranks)
    place = layout.coordinates(rank).pp
    return rank_memory(config, layout, rank_parts(config)[place], run_schedule(config, layout)[place])


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "data, ZeRO-0": (2, {"zero_stage": 0}),
    "data, ZeRO-1": (2, {"zero_stage": 1}),
    "data, ZeRO-2, bf16": (2, {"zero_stage": 2, "precision": "bf16"}),
    "data, ZeRO-3": (2, {"zero_stage": 3}),
    "tensor and data, ZeRO-1, bf16, selective": (
        4,
        {"tensor": 2, "zero_stage": 1, "precision": "bf16", "recompute": "selective"},
    ),
    "tensor and sequence, full recompute": (
        2,
        {"tensor": 2, "sequence_parallel": True, "zero_stage": 1, "recompute": "full"},
    ),
    "context, Ulysses": (2, {"context": 2, "context_method": "ulysses", "zero_stage": 2}),
    "context, ring, selective": (
        2,
        {"context": 2, "context_method": "ring", "zero_stage": 3, "recompute": "selective"},
    ),
    "pipeline, 1F1B, bf16": (2, {"pipeline": 2, "zero_stage": 1, "precision": "bf16"}),
    "pipeline, interleaved": (
        2,
        {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2, "zero_stage": 0},
    ),
    "tensor and pipeline, zero bubble": (
        4,
        {"tensor": 2, "pipeline": 2, "schedule": "zero_bubble", "zero_stage": 1},
    ),
}


@pytest.mark.parametrize(("ranks", "settings"), LAYOUTS.values(), ids=LAYOUTS)
def test_predicted_bytes_are_those_of_a_real_step(ranks: int, settings: dict[str, Any]) -> None:
    """Weights, gradients and optimizer to 1 %, activations to 10 %, on every rank."""
    config = toy_config(**settings)
    found = [measured_step(config)] if ranks == 1 else run_ranks(ranks, measured_step, config)
    for rank, alive in enumerate(found):
        memory = predicted(config, ranks, rank)
        for name in STATE:
            assert getattr(memory, name) == pytest.approx(getattr(alive, name), rel=0.01), (rank, name)
        assert memory.activations == pytest.approx(alive.activations, rel=0.10), rank
