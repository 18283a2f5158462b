"""Checkpoints: logical save, load and reshard, retention, and Hugging Face import and export."""

from megatron_b2.checkpoint.catalog import (
    CheckpointInfo,
    latest_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    resolve_checkpoint,
)
from megatron_b2.checkpoint.logical import (
    LogicalState,
    LogicalTensor,
    Piece,
    Rectangle,
    flat_pieces,
    rectangles,
)
from megatron_b2.checkpoint.reading import load_into
from megatron_b2.checkpoint.store import CheckpointReader, save_checkpoint
from megatron_b2.checkpoint.weights import WeightSource, load_weights, open_weights

__all__ = [
    "CheckpointInfo",
    "CheckpointReader",
    "LogicalState",
    "LogicalTensor",
    "Piece",
    "Rectangle",
    "WeightSource",
    "flat_pieces",
    "latest_checkpoint",
    "list_checkpoints",
    "load_into",
    "load_weights",
    "open_weights",
    "prune_checkpoints",
    "rectangles",
    "resolve_checkpoint",
    "save_checkpoint",
]
