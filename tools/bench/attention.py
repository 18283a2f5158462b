"""Causal attention with ALiBi, forward and backward: ours against torch's with the bias in memory.

torch has no ALiBi, so it gets a bias fp32 [H, S, S] and works on all of it. A model can make the bias in each
call or keep it; kept, it is not in the column of extra memory and is printed below the table. Floor:
7 H S^2 D floating-point operations (2 products forward, 5 backward, the half that causality needs). Prints a
table and writes JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from megatron_b2.ops.alibi import alibi_slopes
from megatron_b2.ops.attention import causal_attention
from megatron_b2.testing.measure import compare, machine, markdown_table, write_report


@dataclass(frozen=True)
class Options:
    """Shape of the problem."""

    sequence: int = 4_096
    heads: int = 8
    head_dim: int = 128
    batch: int = 1
    rounds: int = 5
    out: Path = Path("runs/bench/attention.json")


def inputs(options: Options) -> list[Tensor]:
    """q, k and v, [B, S, H, D]."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, options.sequence, options.heads, options.head_dim)
    return [torch.randn(shape, generator=generator).requires_grad_() for _ in range(3)]


def bias(options: Options) -> Tensor:
    """ALiBi and causality, fp32 [H, S, S]."""
    positions = torch.arange(options.sequence)
    distance = positions - positions.unsqueeze(1)
    slopes = alibi_slopes(options.heads).view(-1, 1, 1)
    return (slopes * distance).masked_fill_(distance > 0, -torch.inf)


def measured(attend: Callable[..., Tensor], *parameters: Tensor) -> Callable[[], None]:
    """Forward and backward, with gradients dropped after it, so that the next call's memory includes them."""

    def call() -> None:
        attend(*parameters).sum().backward()
        for parameter in parameters:
            parameter.grad = None

    return call


def materialised(options: Options, *, keep: bool) -> Callable[[], None]:
    """torch's attention with a bias that is kept from call to call or made in each."""
    kept = bias(options) if keep else None

    def attend(*qkv: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv)
        mask = bias(options) if kept is None else kept
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.unsqueeze(0))

    return measured(attend, *inputs(options))


def ours(options: Options) -> Callable[[], None]:
    slopes = alibi_slopes(options.heads)
    return measured(lambda *qkv: causal_attention(*qkv, alibi_slopes=slopes), *inputs(options))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows = compare(
        {
            "torch, bias made": lambda: materialised(options, keep=False),
            "torch, bias kept": lambda: materialised(options, keep=True),
            "ours": lambda: ours(options),
        },
        rounds=options.rounds,
    )
    facts = machine("torch")
    title = f"S = {options.sequence:,}, {options.heads} heads of {options.head_dim}, ALiBi, fp32"
    table = markdown_table(rows, baseline="torch, bias made", tokens=options.batch * options.sequence)
    megabytes = 4 * options.heads * options.sequence**2 / 1e6
    print(f"{title} · {facts}\n\n{table}\n\nThe bias that is kept: {megabytes:,.0f} MB, not in the column.")
    write_report(options.out, facts=facts, rows={title: rows})


if __name__ == "__main__":
    main()
