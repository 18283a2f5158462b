"""Our model against the published code: logits, losses and every gradient."""

from __future__ import annotations

import pytest
import torch

from megatron_b2.model.cache import KVCache
from megatron_b2.model.model import BaichuanModel
from tests.golden_model import STYLES, Golden, load_golden

TOLERANCE = 2e-5


def golden_model(golden: Golden, *, recompute: str = "none") -> BaichuanModel:
    model = BaichuanModel(golden.config, recompute=recompute)
    weight = golden.named("w")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name))
    return model


@pytest.mark.parametrize("style", STYLES)
def test_logits_equal_the_published_model_in_train_and_eval(style: str) -> None:
    golden = load_golden(style)
    logits = golden_model(golden).logits(golden.tensors["input_ids"])
    for mode in ("train_logits", "eval_logits"):
        torch.testing.assert_close(logits, golden.tensors[mode], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("style", STYLES)
def test_loss_and_every_gradient_equal_the_published_model(style: str, recompute: str) -> None:
    golden = load_golden(style)
    model = golden_model(golden, recompute=recompute)
    ids = golden.tensors["input_ids"]
    count = ids[:, 1:].numel()
    out = model(ids[:, :-1], ids[:, 1:], ce_scale=1 / count, z_scale=2e-4 / count)
    out.total.backward()
    close = dict(atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(out.total, golden.tensors["loss"][0], **close)
    torch.testing.assert_close(out.ce / count, golden.tensors["ce"][0], **close)
    torch.testing.assert_close(2e-4 * out.max_z / count, golden.tensors["zloss"][0], **close)
    gradient = golden.named("g")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient(name), **close, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("style", STYLES)
def test_cached_generation_gives_the_logits_of_one_pass(style: str) -> None:
    golden = load_golden(style)
    model = golden_model(golden)
    ids = golden.tensors["input_ids"]
    whole = model.logits(ids)
    cache = KVCache(golden.config, batch_size=2, max_length=24, dtype=torch.float32)
    with torch.no_grad():
        steps = [model.logits(part, cache=cache) for part in ids.split([7, 1, 1, 10, 5], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("style", STYLES)
def test_packed_documents_do_not_see_each_other(style: str) -> None:
    golden = load_golden(style)
    model = golden_model(golden)
    ids = golden.tensors["input_ids"]
    alone = torch.cat([model.logits(part) for part in ids.split([5, 1, 18], dim=1)], dim=1)
    segments = torch.tensor([0] * 5 + [1] + [2] * 18, dtype=torch.int32).expand(2, 24)
    torch.testing.assert_close(model.logits(ids, segment_ids=segments), alone, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(model.logits(ids), alone, atol=1e-2)


@pytest.mark.parametrize(("style", "expected"), [("7b", 7_505_973_248), ("13b", 13_896_668_160)])
def test_full_size_models_have_the_published_parameter_counts(style: str, expected: int) -> None:
    from megatron_b2.config import load_config

    config = load_config(f"preset:baichuan2-{style}").config.model
    model = BaichuanModel(config, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == expected == config.num_parameters
