"""Import and export against the golden weights, the safetensors library and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_b2.checkpoint import load_weights, open_weights, reading
from megatron_b2.checkpoint.hf import export_hf, import_hf
from megatron_b2.checkpoint.hf_shards import parse_size, shard, tensor_files
from megatron_b2.cli.convert import main
from megatron_b2.errors import CheckpointError, InputError
from megatron_b2.ops.norm_head import normalise_rows
from megatron_b2.tokenizer.training import TrainOptions, train_tokenizer
from megatron_b2.tokenizer.wrapper import load_tokenizer
from tests.checkpoint.support import flip, golden_weights, make_hf_folder, whole_state


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in tensor_files(folder):
        tensors |= load_file(folder / file)
    return tensors


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("size", ["7b", "13b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("torch_file", [False, True])
def test_round_trip_gives_every_bit_back(
    tmp_path: Path, size: str, dtype: torch.dtype, torch_file: bool
) -> None:
    folder = make_hf_folder(tmp_path / "hf", size, dtype=dtype, torch_file=torch_file)
    assert main(["hf-import", str(folder), str(tmp_path / "ours")]) == 0
    arguments = ["hf-export", str(tmp_path / "ours"), str(tmp_path / "back"), "--max-shard-size", "100KB"]
    assert main([*arguments, "--json", str(tmp_path / "summary.json")]) == 0
    weights = {name: tensor.to(dtype) for name, tensor in golden_weights(size)[0].items()}
    assert same_bits(stored(tmp_path / "back"), weights)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["position_embedding"] == ("ROPE" if size == "7b" else "ALIBI")
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    for file in set(index["weight_map"].values()):
        tensors = load_file(tmp_path / "back" / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 100_000
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["format"], summary["tensors"]) == ("baichuan", len(weights))


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_our_names_hold_the_right_rows(tmp_path: Path, size: str) -> None:
    weights, config = golden_weights(size)
    source = open_weights(make_hf_folder(tmp_path / "hf", size))
    assert source.config.position == ("rope" if size == "7b" else "alibi")
    assert (source.kind, source.max_positions, source.head_normalised) == ("baichuan", 128, False)
    block = "model.layers.1."
    assert torch.equal(
        source.read("layers.1.attention.qkv.weight"), weights[block + "self_attn.W_pack.weight"]
    )
    gate, up = (weights[f"{block}mlp.{x}_proj.weight"] for x in ("gate", "up"))
    assert torch.equal(source.read("layers.1.mlp.gate_up.weight"), torch.cat([gate, up]))
    f = config["intermediate_size"]
    assert torch.equal(
        source.read("layers.1.mlp.gate_up.weight", (f - 3, 2), (6, 5)),
        torch.cat([gate, up])[f - 3 : f + 3, 2:7],
    )
    state = whole_state({f"model/{n}": torch.zeros(source.shape(n)) for n in source.names()})
    state |= whole_state({"optim/exp_avg/x": torch.ones(2)})
    load_weights(source, state)
    assert torch.equal(state["model/head.weight"].pieces[0].tensor, weights["lm_head.weight"])
    assert state["optim/exp_avg/x"].pieces[0].tensor.tolist() == [1, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_export_loads_in_transformers(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(reading, "BLOCK_BYTES", 1000)  # the head in many blocks
    folder = make_hf_folder(tmp_path / "hf", "7b")
    config = json.loads((folder / "config.json").read_text()) | {"rope_theta": 50_000.0}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = [str(folder), str(tmp_path / "llama"), "--format", "llama", "--dtype", dtype]
    assert main(["hf-export", *arguments]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype="auto")
    assert type(model).__name__ == "LlamaForCausalLM"
    wanted = getattr(torch, dtype)
    assert model.dtype == wanted
    assert model.config.rope_parameters["rope_theta"] == 50_000.0
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 2)
    weights = golden_weights("7b")[0]
    mine = dict(model.named_parameters())
    assert len(mine) == 2 * 9 + 3
    head = torch.nn.functional.normalize(weights["lm_head.weight"].double(), dim=1)
    tolerance = 1e-7 if dtype == "float32" else 2e-3
    assert (mine["lm_head.weight"].double() - head).abs().max() < tolerance
    q, k, v = weights["model.layers.0.self_attn.W_pack.weight"].to(wanted).chunk(3)
    for part, name in ((q, "q"), (k, "k"), (v, "v")):
        assert torch.equal(mine[f"model.layers.0.self_attn.{name}_proj.weight"], part)
    assert torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_llama_round_trip_does_not_normalise_twice(tmp_path: Path, dtype: str) -> None:
    source = open_weights(make_hf_folder(tmp_path / "hf", "7b"))
    export_hf(source, tmp_path / "llama", style="llama", dtype=getattr(torch, dtype))
    opened = open_weights(tmp_path / "llama")
    assert (opened.kind, opened.head_normalised, opened.config) == ("llama", True, source.config)
    import_hf(opened, tmp_path / "ours")
    again = open_weights(tmp_path / "ours")
    assert again.path.name == "step_00000000"
    export_hf(again, tmp_path / "back", style="llama")
    assert same_bits(stored(tmp_path / "back"), stored(tmp_path / "llama"))
    back = {p.name: p.read_bytes() for p in (tmp_path / "back").iterdir() if p.suffix == ".json"}
    assert back == {p.name: p.read_bytes() for p in (tmp_path / "llama").iterdir() if p.suffix == ".json"}


def test_alibi_has_no_llama_form(tmp_path: Path) -> None:
    source = open_weights(make_hf_folder(tmp_path / "hf", "13b"))
    with pytest.raises(CheckpointError, match="has alibi positions, and the llama format knows only rope"):
        export_hf(source, tmp_path / "out", style="llama")
    assert not (tmp_path / "out").exists()


def test_a_llama_model_with_a_plain_head_is_refused(tmp_path: Path) -> None:
    export_hf(open_weights(make_hf_folder(tmp_path / "hf", "7b")), tmp_path / "llama", style="llama")
    tensors = load_file(tmp_path / "llama" / "model.safetensors")
    tensors["lm_head.weight"][300] *= 2
    save_file(tensors, str(tmp_path / "llama" / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"row 300 of lm_head.weight has length 2, not 1"):
        open_weights(tmp_path / "llama")


def test_float16_overflow_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "hf", "7b")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = 70_000.0
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model.norm.weight: 7e\+04 does not fit float16"):
        export_hf(open_weights(folder), tmp_path / "out", style="baichuan", dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    source = open_weights(make_hf_folder(tmp_path / "hf", "7b"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("mine")
    for write in (
        lambda: import_hf(source, tmp_path / "out"),
        lambda: export_hf(source, tmp_path / "out", style="llama"),
    ):
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            write()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["keep"]
    (tmp_path / "empty").mkdir()
    assert import_hf(source, tmp_path / "empty").tensors == 15
    with pytest.raises(CheckpointError, match="one of our checkpoints already"):
        import_hf(open_weights(tmp_path / "empty"), tmp_path / "other")


def test_memory_is_a_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No block of an export is larger than the limit, so no tensor is ever whole."""
    source = open_weights(make_hf_folder(tmp_path / "hf", "7b"))
    limit, largest = 4_000, 0
    whole = reading.TensorReader.read_blocks
    original = reading.TensorReader.read

    def read(self: Any, *arguments: Any) -> Tensor:
        nonlocal largest
        tensor = original(self, *arguments)
        largest = max(largest, tensor.nbytes)
        return tensor

    monkeypatch.setattr(reading.TensorReader, "read", read)
    monkeypatch.setattr(
        reading.TensorReader, "read_blocks", lambda *a, **k: whole(*a, limit_bytes=limit, **k)
    )
    export_hf(source, tmp_path / "out", style="llama")
    assert 0 < largest <= limit
    monkeypatch.undo()
    export_hf(source, tmp_path / "at once", style="llama")
    assert same_bits(stored(tmp_path / "out"), stored(tmp_path / "at once"))


def test_damage_is_found_before_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_hf(open_weights(make_hf_folder(tmp_path / "hf", "7b")), tmp_path / "ours")
    flip(tmp_path / "ours" / "step_00000000" / "weights_00000.safetensors", 5_000)
    with pytest.raises(CheckpointError, match=r"weights_00000\.safetensors: damaged, its SHA-256"):
        main(["hf-export", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()
    assert open_weights(tmp_path / "ours", verify=False).names()


def test_a_folder_with_our_temporary_name_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "keep").write_text("mine")
    export_hf(open_weights(make_hf_folder(tmp_path / "hf", "7b")), tmp_path / "out", style="llama")
    assert (tmp_path / "out.tmp" / "keep").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out", "out.tmp"]


def test_tokenizer_files_travel(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "hf", "7b")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "tokenizer_config.json").write_text("{}")
    import_hf(open_weights(folder), tmp_path / "ours")
    assert (tmp_path / "ours" / "step_00000000" / "tokenizer.model").read_bytes() == b"pieces"
    (tmp_path / "ours" / "step_00000000" / "tokenizer.json").write_text("fast")
    summary = export_hf(open_weights(tmp_path / "ours"), tmp_path / "back", style="baichuan")
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == "{}"
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "fast"
    assert summary.note == ""


def test_a_fast_tokenizer_is_made_from_the_model_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    text = [f"the cat sat on mat {i}, 你好 世界 under an old bridge near green water" for i in range(50)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text))
    train_tokenizer([tmp_path / "text.jsonl"], tmp_path / "tok", options=TrainOptions(vocab_size=525))
    folder = make_hf_folder(tmp_path / "hf", "7b")
    (folder / "tokenizer.model").write_bytes((tmp_path / "tok" / "tokenizer.model").read_bytes())
    summary = export_hf(open_weights(folder), tmp_path / "out", style="llama")
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} <= set(summary.files)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = load_tokenizer(tmp_path / "tok").encode("a cat, 你好")
    assert loaded.encode("a cat, 你好", add_special_tokens=False) == ids


def test_a_tokenizer_without_a_fast_form_is_copied_and_noted(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "hf", "7b")
    (folder / "tokenizer.model").write_bytes(b"not a model")
    summary = export_hf(open_weights(folder), tmp_path / "out", style="llama")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"not a model"
    assert "no fast tokenizer was made" in summary.note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"missing: model.norm.weight \[64\]"),
        (lambda t: t.update({"lm_head.bias": torch.zeros(2)}), r"unexpected: lm_head.bias \[2\]"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"stored \[3\], the model has \[64\]"),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    folder = make_hf_folder(tmp_path / "hf", "7b")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # published files carry it
    save_file(tensors, str(folder / "model.safetensors"))
    open_weights(folder)
    change(tensors)
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(CheckpointError, match=message):
        open_weights(folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = make_hf_folder(tmp_path / "hf", "7b")
    (folder / "model.safetensors").rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors, nor pytorch_model.bin"):
        open_weights(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-1.safetensors named by the index is missing"):
        open_weights(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="damaged index"):
        open_weights(folder)


def test_sizes_and_shards() -> None:
    assert [parse_size(t) for t in ("5GB", "1.5 MB", "2GiB", "77")] == [5 * 10**9, 1_500_000, 2**31, 77]
    for wrong in ("", "5 apples", "-1GB", "0"):
        with pytest.raises(InputError, match="size"):
            parse_size(wrong)
    assert shard([("a", 3), ("b", 9), ("c", 1), ("d", 2)], limit=4) == [["a"], ["b"], ["c", "d"]]
    rows = normalise_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.bfloat16))
    assert torch.equal(rows, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
