"""What a plan assumes of [ops], and that the head it plans for keeps and calls what is planned."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_b2.config import RunConfig, load_config
from megatron_b2.config.schema import OpsConfig
from megatron_b2.layouts import memory, traffic
from megatron_b2.layouts.backends import describe_backends, planned_backend
from megatron_b2.layouts.memory import part_activations
from megatron_b2.layouts.traffic import micro_batch_traffic
from megatron_b2.model.split import StageLayers
from megatron_b2.ops import head_loss, registry
from megatron_b2.parallel.layout import Layout
from megatron_b2.testing.kernels.interpreter import run_interpreted
from tests.layouts.support import Live, counted_step, live_bytes, small_config

REFERENCE = OpsConfig(backend="reference")
TRITON = OpsConfig(backend="triton")
KEPT = OpsConfig(backend="triton", head_gradient="forward")


def test_a_plan_chooses_as_a_machine_that_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "unavailable", lambda *_args, **_settings: "")
    for backend, op in itertools.product(("auto", "reference", "triton", "cuda"), registry.BACKENDS):
        for choice in ("default", "auto", *registry.BACKENDS[op]):
            config: Any = OpsConfig(**{"backend": backend, op: choice})  # type: ignore[arg-type]
            chosen = registry.choose(config, device=torch.device("cuda"))
            assert {item.op: item.backend for item in chosen} == {
                name: planned_backend(config, name) for name in registry.BACKENDS
            }


def test_sizes_are_those_of_the_operations() -> None:
    from megatron_b2.ops.cuda import head_loss as cuda
    from megatron_b2.ops.triton import head_loss as triton

    sizes = {
        "reference": 4 * head_loss._CHUNK_ELEMENTS,
        "triton": triton.KEPT_BYTES,
        "cuda": cuda.PRODUCT_BYTES,
    }
    assert sizes == memory.HEAD_CHUNK_BYTES
    assert triton.MAX_CHUNK == memory.HEAD_ROWS
    assert triton.CHUNK_MULTIPLE == traffic.CHUNK_MULTIPLE


def kept(config: RunConfig) -> tuple[int, int]:
    """Bytes of a block, and of the rest."""
    one, two = (
        live_bytes(replace(config, model=replace(config.model, num_layers=count))) for count in (1, 2)
    )
    return two - one, 2 * one - two


def test_blocks_keep_the_same_with_kernels_and_the_head_what_it_is_planned_to() -> None:
    config = small_config()
    config = replace(
        config, data=replace(config.data, seq_len=8), train=replace(config.train, micro_batch_size=1)
    )
    extra, planned = [], []
    for ops in (REFERENCE, TRITON, KEPT):
        chosen = replace(config, ops=ops)
        block, rest = run_interpreted(kept, chosen)
        assert block == memory.block_activations(chosen, Layout(), "none")
        ends = StageLayers((), has_embedding=True, has_head=True)
        planned.append(part_activations(chosen, Layout(), ends))
        extra.append(rest - planned[-1])
    # What every model keeps beside: the labels and a few numbers.
    assert min(extra) >= 0
    assert max(extra) - min(extra) <= 16
    assert planned[1] < planned[0] == planned[2]


def test_the_backward_pass_of_the_triton_head_works_with_what_is_planned() -> None:
    tokens, width, rows = 32, 16, 2 * memory.HEAD_ROWS

    def peak() -> int:
        from megatron_b2.ops.triton.head_loss import norm_head_loss

        hidden = torch.randn(tokens, width).requires_grad_()
        weight = torch.randn(rows, width).requires_grad_()
        labels = torch.randint(0, rows, (tokens,))
        own = {tensor.untyped_storage()._cdata for tensor in (hidden, weight, labels)}
        most = 0

        class Peak(Live):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                nonlocal most
                out = super().__torch_dispatch__(func, types, args, kwargs)
                most = max(most, self.bytes_of(self.alive_now() - own))
                return out

        with Peak():
            norm_head_loss(hidden, weight, labels, ce_scale=1.0, z_scale=0.0).total.backward()
        return most

    config = small_config(num_layers=1)
    shape = replace(config.model, hidden_size=width, vocab_size=rows)
    config = replace(
        config,
        ops=TRITON,
        model=shape,
        data=replace(config.data, seq_len=tokens),
        train=replace(config.train, micro_batch_size=1),
    )
    planned = memory._head_working(config, Layout()) + 16 * tokens + 4 * rows
    assert run_interpreted(peak) == pytest.approx(planned, rel=0.1)


def all_gathers(config: RunConfig) -> tuple[int, int]:
    found = counted_step(config)
    return found["all_gather", "count"], found["all_gather", "bytes"]


@pytest.mark.parametrize(
    ("ops", "calls"), [(REFERENCE, 3), (TRITON, 1), (KEPT, 1)], ids=["reference", "triton", "kept"]
)
def test_all_gathers_of_the_head(ops: OpsConfig, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference has one for each chunk of tokens, Triton one for all."""
    monkeypatch.setattr(head_loss, "_MAX_CHUNK_TOKENS", 16)
    config = small_config(num_layers=1, tensor=2)
    config = replace(
        config,
        model=replace(config.model, hidden_size=8, ffn_hidden_size=8, num_heads=2, vocab_size=16),
        ops=replace(ops, attention="reference", swiglu="reference", rms_norm="reference", rope="reference"),
        data=replace(config.data, seq_len=40),
        train=replace(config.train, micro_batch_size=1),
    )
    items = micro_batch_traffic(config, Layout(tensor=2), StageLayers.whole(1))
    counted = [(item.count, item.bytes) for item in items if item.operation == "all_gather"]
    assert counted == [(calls, 2 * 40 * 16)]
    assert run_interpreted(all_gathers, config, ranks=2) == counted * 2


def test_the_report_says_what_it_assumes() -> None:
    config = load_config("preset:baichuan2-13b").config
    text = describe_backends(config.ops)
    assert "head_loss triton" in text
    assert text.endswith('("auto" is planned as on a GPU); gradients of the head in the backward pass')
    assert "head_loss reference" in describe_backends(REFERENCE)
    assert describe_backends(KEPT).endswith("in the forward pass")
