"""Head and loss, forward and backward: ours against two torch expressions, in one run.

"dense" makes the logits; "chunked" is torch's linear_cross_entropy with its default options for chunks.

Floor: 3 matrix products (logits, dx, dW), 6 T H V floating-point operations; the gradient of W, V H 4 bytes,
must exist in both. Prints a table and writes JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from megatron_b2.ops.head_loss import norm_head_loss
from megatron_b2.testing.measure import compare, machine, markdown_table, write_report


@dataclass(frozen=True)
class Options:
    """Shape of the problem."""

    tokens: int = 4_096
    vocab: int = 125_696
    hidden: int = 512
    rounds: int = 5
    out: Path = Path("runs/bench/head_loss.json")


def inputs(options: Options) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden, generator=generator).requires_grad_()
    weight = (0.02 * torch.randn(options.vocab, options.hidden, generator=generator)).requires_grad_()
    return hidden, weight, torch.randint(0, options.vocab, (options.tokens,), generator=generator)


def freed(call: Callable[[], None], *parameters: Tensor) -> Callable[[], None]:
    """The call with gradients dropped after it, so that the next call's memory includes them."""

    def wrapped() -> None:
        call()
        for parameter in parameters:
            parameter.grad = None

    return wrapped


def dense(options: Options) -> Callable[[], None]:
    hidden, weight, labels = inputs(options)

    def call() -> None:
        F.cross_entropy(hidden @ F.normalize(weight).T, labels).backward()

    return freed(call, hidden, weight)


def chunked(options: Options) -> Callable[[], None]:
    hidden, weight, labels = inputs(options)
    chunks = torch.nn.LinearCrossEntropyOptions()

    def call() -> None:
        F.linear_cross_entropy(hidden, F.normalize(weight), labels, options=chunks).backward()

    return freed(call, hidden, weight)


def ours(options: Options, max_z_weight: float) -> Callable[[], None]:
    hidden, weight, labels = inputs(options)

    def call() -> None:
        count = options.tokens
        out = norm_head_loss(hidden, weight, labels, ce_scale=1 / count, z_scale=max_z_weight / count)
        out.total.backward()

    return freed(call, hidden, weight)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    rows = compare(
        {
            "dense": lambda: dense(options),
            "chunked": lambda: chunked(options),
            "ours": lambda: ours(options, 0.0),
            "ours + max-z": lambda: ours(options, 2e-4),
        },
        rounds=options.rounds,
    )
    facts = machine("torch")
    title = f"T = {options.tokens:,}, V = {options.vocab:,}, h = {options.hidden}, fp32"
    print(f"{title} · {facts}\n\n{markdown_table(rows, baseline='dense', tokens=options.tokens)}")
    write_report(options.out, facts=facts, rows={title: rows})


if __name__ == "__main__":
    main()
