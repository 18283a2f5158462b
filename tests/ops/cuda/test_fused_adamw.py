"""FusedAdamW against the published formula and against torch's, through the sources on the CPU."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_b2.errors import InputError
from megatron_b2.optim.fused_adamw import FusedAdamW
from megatron_b2.testing.kernels.cpu_shim import Shim

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def tensors(count: int, *, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + 13 * i % 50, 1 + i % 7, generator=generator) for i in range(count)]


def train(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Gradients are a function of the step alone."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for parameter, gradient in zip(parameters, tensors(len(parameters), seed=1 + step), strict=True):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def test_one_step_is_the_formula(shim: Shim) -> None:
    """Step 3 from given moments: Loshchilov and Hutter (2019), algorithm 2, in float64."""
    generator = torch.Generator().manual_seed(0)
    w, g, m = (torch.randn(100, generator=generator) for _ in range(3))
    v = torch.rand(100, generator=generator)
    parameter = w.clone().requires_grad_()
    parameter.grad = g
    optimizer = FusedAdamW([parameter], **SETTINGS)
    optimizer.state[parameter] = {"step": torch.tensor(2.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    w, g, m, v = (x.double() for x in (w, g, m, v))
    m = 0.9 * m + 0.1 * g
    v = 0.95 * v + 0.05 * g * g
    update = (m / (1 - 0.9**3)) / ((v / (1 - 0.95**3)).sqrt() + 1e-8)
    w = w - 1e-2 * (update + 0.1 * w)
    torch.testing.assert_close(parameter.detach().double(), w, rtol=3e-7, atol=3e-8)
    state = optimizer.state[parameter]
    assert state["step"].item() == 3
    torch.testing.assert_close(state["exp_avg"].double(), m, rtol=3e-7, atol=3e-8)
    torch.testing.assert_close(state["exp_avg_sq"].double(), v, rtol=3e-7, atol=3e-8)


def test_first_step_moves_by_the_learning_rate_also_with_slow_decay(shim: Shim) -> None:
    """1 - 0.9999^1 has few digits in fp32: without care the step is off by 1e-4."""
    parameter = torch.ones(8, requires_grad=True)
    parameter.grad = torch.full((8,), 0.3)
    FusedAdamW([parameter], lr=1e-3, betas=(0.99999, 0.99999), eps=0.0).step()
    torch.testing.assert_close(
        1 - parameter.detach().double(), torch.full((8,), 1e-3).double(), rtol=1e-4, atol=0
    )


def test_many_tensors_of_all_sizes_in_groups(shim: Shim) -> None:
    """More than one launch holds, sizes that are no multiple of 8, two groups, a learning rate that changes."""
    starts = tensors(150, seed=0)
    trained = []
    for make in (FusedAdamW, torch.optim.AdamW):
        parameters = [x.clone().requires_grad_() for x in starts]
        groups = [{"params": parameters[:80]}, {"params": parameters[80:], "weight_decay": 0.0}]
        optimizer: torch.optim.Optimizer = make(groups, **SETTINGS)  # type: ignore[arg-type]
        train(optimizer, range(2))
        for group in optimizer.param_groups:
            group["lr"] = 3e-3
        train(optimizer, range(2, 4))
        trained.append(parameters)
    for ours, reference in zip(*trained, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-6, atol=2e-7)


def test_order_of_threads_does_not_matter(shim: Shim) -> None:
    results = []
    for backwards in (False, True):
        parameters = [x.clone().requires_grad_() for x in tensors(9, seed=0)]
        with shim.order(backwards=backwards):
            train(FusedAdamW(parameters, **SETTINGS), range(2))
        results.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.equal(*results)


@pytest.mark.parametrize("first", [FusedAdamW, torch.optim.AdamW])
def test_state_is_that_of_torch(shim: Shim, first: Any) -> None:
    """Two steps with one of them, two with the other, by state_dict."""
    second = torch.optim.AdamW if first is FusedAdamW else FusedAdamW
    parameters = [x.clone().requires_grad_() for x in tensors(5, seed=0)]
    before = first(parameters, **SETTINGS)
    train(before, range(2))
    after = second(parameters, **SETTINGS)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(after, range(2, 4))
    assert all(set(after.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in parameters)
    assert all(after.state[p]["step"].item() == 4 for p in parameters)
    expected = [x.clone().requires_grad_() for x in tensors(5, seed=0)]
    train(torch.optim.AdamW(expected, **SETTINGS), range(4))
    for ours, reference in zip(parameters, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=2e-6, atol=2e-7)


def test_copies_are_the_rounded_parameters(shim: Shim) -> None:
    parameters = [x.clone().requires_grad_() for x in tensors(12, seed=0)]
    copies = {p: torch.zeros(p.shape, dtype=torch.bfloat16) for p in parameters[1:]}
    train(FusedAdamW(parameters, copies=copies, **SETTINGS), range(2))
    assert all(torch.equal(target, p.detach().bfloat16()) for p, target in copies.items())
    with pytest.raises(InputError, match=r"a copy must be bf16, contiguous, of shape \[3\]"):
        FusedAdamW([torch.zeros(3)], lr=1.0, copies={torch.zeros(3): torch.zeros(3)})


def test_unaligned_slices_of_a_flat_buffer(shim: Shim) -> None:
    """As ZeRO cuts them: the kernel by elements takes over, and nothing beside the slice changes."""
    flat = torch.randn(101, generator=torch.Generator().manual_seed(0))
    before = flat.clone()
    part = torch.nn.Parameter(flat[3:90])
    expected = before[3:90].clone().requires_grad_()
    part.grad, expected.grad = torch.ones(87), torch.ones(87)
    FusedAdamW([part], **SETTINGS).step()
    torch.optim.AdamW([expected], **SETTINGS).step()
    torch.testing.assert_close(flat[3:90], expected.detach())
    assert torch.equal(flat[:3], before[:3])
    assert torch.equal(flat[90:], before[90:])


def test_parameters_without_gradient_stay(shim: Shim) -> None:
    moved, kept = (torch.ones(9, requires_grad=True) for _ in range(2))
    moved.grad = torch.ones(9)
    optimizer = FusedAdamW([moved, kept], **SETTINGS)
    optimizer.step()
    assert torch.equal(kept.detach(), torch.ones(9))
    assert kept not in optimizer.state
    assert (moved < 1).all()


def test_cpu_tensors_are_refused() -> None:
    parameter = torch.ones(9, requires_grad=True)
    parameter.grad = torch.ones(9)
    with pytest.raises(InputError, match="CUDA kernels work on CUDA tensors; these are on cpu"):
        FusedAdamW([parameter], **SETTINGS).step()


@pytest.mark.parametrize("offset", [0, 1])
def test_more_than_2_31_elements(shim: Shim, tmp_path: Path, offset: int) -> None:
    """The last block alone, of the kernel by words and, one element further, of that by elements."""
    numel = 2**31 + 2**14
    memory = [
        torch.from_file(str(tmp_path / f"{i}.bin"), shared=True, size=numel + offset, dtype=torch.float32)[
            offset:
        ]
        for i in range(4)
    ]
    w, g, m, v = memory
    w[-8:], g[-8:] = 1.0, torch.arange(1.0, 9.0)
    step = torch.ones(())
    chunk = 256 * 8 * (1 if offset else 4)
    row = [x.data_ptr() for x in (w, g, m, v)] + [0, step.data_ptr(), numel]
    with shim.order(first_block=-(-numel // chunk) - 1):
        shim.launch("adamw", CPU, torch.tensor([row]), 1, 0.01, 0.9, 0.95, 1e-8, 0.0, 0, 0)
    torch.testing.assert_close(w[-8:], torch.full((8,), 0.99))
    torch.testing.assert_close(m[-8:], 0.1 * g[-8:])
    torch.testing.assert_close(v[-8:], 0.05 * g[-8:].square())
    assert not m[:8].any()
