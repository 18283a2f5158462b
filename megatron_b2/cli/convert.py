"""`b2 convert`: Hugging Face folders out of checkpoints and the other way round."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import Positional, arg, subcommand

from megatron_b2.checkpoint.hf import ConversionSummary, export_hf, import_hf
from megatron_b2.checkpoint.hf_shards import parse_size
from megatron_b2.checkpoint.weights import DTYPES, WeightSource, open_weights
from megatron_b2.cli.main import run
from megatron_b2.files.atomic import write_json
from megatron_b2.files.progress import ProgressBar, format_bytes

HELP = "import from and export to Hugging Face folders"


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint as a Hugging Face folder.

    Example: b2 convert hf-export runs/toy exported --format llama --dtype bfloat16
    """

    checkpoint: Positional[Annotated[Path, arg(metavar="CHECKPOINT")]]
    """A step_* folder, or a run or checkpoint folder (its newest checkpoint), or a Hugging Face folder."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to make; it must not exist or be empty."""
    format: Literal["baichuan", "llama"] = "baichuan"
    """baichuan: the published names, fused W_pack, raw NormHead rows. llama: q, k, v split and the head
    normalised, so that any LlamaForCausalLM gives the same logits (RoPE models only)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type to write; the stored one unless given."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, such as 800MB or 5GB."""
    json: Path | None = None
    """Write the summary as JSON here too."""


@dataclass(frozen=True, kw_only=True)
class Import:
    """Write a Hugging Face folder (baichuan or llama) as a checkpoint of step 0 with weights only.

    Example: b2 convert hf-import Baichuan2-13B-Base imported
    """

    folder: Positional[Annotated[Path, arg(metavar="HF_FOLDER")]]
    """Folder with config.json and safetensors or pytorch_model*.bin files."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to make, for checkpoint.init_from or b2 generate; it must not exist or be empty."""
    position: Literal["rope", "alibi"] | None = None
    """Position encoding, when config.json does not tell (rope: 7B style, alibi: 13B style)."""
    json: Path | None = None
    """Write the summary as JSON here too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0."""
    command = tyro.cli(
        Annotated[Export, subcommand("hf-export")] | Annotated[Import, subcommand("hf-import")],
        prog="b2 convert",
        description=HELP,
        args=argv,
    )
    started = time.monotonic()
    summary = _export(command) if isinstance(command, Export) else _import(command)
    _print(summary, time.monotonic() - started)
    if command.json is not None:
        write_json(command.json, summary.to_json())
    return 0


def _export(command: Export) -> ConversionSummary:
    limit = parse_size(command.max_shard_size)
    with ProgressBar("verify", unit="bytes") as bar:
        source = open_weights(command.checkpoint, on_bytes=bar.advance)
    dtype = DTYPES[command.dtype] if command.dtype else None
    with ProgressBar("export", total=_size(source, dtype), unit="bytes") as bar:
        return export_hf(
            source,
            command.out,
            style=command.format,
            dtype=dtype,
            max_shard_bytes=limit,
            on_bytes=bar.advance,
        )


def _import(command: Import) -> ConversionSummary:
    source = open_weights(command.folder, position=command.position)
    with ProgressBar("import", total=_size(source, None), unit="bytes") as bar:
        return import_hf(source, command.out, on_bytes=bar.advance)


def _size(source: WeightSource, dtype: torch.dtype | None) -> int:
    return sum(prod(source.shape(name)) * (dtype or source.dtype(name)).itemsize for name in source.names())


def _print(summary: ConversionSummary, seconds: float) -> None:
    rate = format_bytes(int(summary.bytes / max(seconds, 1e-9)))
    print(f"{summary.output}: {summary.format}, {summary.dtype}")
    print(f"  {summary.tensors} tensors, {summary.parameters:,} parameters, {format_bytes(summary.bytes)}")
    print(f"  {seconds:.1f} s, {rate}/s")
    for name in summary.files:
        print(f"  {name}")
    if summary.note:
        print(f"note: {summary.note}")


if __name__ == "__main__":
    sys.exit(run(main))
