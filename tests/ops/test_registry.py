"""Which backend a run uses, and why; operations reach the model as they were chosen."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_b2.config import load_config
from megatron_b2.config.schema import OpsConfig
from megatron_b2.errors import ConfigError
from megatron_b2.model.model import BaichuanModel
from megatron_b2.ops import registry
from megatron_b2.ops.bundle import FUNCTIONS, Ops, load_ops
from megatron_b2.ops.registry import BACKENDS, Choice, choose, unavailable
from megatron_b2.testing.kernels.interpreter import run_interpreted
from tests.golden_model import load_golden

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def backends(config: OpsConfig, device: torch.device = CPU) -> dict[str, str]:
    return {choice.op: choice.backend for choice in choose(config, device=device)}


def test_a_cpu_uses_the_references() -> None:
    assert set(backends(OpsConfig()).values()) == {"reference"}
    reasons = {choice.op: choice.reason for choice in choose(OpsConfig(), device=CPU)}
    assert "needs a CUDA device, this is cpu" in reasons["attention"]


def test_a_gpu_uses_the_first_backend_that_there_is() -> None:
    with patch.object(registry, "find_spec", lambda name: name if name == "triton" else None):
        assert backends(OpsConfig(), CUDA) == {
            "attention": "triton",
            "head_loss": "triton",
            "rms_norm": "triton",
            "rope": "triton",
            "swiglu": "triton",
            "adamw": "reference",
        }
    with patch.object(registry, "find_spec", lambda name: name):
        assert backends(OpsConfig(), CUDA)["rms_norm"] == "cuda"
        assert backends(OpsConfig(rms_norm="triton"), CUDA)["rms_norm"] == "triton"
        # A backend that an operation does not have leaves it to auto.
        assert backends(OpsConfig(backend="triton"), CUDA)["adamw"] == "cuda"
        assert backends(OpsConfig(backend="reference"), CUDA)["attention"] == "reference"


def test_wide_heads_stay_with_the_reference() -> None:
    with patch.object(registry, "find_spec", lambda name: name):
        assert "heads are 512 wide" in unavailable("attention", "triton", device=CUDA, head_dim=512)
        assert unavailable("head_loss", "triton", device=CUDA, head_dim=512) == ""


def test_every_choice_that_is_not_available_is_reported() -> None:
    with pytest.raises(ConfigError) as error:
        choose(OpsConfig(attention="triton", swiglu="cuda"), device=CPU)
    assert len(error.value.problems) == 2
    assert error.value.problems[0] == (
        'ops.attention = "triton": attention needs a CUDA device, this is cpu (or, to try it slowly in '
        'fp32, TRITON_INTERPRET=1); use reference, or "auto"'
    )


def test_every_backend_of_the_table_has_its_functions() -> None:
    """Importing is enough: signatures are used by the parity checks."""

    def load_all() -> list[str]:
        missing = []
        for op, names in BACKENDS.items():
            for backend in names:
                ops = load_ops([Choice(op, backend, "")])
                if op in FUNCTIONS and backend != "reference" and ops == Ops():
                    missing.append(f"{op} {backend}")
        return missing

    assert run_interpreted(load_all) == []


def losses(ops: Ops) -> list[Tensor]:
    golden = load_golden("7b")
    model = BaichuanModel(golden.config, ops=ops)
    weight = golden.named("w")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weight(name))
    ids = golden.tensors["input_ids"]
    out = model(ids[:, :-1], ids[:, 1:], ce_scale=1.0, z_scale=1e-4)
    out.total.backward()
    return [out.total.detach(), *(p.grad for p in model.parameters())]


def test_compiled_references_compute_the_same() -> None:
    choices = choose(OpsConfig(), device=CPU)
    for ours, expected in zip(losses(load_ops(choices, compiled=True)), losses(Ops()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_a_model_of_triton_kernels_computes_the_same() -> None:
    def through_kernels() -> list[Tensor]:
        return losses(load_ops(choose(OpsConfig(backend="triton"), device=CPU)))

    for ours, expected in zip(run_interpreted(through_kernels), losses(Ops()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_settings_come_from_the_configuration() -> None:
    config = load_config("preset:toy", ["--ops.backend", "reference", "--ops.head-loss", "triton"]).config
    assert config.ops == replace(OpsConfig(), backend="reference", head_loss="triton")
