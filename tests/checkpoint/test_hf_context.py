"""A Hugging Face folder straight into context-parallel layouts: weights, slices read, and the loss they give."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_b2.checkpoint.hf_names import parameter_shapes
from megatron_b2.testing.fork import run_ranks
from tests.checkpoint.support import make_hf_folder
from tests.dist.test_init_from import Loaded, config_of, load
from tests.engine.runs import assemble
from tests.golden_model import load_golden

LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("7b", 2, {"context": 2, "context_method": "ulysses", "zero_stage": 1}),
    ("13b", 2, {"context": 2, "context_method": "ring", "zero_stage": 3}),
    ("7b", 4, {"context": 2, "tensor": 2, "sequence_parallel": True, "zero_stage": 2}),
    ("13b", 4, {"context": 2, "context_method": "ring", "pipeline": 2, "zero_stage": 1}),
]


@pytest.mark.parametrize(("style", "ranks", "layout"), LAYOUTS, ids=str)
def test_a_hugging_face_folder_fills_a_layout_with_context_parallelism(
    tmp_path: Path, style: str, ranks: int, layout: dict[str, Any]
) -> None:
    """ZeRO cuts the weights over the ranks that share a sequence, so each element is read once, and norms once
    for each tensor-parallel rank. The loss is the published one, over both parts of the sequence."""
    golden = load_golden(style)
    config = config_of(style, make_hf_folder(tmp_path / "hf", style), layout)
    found: list[Loaded] = run_ranks(ranks, load, config, style)
    whole, weight = assemble([rank.trace for rank in found]), golden.named("w")
    shapes = parameter_shapes(golden.config)
    for name in shapes:
        assert torch.equal(whole[f"model/{name}"], weight(name)), name
    for rank in found:
        assert rank.read == rank.held
        assert abs(rank.ce - float(golden.tensors["ce"])) < 2e-5
    elements = sum(prod(shape) for shape in shapes.values())
    copied = sum(prod(shape) for name, shape in shapes.items() if "norm" in name)
    assert sum(rank.read for rank in found) == 4 * (elements + (config.parallel.tensor - 1) * copied)
