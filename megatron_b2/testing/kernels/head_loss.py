"""Parity of NormHead + cross-entropy + max-z with float64 autograd of the formula.

Every token has a planted largest logit, well above the others: with rounded logits torch would pick another
index now and then, and its error would excuse any of ours. Ties are tested on their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_b2.ops import head_loss as reference
from megatron_b2.ops.head_loss import IGNORE_INDEX, HeadLoss
from megatron_b2.ops.norm_head import EPS
from megatron_b2.parallel.tensor_parallel import TensorParallel
from megatron_b2.testing.kernels.parity import Check, Deviation, deviation

DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
PLANTED: Final = 6.0
"""Standard deviations that the planted logit stands above the mean."""
SINGLE_FLOOR: Final = 4.0
"""Factor of the allowed error in fp32, to 8 units in the last place: there a result is the end of about ten
roundings, ours and torch's are both a few units off, and which is closer is chance."""
QUANTITIES: Final = ("total", "ce", "max_z", "grad_hidden", "grad_weight")


@dataclass(frozen=True)
class Case:
    """Sizes and kind of the inputs."""

    tokens: int
    vocab: int
    width: int
    dtype: torch.dtype
    labels: Literal["mixed", "ignored", "all"] = "mixed"
    """One of five ignored, all of them, or none."""
    length: float = 1.0
    """Factor of the hidden states, which are about sqrt(width) long."""
    ce_scale: float = 0.3
    z_scale: float = 0.02
    keeps: bool = False
    """Gradients in the forward, from kept products."""

    def __str__(self) -> str:
        words = [f"T {self.tokens}", f"V {self.vocab}", f"H {self.width}"]
        words += [f"labels {self.labels}"] if self.labels != "mixed" else []
        words += [f"hidden x {self.length:g}"] if self.length != 1 else []
        words += ["no max-z"] if self.z_scale == 0 else []
        words += ["kept products"] if self.keeps else []
        return ", ".join([*words, str(self.dtype).removeprefix("torch.")])

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [T, H], weight [V, H] and labels [T], on the CPU."""
        generator = torch.Generator().manual_seed(self.tokens + self.vocab)
        weight = torch.randn(self.vocab, self.width, generator=generator) * 0.02
        planted = torch.randint(0, self.vocab, (self.tokens,), generator=generator)
        hidden = torch.randn(self.tokens, self.width, generator=generator)
        hidden += PLANTED * F.normalize(weight)[planted]
        labels = torch.randint(0, self.vocab, (self.tokens,), generator=generator)
        if self.labels != "all":
            labels[:: 1 if self.labels == "ignored" else 5] = IGNORE_INDEX
        return (hidden * self.length).to(self.dtype), weight.to(self.dtype), labels


def checks() -> tuple[Check, ...]:
    """Every check of the Triton kernels, quick ones first."""
    return tuple(sorted(_checks(), key=lambda check: not check.quick))


def cases() -> Iterator[tuple[Case, bool]]:
    """What every head is checked on, and whether it is quick."""
    for dtype in DTYPES:
        case = Case(33, 520, 48, dtype)
        for quick in (
            case,
            replace(case, tokens=1, labels="all"),
            replace(case, tokens=19, vocab=5, width=7),
            replace(case, tokens=19, labels="ignored"),
            replace(case, tokens=19, z_scale=0.0),
            # In fp16 the gradient of the weight would overflow.
            replace(case, tokens=19, length=10.0 if dtype == torch.float16 else 100.0),
        ):
            yield quick, True
        for tokens in (97, 512, 1025):
            yield Case(tokens, 1964, 96, dtype), False
        yield Case(33, 15_712, 64, dtype, labels="all"), False


def _checks() -> Iterator[Check]:
    for case, quick in cases():
        yield _check(case, quick=quick)
    for dtype in DTYPES:
        yield _check(Case(33, 520, 48, dtype, keeps=True), quick=True)
    yield Check("norm_head_loss", "triton", "shards of 1, 2, 4 and 8 ranks", check_shards, quick=True)


def _check(case: Case, *, quick: bool) -> Check:
    def run(device: torch.device) -> list[Deviation]:
        from megatron_b2.ops.triton import head_loss

        ours = head_loss.norm_head_loss_kept if case.keeps else head_loss.norm_head_loss
        return compare(case, ours, device=device)

    return Check("norm_head_loss", "triton", str(case), run, quick)


def formula(hidden: Tensor, weight: Tensor, labels: Tensor, *, ce_scale: float, z_scale: float) -> HeadLoss:
    """The loss as anyone would write it, in the dtype of the inputs; differentiable."""
    logits = hidden @ F.normalize(weight, dim=1, eps=EPS).t()
    ce = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
    max_z = logits.max(dim=1).values.square().sum()
    return HeadLoss(ce_scale * ce + z_scale * max_z, ce, max_z)


def evaluate(
    function: Callable[..., HeadLoss], case: Case, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """`QUANTITIES` of a function on the case's inputs, converted to `dtype`."""
    hidden, weight, labels = (x.to(device) for x in case.inputs())
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    loss = function(hidden, weight, labels, ce_scale=case.ce_scale, z_scale=case.z_scale)
    gradients = torch.autograd.grad(loss.total, (hidden, weight))
    return [*(value.detach() for value in loss), *gradients]


def compare(case: Case, ours: Callable[..., HeadLoss], *, device: torch.device) -> list[Deviation]:
    """Deviations of ours and of torch in the case's dtype.

    In fp32 torch is the plain formula. In half precision it is the reference operation, which is closer: it
    rounds the softmax, not the normalised weight.
    """
    plain = formula if case.dtype == torch.float32 else reference.norm_head_loss
    results = (
        evaluate(ours, case, device, case.dtype),
        evaluate(plain, case, device, case.dtype),
        evaluate(formula, case, torch.device("cpu"), torch.float64),
    )
    found = [deviation(name, *values) for name, *values in zip(QUANTITIES, *results, strict=True)]
    floor = SINGLE_FLOOR if case.dtype == torch.float32 else 1.0
    return [replace(one, floor=floor * one.floor) for one in found]


def check_shards(device: torch.device) -> list[Deviation]:
    """Merged statistics of the shards of 2, 4 and 8 ranks: the bits of one rank. Last tiles are padded."""
    from megatron_b2.ops.triton import head_loss

    case = Case(33, 1048, 48, torch.float32, labels="all")
    hidden, weight, labels = (x.to(device) for x in case.inputs())
    results = []
    for ranks in (1, 2, 4, 8):
        shards = []
        for rank, rows in enumerate(weight.chunk(ranks)):
            head = head_loss.Head.of(hidden, rows, labels, TensorParallel(size=ranks, rank=rank))
            shards.append(head_loss.merge(head_loss.local_statistics(head), head.tiles))
        results.append(head_loss.merge(torch.stack(shards), head.tiles))
    logits = hidden.double() @ F.normalize(weight.double()).t()
    top, index = logits.max(dim=1)
    label = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    exact = torch.stack([top, (logits - top.unsqueeze(1)).exp().sum(dim=1), index, label])
    named = (("top", 0), ("sum", 1), ("index", 2), ("label", 3))
    found = [deviation(name, results[0][i], exact[i].float(), exact[i]) for name, i in named]
    found = [replace(one, torch=0.0, floor=2 * SINGLE_FLOOR * one.floor) for one in found]
    for ranks, result in zip((2, 4, 8), results[1:], strict=True):
        different = float((result != results[0]).sum())
        found.append(Deviation(f"different bits at {ranks} ranks", different, 0.0, 0.0))
    return found
