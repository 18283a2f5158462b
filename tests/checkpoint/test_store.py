"""Save, reshard, load."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_b2.checkpoint import (
    CheckpointReader,
    LogicalTensor,
    Piece,
    load_into,
    open_weights,
    save_checkpoint,
)
from megatron_b2.errors import CheckpointError
from megatron_b2.parallel.comm import Comm, ProcessGroupComm, SingleComm
from megatron_b2.testing.fork import run_ranks
from tests.checkpoint.support import flat_state, numbered, on_threads, save_small, whole_state

NOTHING: dict[str, Any] = {"rank_state": {}, "meta": {}, "files": {}}


def test_a_checkpoint_is_plain_safetensors_json_and_checksums(tmp_path: Path) -> None:
    path = save_small(tmp_path, 20)
    assert path == tmp_path / "step_00000020"
    assert sorted(p.name for p in path.iterdir()) == [
        "SHA256SUMS",
        "config.toml",
        "manifest.json",
        "rank_00000.safetensors",
    ]
    assert (path / "config.toml").read_bytes() == b"name = 'small'\n"
    stored = load_file(path / "rank_00000.safetensors")
    assert torch.equal(stored["model/a@0"], numbered((64, 3), 20))
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["step"], manifest["tokens"], manifest["meta"]) == (20, 2000, {"run": {"name": "small"}})
    checked = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=path, capture_output=True, text=True, check=True
    )
    assert checked.stdout.count(": OK") == 3


def test_reader_gives_any_rectangle_and_the_extras(tmp_path: Path) -> None:
    reader = CheckpointReader(save_small(tmp_path, 20))
    assert (reader.step, reader.tokens, reader.meta["run"]["name"]) == (20, 2000, "small")
    assert reader.names() == ["model/a", "optim/exp_avg/a"]
    assert (reader.shape("model/a"), reader.dtype("model/a")) == ((64, 3), torch.float32)
    assert torch.equal(reader.read("model/a", (5, 1), (7, 2)), numbered((64, 3), 20)[5:12, 1:3])
    assert torch.equal(reader.read("model/a", (60, 0)), numbered((64, 3), 20)[60:])
    assert reader.rank_state(0)["rng"].tolist() == [0, 1, 2, 3, 4]
    assert reader.rank_state(7) == {}
    assert reader.verify() == []
    with pytest.raises(CheckpointError, match="holds no tensor 'model/b'"):
        reader.read("model/b")
    with pytest.raises(CheckpointError, match=r"model/a is \[64, 3\], cannot read \[1, 4\] at \[0, 0\]"):
        reader.read("model/a", (0, 0), (1, 4))


@settings(deadline=None, max_examples=25)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=3), min_size=1, max_size=4),
    writers=st.integers(1, 4),
    readers=st.integers(1, 4),
)
def test_flat_partitions_load_into_any_other_number(
    shapes: list[list[int]], writers: int, readers: int
) -> None:
    tensors = {f"model/{i}": numbered(shape, 1000.0 * i) for i, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as folder:

        def save(comm: Comm) -> Path:
            state = flat_state(tensors, rank=comm.rank, ranks=comm.size)
            extras = {"rank": torch.tensor(comm.rank)}
            return save_checkpoint(
                Path(folder), step=1, tokens=0, state=state, rank_state=extras, meta={}, files={}, comm=comm
            )

        paths = on_threads(writers, save)
        assert paths == [Path(folder) / "step_00000001"] * writers
        reader = CheckpointReader(paths[0])
        assert reader.verify() == []
        assert [int(reader.rank_state(r)["rank"]) for r in range(writers)] == list(range(writers))
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name), tensor)
        for rank in range(readers):
            target = flat_state(
                {n: torch.full_like(t, -1) for n, t in tensors.items()}, rank=rank, ranks=readers
            )
            load_into(reader, target)
            for name, wanted in flat_state(tensors, rank=rank, ranks=readers).items():
                for got, piece in zip(target[name].pieces, wanted.pieces, strict=True):
                    assert torch.equal(got.tensor, piece.tensor)


def test_ranks_of_a_process_group_save_together(tmp_path: Path) -> None:
    tensors = {"model/w": numbered((9, 7)), "optim/exp_avg/w": numbered((9, 7), 500)}

    def save() -> str:
        comm = ProcessGroupComm()
        state = flat_state(tensors, rank=comm.rank, ranks=comm.size)
        path = save_checkpoint(tmp_path, step=3, tokens=0, state=state, **NOTHING, comm=comm)
        problems = CheckpointReader(path).verify(comm=comm)
        return f"{path.name} {problems}"

    assert run_ranks(3, save) == ["step_00000003 []"] * 3
    reader = CheckpointReader(tmp_path / "step_00000003")
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_replicated_pieces_are_written_by_one_rank(tmp_path: Path) -> None:
    tensor = numbered((4, 4))

    def save(comm: Comm) -> Path:
        piece = Piece(tensor=tensor, offsets=(0, 0), write=comm.rank == 1)
        state = {"model/w": LogicalTensor(shape=(4, 4), dtype=tensor.dtype, pieces=(piece,))}
        return save_checkpoint(tmp_path, step=1, tokens=0, state=state, **NOTHING, comm=comm)

    reader = CheckpointReader(on_threads(2, save)[0])
    assert [chunk.file for chunk in reader.tensors["model/w"].chunks] == ["rank_00001.safetensors"]
    assert torch.equal(reader.read("model/w"), tensor)


def test_the_same_step_again_replaces_the_old_one(tmp_path: Path) -> None:
    save_small(tmp_path, 5)
    path = save_small(tmp_path, 5, scale=2.0)
    assert torch.equal(CheckpointReader(path).read("model/a"), numbered((64, 3), 5) * 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005"]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([((0, 0), (2, 4))], "model/w: only 8 of 16 elements"),
        ([((0, 0), (4, 4)), ((3, 3), (1, 1))], r"model/w: pieces at \[0, 0\] and \[3, 3\] overlap"),
    ],
)
def test_pieces_that_do_not_tile_are_refused(
    tmp_path: Path, pieces: list[tuple[tuple[int, ...], tuple[int, ...]]], message: str
) -> None:
    held = tuple(Piece(tensor=torch.zeros(shape), offsets=offsets) for offsets, shape in pieces)
    state = {"model/w": LogicalTensor(shape=(4, 4), dtype=torch.float32, pieces=held)}
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint(tmp_path, step=1, tokens=0, state=state, **NOTHING, comm=SingleComm())
    assert list(tmp_path.iterdir()) == []


def test_every_rank_raises_when_one_fails(tmp_path: Path) -> None:
    def save(comm: Comm) -> Path:
        tensor = torch.zeros(2, dtype=torch.float32 if comm.rank != 2 else torch.float16)
        piece = Piece(tensor=tensor, offsets=(2 * comm.rank,))
        state = {"model/w": LogicalTensor(shape=(6,), dtype=torch.float32, pieces=(piece,))}
        return save_checkpoint(tmp_path, step=1, tokens=0, state=state, **NOTHING, comm=comm)

    errors = on_threads(3, save)
    assert all(isinstance(error, CheckpointError) for error in errors)
    assert len({str(error) for error in errors}) == 1
    assert "rank 2: " in str(errors[0])
    assert "a piece is torch.float16" in str(errors[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("files", [{"../x": b""}, {"manifest.json": b""}, {"/x": b""}])
def test_extra_files_stay_inside(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(CheckpointError, match="must be a relative name inside the checkpoint"):
        save_checkpoint(
            tmp_path / "c", step=1, tokens=0, state={}, rank_state={}, meta={}, files=files, comm=SingleComm()
        )


def test_meta_that_is_not_json_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save_checkpoint(
            tmp_path / "c",
            step=1,
            tokens=0,
            state={},
            rank_state={},
            meta={"x": object()},
            files={},
            comm=SingleComm(),
        )
    assert list(tmp_path.iterdir()) == []


def test_loading_lists_everything_that_does_not_fit(tmp_path: Path) -> None:
    reader = CheckpointReader(save_small(tmp_path, 1))
    state = whole_state({"model/a": torch.zeros(64, 4), "model/b": torch.zeros(2)})
    with pytest.raises(CheckpointError) as caught:
        load_into(reader, state)
    text = str(caught.value)
    assert "missing: model/b [2]" in text
    assert "unexpected: optim/exp_avg/a [64, 3]" in text
    assert "shape of model/a: stored [64, 3], the model has [64, 4]" in text
    weights_only = whole_state({"model/a": torch.zeros(64, 3, dtype=torch.bfloat16)})
    load_into(reader, weights_only, prefix="model/")
    assert torch.equal(weights_only["model/a"].pieces[0].tensor, numbered((64, 3), 1).bfloat16())


def test_a_checkpoint_without_a_known_model_is_no_weight_source(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not usable: model must be a table, got None"):
        open_weights(save_small(tmp_path, 1))
    path = save_checkpoint(
        tmp_path,
        step=2,
        tokens=0,
        state=whole_state({"model/a": torch.zeros(2)}),
        rank_state={},
        meta={"run": {"model": {"hidden_size": 8, "ffn_hidden_size": 8, "num_layers": 1, "heads": 2}}},
        files={},
        comm=SingleComm(),
    )
    with pytest.raises(
        CheckpointError, match=r"(?s)step_00000002.*unknown key model\.heads.*num_heads is missing"
    ):
        open_weights(path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_weights(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a checkpoint, nor a run folder"):
        open_weights(tmp_path / "empty")


def test_a_rank_sends_only_the_tensors_it_wrote(tmp_path: Path) -> None:
    """Names that other ranks wrote would cost ranks x tensors of memory on rank 0."""
    sent: list[list[str]] = []

    class Recorder(SingleComm):
        rank, size = 1, 2

        def gather_object(self, obj: Any) -> list[Any]:
            sent.append([name for name, _ in obj.tensors])
            return [obj]

    (tmp_path / "step_00000001.tmp").mkdir()
    mine = whole_state({"model/mine": torch.ones(3)})
    theirs = {"model/theirs": LogicalTensor(shape=(4,), dtype=torch.float32, pieces=())}
    save_checkpoint(
        tmp_path, step=1, tokens=0, state=mine | theirs, rank_state={}, meta={}, files={}, comm=Recorder()
    )
    assert sent == [[], ["model/mine"], []]


def test_a_tensor_that_no_rank_wrote_is_an_error(tmp_path: Path) -> None:
    state = {"model/nobody": LogicalTensor(shape=(4,), dtype=torch.float32, pieces=())}

    def save(comm: Comm) -> Path:
        return save_checkpoint(
            tmp_path, step=1, tokens=0, state=state, rank_state={}, meta={}, files={}, comm=comm
        )

    assert all("model/nobody: only 0 of 4" in str(error) for error in on_threads(2, save))
