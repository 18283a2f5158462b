"""config.json: what tells RoPE from ALiBi, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_b2.checkpoint.hf_config import hf_config, read_hf_config
from megatron_b2.config.schema import ModelConfig
from megatron_b2.errors import CheckpointError

BASE: dict[str, Any] = {
    "model_type": "baichuan",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


def write(folder: Path, **fields: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(BASE | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "position", "longest"),
    [
        ({"max_position_embeddings": 128, "model_max_length": 128}, "rope", 128),  # as published 7B
        ({"model_max_length": 96}, "alibi", 96),  # as published 13B
        ({"model_max_length": 96, "position_embedding": "ROPE"}, "rope", 96),
        ({"max_position_embeddings": 128, "position_embedding": "alibi"}, "alibi", 128),
    ],
)
def test_position_encoding(tmp_path: Path, fields: dict[str, Any], position: str, longest: int) -> None:
    config = read_hf_config(write(tmp_path, **fields))
    assert (config.model.position, config.max_positions, config.style) == (position, longest, "baichuan")
    assert read_hf_config(tmp_path, position="alibi").model.position == "alibi"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, 'does not tell RoPE from ALiBi; add "position_embedding": "ROPE"'),
        ({"position_embedding": "learned"}, "position_embedding is 'learned'; add"),
        ({"vocab_size": 64_000, "model_max_length": 9}, "look like Baichuan 1"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; baichuan and llama"),
        ({"model_max_length": 9, "hidden_size": "64"}, "hidden_size is '64'"),
        ({"model_max_length": 9, "num_attention_heads": 5}, "64 is no multiple of num_attention_heads 5"),
        ({"model_max_length": 9, "tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"model_max_length": 9, "architectures": ["BaiChuanForCausalLM"]}, "architectures"),
        ({"model_type": "llama", "num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling = "),
        ({"model_type": "llama", "rope_theta": "x"}, "rope_theta = 'x'"),
        ({"model_max_length": 9, "quantization_config": {}}, "quantization_config"),
    ],
)
def test_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_hf_config(write(tmp_path, **fields))
    assert message in str(caught.value)
    assert "config.json" in str(caught.value)


def test_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing or not JSON"):
        read_hf_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="missing or not JSON"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_what_we_write_we_read(tmp_path: Path, position: str) -> None:
    model = ModelConfig(
        hidden_size=48,
        ffn_hidden_size=128,
        num_layers=3,
        num_heads=6,
        vocab_size=300,
        position=position,  # type: ignore[arg-type]
        rope_base=5e5 if position == "rope" else 1e4,
        norm_eps=1e-5,
        init_std=0.01,
    )
    written = hf_config(model, style="baichuan", max_positions=77, dtype="float32")
    assert ("max_position_embeddings" in written) == (position == "rope")
    (tmp_path / "config.json").write_text(json.dumps(written))
    read = read_hf_config(tmp_path)
    assert (read.model, read.max_positions) == (model, 77)
