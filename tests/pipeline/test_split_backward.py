"""The two passes of a zero-bubble backward against one ordinary backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.profiler import ProfilerActivity, profile

from megatron_b2.pipeline.split_backward import SplitBackward
from tests.pipeline.toy import SHAPE, Stage, micro_batches

LABELS = micro_batches(1)[0][1]


def stage_input(seed: int = 3) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def two_passes(stage: nn.Module, x: Tensor, grad: Tensor | None) -> Tensor:
    split = SplitBackward(get_gradient_edge(stage(x, LABELS)), grad, x)
    before = [None if p.grad is None else p.grad.clone() for p in stage.parameters()]
    found = split.input_gradient()
    assert x.grad is None
    for parameter, old in zip(stage.parameters(), before, strict=True):
        assert (parameter.grad is None and old is None) or torch.equal(parameter.grad, old)
    split.accumulate_weights()
    assert found is not None
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("bounds", [(2, 5), (5, 8)])
def test_bits_are_those_of_one_backward(bounds: tuple[int, int], shared: bool) -> None:
    whole, split = (Stage(*bounds, shared=shared) for _ in range(2))
    grad = None if whole.last else torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    x = stage_input()
    whole(x, LABELS).backward(grad)
    assert torch.equal(two_passes(split, stage_input(), grad), x.grad)
    for (name, expected), (_, parameter) in zip(
        whole.named_parameters(), split.named_parameters(), strict=True
    ):
        assert torch.equal(parameter.grad, expected.grad), name


def test_gradients_accumulate_over_micro_batches() -> None:
    whole, split = Stage(2, 5), Stage(2, 5)
    for seed in (1, 2, 3):
        grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        whole(stage_input(seed), LABELS).backward(grad)
        two_passes(split, stage_input(seed), grad)
    for expected, parameter in zip(whole.parameters(), split.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def hook_calls(backward: Callable[[Stage, Tensor], object], stage: Stage) -> list[tuple[str, str, float]]:
    """(kind of hook, parameter, sum of what it saw), sorted: the order of parameters is autograd's affair."""
    calls: list[tuple[str, str, float]] = []
    kept = []
    for name, parameter in stage.named_parameters():
        parameter.register_hook(lambda grad, n=name: calls.append(("tensor", n, float(grad.sum()))))
        parameter.register_post_accumulate_grad_hook(
            lambda p, n=name: calls.append(("accumulated", n, float(p.grad.sum())))
        )
        # As DeepSpeed does.
        node = get_gradient_edge(parameter).node
        node.register_hook(lambda *_, n=name: calls.append(("node", n, 0.0)))
        kept.append(node)
    backward(stage, stage_input())
    return sorted(calls)


def test_hooks_on_parameters_fire_once_a_micro_batch_as_in_one_backward() -> None:
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    expected = hook_calls(lambda stage, x: stage(x, LABELS).backward(grad), Stage(2, 5))
    found = hook_calls(lambda stage, x: two_passes(stage, x, grad), Stage(2, 5))
    assert len(expected) == 3 * len(list(Stage(2, 5).parameters()))
    assert found == expected


def test_hooks_on_parameters_fire_in_the_second_pass() -> None:
    """Where they call a collective, as under sequence parallelism, it runs in W, not in I (docs/pipeline.md)."""
    stage, x, calls = Stage(2, 5), stage_input(), []
    for parameter in stage.parameters():
        parameter.register_hook(calls.append)
    split = SplitBackward(get_gradient_edge(stage(x, LABELS)), torch.ones(SHAPE), x)
    split.input_gradient()
    assert calls == []
    split.accumulate_weights()
    assert len(calls) == len(list(stage.parameters()))


def test_a_hook_that_changes_a_parameter_gradient_works() -> None:
    stages = [Stage(2, 5), Stage(2, 5)]
    for stage in stages:
        for parameter in stage.parameters():
            parameter.register_hook(lambda grad: 2 * grad)
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    stages[0](stage_input(), LABELS).backward(grad)
    two_passes(stages[1], stage_input(), grad)
    for expected, parameter in zip(stages[0].parameters(), stages[1].parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def matrix_products(run: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    return sum(event.count for event in recorded.key_averages() if event.key in ("aten::mm", "aten::addmm"))


def test_every_product_of_linear_layers_is_done_once() -> None:
    grad = torch.ones(SHAPE)
    whole, stage, x = Stage(2, 5), Stage(2, 5), stage_input()
    out = whole(stage_input(), LABELS)
    split = SplitBackward(get_gradient_edge(stage(x, LABELS)), grad, x)
    total = matrix_products(lambda: out.backward(grad))
    first, second = matrix_products(split.input_gradient), matrix_products(split.accumulate_weights)
    assert (first, second) == (total // 2, total // 2)


def test_frozen_parameters_get_no_gradient() -> None:
    whole, split = Stage(2, 5), Stage(2, 5)
    for stage in (whole, split):
        stage.layers["3"].up.weight.requires_grad_(False)
    grad = torch.ones(SHAPE)
    whole(stage_input(), LABELS).backward(grad)
    two_passes(split, stage_input(), grad)
    assert split.layers["3"].up.weight.grad is None
    for expected, parameter in zip(whole.parameters(), split.parameters(), strict=True):
        assert expected.grad is None or torch.equal(parameter.grad, expected.grad)


class TwoResults(torch.autograd.Function):
    """Two differentiable results, of which only one is used; makes its gradients in forward, as the head does."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight, x + weight

    @staticmethod
    def backward(ctx, first, second):
        x, weight = ctx.saved_tensors
        return first * weight + second, (first * x + second).sum((0, 1))


def test_an_operation_with_several_results() -> None:
    weights = [torch.full((SHAPE[-1],), 2.0, requires_grad=True) for _ in range(2)]
    inputs = [stage_input(), stage_input()]
    outs = [TwoResults.apply(x.exp(), w)[1].sin() for x, w in zip(inputs, weights, strict=True)]
    outs[0].backward(torch.ones(SHAPE))
    split = SplitBackward(get_gradient_edge(outs[1]), torch.ones(SHAPE), inputs[1])
    assert torch.equal(split.input_gradient(), inputs[0].grad)
    split.accumulate_weights()
    assert torch.equal(weights[1].grad, weights[0].grad)


def test_the_first_stage_does_everything_in_the_second_pass() -> None:
    ids, labels = micro_batches(1)[0]
    whole, stage = Stage(0, 2), Stage(0, 2)
    grad = torch.ones(SHAPE)
    whole(ids, labels).backward(grad)
    split = SplitBackward(get_gradient_edge(stage(ids, labels)), grad, None)
    assert split.input_gradient() is None
    split.accumulate_weights()
    for expected, parameter in zip(whole.parameters(), stage.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_an_output_that_ignores_its_input_is_refused() -> None:
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="does not depend on its input"):
        SplitBackward(get_gradient_edge(weight * 2), torch.ones(3), stage_input()).input_gradient()
