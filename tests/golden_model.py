"""The golden files: outputs of the published Baichuan 2 modelling code on seeded tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_b2.config.schema import ModelConfig

FOLDER = Path(__file__).parent / "golden"
STYLES = ("7b", "13b")


@dataclass(frozen=True)
class Golden:
    """One tiny published model with its outputs."""

    config: ModelConfig
    tensors: dict[str, Tensor]

    def named(self, prefix: str) -> Callable[[str], Tensor]:
        """Read tensors under our parameter names; prefix "w" for weights, "g" for gradients."""

        def read(name: str) -> Tensor:
            parts = [self.tensors[f"{prefix}.{hf}"] for hf in hf_names(name)]
            return torch.cat(parts)

        return read


def hf_names(name: str) -> list[str]:
    """Published names behind one of ours, spelled out here independently of the package's own table."""
    outer = {
        "embedding.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    }
    if name in outer:
        return [outer[name]]
    _, layer, rest = name.split(".", 2)
    inner = {
        "input_norm.weight": ["input_layernorm"],
        "post_attention_norm.weight": ["post_attention_layernorm"],
        "attention.qkv.weight": ["self_attn.W_pack"],
        "attention.output.weight": ["self_attn.o_proj"],
        "mlp.gate_up.weight": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.down.weight": ["mlp.down_proj"],
    }
    return [f"model.layers.{layer}.{module}.weight" for module in inner[rest]]


def load_golden(style: str) -> Golden:
    """style is "7b" (RoPE) or "13b" (ALiBi)."""
    with safe_open(FOLDER / f"b2_tiny_{style}.safetensors", "pt") as file:
        raw = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    config = ModelConfig(
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        vocab_size=raw["vocab_size"],
        position="rope" if style == "7b" else "alibi",
    )
    return Golden(config, tensors)
