"""A small model on real ranks, and what it keeps and sends."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_b2.config import RunConfig, load_config
from megatron_b2.config.schema import ModelConfig
from megatron_b2.engine.single import DTYPES
from megatron_b2.layouts.memory import context_method
from megatron_b2.model.model import BaichuanModel
from megatron_b2.model.split import ModelSplit
from megatron_b2.parallel.context_parallel import ContextParallel
from megatron_b2.parallel.groups import ParallelGroups
from megatron_b2.parallel.layout import Layout
from megatron_b2.parallel.tensor_parallel import TensorParallel


def small_config(
    *,
    position: Literal["rope", "alibi"] = "alibi",
    num_layers: int = 2,
    recompute: Any = "none",
    **parallel: Any,
) -> RunConfig:
    """A model whose sizes differ from each other; 2 sequences of 64 a micro-batch."""
    config = load_config("preset:toy").config
    shape = ModelConfig(
        hidden_size=32,
        ffn_hidden_size=48,
        num_layers=num_layers,
        num_heads=4,
        vocab_size=160,
        position=position,
    )
    return replace(
        config,
        model=shape,
        data=replace(config.data, seq_len=64),
        train=replace(config.train, recompute=recompute, micro_batch_size=2, global_batch_size=8),
        parallel=replace(config.parallel, engine="deepspeed", **parallel),
    )


def build(config: RunConfig) -> tuple[BaichuanModel, Layout]:
    """The model of this rank with random weights."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    layout = Layout.of(config.parallel, world_size=size)
    split = ModelSplit()
    if size > 1:
        groups = ParallelGroups.create(layout, timeout=timedelta(seconds=60))
        place = groups.coordinates
        split = ModelSplit(
            tensor=TensorParallel(layout.tensor, place.tp, groups.tp, config.parallel.sequence_parallel),
            context=ContextParallel(layout.context, place.cp, groups.cp, context_method(config)),
        )
    model = BaichuanModel(
        config.model, split=split, recompute=config.train.recompute, dtype=DTYPES[config.train.precision]
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model, layout


def batch(config: RunConfig, layout: Layout) -> dict[str, torch.Tensor]:
    """Random tokens of this rank; sequences of one document."""
    shape = (config.train.micro_batch_size, config.data.seq_len // layout.context)
    ids = torch.randint(1, config.model.vocab_size, shape, generator=torch.Generator().manual_seed(1))
    return {"x": ids, "labels": ids}


class _Live(TorchDispatchMode):
    """Remembers every storage that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in tree_leaves(out):
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                self.storages[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        return out

    def total(self, *, without: set[int]) -> int:
        """Bytes of those that are still alive."""
        return sum(
            size for key, (found, size) in self.storages.items() if key not in without and found() is not None
        )


def live_bytes(config: RunConfig) -> int:
    """Bytes that are still alive between a forward and its backward, without the parameters."""
    model, layout = build(config)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with _Live() as live:
        loss = model(**batch(config, layout))
        gc.collect()
        sizes = [
            live.total(without=own) for _ in range(5) if not time.sleep(0.02)
        ]  # gloo lets go a little late
    loss.total.backward()
    return min(sizes)


@contextmanager
def counted(found: Counter[tuple[str, str]]) -> Iterator[None]:
    """Count calls and bytes of the collectives and sends of torch.distributed."""

    def wrap(name: str, label: str, measured: int) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[label, "count"] += 1
            found[label, "bytes"] += args[measured].nbytes
            return original(*args, **kwargs)

        return patch.object(dist, name, call)

    def batch_p2p(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            if operation.op is dist.isend:
                found["send", "count"] += 1
                found["send", "bytes"] += operation.tensor.nbytes
        return original_p2p(operations)

    original_p2p = dist.batch_isend_irecv
    with (
        wrap("all_reduce", "all_reduce", 0),
        wrap("all_gather_single", "all_gather", 0),
        wrap("reduce_scatter_single", "reduce_scatter", 1),
        wrap("all_to_all_single", "all_to_all", 1),
        patch.object(dist, "batch_isend_irecv", batch_p2p),
    ):
        yield


def counted_step(config: RunConfig) -> dict[tuple[str, str], int]:
    """What one forward and backward of this rank calls."""
    model, layout = build(config)
    found: Counter[tuple[str, str]] = Counter()
    with counted(found):
        model(**batch(config, layout)).total.backward()
    return dict(found)
