"""Machine code of Liger-Kernel's and cut-cross-entropy's kernels, made the same way as ours, side by side.

Both packages are optional, only for this table: `pip install --no-deps liger-kernel cut-cross-entropy`.
Their functions run on `meta` tensors of the 7B shapes at tensor parallel 1, every launch is compiled for
sm_80 and sm_90, nothing is executed. Backward kernels of Liger's norms ask a CUDA device for its
multiprocessors, which a `meta` tensor has not: they are compiled for 1, so only the number of rows in their
loop differs.

Writes docs/kernels_peers.md and prints it. It says which package is missing. No speed is measured here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from megatron_b2.config import load_config
from megatron_b2.testing.kernels.table import CACHE, DOCS, LEGEND, markdown_table, triton_rows
from megatron_b2.testing.kernels.variants import TOKENS, Variant, variants

MODEL = load_config("preset:baichuan2-7b").config.model
EPS = 1e-6
IGNORED = -100
COUNTED = 4_000
"""Targets that are not ignored: a plain number in the launch."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def grad(outputs: Any, *inputs: Tensor) -> None:
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    torch.autograd.grad(outputs, inputs, [torch.empty_like(out) for out in outputs], allow_unused=True)


def liger_rms_norm() -> None:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight = empty(1, TOKENS, MODEL.hidden_size), empty(MODEL.hidden_size)
    grad(LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False, True), x, weight)


def liger_add_rms_norm() -> None:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    x, residual = empty(1, TOKENS, MODEL.hidden_size), empty(1, TOKENS, MODEL.hidden_size)
    weight = empty(MODEL.hidden_size)
    out = LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)
    grad(out, x, residual, weight)


def liger_rope() -> None:
    from liger_kernel.ops.rope import LigerRopeFunction

    heads, width = MODEL.num_heads, MODEL.hidden_size // MODEL.num_heads
    # Kept as [1, S, heads, width] and handed over as [1, heads, S, width].
    q, k = (empty(1, TOKENS, heads, width).transpose(1, 2) for _ in range(2))
    cos, sin = (torch.empty(1, TOKENS, width, dtype=torch.float32, device="meta") for _ in range(2))
    grad(LigerRopeFunction.apply(q, k, cos, sin), q, k)


def liger_swiglu() -> None:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    gate_up = empty(TOKENS, 2 * MODEL.ffn_hidden_size)
    grad(LigerFusedGateUpSiLUMulFunction.apply(gate_up), gate_up)


def liger_cross_entropy() -> None:
    """The kernel between the matrix products of its fused linear cross-entropy, on a chunk of 256 tokens; the
    function itself reads numbers from tensors, which `meta` has not."""
    from liger_kernel.ops.cross_entropy import MAX_FUSED_SIZE, liger_cross_entropy_kernel

    logits, targets = empty(256, MODEL.vocab_size), empty(256, dtype=torch.int64)
    losses = empty(256, dtype=torch.float32)
    arguments = {
        "X_ptr": logits, "X_stride": logits.stride(0), "Y_ptr": targets, "Y_stride": 1, "weight_ptr": None,
        "loss_ptr": losses, "z_loss_ptr": None, "loss_stride": 1, "token_accuracy_ptr": None,
        "token_accuracy_stride": 0, "predicted_tokens_ptr": None, "predicted_tokens_stride": 0,
        "n_cols": MODEL.vocab_size, "n_non_ignore": COUNTED, "sum_non_ignore_weight": COUNTED,
        "weight_sum": 0.0, "ignore_index": IGNORED, "lse_square_scale": 0.0, "label_smoothing": 0.0,
        "reduction": "mean", "softcap": None, "RETURN_Z_LOSS": False, "RETURN_TOKEN_ACCURACY": False,
        "RETURN_PREDICTED_TOKENS": False, "HAS_WEIGHT": False, "HAS_SOFTCAPPING": False,
        "HAS_GRADIENTS": True, "BLOCK_SIZE": MAX_FUSED_SIZE, "num_warps": 32,
    }  # fmt: skip
    liger_cross_entropy_kernel[(256,)](**arguments)


def cce() -> None:
    from cut_cross_entropy.cce_backward import cce_backward_kernel
    from cut_cross_entropy.cce_lse_forward import cce_lse_forward_kernel
    from cut_cross_entropy.indexed_dot import indexed_neg_dot_forward_kernel

    hidden, weight = empty(TOKENS, MODEL.hidden_size), empty(MODEL.vocab_size, MODEL.hidden_size)
    targets = empty(TOKENS, dtype=torch.int64)
    lse, _ = cce_lse_forward_kernel(hidden, weight, return_logit_avg=True)
    indexed_neg_dot_forward_kernel(hidden, weight, targets)
    order = empty(MODEL.vocab_size, dtype=torch.int64)
    one = torch.empty((), dtype=torch.float32, device="meta")
    cce_backward_kernel(
        one, hidden, weight, lse, None, None, 2.44e-4, targets=targets, vocab_ordering=order, grad_scale=1.0
    )


PEERS: tuple[tuple[str, str, Callable[[], None]], ...] = (
    ("liger-kernel", "rms_norm", liger_rms_norm),
    ("liger-kernel", "add_rms_norm", liger_add_rms_norm),
    ("liger-kernel", "rope_split", liger_rope),
    ("liger-kernel", "swiglu", liger_swiglu),
    ("liger-kernel", "norm_head_loss", liger_cross_entropy),
    ("cut-cross-entropy", "norm_head_loss", cce),
)


def installed() -> dict[str, str]:
    """Peer to version, for those that are installed."""
    found = {}
    for package in dict.fromkeys(package for package, _, _ in PEERS):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            print(f"{package} is not installed: pip install --no-deps {package}")
    return found


def main(cache: Path = CACHE, out: Path = DOCS / "kernels_peers.md", workers: int = 2) -> None:
    """Compile ours and theirs and write the table.

    Args:
        cache: folder of compiled kernels, safe to delete.
        out: the table.
        workers: processes that compile.
    """
    versions = installed()
    if not versions:
        print("nothing to compare with")
        return
    theirs = [
        Variant(op, f"{package} {versions[package]}", 1, run)
        for package, op, run in PEERS
        if package in versions
    ]
    ops = list(dict.fromkeys(variant.op for variant in theirs))
    ours = [v for v in variants() if v.op in ops and v.shape == "7B" and v.tensor_parallel == 1]
    rows = triton_rows([*ours, *theirs], cache, workers=workers)
    named = [replace(row, shape="ours") if row.shape == "7B" else row for row in rows]
    text = (
        "# Kernels beside those of other projects\n\nGenerated by `tools/bench/kernels_binaries.py`; read "
        f"from machine code as [kernels.md](kernels.md), 7B shapes, TP 1, triton {version('triton')}. No "
        f"speed is stated here because none was measured.\n\n{LEGEND}\n"
    )
    for op in ops:
        text += f"\n## {op}\n\n" + markdown_table([row for row in named if row.op == op])
    out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    tyro.cli(main)
