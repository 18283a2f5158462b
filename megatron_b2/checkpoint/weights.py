"""Weights for inference, export or a warm start: one view of our checkpoints and of Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_b2.checkpoint.catalog import resolve_checkpoint
from megatron_b2.checkpoint.hf_config import CONFIG, Position, read_hf_config
from megatron_b2.checkpoint.hf_names import (
    HEAD,
    hf_tensors,
    is_known_buffer,
    parameter_shapes,
    rows_by_parameter,
)
from megatron_b2.checkpoint.hf_shards import tensor_files
from megatron_b2.checkpoint.logical import LogicalState, Shape
from megatron_b2.checkpoint.reading import Chunk, StoredTensor, TensorReader, load_into, shape_problems
from megatron_b2.checkpoint.store import CheckpointReader
from megatron_b2.checkpoint.tensor_file import open_tensor_file
from megatron_b2.config.decode import from_dict
from megatron_b2.config.schema import ModelConfig
from megatron_b2.errors import CheckpointError, ConfigError
from megatron_b2.files.hashing import OnBytes
from megatron_b2.parallel.comm import Comm

MODEL = "model/"
"""Prefix of the parameters in a logical state."""
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
"""Data types that a model can be loaded or exported in, by name."""
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
"""Files that belong to a tokenizer; carried along by import and export."""
HEAD_NORMALISED = "head_normalised"
"""Key in the meta of imported checkpoints: the head rows were already divided by their length."""
UNIT_TOLERANCE = 1e-2
"""How far a stored bf16 row may be from length one and still count as normalised."""


@dataclass(frozen=True)
class WeightSource:
    """A model's parameters on disk, read lazily under our logical names (without "model/")."""

    path: Path
    """The folder that is read (of a run folder: the checkpoint that was chosen)."""
    kind: Literal["checkpoint", "baichuan", "llama"]
    config: ModelConfig
    tensors: TensorReader
    max_positions: int | None
    """Sequence length of training, or the context the configuration promises."""
    head_normalised: bool
    """Whether the head rows have length one already; NormHead is then the identity up to rounding."""

    def names(self) -> list[str]:
        """Parameter names in model order."""
        return list(parameter_shapes(self.config))

    def shape(self, name: str) -> Shape:
        """Full shape of a parameter."""
        return self.tensors.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Stored data type of a parameter."""
        return self.tensors.dtype(name)

    def read(
        self, name: str, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """The rectangle at `offsets` (default: the origin) of `shape` (default: the rest), as stored."""
        return self.tensors.read(name, offsets, shape)

    def read_blocks(self, name: str, *, start: int = 0, rows: int | None = None) -> Iterator[Tensor]:
        """Rows of a parameter in consecutive blocks of bounded memory."""
        return self.tensors.read_blocks(name, start=start, rows=rows)

    @property
    def tokenizer_files(self) -> Mapping[str, Path]:
        """The tokenizer's files by name; empty when the folder has none."""
        return {name: self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()}


def open_weights(
    path: Path | str,
    *,
    position: Position | None = None,
    verify: bool = True,
    comm: Comm | None = None,
    on_bytes: OnBytes | None = None,
) -> WeightSource:
    """Open one of our checkpoints (a step, checkpoint or run folder: newest) or a Hugging Face folder.

    Hugging Face folders may be `baichuan` (7B or 13B style) or `llama`, in safetensors or pytorch_model*.bin
    files. `position` states the encoding of a `baichuan` folder whose config.json does not. All names and
    shapes are checked here; values are read later. With `verify` every file of one of our checkpoints is
    hashed first (the ranks of `comm` share the work and must all call it; `on_bytes` hears of the progress);
    Hugging Face folders have no checksums. CheckpointError says what is damaged or does not fit.
    """
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / CONFIG).is_file():
        return _open_hf(folder, position)
    checkpoint = resolve_checkpoint(folder)
    if checkpoint is None:
        raise CheckpointError(
            f"{folder}: neither a checkpoint, nor a run folder with one, nor a Hugging Face folder ({CONFIG})"
        )
    if verify and (problems := CheckpointReader(checkpoint).verify(comm=comm, on_bytes=on_bytes)):
        raise CheckpointError(f"{checkpoint} is damaged; use another checkpoint:\n  " + "\n  ".join(problems))
    return _open_checkpoint(checkpoint)


def load_weights(source: WeightSource, state: LogicalState) -> None:
    """Fill the parameters ("model/...") of `state` in place; other names are left alone. See `load_into`."""
    parameters = {n.removeprefix(MODEL): tensor for n, tensor in state.items() if n.startswith(MODEL)}
    load_into(source, parameters)


def model_differences(stored: Mapping[str, Any], model: ModelConfig) -> list[str]:
    """Settings in which the model of a checkpoint is another one, a line each with both values.

    `init_std` may differ, and `rope_base` where there are no rotary positions.
    """
    ours = asdict(model)
    del ours["init_std"]
    if model.position != "rope":
        del ours["rope_base"]
    return [
        f"model.{key} = {stored.get(key)!r}, now {value!r}"
        for key, value in ours.items()
        if stored.get(key) != value
    ]


def _open_checkpoint(path: Path) -> WeightSource:
    reader = CheckpointReader(path)
    run = reader.meta.get("run")
    raw = run.get("model") if isinstance(run, Mapping) else None
    try:
        config = from_dict(ModelConfig, raw, key=("model",))
    except ConfigError as error:
        raise CheckpointError(f"{path}: the manifest's model configuration is not usable: {error}") from error
    data: Any = run.get("data") if isinstance(run, Mapping) else None
    names = {n.removeprefix(MODEL): t for n, t in reader.tensors.items() if n.startswith(MODEL)}
    return _checked(
        WeightSource(
            path=path,
            kind="checkpoint",
            config=config,
            tensors=TensorReader(path, names),
            max_positions=data.get("seq_len") if isinstance(data, Mapping) else None,
            head_normalised=bool(reader.meta.get(HEAD_NORMALISED, False)),
        )
    )


def _open_hf(folder: Path, position: Position | None) -> WeightSource:
    hf = read_hf_config(folder, position=position)
    located: dict[str, tuple[str, torch.dtype, Shape]] = {}
    for file in tensor_files(folder):
        for key, (dtype, shape) in open_tensor_file(folder / file).describe().items():
            located[key] = (file, dtype, shape)
    table = hf_tensors(hf.model, style=hf.style)
    problems = shape_problems(
        {t.name: t.shape for t in table},
        {key: shape for key, (_, _, shape) in located.items() if not is_known_buffer(key)},
    )
    if problems:
        raise CheckpointError(f"{folder}: does not fit its {CONFIG}:\n  " + "\n  ".join(problems))
    shapes = parameter_shapes(hf.model)
    tensors: dict[str, StoredTensor] = {}
    for ours, parts in rows_by_parameter(table).items():
        dtypes = {located[part.name][1] for part in parts}
        if len(dtypes) > 1:
            raise CheckpointError(f"{folder}: {', '.join(p.name for p in parts)} have different data types")
        chunks = tuple(
            Chunk(
                file=located[p.name][0],
                key=p.name,
                offsets=(p.row, *(0,) * (len(p.shape) - 1)),
                shape=p.shape,
            )
            for p in parts
        )
        tensors[ours] = StoredTensor(dtype=dtypes.pop(), shape=shapes[ours], chunks=chunks)
    source = WeightSource(
        path=folder,
        kind=hf.style,
        config=hf.model,
        tensors=TensorReader(folder, tensors),
        max_positions=hf.max_positions,
        head_normalised=False,
    )
    return _require_unit_head(source) if hf.style == "llama" else source


def _checked(source: WeightSource) -> WeightSource:
    stored = {name: source.shape(name) for name in source.tensors.names()}
    if problems := shape_problems(parameter_shapes(source.config), stored):
        raise CheckpointError(f"{source.path}: does not fit its configuration:\n  " + "\n  ".join(problems))
    return source


def _require_unit_head(source: WeightSource) -> WeightSource:
    """A llama head must be a baked NormHead: other models would get other logits from ours in silence."""
    row = 0
    for block in source.read_blocks(HEAD):
        lengths = block.float().norm(dim=1)
        wrong = ((lengths - 1).abs() > UNIT_TOLERANCE) & (lengths != 0)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise CheckpointError(
                f"{source.path}: row {row + first} of lm_head.weight has length {float(lengths[first]):.4g}, "
                "not 1: this llama model has no normalised head, so NormHead would change its logits"
            )
        row += block.shape[0]
    return replace(source, head_normalised=True)
