"""The Python API against the published outputs and transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

import megatron_b2
from megatron_b2.checkpoint.hf import export_hf, import_hf
from megatron_b2.checkpoint.weights import open_weights
from megatron_b2.errors import CheckpointError, InputError
from tests.checkpoint.support import flip
from tests.golden_model import STYLES, load_golden


def published_folder(style: str, folder: Path) -> Path:
    """A Hugging Face folder as the published 7B and 13B have it."""
    golden = load_golden(style)
    folder.mkdir()
    weights = {key[2:]: value for key, value in golden.tensors.items() if key.startswith("w.")}
    save_file(weights, folder / "model.safetensors")
    config = golden.config
    raw = {
        "model_type": "baichuan",
        "architectures": ["BaichuanForCausalLM"],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **({"max_position_embeddings": 128} if style == "7b" else {"model_max_length": 128}),
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("style", STYLES)
def test_loss_logits_and_gradients_equal_the_published_ones(style: str, tmp_path: Path) -> None:
    golden = load_golden(style)
    model = megatron_b2.load(published_folder(style, tmp_path / "hf"), dtype="float32")
    ids = golden.tensors["input_ids"]
    torch.testing.assert_close(model.logits(ids), golden.tensors["eval_logits"], atol=2e-5, rtol=0)
    loss = model.loss(ids, ids, max_z_weight=2e-4)
    loss.total.backward()
    torch.testing.assert_close(loss.total, golden.tensors["loss"][0], atol=2e-5, rtol=0)
    torch.testing.assert_close(loss.ce, golden.tensors["ce"][0], atol=2e-5, rtol=0)
    torch.testing.assert_close(2e-4 * loss.max_z, golden.tensors["zloss"][0], atol=2e-5, rtol=0)
    gradients = model.hf_gradients()
    assert set(gradients) == {key[2:] for key in golden.tensors if key.startswith("g.")}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, golden.tensors[f"g.{name}"], atol=2e-5, rtol=0)


def test_llama_export_gives_transformers_our_logits_and_greedy_text(tmp_path: Path) -> None:
    golden = load_golden("7b")
    folder = published_folder("7b", tmp_path / "hf")
    export_hf(open_weights(folder), tmp_path / "llama", style="llama")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    ours = megatron_b2.load(folder)
    ids = golden.tensors["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            megatron_b2.load(tmp_path / "llama").logits(ids), ours.logits(ids), atol=1e-5, rtol=0
        )
    prompt = ids[0, :5]
    expected = theirs.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None)[0, 5:]
    assert ours.generate(prompt, max_new_tokens=20) == expected.tolist()


def test_ignored_labels_leave_the_cross_entropy_but_not_max_z(tmp_path: Path) -> None:
    model = megatron_b2.load(published_folder("7b", tmp_path / "hf"))
    ids = load_golden("7b").tensors["input_ids"]
    labels = ids.clone()
    labels[:, 5:] = -100
    masked, whole = model.loss(ids, labels), model.loss(ids, ids)
    torch.testing.assert_close(masked.max_z, whole.max_z)
    expected = torch.nn.functional.cross_entropy(
        model.logits(ids)[:, :4].flatten(0, 1), ids[:, 1:5].flatten()
    )
    torch.testing.assert_close(masked.ce, expected)


@pytest.mark.parametrize("style", STYLES)
def test_packed_segments_equal_separate_documents(style: str, tmp_path: Path) -> None:
    model = megatron_b2.load(published_folder(style, tmp_path / "hf"))
    ids = load_golden(style).tensors["input_ids"][:1]
    segments = torch.tensor([[0] * 10 + [1] * 14])
    apart = torch.cat([model.logits(ids[:, :10]), model.logits(ids[:, 10:])], dim=1)
    torch.testing.assert_close(model.logits(ids, segments), apart, atol=2e-5, rtol=0)


def test_sampling_is_repeatable_and_stops(tmp_path: Path) -> None:
    model = megatron_b2.load(published_folder("13b", tmp_path / "hf"))
    first = model.generate([1, 2, 3], max_new_tokens=12, temperature=1.0, seed=5)
    assert first == model.generate([1, 2, 3], max_new_tokens=12, temperature=1.0, seed=5)
    assert len(first) == 12
    cut = model.generate([1, 2, 3], max_new_tokens=12, temperature=1.0, seed=5, stop_ids=[first[3]])
    assert cut == first[: first.index(first[3]) + 1]


def test_bad_input_is_named(tmp_path: Path) -> None:
    model = megatron_b2.load(published_folder("7b", tmp_path / "hf"))
    with pytest.raises(InputError, match=r"\[0, 512\), found 600"):
        model.logits([600])
    with pytest.raises(InputError, match=r"labels of shape \[1, 2\].*shape of input_ids, \[1, 3\]"):
        model.loss([1, 2, 3], [1, 2])
    with pytest.raises(InputError, match=r"segment_ids of shape \[1, 2\]"):
        model.logits([1, 2, 3], torch.tensor([0, 0]))
    with pytest.raises(InputError, match="row 0 goes from 1 to 0 at position 2"):
        model.loss([1, 2, 3], [1, 2, 3], segment_ids=torch.tensor([0, 1, 0]))
    with pytest.raises(InputError, match="at least 2 tokens"):
        model.loss([1], [1])
    with pytest.raises(InputError, match=r"call \.total\.backward"):
        model.hf_gradients()


def test_damage_is_found_before_it_is_loaded(tmp_path: Path) -> None:
    import_hf(open_weights(published_folder("7b", tmp_path / "hf")), tmp_path / "ours")
    flip(tmp_path / "ours" / "step_00000000" / "weights_00000.safetensors", -5)
    with pytest.raises(CheckpointError, match=r"weights_00000\.safetensors: damaged, its SHA-256"):
        megatron_b2.load(tmp_path / "ours")
    assert megatron_b2.load(tmp_path / "ours", verify=False).config.num_layers == 2
