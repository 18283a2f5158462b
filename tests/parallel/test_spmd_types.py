"""The tensor-parallel model passes a type checker for collectives, and fails it where one is left out.

spmd_types (Meta) follows what each tensor is over the ranks of the group: the same everywhere with one
gradient (I), the same with gradients still to be summed (R), different (V), a partial sum (P). It sees every
torch operation of the real model; of our autograd functions it knows the rules below, and those of the
collectives are checked against their numbers on simulated ranks. Forward only: a backward that a rule
describes wrongly is for the gradient comparisons of tests/dist. Under sequence parallelism the gradients of
unsplit parameters are left to the engine's hooks: they are R here.
"""

from __future__ import annotations

import multiprocessing
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Literal
from unittest.mock import patch

import pytest
import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types import rulecheck, rules
from spmd_types.checker import typecheck
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_b2.config.schema import ModelConfig
from megatron_b2.errors import InputError
from megatron_b2.model.model import BaichuanModel
from megatron_b2.model.sharding import shard_spec
from megatron_b2.model.split import ModelSplit
from megatron_b2.ops import attention, head_loss, rms_norm, rope, swiglu
from megatron_b2.parallel import collectives
from megatron_b2.parallel.tensor_parallel import TensorParallel

WORLD, TENSOR, LAYERS, LENGTH = 1_024, 8, 2, 128
LOCAL = (swiglu._SwiGLU, rms_norm._RMSNorm, rms_norm._AddRMSNorm, rope._RopeSplit, attention._TiledAttention)
"""Functions without communication: R and V in, V out."""


def in_child(fn: Callable[..., Any], *args: Any) -> Any:
    """Call in a forked child: fake groups and registered rules stay there."""

    def child(pipe: Connection) -> None:
        torch.set_num_threads(1)
        pipe.send(fn(*args))

    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        raise AssertionError("the child failed: its traceback is above") from None
    finally:
        process.join()


def pending(x: Any, group: Any) -> Any:
    """What a row-parallel matrix leaves differs over the ranks; that it is a partial sum is for us to say."""
    is_varying = spmd.get_local_type(x)[spmd.normalize_axis(group)] is spmd.V
    return rules.reinterpret(x, group, src=spmd.V, dst=spmd.P) if is_varying else x


def copy_rule(*, x: Any, group: Any) -> Any:
    return rules.convert(x, group, src=spmd.I, dst=spmd.R)


def reduce_rule(*, x: Any, group: Any) -> Any:
    return rules.all_reduce(pending(x, group), group, src=spmd.P, dst=spmd.I)


def gather_rule(*, x: Any, group: Any) -> Any:
    return rules.all_gather(x, group, src=spmd.S(1), dst=spmd.R)


def scatter_rule(*, x: Any, group: Any) -> Any:
    return rules.reduce_scatter(pending(x, group), group, src=spmd.P, dst=spmd.S(1))


def head_rule(
    outputs: Any, *, hidden: Any, weight: Any, labels: Any, ce_scale: Any, z_scale: Any, tensor: Any
) -> None:
    """The loss is whole on every rank; the gradient of `hidden` is a partial sum, which R stands for."""
    spmd.assert_type(hidden, {tensor.group: spmd.R})
    spmd.assert_type(weight, {tensor.group: spmd.V})
    rules.ignore(labels, ce_scale, z_scale)
    for output in outputs:
        spmd.assert_type(output, {tensor.group: spmd.I})


RULES: dict[type, Callable[..., Any]] = {
    collectives._Copy: copy_rule,
    collectives._Reduce: reduce_rule,
    collectives._AllGatherSequence: gather_rule,
    collectives._ReduceScatterSequence: scatter_rule,
    head_loss._NormHeadLoss: head_rule,
}


def declare_rules() -> None:
    for function, rule in RULES.items():
        function.spmd_typecheck = staticmethod(rule)  # type: ignore[attr-defined]
    for function in LOCAL:
        spmd.register_local_autograd_function(function)


Side = Literal["enter", "leave"]


@dataclass(frozen=True)
class Forgetful(TensorParallel):
    """Leaves out one of its collectives: the nth of a side."""

    forgets: tuple[Side, int] | None = None
    seen: list[Side] = field(default_factory=list)

    def enter(self, x: Tensor) -> Tensor:
        return self._unless_forgotten("enter", x, super().enter)

    def leave(self, x: Tensor) -> Tensor:
        return self._unless_forgotten("leave", x, super().leave)

    def _unless_forgotten(self, side: Side, x: Tensor, collective: Callable[[Tensor], Tensor]) -> Tensor:
        self.seen.append(side)
        return x if self.forgets == (side, self.seen.count(side) - 1) else collective(x)


def type_of_loss(mesh: DeviceMesh, tensor: TensorParallel, position: Literal["rope", "alibi"]) -> str:
    """Run the model forward under the checker; the type of its loss, or the error."""
    group = mesh.get_group()
    config = ModelConfig(
        hidden_size=32,
        ffn_hidden_size=48,
        num_layers=LAYERS,
        num_heads=16,
        vocab_size=160,
        position=position,
    )
    model = BaichuanModel(config, split=ModelSplit(tensor=tensor))
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    ids = torch.ones(2, LENGTH, dtype=torch.int64)
    unsplit = spmd.R if tensor.sequence_parallel else spmd.I
    with spmd.set_current_mesh(mesh), typecheck(strict_mode="strict"):  # strict: no tensor is untyped
        for name, parameter in model.named_parameters():
            spmd.assert_type(parameter, {group: unsplit if shard_spec(name).dim is None else spmd.V})
        spmd.assert_type(ids, {group: spmd.R})
        try:
            total = model(ids, ids).total
        except (spmd.SpmdTypeError, RuntimeError, InputError) as error:
            return type(error).__name__
        return str(spmd.get_local_type(total)[spmd.normalize_axis(group)])


def types_with(
    position: Literal["rope", "alibi"], is_sequence: bool, places: list[tuple[Side, int] | None]
) -> list[str]:
    """Of a rank of 1,024."""
    dist.init_process_group("fake", rank=3, world_size=WORLD, store=FakeStore())
    mesh = init_device_mesh("cpu", (WORLD // TENSOR, TENSOR), mesh_dim_names=("data", "tensor"))["tensor"]
    declare_rules()
    group = mesh.get_group()
    return [
        type_of_loss(mesh, Forgetful(TENSOR, 3, group, is_sequence, forgets=place), position)
        for place in places
    ]


@pytest.mark.parametrize("is_sequence", [False, True], ids=["whole", "sequence"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_the_model_passes(position: Literal["rope", "alibi"], is_sequence: bool) -> None:
    assert in_child(types_with, position, is_sequence, [None]) == [str(spmd.I)]


PLACES: list[tuple[Side, int] | None] = [
    (side, place) for side in ("enter", "leave") for place in range(2 * LAYERS + 1)
]


def test_every_collective_that_is_left_out_is_found() -> None:
    """Also one whose forward does nothing: without it only gradients would be wrong."""
    assert in_child(types_with, "alibi", False, PLACES) == ["SpmdTypeError"] * len(PLACES)


def test_every_sequence_collective_that_is_left_out_is_found() -> None:
    """By its type, or by its shape already, as before the head, which has a label for each position."""
    found = in_child(types_with, "alibi", True, PLACES)
    assert set(found) <= {"SpmdTypeError", "RuntimeError", "InputError"}
    assert found[PLACES.index(("enter", 2 * LAYERS))] == "InputError"


COLLECTIVES: list[tuple[type, Any]] = [
    (collectives._Copy, spmd.I),
    (collectives._Reduce, spmd.P),
    (collectives._AllGatherSequence, spmd.S(1)),
    (collectives._ReduceScatterSequence, spmd.P),
]


def noise(like: Tensor, *key: object) -> Tensor:
    """spmd_types 0.3.1 draws partial sums with an operation that torch 2.13 does not have on CPUs."""
    seed = zlib.crc32(repr(key).encode())
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def check_rule(function: type, placement: Any) -> None:
    declare_rules()
    x = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    with patch.object(rulecheck, "_seeded_noise", noise):
        rulecheck.rulecheck(
            function, (x, "tp"), {"x": {"tp": placement}}, mesh={"tp": 4}, local_tensor_mode=True
        )


@pytest.mark.parametrize(("function", "placement"), COLLECTIVES, ids=[f.__name__ for f, _ in COLLECTIVES])
def test_a_rule_is_what_its_collective_computes(function: type, placement: Any) -> None:
    in_child(check_rule, function, placement)


def wrong_rule_is_found() -> bool:
    with patch.object(collectives, "_all_reduce", lambda x, group: x.clone()):
        try:
            check_rule(collectives._Reduce, spmd.P)
        except rulecheck.RuleCheckError:
            return True
    return False


def test_a_collective_that_does_not_reduce_breaks_its_rule() -> None:
    assert in_child(wrong_rule_is_found)
