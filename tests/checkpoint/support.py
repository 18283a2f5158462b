"""Small states, ranks as threads and Hugging Face folders for the checkpoint tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_b2.checkpoint import LogicalState, LogicalTensor, Piece, flat_pieces, save_checkpoint
from megatron_b2.parallel.comm import Comm, SingleComm

GOLDEN = Path(__file__).parents[1] / "golden"


class ThreadComm:
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._slots = barrier, slots

    def barrier(self) -> None:
        self._barrier.wait(timeout=30)

    def all_gather_object(self, obj: Any) -> list[Any]:
        self._slots[self.rank] = obj
        self.barrier()
        gathered = list(self._slots)
        self.barrier()
        return gathered

    def gather_object(self, obj: Any) -> list[Any] | None:
        gathered = self.all_gather_object(obj)
        return gathered if self.rank == 0 else None

    def broadcast_object(self, obj: Any) -> Any:
        return self.all_gather_object(obj)[0]

    def all_reduce_max(self, value: int) -> int:
        return max(self.all_gather_object(value))


def on_threads(size: int, function: Callable[[Comm], Any]) -> list[Any]:
    """Call `function` on `size` ranks at the same time; results, or exceptions, in rank order."""
    barrier, slots = threading.Barrier(size), [None] * size

    def call(rank: int) -> Any:
        try:
            return function(ThreadComm(rank, size, barrier, slots))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(call, range(size)))


def whole_state(tensors: Mapping[str, Tensor]) -> LogicalState:
    """A state whose every tensor is one piece."""
    return {
        name: LogicalTensor(
            shape=tuple(t.shape), dtype=t.dtype, pieces=(Piece(tensor=t, offsets=(0,) * t.dim()),)
        )
        for name, t in tensors.items()
    }


def flat_shares(sizes: Sequence[int], ranks: int) -> list[list[tuple[int, int]]]:
    """ZeRO's layout, told independently: concatenate tensors, pad, cut evenly; ranges of each tensor by rank."""
    total = sum(sizes)
    share = -(-total // ranks)
    shares: list[list[tuple[int, int]]] = []
    for rank in range(ranks):
        ranges, begin = [], 0
        for size in sizes:
            low = min(max(rank * share - begin, 0), size)
            high = min(max((rank + 1) * share - begin, 0), size)
            ranges.append((low, high))
            begin += size
        shares.append(ranges)
    return shares


def flat_state(tensors: Mapping[str, Tensor], *, rank: int, ranks: int) -> LogicalState:
    """The part of a ZeRO-like flat partition that `rank` holds, with its own memory."""
    ranges = flat_shares([t.numel() for t in tensors.values()], ranks)[rank]
    return {
        name: LogicalTensor(
            shape=tuple(t.shape),
            dtype=t.dtype,
            pieces=flat_pieces(t.reshape(-1)[low:high].clone(), local_shape=t.shape, start=low),
        )
        for (name, t), (low, high) in zip(tensors.items(), ranges, strict=True)
    }


def numbered(shape: Sequence[int], first: float = 0.0) -> Tensor:
    """A float32 tensor whose elements are all different."""
    return torch.arange(prod(shape), dtype=torch.float32).reshape(tuple(shape)) + first


def save_small(
    root: Path, step: int, *, scale: float = 1.0, comm: Comm | None = None, size: int = 64
) -> Path:
    """Save a checkpoint of two tensors with values that tell the step."""
    tensors = {"model/a": numbered((size, 3), step) * scale, "optim/exp_avg/a": numbered((size, 3), -step)}
    return save_checkpoint(
        root,
        step=step,
        tokens=step * 100,
        state=whole_state(tensors),
        rank_state={"rng": torch.arange(5, dtype=torch.uint8)},
        meta={"run": {"name": "small"}},
        files={"config.toml": b"name = 'small'\n"},
        comm=comm or SingleComm(),
    )


def flip(path: Path, position: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 0x10
    path.write_bytes(bytes(data))


def golden_weights(size: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under Hugging Face names and the configuration of golden file `size` (7b or 13b)."""
    with safe_open(str(GOLDEN / f"b2_tiny_{size}.safetensors"), framework="pt") as file:
        weights = {key[2:]: file.get_tensor(key) for key in file.keys() if key.startswith("w.")}  # noqa: SIM118
        config: dict[str, Any] = json.loads(file.metadata()["config"])
    return weights, config


def make_hf_folder(
    folder: Path, size: str, *, dtype: torch.dtype = torch.float32, torch_file: bool = False
) -> Path:
    """A Hugging Face folder as the published ones look, written by other libraries only."""
    weights, config = golden_weights(size)
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    folder.mkdir(parents=True)
    config |= {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if torch_file:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    return folder
