"""The shapes in which the published models launch every Triton operation, for the table of kernels.

One sequence of 4,096 tokens in bf16 (attention and the head also in fp32), forward and backward, on `meta`
tensors; laid out in memory as the model hands them over. Tensor parallel 8 is one rank's share, with sequence
parallelism between the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from megatron_b2.config import load_config
from megatron_b2.config.schema import ModelConfig
from megatron_b2.ops.attention import Documents, attend

TOKENS: Final = 4_096
TENSOR_PARALLEL: Final = (1, 8)
DOCUMENT_TOKENS: Final = 1_000
"""Length of the packed documents of the variant with documents; not a multiple of any tile."""
OTHER_HEAD_DIMS: Final = (64, 88, 104, 144, 152, 160)
"""Head widths of other models than 7B and 13B."""
OTHER_HEADS: Final = 5
"""Odd, so that strides are multiples of the width and of nothing more."""
GROUP: Final = 5
"""Query heads of a key head where they are grouped."""
DTYPE: Final = torch.bfloat16
SINGLE: Final = "fp32"
"""Ends the shape of variants in fp32."""


@dataclass(frozen=True)
class Variant:
    """One operation in one shape."""

    op: str
    """Function of the operation."""
    shape: str
    """Such as "7B", "13B packed", "head_dim 88" or "head_dim 88 packed fp32"."""
    tensor_parallel: int
    run: Callable[[], None]
    """Forward and backward on `meta` tensors."""

    @property
    def name(self) -> str:
        return f"{self.op} | {self.shape} | TP {self.tensor_parallel}"


def variants() -> tuple[Variant, ...]:
    """All of them, in the order of the table."""
    models = {name: load_config(f"preset:baichuan2-{name.lower()}").config.model for name in ("7B", "13B")}
    found = []
    for op, run in _OPERATIONS:
        for name, model in models.items():
            for size in TENSOR_PARALLEL:
                if op != "rope_split" or model.position == "rope":
                    found.append(Variant(op, name, size, _bound(run, model, size)))
    return (*found, *_attention_variants(models), *_head_variants(models))


def _attention_variants(models: Mapping[str, ModelConfig]) -> Iterator[Variant]:
    """Attention over packed documents, in other widths, with grouped heads and in fp32."""
    op, alibi = "causal_attention", models["13B"]
    for name, model in models.items():
        for size in TENSOR_PARALLEL:
            yield Variant(op, f"{name} packed", size, _bound(_packed_attention, model, size))
    for size in TENSOR_PARALLEL:
        yield Variant(op, "13B skipping", size, _bound(_skipping_attention, alibi, size))
    others = {
        f"head_dim {width}": replace(alibi, num_heads=OTHER_HEADS, hidden_size=OTHER_HEADS * width)
        for width in OTHER_HEAD_DIMS
    }
    for name, model in others.items():
        yield Variant(op, name, 1, _bound(_attention, model, 1))
        yield Variant(op, f"{name} packed", 1, _bound(_packed_attention, model, 1))
    for name, model in ("13B", alibi), *others.items():
        yield Variant(op, f"{name} packed grouped", 1, _bound(_grouped_attention, model, 1))
        yield Variant(op, f"{name} packed {SINGLE}", 1, _bound(_single_attention, model, 1))


def _head_variants(models: Mapping[str, ModelConfig]) -> Iterator[Variant]:
    """The head with gradients from kept products, which suits ranks with few rows, and in fp32."""
    op, size = "norm_head_loss", TENSOR_PARALLEL[-1]
    for name, model in models.items():
        yield Variant(op, f"{name} kept", size, _bound(_kept_head_loss, model, size))
    yield Variant(op, f"7B {SINGLE}", size, _bound(_single_head_loss, models["7B"], size))
    yield Variant(op, f"7B kept {SINGLE}", size, _bound(_single_kept_head_loss, models["7B"], size))


def _bound(run: Callable[[ModelConfig, int], None], model: ModelConfig, size: int) -> Callable[[], None]:
    return lambda: run(model, size)


def _empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _backward(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """The gradient of everything, with contiguous gradients of the outputs."""
    wanted = [x for x in inputs if x.requires_grad]
    torch.autograd.grad(outputs, wanted, [torch.empty_like(out) for out in outputs])


def _rms_norm(model: ModelConfig, size: int) -> None:
    from megatron_b2.ops.triton.rms_norm import rms_norm

    x, weight = _empty(1, TOKENS // size, model.hidden_size), _empty(model.hidden_size)
    _backward([rms_norm(x, weight, eps=model.norm_eps)], [x, weight])


def _add_rms_norm(model: ModelConfig, size: int) -> None:
    from megatron_b2.ops.triton.rms_norm import add_rms_norm

    x, residual = (_empty(1, TOKENS // size, model.hidden_size) for _ in range(2))
    weight = _empty(model.hidden_size)
    _backward(add_rms_norm(x, residual, weight, eps=model.norm_eps), [x, residual, weight])


def _rope_split(model: ModelConfig, size: int) -> None:
    from megatron_b2.ops.triton.rope import rope_split

    head_dim = model.hidden_size // model.num_heads
    qkv = _empty(1, TOKENS, 3, model.num_heads // size, head_dim)
    cos, sin = (torch.empty(1, TOKENS, head_dim // 2, device="meta") for _ in range(2))
    _backward(rope_split(qkv, cos, sin), [qkv])


def _swiglu(model: ModelConfig, size: int) -> None:
    from megatron_b2.ops.triton.swiglu import swiglu

    gate_up = _empty(1, TOKENS, 2 * model.ffn_hidden_size // size)
    _backward([swiglu(gate_up)], [gate_up])


def _attention(
    model: ModelConfig,
    size: int,
    documents: Documents | None = None,
    *,
    group: int = 1,
    skip_negligible: bool = False,
    dtype: torch.dtype = DTYPE,
) -> None:
    from megatron_b2.ops.triton.attention import TritonAttention

    heads, head_dim = model.num_heads // size, model.hidden_size // model.num_heads
    qkv = _empty(1, TOKENS, 3, heads, head_dim, dtype=dtype)
    q, k, v = qkv.unbind(2)
    if model.position == "rope":
        # rope_split makes new queries and keys and leaves the values where they are.
        q, k = (_empty(1, TOKENS, heads, head_dim, dtype=dtype) for _ in range(2))
    k, v = (x[:, :, : heads // group] for x in (k, v))
    slopes = torch.empty(heads, device="meta") if model.position == "alibi" else None
    kernel = TritonAttention(skip_negligible=skip_negligible)
    out = attend(q, k, v, alibi_slopes=slopes, documents=documents, kernel=kernel)
    _backward([out], [q, k, v])


def _packed_attention(model: ModelConfig, size: int, *, group: int = 1, dtype: torch.dtype = DTYPE) -> None:
    segments = torch.arange(TOKENS).div(DOCUMENT_TOKENS, rounding_mode="floor").unsqueeze(0)
    documents = Documents.of(segments)
    assert documents is not None
    # `meta` in place of the tensors; what is kept as numbers stays.
    tensors: dict[str, Any] = {
        name: value.to("meta") for name, value in vars(documents).items() if isinstance(value, Tensor)
    }
    _attention(model, size, replace(documents, **tensors), group=group, dtype=dtype)


def _single_attention(model: ModelConfig, size: int) -> None:
    _packed_attention(model, size, dtype=torch.float32)


def _grouped_attention(model: ModelConfig, size: int) -> None:
    _packed_attention(model, size, group=GROUP)


def _skipping_attention(model: ModelConfig, size: int) -> None:
    _attention(model, size, skip_negligible=True)


def _norm_head_loss(
    model: ModelConfig, size: int, *, keeps: bool = False, dtype: torch.dtype = DTYPE
) -> None:
    from megatron_b2.ops.triton import head_loss

    hidden = _empty(TOKENS, model.hidden_size, dtype=dtype)
    weight = _empty(model.vocab_size // size, model.hidden_size, dtype=dtype)
    labels = _empty(TOKENS, dtype=torch.int64)
    ce_scale, z_scale = (torch.empty((), device="meta") for _ in range(2))
    function = head_loss.norm_head_loss_kept if keeps else head_loss.norm_head_loss
    loss = function(hidden, weight, labels, ce_scale=ce_scale, z_scale=z_scale)
    _backward([loss.total], [hidden, weight])


def _kept_head_loss(model: ModelConfig, size: int) -> None:
    _norm_head_loss(model, size, keeps=True)


def _single_head_loss(model: ModelConfig, size: int) -> None:
    _norm_head_loss(model, size, dtype=torch.float32)


def _single_kept_head_loss(model: ModelConfig, size: int) -> None:
    _norm_head_loss(model, size, keeps=True, dtype=torch.float32)


_OPERATIONS: Final = (
    ("rms_norm", _rms_norm),
    ("add_rms_norm", _add_rms_norm),
    ("rope_split", _rope_split),
    ("swiglu", _swiglu),
    ("causal_attention", _attention),
    ("norm_head_loss", _norm_head_loss),
)
