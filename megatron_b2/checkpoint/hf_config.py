"""config.json of Hugging Face folders: read it into a ModelConfig, write it from one.

The class name does not tell a 7B-style (RoPE) from a 13B-style (ALiBi) model, so it is decided by an explicit
field `position_embedding`, which we write, and for published files by the facts that 7B's configuration
has `max_position_embeddings` and 13B's has only `model_max_length`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_b2.checkpoint.hf_names import Style
from megatron_b2.config.schema import ModelConfig
from megatron_b2.errors import CheckpointError

CONFIG = "config.json"
Position = Literal["rope", "alibi"]
BAICHUAN_1_VOCAB = 64_000
"""Vocabulary of Baichuan 1, whose head is plain: run through NormHead it would give other logits."""


@dataclass(frozen=True)
class HFConfig:
    """What config.json says."""

    model: ModelConfig
    style: Style
    max_positions: int | None
    """Longest context the file promises; None when it does not say."""


def read_hf_config(folder: Path, *, position: Position | None = None) -> HFConfig:
    """Parse `folder/config.json`; `position` overrides what it says about position encoding.

    Raises CheckpointError naming the key for anything that our model cannot represent.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or not JSON ({error})") from error
    if not isinstance(raw, dict) or raw.get("model_type") not in ("baichuan", "llama"):
        found = raw.get("model_type") if isinstance(raw, dict) else raw
        raise CheckpointError(f"{path}: model_type is {found!r}; baichuan and llama can be read")
    style: Style = "baichuan" if raw["model_type"] == "baichuan" else "llama"
    _require_representable(path, raw, style)
    decided = (position or _baichuan_position(path, raw)) if style == "baichuan" else "rope"
    model = ModelConfig(
        hidden_size=_positive_int(path, raw, "hidden_size"),
        ffn_hidden_size=_positive_int(path, raw, "intermediate_size"),
        num_layers=_positive_int(path, raw, "num_hidden_layers"),
        num_heads=_positive_int(path, raw, "num_attention_heads"),
        vocab_size=_positive_int(path, raw, "vocab_size"),
        position=decided,
        rope_base=_rope_base(path, raw),
        norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        init_std=float(raw.get("initializer_range", 0.02)),
    )
    if model.hidden_size % model.num_heads:
        raise CheckpointError(
            f"{path}: hidden_size {model.hidden_size} is no multiple of num_attention_heads {model.num_heads}"
        )
    longest = raw.get("max_position_embeddings", raw.get("model_max_length"))
    return HFConfig(model=model, style=style, max_positions=longest)


def hf_config(model: ModelConfig, *, style: Style, max_positions: int, dtype: str) -> dict[str, Any]:
    """The config.json of an export. `dtype` is a torch name such as "bfloat16".

    Published fields keep their names; ALiBi models have no `max_position_embeddings`, as the published 13B.
    """
    rope = model.position == "rope"
    config: dict[str, Any] = {
        "model_type": style,
        "architectures": ["BaichuanForCausalLM" if style == "baichuan" else "LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if rope:
        config |= {"max_position_embeddings": max_positions, "rope_theta": model.rope_base}
    if style == "baichuan":
        config |= {"model_max_length": max_positions, "position_embedding": "ROPE" if rope else "ALIBI"}
    else:
        config |= {"num_key_value_heads": model.num_heads, "attention_bias": False, "mlp_bias": False}
    return config


def _baichuan_position(path: Path, raw: Mapping[str, Any]) -> Position:
    fix = 'add "position_embedding": "ROPE" (7B style) or "ALIBI" (13B style) to it, or pass --position'
    stated = raw.get("position_embedding")
    if stated is not None:
        if str(stated).lower() == "rope":
            return "rope"
        if str(stated).lower() == "alibi":
            return "alibi"
        raise CheckpointError(f"{path}: position_embedding is {stated!r}; {fix}")
    if raw.get("vocab_size") == BAICHUAN_1_VOCAB:
        raise CheckpointError(
            f"{path}: a vocabulary of {BAICHUAN_1_VOCAB} and no position_embedding look like Baichuan 1, "
            f"whose head is not a NormHead; if this is a Baichuan 2 model, {fix}"
        )
    if "max_position_embeddings" in raw:
        return "rope"
    if "model_max_length" in raw:
        return "alibi"
    raise CheckpointError(f"{path}: does not tell RoPE from ALiBi; {fix}")


def _require_representable(path: Path, raw: Mapping[str, Any], style: Style) -> None:
    heads = raw.get("num_attention_heads")
    rope_scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    wrong = {
        "architectures": "BaiChuanForCausalLM" in (raw.get("architectures") or ()),  # Baichuan 1: plain head
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "hidden_act": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(raw.get("attention_bias", False)),
        "mlp_bias": bool(raw.get("mlp_bias", False)),
        "num_key_value_heads": style == "llama" and (raw.get("num_key_value_heads") or heads) != heads,
        "rope_scaling": rope_scaling.get("rope_type", rope_scaling.get("type", "default")) != "default",
        "quantization_config": raw.get("quantization_config") is not None,
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            value = rope_scaling if key == "rope_scaling" else raw.get(key)
            raise CheckpointError(f"{path}: {key} = {value!r} is not a Baichuan 2 model's and cannot be read")


def _rope_base(path: Path, raw: Mapping[str, Any]) -> float:
    nested = raw.get("rope_parameters") or {}
    value = raw.get("rope_theta", nested.get("rope_theta", 10_000.0))
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise CheckpointError(f"{path}: rope_theta = {value!r} is not a positive number")
    return float(value)


def _positive_int(path: Path, raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{path}: {key} is {value!r}; it must be a positive whole number")
    return value
