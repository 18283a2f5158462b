"""A Hugging Face folder straight into every kind of layout: each rank reads its own slices and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_b2.checkpoint import tensor_file
from megatron_b2.checkpoint.hf_names import parameter_shapes
from megatron_b2.config.schema import CheckpointConfig, ParallelConfig, RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine import deepspeed as _preloaded  # noqa: F401 (imported once, before the forks)
from megatron_b2.engine.build import build_engine
from megatron_b2.parallel.comm import ProcessGroupComm
from megatron_b2.testing import layouts
from megatron_b2.testing.fork import run_ranks
from megatron_b2.training.pretrain import RunInputs, start_state
from tests.checkpoint.support import make_hf_folder
from tests.engine.runs import Trace, assemble, pieces
from tests.golden_model import load_golden

RANKS = 2


@dataclass(frozen=True)
class Loaded:
    """What one rank has and did."""

    trace: Trace
    held: int
    """Bytes of parameters that it keeps in fp32, copies of other ranks included."""
    read: int
    """Bytes of tensors that it took out of the folder's files."""
    largest: int
    """Bytes of the largest single read."""
    ce: float


@contextmanager
def reads_counted(sizes: list[int]) -> Iterator[None]:
    """Sizes of everything that is read out of safetensors files."""
    original = tensor_file._SafetensorsFile.read

    def read(self: Any, key: str, index: tuple[slice, ...]) -> Tensor:
        part = original(self, key, index)
        sizes.append(part.nbytes)
        return part

    with patch.object(tensor_file._SafetensorsFile, "read", read):
        yield


def config_of(style: str, folder: Path, layout: dict[str, Any]) -> RunConfig:
    golden = load_golden(style)
    base = layouts.reference_config("7b", seed=0)
    return replace(
        base,
        model=golden.config,
        data=replace(base.data, seq_len=golden.tensors["input_ids"].shape[1]),
        train=replace(base.train, global_batch_size=2, micro_batch_size=1),
        parallel=ParallelConfig(engine="deepspeed", **layout),
        checkpoint=CheckpointConfig(init_from=str(folder)),
    )


def load(config: RunConfig, style: str) -> Loaded:
    """Start this rank as a run with checkpoint.init_from does."""
    engine = build_engine(config, comm=ProcessGroupComm(), device=torch.device("cpu"))
    sizes: list[int] = []
    with reads_counted(sizes):
        start_state(config, engine=engine, inputs=cast(RunInputs, SimpleNamespace(resume=None)))
    state = engine.logical_state()
    held = [p.tensor.nbytes for name, t in state.items() if name.startswith("model/") for p in t.pieces]
    ids = load_golden(style).tensors["input_ids"]
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    positions = torch.arange(ids.shape[1], dtype=torch.int32).expand_as(ids)
    whole = Batch(ids, labels, torch.zeros_like(positions), positions)
    share = len(ids) // engine.dp_size
    rows = range(engine.dp_rank * share, (engine.dp_rank + 1) * share)
    micro = [Batch(*(getattr(whole, field)[i : i + 1] for field in Batch.__dataclass_fields__)) for i in rows]
    ce = float(engine.eval_step(micro).ce)
    return Loaded(Trace([], pieces(state)), sum(held), sum(sizes), max(sizes), ce)


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("7b", {"tensor": 2, "zero_stage": 1}),
    ("7b", {"tensor": 2, "zero_stage": 1, "sequence_parallel": True}),
    ("7b", {"pipeline": 2, "zero_stage": 1}),
    ("7b", {"zero_stage": 3}),
    ("13b", {"pipeline": 2, "zero_stage": 1}),
    ("13b", {"zero_stage": 3}),
    ("13b", {"zero_stage": 2}),
]


@pytest.mark.parametrize(("style", "layout"), LAYOUTS, ids=[f"{style} {layout}" for style, layout in LAYOUTS])
def test_a_hugging_face_folder_fills_a_layout(tmp_path: Path, style: str, layout: dict[str, Any]) -> None:
    golden = load_golden(style)
    config = config_of(style, make_hf_folder(tmp_path / "hf", style), layout)
    ranks: list[Loaded] = run_ranks(RANKS, load, config, style)
    whole = assemble([rank.trace for rank in ranks])
    weight = golden.named("w")
    shapes = parameter_shapes(golden.config)
    for name in shapes:
        assert torch.equal(whole[f"model/{name}"], weight(name)), name
    for rank in ranks:
        assert rank.read == rank.held
        # The working weights, not only the fp32 copies that the pieces are.
        assert abs(rank.ce - float(golden.tensors["ce"])) < 2e-5
    total = 4 * sum(prod(shape) for shape in shapes.values())
    copied = 4 * sum(prod(shape) for name, shape in shapes.items() if "norm" in name)
    assert sum(rank.read for rank in ranks) == total + (copied if config.parallel.tensor > 1 else 0)
    if config.parallel.tensor > 1 or config.parallel.zero_stage == 3:
        # No rank reads a whole matrix. ZeRO-2 cuts all parameters together, a pipeline between layers.
        assert max(rank.largest for rank in ranks) <= 4 * max(map(prod, shapes.values())) // RANKS
