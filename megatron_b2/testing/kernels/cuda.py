"""Parity of the CUDA C++ kernels with float64: compiled ones on a GPU, their sources by `cpu_shim` on a CPU.

Widths are those of the models (H, F, 5 and 40 heads, vocabulary over 8 ranks) and odd ones, which take the
kernels that work by elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_b2.ops import rms_norm, swiglu
from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.attention import Documents
from megatron_b2.ops.cuda import alibi_softmax, attention, head_softmax
from megatron_b2.ops.cuda import head_loss as cuda_head_loss
from megatron_b2.ops.cuda import rms_norm as cuda_rms_norm
from megatron_b2.ops.cuda import swiglu as cuda_swiglu
from megatron_b2.ops.head_common import Statistics
from megatron_b2.optim.fused_adamw import FusedAdamW
from megatron_b2.testing.kernels import head_loss
from megatron_b2.testing.kernels.cpu_shim import kernels_on_cpu
from megatron_b2.testing.kernels.elementwise import Case, compare, random
from megatron_b2.testing.kernels.parity import Check, Deviation, deviation

EPS: Final = 1e-6
DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)

NORM_SHAPES: Final[Sequence[tuple[int, int]]] = (
    (1, 5_120),
    (19, 4_096),
    (3, 96),
    (37, 97),
    (18, 6_144),
    (3, 1),
)
"""Rows and columns."""
MANY_ROWS: Final[Sequence[tuple[int, int]]] = ((97, 4_096), (128, 5_120), (1_025, 97), (5, 16_384))
SWIGLU_SHAPES: Final[Sequence[tuple[int, int]]] = (
    (1, 11_008),
    (3, 13_696),
    (9, 1_376),
    (9, 1_712),
    (97, 33),
    (5, 1),
)
"""Rows and columns of one half."""
MANY_TOKENS: Final[Sequence[tuple[int, int]]] = ((97, 11_008), (512, 1_712))
SCORES: Final = ((1, 5, 33, 33), (2, 3, 4, 97), (1, 40, 6, 128), (2, 2, 1, 1))
"""Batch, heads, queries, keys."""
LONG_SCORES: Final = ((1, 5, 512, 512), (1, 5, 3, 8_200), (1, 40, 97, 97), (1, 2, 1_025, 1_025))
ATTENTION: Final = ((1, 5, 1, 33, 33, 88), (2, 4, 2, 9, 40, 128), (1, 2, 1, 1, 1, 64))
"""Batch, heads, heads of a key head, queries, keys and head width."""
LONG_ATTENTION: Final = ((1, 5, 1, 512, 512, 128), (1, 40, 1, 97, 97, 128), (2, 6, 3, 100, 333, 152))
LOGITS: Final = ((9, 1_000, 384), (5, 331, 128), (4, 15_712, 8_192))
"""Tokens, vocabulary columns and columns of a chunk; the last chunk is smaller."""
MANY_LOGITS: Final = ((33, 15_712, 3_928), (97, 2_048, 512))

ADAM_DTYPES: Final = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2)
"""Of parameters and of gradients."""


def checks() -> tuple[Check, ...]:
    """Every check of the CUDA kernels, quick ones first."""
    return tuple(sorted(_checks(), key=lambda check: not check.quick))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Where CUDA operations work: on a CUDA device as they are, on the CPU through the shim."""
    return kernels_on_cpu() if device.type == "cpu" else nullcontext()


def _checks() -> Iterator[Check]:
    for dtype in DTYPES:
        for shapes, quick in ((NORM_SHAPES, True), (MANY_ROWS, False)):
            for shape in shapes:
                name = f"{shape[0]} x {shape[1]}"
                yield _check("rms_norm", name, partial(_compare, partial(norm_case, *shape)), dtype, quick)
                yield _check(
                    "add_rms_norm", name, partial(_compare, partial(add_norm_case, *shape)), dtype, quick
                )
        for shapes, quick in ((SWIGLU_SHAPES, True), (MANY_TOKENS, False)):
            for shape in shapes:
                name = f"{shape[0]} x {shape[1]}"
                yield _check("swiglu", name, partial(_compare, partial(swiglu_case, *shape)), dtype, quick)
        for dimensions, quick in ((SCORES, True), (LONG_SCORES, False)):
            for shape4 in dimensions:
                for packed in (False, True):
                    name = " x ".join(map(str, shape4)) + (", packed" if packed else "")
                    build = partial(softmax_case, *shape4, packed)
                    yield _check("alibi_softmax", name, partial(_compare, build), dtype, quick)
        for problems, quick in ((ATTENTION, True), (LONG_ATTENTION, False)):
            for shape6 in problems:
                for alibi, packed in ((True, False), (True, True), (False, True)):
                    words = [" x ".join(map(str, shape6)), *["alibi"] * alibi, *["packed"] * packed]
                    build = partial(attention_case, *shape6, alibi, packed)
                    yield _check("causal_attention", ", ".join(words), partial(_compare, build), dtype, quick)
        for sizes, quick in ((LOGITS, True), (MANY_LOGITS, False)):
            for tokens, columns, chunk in sizes:
                name = f"{tokens} tokens, {columns} columns by {chunk}"
                run = partial(compare_head, tokens, columns, chunk)
                yield _check("head_softmax", name, run, dtype, quick)
    for case, quick in head_loss.cases():
        yield Check("norm_head_loss", "cuda", str(case), partial(_compare_loss, case), quick)
    for dtype, grad_dtype in ADAM_DTYPES:
        name = f"gradients {_short(grad_dtype)}"
        yield _check("adamw", name, partial(compare_adamw, grad_dtype=grad_dtype), dtype, True)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(
    op: str, name: str, body: Callable[..., list[Deviation]], dtype: torch.dtype, quick: bool
) -> Check:
    def run(device: torch.device) -> list[Deviation]:
        with on(device):
            return body(dtype=dtype, device=device)

    return Check(op, "cuda", f"{name}, {_short(dtype)}", run, quick)


def _compare(build: Callable[..., Case], *, dtype: torch.dtype, device: torch.device) -> list[Deviation]:
    return compare(build(dtype=dtype, device=device))


def norm_case(rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Case:
    """RMSNorm of `rows` rows of `width` columns."""
    weight = 1 + 0.5 * random(width, dtype=dtype, device=device, seed=1)
    x = random(rows, width, dtype=dtype, device=device, seed=2)
    return Case(
        partial(cuda_rms_norm.rms_norm, eps=EPS), partial(rms_norm.rms_norm, eps=EPS), _exact_norm,
        [x, weight], ["out"], ["x", "weight"],
    )  # fmt: skip


def add_norm_case(rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Case:
    """The same after a residual was added."""

    def exact(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What is normalised is the rounded total; rounding has the gradient of the identity."""
        total = x + residual
        stored = total + (total.to(dtype).double() - total).detach()
        return _exact_norm(stored, weight), total

    weight = 1 + 0.5 * random(width, dtype=dtype, device=device, seed=1)
    x, residual = (random(rows, width, dtype=dtype, device=device, seed=seed) for seed in (2, 3))
    return Case(
        partial(cuda_rms_norm.add_rms_norm, eps=EPS), partial(rms_norm.add_rms_norm, eps=EPS), exact,
        [x, residual, weight], ["out", "total"], ["x", "residual", "weight"],
    )  # fmt: skip


def _exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def swiglu_case(rows: int, width: int, *, dtype: torch.dtype, device: torch.device) -> Case:
    """SwiGLU of `rows` rows of twice `width` columns; some gates far from 0, where the sigmoid is flat."""

    def exact(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    gate_up = random(rows, 2 * width, dtype=dtype, device=device, seed=4)
    gate_up[:, ::7] *= 8
    return Case(cuda_swiglu.swiglu, swiglu.swiglu, exact, [gate_up], ["out"], ["gate_up"])


def softmax_case(
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    packed: bool,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """ALiBi softmax of `queries` that are the last of `keys` positions, in one document or in some."""
    scores = 8 * random(batch, heads, queries, keys, dtype=dtype, device=device, seed=6)
    options: dict[str, Any] = {
        "scale": 0.125,
        "alibi_slopes": alibi_slopes(heads).to(device),
        "documents": _documents(batch, keys, device) if packed else None,
    }
    reference = partial(_torch_softmax, softmax=lambda x, dim: _StoredSoftmax.apply(x, dim, dtype), **options)
    ours, exact = partial(alibi_softmax.alibi_softmax, **options), partial(_torch_softmax, **options)
    return Case(ours, reference, exact, [scores], ["probs"], ["scores"])


def attention_case(
    batch: int,
    heads: int,
    group: int,
    queries: int,
    keys: int,
    head_dim: int,
    alibi: bool,
    packed: bool,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """Attention of queries that are the last of `keys` positions; torch stores scores of the same dtype."""
    q = random(batch, queries, heads, head_dim, dtype=dtype, device=device, seed=10)
    k, v = (
        random(batch, keys, heads // group, head_dim, dtype=dtype, device=device, seed=seed)
        for seed in (11, 12)
    )
    options: dict[str, Any] = {
        "alibi_slopes": alibi_slopes(heads).to(device) if alibi else None,
        "documents": _documents(batch, keys, device) if packed else None,
    }

    def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
        scores = torch.matmul(q.transpose(1, 2), k.transpose(2, 3))
        return (_torch_softmax(scores, scale=head_dim**-0.5, **options) @ v).transpose(1, 2)

    ours = partial(attention.causal_attention, **options)
    return Case(ours, torch_attention, torch_attention, [q, k, v], ["out"], ["q", "k", "v"])


def _documents(batch: int, keys: int, device: torch.device) -> Documents | None:
    """Of 7 positions each in the first sequence, 4 more in each next one."""
    lengths = 7 + 4 * torch.arange(batch, device=device)
    return Documents.of(torch.arange(keys, device=device) // lengths[:, None])


class _StoredSoftmax(torch.autograd.Function):
    """fp32 logits to probabilities in `dtype`, which are all that the backward pass has: so does torch's own
    softmax in 16 bits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        probs = logits.softmax(dim).to(dtype)
        ctx.save_for_backward(probs)
        ctx.dim = dim
        return probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (stored,) = ctx.saved_tensors
        probs, wide = stored.float(), grad.float()
        return probs * (wide - (probs * wide).sum(ctx.dim, keepdim=True)), None, None


def _torch_softmax(
    scores: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None,
    documents: Documents | None,
    softmax: Callable[[Tensor, int], Tensor] = torch.softmax,
) -> Tensor:
    """`alibi_softmax` by its formula, rounded once to the dtype of the scores."""
    queries, keys = scores.shape[2:]
    places = torch.arange(keys, device=scores.device)
    rows = places[keys - queries :, None]
    hidden = places > rows
    if documents is not None:
        hidden = hidden | (places < documents.starts[:, None, keys - queries :, None])
    wide = scale * scores.to(torch.promote_types(scores.dtype, torch.float32))
    if alibi_slopes is not None:
        wide = wide + alibi_slopes.to(wide.dtype).view(-1, 1, 1) * (places - rows)
    return softmax(wide.masked_fill(hidden, -torch.inf), -1).to(scores.dtype)


def _compare_loss(case: head_loss.Case, device: torch.device) -> list[Deviation]:
    with on(device):
        return head_loss.compare(case, cuda_head_loss.norm_head_loss, device=device)


def compare_head(
    tokens: int, columns: int, chunk: int, *, dtype: torch.dtype, device: torch.device
) -> list[Deviation]:
    """Statistics and gradient of the logits, chunk by chunk, with equal maxima, ignored and absent labels."""
    products = 30 * random(tokens, columns, dtype=dtype, device=device, seed=7)
    inverse_norms = 0.1 + 0.05 * random(columns, dtype=torch.float32, device=device, seed=8).abs()
    first = 5 * columns  # this rank's first id
    labels = first + torch.arange(tokens, device=device) * 37 % columns
    labels[::4] = -100
    labels[1::5] = first - 1
    tie = torch.tensor([columns // 3, columns // 2, columns - 1], device=device)
    products[1], inverse_norms[tie] = products[1].clamp(max=50), 0.2
    products[1].index_fill_(0, tie, 120.0)
    ce_grad = (labels != -100).float() / tokens
    z_grad = random(tokens, dtype=torch.float32, device=device, seed=9) / tokens

    ours = _head_by_chunks(products, inverse_norms, labels, ce_grad, z_grad, first=first, chunk=chunk)
    torch_results, exact = (
        _head_by_torch(products.to(wanted), inverse_norms.to(wanted), labels - first, ce_grad, z_grad)
        for wanted in (torch.float32, torch.float64)
    )
    names = ("top", "top_index", "target_logit", "lse", "grad", "column_sums")
    results = zip(names, ours, torch_results, exact, strict=True)
    return [deviation(name, x, y.to(x.dtype), z) for name, x, y, z in results]


def _head_by_chunks(
    products: Tensor,
    inverse_norms: Tensor,
    labels: Tensor,
    ce_grad: Tensor,
    z_grad: Tensor,
    *,
    first: int,
    chunk: int,
) -> list[Tensor]:
    statistics = Statistics.empty(len(products), products.device)
    spans = [slice(start, start + chunk) for start in range(0, products.shape[1], chunk)]
    for span in spans:
        head_softmax.update_statistics(
            statistics, products[:, span], inverse_norms[span], labels, first_column=first + span.start
        )
    grad, sums = products.clone(), torch.zeros_like(inverse_norms)
    for span in spans:
        head_softmax.epilogue(
            grad[:, span],
            inverse_norms[span],
            labels,
            lse=statistics.lse,
            ce_grad=ce_grad,
            z_grad=z_grad,
            top_index=statistics.top_index,
            column_sums=sums[span],
            first_column=first + span.start,
        )
    top_index = (statistics.top_index - first).float()
    return [statistics.top, top_index, statistics.target_logit, statistics.lse, grad, sums]


def _head_by_torch(
    products: Tensor, inverse_norms: Tensor, labels: Tensor, ce_grad: Tensor, z_grad: Tensor
) -> list[Tensor]:
    """In the dtype of `products`; labels count from its first column."""
    logits = products * inverse_norms
    top, top_index = logits.max(dim=1)
    lse = logits.logsumexp(dim=1)
    places = torch.arange(logits.shape[1], device=logits.device)
    is_label, is_top = places == labels[:, None], places == top_index[:, None]
    target = logits.where(is_label, 0).sum(dim=1)
    delta = (
        ce_grad[:, None] * ((logits - lse[:, None]).exp() - is_label.to(logits)) + z_grad[:, None] * is_top
    )
    return [top, top_index, target, lse, delta * inverse_norms, (delta * logits).sum(dim=0)]


ADAM: Final[Mapping[str, Any]] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
ADAM_SIZES: Final = ((7,), (5, 33), (64, 48), (4_099,), (1,))
ADAM_STEPS: Final = 3


def compare_adamw(*, dtype: torch.dtype, grad_dtype: torch.dtype, device: torch.device) -> list[Deviation]:
    """Parameters and moments after some steps on the same gradients."""
    start = [random(*size, dtype=dtype, device=device, seed=20 + i) for i, size in enumerate(ADAM_SIZES)]
    gradients = [
        [
            0.1 * random(*size, dtype=grad_dtype, device=device, seed=50 * step + i)
            for i, size in enumerate(ADAM_SIZES)
        ]
        for step in range(ADAM_STEPS)
    ]
    results = [
        _adam_results(FusedAdamW, start, gradients, dtype),
        _adam_results(torch.optim.AdamW, start, gradients, torch.float32),
        _adam_results(torch.optim.AdamW, start, gradients, torch.float64),
    ]
    names = ("parameters", "moments")
    return [
        deviation(name, ours.to(kept), torch_result.to(kept), exact)
        for name, kept, ours, torch_result, exact in zip(names, (dtype, torch.float32), *results, strict=True)
    ]


def _adam_results(
    make: Callable[..., torch.optim.Optimizer],
    start: list[Tensor],
    gradients: list[list[Tensor]],
    working: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """All parameters and all moments; parameters are kept in the dtype of `start`, worked on in `working`."""
    kept = start[0].dtype
    parameters = [x.to(working, copy=True).requires_grad_() for x in start]
    optimizer = make(parameters, **ADAM)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            if make is FusedAdamW:
                parameter.grad_dtype = None  # torch: a gradient may have another dtype
            parameter.grad = gradient.to(gradient.dtype if make is FusedAdamW else working, copy=True)
        optimizer.step()
        for parameter in parameters if kept != torch.float32 else ():
            parameter.data.copy_(parameter.data.to(kept))
    moments = [optimizer.state[x][key] for key in ("exp_avg", "exp_avg_sq") for x in parameters]
    return torch.cat([x.detach().flatten() for x in parameters]), torch.cat([x.flatten() for x in moments])
