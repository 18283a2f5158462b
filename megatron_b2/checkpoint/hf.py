"""Hugging Face folders out of our checkpoints and the other way round, streaming: memory holds a few blocks.

Nothing is renamed or reordered beyond rows, so import followed by export gives back every bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_b2.checkpoint.files import write_file
from megatron_b2.checkpoint.hf_config import CONFIG, hf_config
from megatron_b2.checkpoint.hf_names import HEAD, HFTensor, Style, hf_tensors
from megatron_b2.checkpoint.hf_shards import SAFETENSORS_INDEX, shard, shard_names
from megatron_b2.checkpoint.reading import Chunk, StoredTensor
from megatron_b2.checkpoint.store import step_name, write_manifest, write_part
from megatron_b2.checkpoint.tensor_file import Entry, write_tensors
from megatron_b2.checkpoint.weights import HEAD_NORMALISED, MODEL, WeightSource
from megatron_b2.errors import CheckpointError, TokenizerError
from megatron_b2.files.atomic import atomic_folder, write_json
from megatron_b2.files.hashing import OnBytes
from megatron_b2.ops.norm_head import normalise_rows
from megatron_b2.tokenizer.hf import FAST_NAME
from megatron_b2.tokenizer.hf import export_hf as export_tokenizer
from megatron_b2.tokenizer.wrapper import MODEL_NAME, load_tokenizer

DEFAULT_SHARD_BYTES = 5 * 10**9
"""Shard size of exports and of imported checkpoints."""
DEFAULT_MAX_POSITIONS = 4_096
"""Context length written when the checkpoint does not know it (report Table 3)."""


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion wrote."""

    output: Path
    format: str
    dtype: str
    """Torch names of the data types written."""
    tensors: int
    parameters: int
    bytes: int
    """Bytes of tensor data."""
    note: str
    """What the user should know, or nothing."""
    files: tuple[str, ...]
    """Everything in the output folder."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"output": str(self.output)}


def export_hf(
    source: WeightSource,
    out: Path,
    *,
    style: Style,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_bytes: OnBytes | None = None,
) -> ConversionSummary:
    """Write `source` as a Hugging Face folder `out`, which must be absent or empty; atomic.

    `baichuan` keeps names, fused W_pack and the raw head of the published models. `llama` splits W_pack and
    divides the head rows by their length, so that code without NormHead gives the same logits; only models
    with rotary positions can be written so. `dtype` defaults to the stored one.
    """
    if style == "llama" and source.config.position != "rope":
        raise CheckpointError(
            f"{source.path}: has {source.config.position} positions, and the llama format knows only rope; "
            "use --format baichuan"
        )
    table = hf_tensors(source.config, style=style)
    entries = [(_entry(source, tensor, style, dtype), tensor) for tensor in table]
    shards = shard([((entry, tensor), entry.nbytes) for entry, tensor in entries], limit=max_shard_bytes)
    names = shard_names(len(shards))
    with atomic_folder(out, error=CheckpointError) as tmp:
        for name, group in zip(names, shards, strict=True):
            write_tensors(tmp / name, [e for e, _ in group], metadata={"format": "pt"}, on_bytes=on_bytes)
        if len(shards) > 1:
            total = sum(entry.nbytes for entry, _ in entries)
            weight_map = {e.key: name for name, group in zip(names, shards, strict=True) for e, _ in group}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(tmp / SAFETENSORS_INDEX, index, error=CheckpointError)
        config = _export_config(source, style, entries[0][0].dtype)
        write_json(tmp / CONFIG, config, error=CheckpointError)
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        write_json(tmp / "generation_config.json", special, error=CheckpointError)
        note = _write_tokenizer(source, tmp)
    return _summary(out, style, [entry for entry, _ in entries], note)


def import_hf(source: WeightSource, out: Path, *, on_bytes: OnBytes | None = None) -> ConversionSummary:
    """Write an opened Hugging Face folder as a checkpoint `out/step_00000000` with weights only; atomic.

    `out` must be absent or empty. Data types are kept. The result serves `checkpoint.init_from`,
    generation and export.
    """
    if source.kind == "checkpoint":
        raise CheckpointError(f"{source.path}: is one of our checkpoints already, not a Hugging Face folder")
    entries = [_import_entry(source, name) for name in source.names()]
    shards = shard([(entry, entry.nbytes) for entry in entries], limit=DEFAULT_SHARD_BYTES)
    seq_len = source.max_positions or DEFAULT_MAX_POSITIONS
    meta = {
        "run": {"model": asdict(source.config), "data": {"seq_len": seq_len}},
        "imported": {"format": source.kind, "folder": source.path.resolve().name},
        HEAD_NORMALISED: source.head_normalised,
    }
    files = {name: path.read_bytes() for name, path in source.tokenizer_files.items()}
    with atomic_folder(out, error=CheckpointError) as tmp:
        step = tmp / step_name(0)
        step.mkdir()
        parts = [
            write_part(
                step,
                f"weights_{i:05d}.safetensors",
                group,
                [_whole(entry) for entry in group],
                on_bytes=on_bytes,
            )
            for i, group in enumerate(shards)
        ]
        write_manifest(step, parts, files, step=0, tokens=0, meta=meta, world_size=1)
    return _summary(out, "checkpoint", entries)


def _entry(source: WeightSource, tensor: HFTensor, style: Style, dtype: torch.dtype | None) -> Entry:
    target = dtype or source.dtype(tensor.ours)
    bake = style == "llama" and tensor.ours == HEAD and not source.head_normalised
    return Entry(
        key=tensor.name,
        dtype=target,
        shape=tensor.shape,
        blocks=partial(_converted, source, tensor, target, bake),
    )


def _converted(source: WeightSource, tensor: HFTensor, dtype: torch.dtype, bake: bool) -> Iterator[Tensor]:
    for stored in source.read_blocks(tensor.ours, start=tensor.row, rows=tensor.shape[0]):
        block = normalise_rows(stored) if bake else stored
        cast = block.to(dtype)
        if dtype == torch.float16 and not bool(cast.isfinite().all()) and bool(stored.isfinite().all()):
            raise CheckpointError(
                f"{tensor.name}: {float(stored.abs().max()):.4g} does not fit float16 (65504); "
                "use --dtype bfloat16"
            )
        yield cast


def _import_entry(source: WeightSource, name: str) -> Entry:
    return Entry(
        key=f"{MODEL}{name}@0",
        dtype=source.dtype(name),
        shape=source.shape(name),
        blocks=partial(source.read_blocks, name),
    )


def _whole(entry: Entry) -> tuple[str, StoredTensor]:
    chunk = Chunk(file="", key=entry.key, offsets=(0,) * len(entry.shape), shape=entry.shape)
    return entry.key.removesuffix("@0"), StoredTensor(dtype=entry.dtype, shape=entry.shape, chunks=(chunk,))


def _export_config(source: WeightSource, style: Style, dtype: torch.dtype) -> dict[str, Any]:
    positions = source.max_positions or DEFAULT_MAX_POSITIONS
    return hf_config(source.config, style=style, max_positions=positions, dtype=_torch_name(dtype))


def _write_tokenizer(source: WeightSource, tmp: Path) -> str:
    """Copy a Hugging Face tokenizer, or make one from tokenizer.model; a note for the user, or nothing."""
    files = source.tokenizer_files
    if MODEL_NAME in files and FAST_NAME not in files:
        try:
            tokenizer = load_tokenizer(files[MODEL_NAME])
            export_tokenizer(tokenizer, tmp, max_length=source.max_positions or DEFAULT_MAX_POSITIONS)
        except TokenizerError as error:
            write_file(tmp / MODEL_NAME, files[MODEL_NAME].read_bytes())
            return f"no fast tokenizer was made, tokenizer.model is copied as it is: {error}"
        return ""
    for name, path in files.items():
        write_file(tmp / name, path.read_bytes())
    return "" if files else "the checkpoint has no tokenizer, so none was written"


def _torch_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _summary(out: Path, style: str, entries: list[Entry], note: str = "") -> ConversionSummary:
    return ConversionSummary(
        output=out,
        format=style,
        dtype=", ".join(sorted({_torch_name(entry.dtype) for entry in entries})),
        tensors=len(entries),
        parameters=sum(prod(entry.shape) for entry in entries),
        bytes=sum(entry.nbytes for entry in entries),
        note=note,
        files=tuple(sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())),
    )
