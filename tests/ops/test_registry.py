"""Which backend a run uses, and why; operations reach the model as they were chosen."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_b2.config import load_config
from megatron_b2.config.schema import OpsConfig
from megatron_b2.errors import ConfigError, InputError
from megatron_b2.model.model import BaichuanModel
from megatron_b2.ops import registry
from megatron_b2.ops.bundle import FUNCTIONS, Ops, load_ops
from megatron_b2.ops.cuda import extension
from megatron_b2.ops.registry import BACKENDS, Backend, Choice, choose, unavailable
from megatron_b2.parallel.context_parallel import ContextParallel
from megatron_b2.testing.kernels import cpu_shim
from megatron_b2.testing.kernels.interpreter import run_interpreted
from tests.golden_model import load_golden

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def backends(config: OpsConfig, device: torch.device = CPU) -> dict[str, str]:
    return {choice.op: choice.backend for choice in choose(config, device=device)}


def test_a_cpu_uses_the_references() -> None:
    assert set(backends(OpsConfig()).values()) == {"reference"}
    reasons = {choice.op: choice.reason for choice in choose(OpsConfig(), device=CPU)}
    assert "needs a CUDA device, this is cpu" in reasons["attention"]


def installed(*, triton: bool = True, cuda: bool = True) -> ExitStack:
    """As if triton and the CUDA extension were installed or not."""
    stack = ExitStack()
    stack.enter_context(patch.object(registry, "find_spec", lambda name: name if triton else None))
    stack.enter_context(patch.object(extension, "missing", lambda: "" if cuda else "was not built"))
    return stack


def test_a_gpu_uses_the_first_backend_that_there_is() -> None:
    with installed(cuda=False):
        assert backends(OpsConfig(), CUDA) == {
            "attention": "triton",
            "head_loss": "triton",
            "rms_norm": "triton",
            "rope": "triton",
            "swiglu": "triton",
            "adamw": "reference",
        }
    with installed():
        assert backends(OpsConfig(), CUDA) == {
            "attention": "triton",
            "head_loss": "triton",
            "rms_norm": "cuda",
            "rope": "triton",
            "swiglu": "cuda",
            "adamw": "cuda",
        }
        assert backends(OpsConfig(rms_norm="triton"), CUDA)["rms_norm"] == "triton"
        # A backend that an operation does not have leaves it to auto.
        assert backends(OpsConfig(backend="triton"), CUDA)["adamw"] == "cuda"
        assert backends(OpsConfig(backend="reference"), CUDA)["attention"] == "reference"
    with installed(triton=False):
        assert backends(OpsConfig(), CUDA)["head_loss"] == "cuda"
        assert backends(OpsConfig(), CUDA)["rope"] == "reference"


def test_attention_that_stores_its_probabilities_is_used_only_by_name() -> None:
    with installed(triton=False):
        assert backends(OpsConfig(), CUDA)["attention"] == "reference"
        assert backends(OpsConfig(attention="auto"), CUDA)["attention"] == "reference"
        choice = choose(OpsConfig(backend="cuda"), device=CUDA)[0]
        assert (choice.op, choice.backend) == ("attention", "reference")
        assert "ops.backend = 'cuda', which only ops.attention can name" in choice.reason
        assert backends(OpsConfig(backend="cuda"), CUDA)["head_loss"] == "cuda"
        assert backends(OpsConfig(attention="cuda"), CUDA)["attention"] == "cuda"


@pytest.mark.parametrize(
    ("backend", "made_in"),
    [("reference", ("forward", "forward")), ("triton", ("backward", "forward")), ("cuda", ("backward",) * 2)],
)
def test_the_pass_of_the_heads_gradients_is_reported(backend: Backend, made_in: tuple[str, str]) -> None:
    with installed():
        for wanted, made in zip(("backward", "forward"), made_in, strict=True):
            config = OpsConfig(head_loss=backend, head_gradient=wanted)  # type: ignore[arg-type]
            (choice,) = (c for c in choose(config, device=CUDA) if c.op == "head_loss")
            assert choice == Choice("head_loss", backend, f"ops.head_loss; gradients made in the {made} pass")


def test_the_head_of_triton_has_both_ways() -> None:
    def names(gradient: Any) -> list[str]:
        choices = [Choice("head_loss", backend, "") for backend in BACKENDS["head_loss"]]
        config = OpsConfig(head_gradient=gradient)
        return [load_ops([choice], config).norm_head_loss.__name__ for choice in choices]

    assert BACKENDS["head_loss"] == ("triton", "cuda", "reference")
    assert run_interpreted(names, "backward") == ["norm_head_loss"] * 3
    assert run_interpreted(names, "forward") == ["norm_head_loss_kept", "norm_head_loss", "norm_head_loss"]


def test_negligible_keys_are_skipped_by_tritons_attention_alone() -> None:
    skips = OpsConfig(skip_negligible_keys=True)
    with installed():
        choice = choose(skips, device=CUDA)[0]
        assert choice == Choice("attention", "triton", "auto (ops.backend); negligible keys left out")
        with pytest.raises(ConfigError) as error:
            choose(replace(skips, attention="cuda"), device=CUDA)
    assert error.value.problems == (
        "ops.skip_negligible_keys = true: only Triton's attention does, not cuda (ops.attention); use false",
    )
    with pytest.raises(
        ConfigError, match=r"only Triton's attention does, not reference \(auto \(ops.backend\);"
    ):
        choose(skips, device=CPU)


def finite(config: OpsConfig) -> list[bool]:
    """Whether attention of the last queries of a long sequence is finite where the first values are NaN."""
    ops = load_ops([Choice("attention", "triton", "")], config)
    q, k, v = (0.1 * torch.randn(1, 1_024, 1, 16) for _ in range(3))
    v[:, :256] = torch.nan
    q, slopes = q[:, 512:], torch.tensor([0.8])
    outs = (
        ops.causal_attention(q, k, v, alibi_slopes=slopes, documents=None),
        ops.context_attention(q, k, v, context=ContextParallel(), alibi_slopes=slopes, documents=None),
    )
    return [bool(out.isfinite().all()) for out in outs]


@pytest.mark.parametrize("skips", [False, True])
def test_the_configuration_skips_negligible_keys(skips: bool) -> None:
    assert run_interpreted(finite, OpsConfig(skip_negligible_keys=skips)) == [skips, skips]


def test_what_setup_wrote_about_the_cuda_extension_is_quoted(tmp_path: Path) -> None:
    notice = tmp_path / "_cuda.txt"
    again = "run `make setup` again"
    with patch.object(extension, "find_spec", lambda _: None), patch.object(extension, "NOTICE", notice):
        reason = unavailable("swiglu", "cuda", device=CUDA)
        assert reason == f"megatron_b2._cuda was not built: install CUDA's nvcc and {again}"
        notice.write_text("megatron_b2: the CUDA kernels were not built\n  nvcc failed:\n  no such arch\n")
        reason = unavailable("swiglu", "cuda", device=CUDA)
        assert reason == f"megatron_b2._cuda was not built: nvcc failed: no such arch; mend that and {again}"
        with pytest.raises(InputError, match="no such arch"):
            extension.launch("swiglu_forward", CUDA)
    assert Path(registry.__file__).parents[1] / "_cuda.txt" == extension.NOTICE


def test_wide_heads_stay_with_the_reference() -> None:
    with installed():
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
                ops = load_ops([Choice(op, backend, "")], OpsConfig())
                if op in FUNCTIONS and backend != "reference" and ops == Ops():
                    missing.append(f"{op} {backend}")
        return missing

    assert run_interpreted(load_all) == []


def losses(ops: Ops, name: Literal["7b", "13b"] = "7b") -> list[Tensor]:
    golden = load_golden(name)
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
    config = OpsConfig(compile=True)
    ops = load_ops(choose(config, device=CPU), config)
    for ours, expected in zip(losses(ops), losses(Ops()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)


def test_a_model_of_triton_kernels_computes_the_same() -> None:
    config = OpsConfig(backend="triton")

    def through_kernels() -> list[Tensor]:
        return losses(load_ops(choose(config, device=CPU), config))

    for ours, expected in zip(run_interpreted(through_kernels), losses(Ops()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.skipif(bool(cpu_shim.missing()), reason=cpu_shim.missing())
@pytest.mark.parametrize("name", ["7b", "13b"])
def test_a_model_of_cuda_kernels_computes_the_same(name: Literal["7b", "13b"]) -> None:
    """RMSNorm, SwiGLU, attention and the head; RoPE has no kernel."""
    choices = [Choice(op, "cuda", "") for op in ("attention", "head_loss", "rms_norm", "swiglu")]
    ops = load_ops(choices, OpsConfig())
    with cpu_shim.kernels_on_cpu():
        found = losses(ops, name)
    for ours, expected in zip(found, losses(Ops(), name), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-5)


def test_settings_come_from_the_configuration() -> None:
    flags = ["--ops.backend", "reference", "--ops.head-loss", "cuda", "--ops.head-gradient", "forward"]
    config = load_config("preset:toy", flags).config
    assert config.ops == OpsConfig(backend="reference", head_loss="cuda", head_gradient="forward")
