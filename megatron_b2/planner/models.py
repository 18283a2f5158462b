"""Shapes of public models, by name, by parameters or by the columns of a row (published/models.csv)."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Final

from megatron_b2.planner.rows import Row, needed, whole
from megatron_b2.planner.workload import ModelShape

MODELS: Final = "published/models.csv"
SIZE_TOLERANCE: Final = 0.02
"""Between a row's parameters and those of the model that is meant."""
LLAMA: Final = re.compile(r"llama[\s_-]*(?:v?([1-3])(?:\.\d)?[\s_-]+)?(\d+b)", re.IGNORECASE)
"""Generation, which may be missing, and size: Llama-2-7B, Llama3.1-405B, LLaMA-13B."""
SWIGLU_MULTIPLE: Final = 256
"""Of which 8/3 h of an unknown SwiGLU model is rounded up to a multiple (arXiv 2302.13971)."""


def known_model(name: str, parameters: float | None = None) -> ModelShape | None:
    """A public model by its name, or by its name and parameters; None if it is not known."""
    family = llama_named(name)
    if family:
        return _nearest(family, parameters) if parameters else family[0]
    if LLAMA.search(name):
        return None
    key = re.sub(r"[^a-z0-9.]", "", name.lower())
    exact = {known.replace("-", ""): shape for known, shape in known_models().items()}
    found = exact.get(key) or exact.get(f"mpt{key}")
    if found is not None or parameters is None:
        return found
    nearest = _nearest(list(known_models().values()), parameters)
    return nearest if abs(nearest.parameters / parameters - 1) <= SIZE_TOLERANCE else None


def llama_named(name: str) -> list[ModelShape]:
    """The Llamas that a name can mean, oldest first: one with a generation, all of the size without."""
    found = LLAMA.search(name)
    if found is None:
        return []
    generation, size = found[1], found[2].lower()
    families = ("llama", "llama-2", "llama-3")
    wanted = families if generation is None else (families[int(generation) - 1],)
    models = known_models()
    return [models[f"{family}-{size}"] for family in wanted if f"{family}-{size}" in models]


def llama_shape(row: Row, assumed: list[str]) -> ModelShape:
    """The Llama that a row means: by its name, else by its columns; its vocabulary is the row's. Where no
    Llama has these columns, a SwiGLU model of them."""
    hidden, layers, heads = needed(row, "hidden"), needed(row, "layers"), whole(row, "heads")
    vocabulary, model = whole(row, "vocab"), row.get("model", "")
    named = llama_named(model) or llama_named(f"{row.get('source', '')} {model}")
    known = [(name, shape) for name, shape in known_models().items() if name.startswith("llama")]
    fitting = [
        (name, shape)
        for name, shape in known
        if (shape.hidden_size, shape.num_layers) == (hidden, layers) and heads in (None, shape.num_heads)
    ]
    chosen = [item for item in fitting if item[1] in named] or fitting
    same = [item for item in chosen if vocabulary in (None, item[1].vocab_size)]
    if same or chosen:
        name, shape = (same or chosen)[0]
        if not (named and shape in named):
            assumed.append(f"shape of {name}")
        return shape if vocabulary is None else replace(shape, vocab_size=vocabulary)
    ffn = whole(row, "ffn")
    if ffn is None:
        ffn = -(-8 * hidden // (3 * SWIGLU_MULTIPLE)) * SWIGLU_MULTIPLE
        assumed.append(f"SwiGLU of width {ffn}")
    return ModelShape(
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_layers=layers,
        num_heads=heads or max(1, hidden // 128),
        vocab_size=vocabulary or 32_000,
        gated=True,
        tied=False,
    )


def _nearest(shapes: Sequence[ModelShape], parameters: float) -> ModelShape:
    return min(shapes, key=lambda shape: abs(shape.parameters - parameters))


@cache
def known_models() -> Mapping[str, ModelShape]:
    """Every model of published/models.csv, by its name."""
    text = resources.files(__package__).joinpath(MODELS).read_text(encoding="utf-8")
    return {
        row["name"]: ModelShape(
            hidden_size=int(row["hidden"]),
            ffn_hidden_size=int(row["ffn"]),
            num_layers=int(row["layers"]),
            num_heads=int(row["heads"]),
            kv_heads=int(row["kv_heads"]),
            vocab_size=int(row["vocab"]),
            gated=row["gated"] == "1",
            tied=row["tied"] == "1",
        )
        for row in csv.DictReader(text.splitlines())
    }
