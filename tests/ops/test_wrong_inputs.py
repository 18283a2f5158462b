"""Inputs that do not fit each other are refused by name: a kernel would read beyond the end of the smaller one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_b2.config.schema import OpsConfig
from megatron_b2.errors import InputError
from megatron_b2.ops.attention import Documents
from megatron_b2.ops.bundle import Ops, load_ops
from megatron_b2.ops.registry import BACKENDS, Backend, Choice
from megatron_b2.testing.kernels import cpu_shim
from megatron_b2.testing.kernels.interpreter import run_interpreted

Wrong = tuple[str, str, Callable[[Ops], Any]]
"""Name, what the error says, and a call."""

FP64 = "fp32, fp16 or bf16; got torch.float64"


def ops_of(backend: Backend) -> Ops:
    choices = [Choice(op, backend, "") for op, backends in BACKENDS.items() if backend in backends]
    return load_ops(choices, OpsConfig())


def norms() -> Iterator[Wrong]:
    x, weight = torch.randn(4, 16), torch.ones(16)
    yield "short weight", "weight must be [16]", lambda ops: ops.rms_norm(x, weight[:8], eps=1e-6)
    yield "long weight", "got [32]", lambda ops: ops.rms_norm(x, weight.repeat(2), eps=1e-6)
    yield (
        "fewer residual rows",
        "residual must have the shape of x, [4, 16], got [1, 16]",
        lambda ops: ops.add_rms_norm(x, x[:1], weight, eps=1e-6),
    )
    yield "fp64 norm", FP64, lambda ops: ops.rms_norm(x.double(), weight.double(), eps=1e-6)
    yield (
        "mixed norm",
        "got torch.bfloat16 and torch.float32",
        lambda ops: ops.rms_norm(x.bfloat16(), weight, eps=1e-6),
    )
    yield "odd width", "gate_up has an odd width: 15", lambda ops: ops.swiglu(x[:, :15])
    yield "fp64 swiglu", FP64, lambda ops: ops.swiglu(x.double())


def rotations() -> Iterator[Wrong]:
    qkv, table = torch.randn(2, 5, 3, 2, 8), torch.rand(1, 5, 4)
    yield "short table", "[1, 3, 4]", lambda ops: ops.rope_split(qkv, table[:, :3], table[:, :3])
    yield "short sines", "[1, 3, 4]", lambda ops: ops.rope_split(qkv, table, table[:, :3])
    yield "odd head", "D even", lambda ops: ops.rope_split(qkv[..., :7], table[..., :3], table[..., :3])
    yield "fp64 rope", FP64, lambda ops: ops.rope_split(qkv.double(), table, table)


def attentions() -> Iterator[Wrong]:
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 2, 8)
    slopes, documents = torch.ones(4), Documents.of(torch.arange(5).expand(2, 5) // 2)
    assert documents is not None
    cut = replace(documents, starts=documents.starts[:1])

    def attend(*inputs: Tensor, slopes: Tensor | None = slopes, **rest: Any) -> Callable[[Ops], Tensor]:
        return lambda ops: ops.causal_attention(*inputs, alibi_slopes=slopes, **rest)

    yield "few slopes", "alibi_slopes must be [4], one a head, got [2]", attend(q, k, k, slopes=slopes[:2])
    yield (
        "one document row",
        "documents must be of [2, 5] positions, got [1, 5]",
        attend(q, k, k, documents=cut),
    )
    yield "three key heads", "[2, 5, 3, 8]", attend(q, q[:, :, :3], q[:, :, :3])
    yield "fewer values", "[2, 4, 2, 8]", attend(q, k, k[:, :4])
    yield "fewer batches", "[1, 5, 2, 8]", attend(q, k[:1], k[:1])
    yield "wider values", "[2, 5, 4, 8]", attend(q[..., :6], k[..., :6], q)
    yield "more queries", "5 queries, but only 3 keys", attend(q, k[:, :3], k[:, :3])


def heads() -> Iterator[Wrong]:
    hidden, weight, labels = torch.randn(5, 16), torch.randn(9, 16), torch.zeros(5, dtype=torch.int64)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Callable[[Ops], Any]:
        return lambda ops: ops.norm_head_loss(hidden, weight, labels, ce_scale=1.0, z_scale=0.1)

    yield "few labels", "int64 [3]", loss(hidden, weight, labels[:3])
    yield "int32 labels", "int32 [5]", loss(hidden, weight, labels.int())
    yield "labels of a batch", "int64 [1, 5]", loss(hidden, weight, labels[None])
    yield "narrow weight", "[9, 8]", loss(hidden, weight[:, :8], labels)
    yield "no vocabulary", "[0, 16]", loss(hidden, weight[:0], labels)


def answers(ops: Ops, *cases: Iterator[Wrong]) -> list[str]:
    """What was not refused, or with other words."""
    found = []
    for name, words, call in (case for kind in cases for case in kind):
        try:
            call(ops)
        except InputError as error:
            if words not in str(error):
                found.append(f"{name}: {error}")
        else:
            found.append(f"{name}: accepted")
    return found


def test_triton_refuses_them() -> None:
    def wide_head() -> list[str]:
        x = torch.randn(2, 4, 16, dtype=torch.float64)
        ops = ops_of("triton")
        fp64: Iterator[Wrong] = iter(
            [
                ("fp64 head", FP64, lambda ops: ops.norm_head_loss(
                    x[0], x[1], torch.zeros(4, dtype=torch.int64), ce_scale=1.0, z_scale=0.0
                )),
                ("fp64 attention", FP64, lambda ops: ops.causal_attention(*(x[None] for _ in range(3)))),
            ]
        )  # fmt: skip
        return answers(ops, norms(), rotations(), attentions(), heads(), fp64)

    assert run_interpreted(wide_head) == []


@pytest.mark.skipif(bool(cpu_shim.missing()), reason=cpu_shim.missing())
def test_cuda_refuses_them() -> None:
    with cpu_shim.kernels_on_cpu():
        assert answers(ops_of("cuda"), norms(), heads()) == []


def test_references_refuse_what_torch_would_take() -> None:
    assert answers(ops_of("reference"), attentions(), heads()) == []


def of_foreign_labels(backend: Backend) -> list[Tensor]:
    """Sums and gradients with labels of no row; they count as ones whose logit is 0."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=generator).requires_grad_() for size in (4, 9))
    labels = torch.tensor([3, 9, -1, -100])
    loss = ops_of(backend).norm_head_loss(hidden, weight, labels, ce_scale=0.3, z_scale=0.1)
    return [x.detach() for x in (*loss, *torch.autograd.grad(loss.total, (hidden, weight)))]


def test_labels_of_no_row_count_as_logits_of_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 16, generator=generator).requires_grad_() for size in (4, 9))
    logits = hidden @ (weight / weight.norm(dim=1, keepdim=True)).t()
    ce = logits[:3].logsumexp(1).sum() - logits[0, 3]
    max_z = logits.amax(1).square().sum()
    total = 0.3 * ce + 0.1 * max_z
    expected = [x.detach() for x in (total, ce, max_z)] + list(torch.autograd.grad(total, (hidden, weight)))
    for found in (of_foreign_labels("reference"), run_interpreted(of_foreign_labels, "triton")):
        for ours, exact in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
