"""A small model on real ranks, and what it keeps and sends."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_b2.config import RunConfig, load_config
from megatron_b2.config.schema import ModelConfig, OpsConfig
from megatron_b2.engine.single import DTYPES
from megatron_b2.layouts.memory import context_method
from megatron_b2.model.model import BaichuanModel
from megatron_b2.model.split import ModelSplit
from megatron_b2.ops.bundle import load_ops
from megatron_b2.ops.registry import choose
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
        ops=OpsConfig(backend="reference"),
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
    choices = choose(config.ops, device=torch.device("cpu"), head_dim=config.model.head_dim)
    model = BaichuanModel(
        config.model,
        split=split,
        ops=load_ops(choices, config.ops),
        recompute=config.train.recompute,
        dtype=DTYPES[config.train.precision],
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


class Live(TorchDispatchMode):
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

    def alive_now(self) -> set[int]:
        """Storages that have memory."""
        found = {key: storage() for key, (storage, _) in self.storages.items()}
        return {key for key, item in found.items() if item is not None and item.device.type == "cpu"}

    def alive(self) -> set[int]:
        """The fewest of several looks: a thread of gloo lets go of what it has sent a moment after its caller
        goes on."""
        gc.collect()
        return min((self.alive_now() for _ in range(5) if not time.sleep(0.02)), key=self.bytes_of)

    def bytes_of(self, keys: set[int]) -> int:
        return sum(self.storages[key][1] for key in keys)


def live_bytes(config: RunConfig) -> int:
    """Bytes that are still alive between a forward and its backward, without the parameters."""
    model, layout = build(config)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with Live() as live:
        loss = model(**batch(config, layout))
        kept = live.bytes_of(live.alive() - own)
    loss.total.backward()
    return kept


class Calls(TorchDispatchMode):
    """Counts calls and bytes of everything that torch.distributed is asked for, whoever asks.

    Every process group hands its operations to torch's dispatcher, which this stands in front of: nothing can
    pass it by, and an operation it does not know is an error.
    """

    MEASURED: ClassVar[dict[str, tuple[str, int]]] = {
        "allreduce_": ("all_reduce", 0),
        "_allgather_base_": ("all_gather", 0),
        "_reduce_scatter_base_": ("reduce_scatter", 1),
        "alltoall_base_": ("all_to_all", 1),
        "send": ("send", 0),
    }
    """Operation of c10d -> our name for it, and the argument whose bytes count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str]] = Counter()
        """(name of the group, operation, "count" or "bytes")."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name != "recv_":
            operation, measured = self.MEASURED[name]
            group = next(
                dist.ProcessGroup.unbox(item) for item in args if isinstance(item, torch.ScriptObject)
            )
            size = sum(tensor.nbytes for tensor in tree_leaves(args[measured]))
            self.found[group.group_name, operation, "count"] += 1
            self.found[group.group_name, operation, "bytes"] += size
        return func(*args, **(kwargs or {}))

    def by_operation(self) -> dict[tuple[str, str], int]:
        """Of all groups together."""
        total: Counter[tuple[str, str]] = Counter()
        for (_, operation, kind), value in self.found.items():
            total[operation, kind] += value
        return dict(total)


def counted_step(config: RunConfig) -> dict[tuple[str, str], int]:
    """What one forward and backward of this rank calls."""
    model, layout = build(config)
    with Calls() as calls:
        model(**batch(config, layout)).total.backward()
    return calls.by_operation()
