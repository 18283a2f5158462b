"""The name table against BAICHUAN2.md: 283 tensors at 13B, 227 at 7B, exact names and shapes."""

from __future__ import annotations

from math import prod

import pytest

from megatron_b2.checkpoint.hf_names import hf_tensors, parameter_shapes, rows_by_parameter
from megatron_b2.config.schema import ModelConfig
from tests.checkpoint.support import golden_weights

B7 = ModelConfig(hidden_size=4096, ffn_hidden_size=11008, num_layers=32, num_heads=32)
B13 = ModelConfig(hidden_size=5120, ffn_hidden_size=13696, num_layers=40, num_heads=40, position="alibi")


def published(v: int, h: int, f: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Written again from the table in BAICHUAN2.md."""
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for i in range(layers):
        block = f"model.layers.{i}."
        names[block + "self_attn.W_pack.weight"] = (3 * h, h)
        names[block + "self_attn.o_proj.weight"] = (h, h)
        names[block + "mlp.gate_proj.weight"] = (f, h)
        names[block + "mlp.up_proj.weight"] = (f, h)
        names[block + "mlp.down_proj.weight"] = (h, f)
        names[block + "input_layernorm.weight"] = (h,)
        names[block + "post_attention_layernorm.weight"] = (h,)
    return names | {"model.norm.weight": (h,), "lm_head.weight": (v, h)}


@pytest.mark.parametrize(
    ("config", "count", "parameters"),
    [(B7, 227, 7_505_973_248), (B13, 283, 13_896_668_160)],
    ids=["7b", "13b"],
)
def test_published_names_and_shapes(config: ModelConfig, count: int, parameters: int) -> None:
    table = {t.name: t.shape for t in hf_tensors(config, style="baichuan")}
    assert table == published(125_696, config.hidden_size, config.ffn_hidden_size, config.num_layers)
    assert len(table) == count
    assert sum(map(prod, table.values())) == parameters == config.num_parameters
    assert sum(map(prod, parameter_shapes(config).values())) == parameters


@pytest.mark.parametrize("style", ["baichuan", "llama"])
def test_rows_tile_our_parameters(style: str) -> None:
    shapes = parameter_shapes(B7)
    grouped = rows_by_parameter(hf_tensors(B7, style=style))  # type: ignore[arg-type]
    assert grouped.keys() == shapes.keys()
    for ours, parts in grouped.items():
        row = 0
        for part in parts:
            assert part.row == row
            assert part.shape[1:] == shapes[ours][1:]
            row += part.shape[0]
        assert row == shapes[ours][0]


def test_llama_splits_query_key_value_in_this_order() -> None:
    table = {t.name: t for t in hf_tensors(B7, style="llama")}
    assert len(table) == 32 * 9 + 3
    rows = [table[f"model.layers.5.self_attn.{x}_proj.weight"].row for x in "qkv"]
    assert rows == [0, 4096, 8192]


@pytest.mark.parametrize(("size", "position"), [("7b", "rope"), ("13b", "alibi")])
def test_the_golden_files_have_these_names(size: str, position: str) -> None:
    weights, config = golden_weights(size)
    shapes = published(
        config["vocab_size"], config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    )
    assert {name: tuple(t.shape) for name, t in weights.items()} == shapes
