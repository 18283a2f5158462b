"""Parameter names: ours and those of the two Hugging Face layouts. Pure tables.

Every Hugging Face tensor is a range of rows of exactly one of ours, so import and export only copy rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_b2.config.schema import ModelConfig

Style = Literal["baichuan", "llama"]
"""baichuan: W_pack fused, raw NormHead rows. llama: q, k, v split, head rows normalised ("baked")."""

HEAD = "head.weight"
"""Our NormHead matrix."""
HF_HEAD = "lm_head.weight"
"""Its Hugging Face name."""


@dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor and the rows of our tensor that it is."""

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    """Its shape."""
    ours: str
    """Our logical tensor."""
    row: int = 0
    """First row in ours."""


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our parameter names and full shapes, in model order."""
    h, f, vocab = config.hidden_size, config.ffn_hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab, h)}
    for i in range(config.num_layers):
        shapes |= {
            f"layers.{i}.input_norm.weight": (h,),
            f"layers.{i}.attention.qkv.weight": (3 * h, h),
            f"layers.{i}.attention.output.weight": (h, h),
            f"layers.{i}.post_attention_norm.weight": (h,),
            f"layers.{i}.mlp.gate_up.weight": (2 * f, h),
            f"layers.{i}.mlp.down.weight": (h, f),
        }
    return shapes | {"final_norm.weight": (h,), HEAD: (vocab, h)}


def hf_tensors(config: ModelConfig, *, style: Style) -> tuple[HFTensor, ...]:
    """Every tensor of the Hugging Face layout, in model order (baichuan: 7 L + 3 of them, llama: 9 L + 3)."""
    h, f, vocab = config.hidden_size, config.ffn_hidden_size, config.vocab_size
    table = [HFTensor("model.embed_tokens.weight", (vocab, h), "embedding.weight")]
    for i in range(config.num_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        qkv = f"{ours}.attention.qkv.weight"
        if style == "baichuan":
            table.append(HFTensor(f"{theirs}.self_attn.W_pack.weight", (3 * h, h), qkv))
        else:
            table += [
                HFTensor(f"{theirs}.self_attn.{part}_proj.weight", (h, h), qkv, row=k * h)
                for k, part in enumerate("qkv")
            ]
        table += [
            HFTensor(f"{theirs}.self_attn.o_proj.weight", (h, h), f"{ours}.attention.output.weight"),
            HFTensor(f"{theirs}.mlp.gate_proj.weight", (f, h), f"{ours}.mlp.gate_up.weight"),
            HFTensor(f"{theirs}.mlp.up_proj.weight", (f, h), f"{ours}.mlp.gate_up.weight", row=f),
            HFTensor(f"{theirs}.mlp.down_proj.weight", (h, f), f"{ours}.mlp.down.weight"),
            HFTensor(f"{theirs}.input_layernorm.weight", (h,), f"{ours}.input_norm.weight"),
            HFTensor(f"{theirs}.post_attention_layernorm.weight", (h,), f"{ours}.post_attention_norm.weight"),
        ]
    table += [HFTensor("model.norm.weight", (h,), "final_norm.weight"), HFTensor(HF_HEAD, (vocab, h), HEAD)]
    return tuple(table)


def is_known_buffer(name: str) -> bool:
    """Whether a stored name is a constant that published files carry and no model needs."""
    return name.endswith("rotary_emb.inv_freq")


def rows_by_parameter(table: tuple[HFTensor, ...]) -> Mapping[str, tuple[HFTensor, ...]]:
    """Our names to the Hugging Face tensors that make them up, top rows first."""
    grouped: dict[str, list[HFTensor]] = {}
    for tensor in table:
        grouped.setdefault(tensor.ours, []).append(tensor)
    return {name: tuple(sorted(parts, key=lambda part: part.row)) for name, parts in grouped.items()}
