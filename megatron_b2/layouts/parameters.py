"""Parameters of a rank, from the model's shape and the shard table alone (no tensor is made)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_b2.config.deepspeed_keys import zero_settings
from megatron_b2.config.schema import ModelConfig, RunConfig
from megatron_b2.model.sharding import Shape, shard_spec
from megatron_b2.model.split import StageLayers


@dataclass(frozen=True)
class LocalParameter:
    """A parameter as a tensor-parallel rank holds it."""

    name: str
    """Name in the whole model."""
    shape: Shape
    """Of the rank's part."""

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def layer(self) -> int | None:
        """Global index of its block; none outside the blocks."""
        _, is_block, rest = self.name.partition("layers.")
        return int(rest.split(".")[0]) if is_block else None


@lru_cache(maxsize=64)
def part_parameters(model: ModelConfig, part: StageLayers, *, tensor: int) -> tuple[LocalParameter, ...]:
    """The parameters of one rank, in the order of the model (DeepSpeed walks them in it)."""
    h, f, v = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    block: tuple[tuple[str, Shape], ...] = (
        ("input_norm.weight", (h,)),
        ("attention.qkv.weight", (3 * h, h)),
        ("attention.output.weight", (h, h)),
        ("post_attention_norm.weight", (h,)),
        ("mlp.gate_up.weight", (2 * f, h)),
        ("mlp.down.weight", (h, f)),
    )
    whole: list[tuple[str, Shape]] = []
    whole += [("embedding.weight", (v, h))] if part.has_embedding else []
    whole += [(f"layers.{index}.{name}", shape) for index in part.layers for name, shape in block]
    whole += [("final_norm.weight", (h,)), ("head.weight", (v, h))] if part.has_head else []
    return tuple(
        LocalParameter(name, shard_spec(name).local_shape(shape, size=tensor)) for name, shape in whole
    )


def kept_whole(
    parameters: Sequence[LocalParameter], *, each: int, together: int
) -> tuple[LocalParameter, ...]:
    """What ZeRO-3 does not partition: parameters of at most `each` elements, in order, up to `together`.

    The same walk as DeepSpeed 0.19.8 `mark_persistent_parameters`.
    """
    kept: list[LocalParameter] = []
    total = 0
    for parameter in parameters:
        if parameter.size <= each and total + parameter.size <= together:
            kept.append(parameter)
            total += parameter.size
    return tuple(kept)


def zero_3_whole(config: RunConfig, parameters: Sequence[LocalParameter]) -> tuple[LocalParameter, ...]:
    """What ZeRO-3 does not partition of a rank's parameters in this run."""
    settings = zero_settings(config)
    each, together = (int(settings[f"stage3_{name}_persistence_threshold"]) for name in ("param", "model"))
    return kept_whole(parameters, each=each, together=together)
