"""One optimizer step of the single engine, against AdamW written out in float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_b2.optim.adamw import has_weight_decay
from tests.engine.runs import global_batch, make_engine, run_config

BETA1, BETA2, EPS, DECAY, CLIP = 0.9, 0.95, 1e-8, 0.1, 0.5
RATES = (1e-3, 3e-3, 2e-3)


def adamw(
    weight: Tensor, grad: Tensor, moments: tuple[Tensor, Tensor], *, lr: float, step: int, decay: float
) -> None:
    """The formula of the paper on decoupled weight decay (Loshchilov and Hutter), in place."""
    first, second = moments
    first.copy_(BETA1 * first + (1 - BETA1) * grad)
    second.copy_(BETA2 * second + (1 - BETA2) * grad**2)
    direction = (first / (1 - BETA1**step)) / ((second / (1 - BETA2**step)).sqrt() + EPS)
    weight.copy_(weight - lr * decay * weight - lr * direction)


def test_three_steps_equal_the_formula_in_float64() -> None:
    config = run_config(micro_batch_size=8)
    # A large weight of max-z makes gradients that are clipped; norm gains are moved off 1 so that decay shows.
    config = replace(config, train=replace(config.train, max_z_weight=1.0))
    assert (config.optim.beta1, config.optim.beta2, config.optim.eps) == (BETA1, BETA2, EPS)
    assert (config.optim.weight_decay, config.optim.grad_clip) == (DECAY, CLIP)
    engine = make_engine(config)
    parameters = dict(engine.module.named_parameters())
    seen: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: seen.__setitem__(name, p.grad.double().clone())
        )
    weights = {name: p.detach().double().clone() for name, p in parameters.items()}
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in weights.items()}
    clipped = 0
    for step, lr in enumerate(RATES, start=1):
        result = engine.train_step([global_batch(step)], lr=lr, step=step)
        norm = torch.stack([grad.square().sum() for grad in seen.values()]).sum().sqrt()
        torch.testing.assert_close(result.grad_norm.double(), norm, rtol=1e-5, atol=0)
        scale = min(1.0, CLIP / float(norm))
        clipped += scale < 1
        for name, weight in weights.items():
            decay = 0.0 if "norm" in name else DECAY
            adamw(weight, seen[name] * scale, moments[name], lr=lr, step=step, decay=decay)
    assert clipped > 0
    for name, weight in weights.items():
        torch.testing.assert_close(parameters[name].detach().double(), weight, rtol=0, atol=1e-6, msg=name)


def test_matrices_decay_and_norms_do_not() -> None:
    names = dict(make_engine(run_config()).module.named_parameters())
    for name, parameter in names.items():
        assert has_weight_decay(name) == (parameter.dim() == 2), name
