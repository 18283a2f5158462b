"""The built-in configurations, against the numbers of the report."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_b2.config import check, load_config, preset_names
from megatron_b2.config.presets import FOLDER, preset_path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "configs"

# Report Table 10: hidden, FFN, layers, heads, N in millions.
LADDER = {
    "ladder-11m": (384, 1_152, 6, 6, 11.51),
    "ladder-51m": (704, 2_112, 8, 8, 51.56),
    "ladder-108m": (832, 2_496, 12, 8, 108.01),
    "ladder-307m": (1_216, 3_648, 16, 8, 307.60),
    "ladder-835m": (1_792, 5_376, 20, 14, 835.00),
    "ladder-1.5b": (2_240, 6_720, 24, 14, 1_565.60),
    "ladder-3b": (2_880, 8_640, 28, 20, 3_019.33),
}


def test_names() -> None:
    assert set(preset_names()) == {"toy", "baichuan2-7b", "baichuan2-13b", *LADDER}
    assert all(preset_path(name).is_file() for name in preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_is_a_whole_run_that_passes_every_rule(name: str) -> None:
    config = load_config(f"preset:{name}").config
    assert config.name == name
    check(config, world_size=1)
    if name != "toy":
        check(config, world_size=1_024)


@pytest.mark.parametrize(
    ("name", "shape", "max_lr", "parameters"),
    [
        ("baichuan2-7b", (4_096, 11_008, 32, 32, "rope"), 2e-4, 7_505_973_248),
        ("baichuan2-13b", (5_120, 13_696, 40, 40, "alibi"), 1.5e-4, 13_896_668_160),
    ],
)
def test_report_models(name: str, shape: tuple[object, ...], max_lr: float, parameters: int) -> None:
    config = load_config(f"preset:{name}").config
    model, optim, train = config.model, config.optim, config.train
    assert (
        model.hidden_size,
        model.ffn_hidden_size,
        model.num_layers,
        model.num_heads,
        model.position,
    ) == shape
    assert model.num_parameters == parameters
    assert (model.vocab_size, model.norm_eps, model.init_std, model.head_dim) == (125_696, 1e-6, 0.02, 128)
    assert model.ffn_hidden_size == math.ceil(8 / 3 * model.hidden_size / 128) * 128
    assert (optim.max_lr, optim.warmup_steps, optim.beta1, optim.beta2) == (max_lr, 2_000, 0.9, 0.95)
    assert (optim.weight_decay, optim.grad_clip, optim.min_lr_ratio, optim.eps) == (0.1, 0.5, 0.1, 1e-8)
    assert (config.data.seq_len, train.precision, train.max_z_weight) == (4_096, "bf16", 2e-4)
    assert config.tokens_per_step == 4_194_304
    assert (train.steps - 1) * config.tokens_per_step < 2.6e12 <= train.steps * config.tokens_per_step
    assert (config.checkpoint.interval, config.checkpoint.milestone_tokens) == (1_000, 220 * 10**9)


@pytest.mark.parametrize("name", LADDER)
def test_scaling_ladder(name: str) -> None:
    config = load_config(f"preset:{name}").config
    model = config.model
    *shape, millions = LADDER[name]
    assert [model.hidden_size, model.ffn_hidden_size, model.num_layers, model.num_heads] == shape
    assert model.ffn_hidden_size == 3 * model.hidden_size
    assert round(model.num_block_parameters / 1e6, 2) == millions
    assert (
        (config.train.steps - 1) * config.tokens_per_step
        < 1e12
        <= config.train.steps * config.tokens_per_step
    )


def test_shared_parts_are_not_offered() -> None:
    parts = {path.stem for path in FOLDER.glob("_*.toml")}
    assert parts == {"_baichuan2", "_ladder"}
    assert not parts & set(preset_names())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    resolved = load_config(path)
    assert resolved.config.data.sources
    assert resolved.config.tokenizer.path
