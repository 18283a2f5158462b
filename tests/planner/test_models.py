"""Public models by the many ways in which tables name them. Parameters are those of the published weights."""

from __future__ import annotations

import pytest

from megatron_b2.planner.models import known_model, llama_shape

PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-34b": 33_743_970_304,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
}
"""Of the weights that Meta published; 34B is Code Llama's."""


@pytest.mark.parametrize(
    ("name", "model"),
    [
        *[(name, name) for name in PUBLISHED],
        *[("LLaMA-13B", "llama-13b"), ("LLaMA 65B", "llama-65b"), ("llama7b", "llama-7b")],
        *[("Llama-2-70b-hf", "llama-2-70b"), ("Llama2-70B", None), ("Llama v2 70B", "llama-2-70b")],
        *[("Llama 3 70B", "llama-3-70b"), ("Llama3.1-405B", "llama-3-405b"), ("Llama-8B", "llama-3-8b")],
        *[("Meta-Llama-3-8B", "llama-3-8b"), ("Llama-70B", "llama-2-70b")],
        *[("Llama 3 13B", ""), ("llama-400b", "")],
    ],
)
def test_names_of_llamas(name: str, model: str | None) -> None:
    shape = known_model(name)
    wanted = "llama-2-70b" if model is None else model
    assert (shape.parameters if shape else 0) == PUBLISHED.get(wanted, 0)


def test_parameters_decide_where_a_name_means_two() -> None:
    shape = known_model("Llama-70B", 70.6e9)
    assert shape is not None
    assert shape.parameters == PUBLISHED["llama-3-70b"]


def row(**cells: str) -> dict[str, str]:
    return {"source": "x", "model": "Llama", "hidden": "8192", "layers": "80", "heads": "64"} | cells


def test_vocabulary_decides_where_columns_mean_three() -> None:
    """8,192 x 80 with 64 heads is Llama 1 65B, Llama 2 70B or Llama 3 70B."""
    assumed: list[str] = []
    assert llama_shape(row(vocab="128256"), assumed).parameters == PUBLISHED["llama-3-70b"]
    assert assumed == ["shape of llama-3-70b"]
    named = llama_shape(row(model="LLaMA-65B", vocab="32000"), assumed)
    assert named.parameters == PUBLISHED["llama-65b"]
    assert llama_shape(row(source="LLaMA", model="65B"), assumed) == named
    assert len(assumed) == 1  # a name is no assumption


def test_a_vocabulary_of_ones_own_is_kept() -> None:
    shape = llama_shape(row(model="llama-7b", hidden="4096", layers="32", heads="32", vocab="50000"), [])
    assert (shape.vocab_size, shape.ffn_hidden_size) == (50_000, 11_008)


def test_columns_of_no_known_llama() -> None:
    """A SwiGLU model of the columns: 8/3 h rounded up to a multiple of 256, as LLaMA did."""
    assumed: list[str] = []
    shape = llama_shape(row(model="Llama-2-7B", hidden="6144", layers="40", heads="48"), assumed)
    assert (shape.hidden_size, shape.num_layers, shape.num_heads) == (6144, 40, 48)
    assert (shape.gated, shape.tied, shape.ffn_hidden_size) == (True, False, 16_384)
    assert assumed == ["SwiGLU of width 16384"]
    assert llama_shape(row(hidden="6144", layers="40", ffn="20000"), []).ffn_hidden_size == 20_000
    for name, hidden in (("llama-7b", 4096), ("llama-13b", 5120), ("llama-33b", 6656), ("llama-65b", 8192)):
        known = known_model(name)
        assert known is not None
        own = llama_shape(row(model="Llama", hidden=str(hidden), layers="7", heads="32"), [])
        assert own.ffn_hidden_size == known.ffn_hidden_size


OTHERS = {
    "gpt2-124m": 124_439_808 - 1024 * 768,
    "gpt2-xl": 1_557_611_200 - 1024 * 1600,
    "gpt-neox-20b": 20_554_567_680,
    "bloom-176b": 176_247_271_424,
    "falcon-180b": 179_522_565_120,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-7b": 7_615_616_512,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-30b": 32_528_943_616,
}
"""Of the published weights, without learned positions."""


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_of_other_models(name: str) -> None:
    """But for a few vectors: biases that a family lacks or has."""
    shape = known_model(name)
    assert shape is not None
    assert shape.parameters == pytest.approx(OTHERS[name], rel=1e-4)


def test_other_models() -> None:
    small = known_model("7b", 6_658_859_008)
    assert small == known_model("MPT-7B")
    assert known_model("nemo-9b", 9e9) is None
    assert known_model("of our own", 13_896_668_160) == known_model("Baichuan2-13B")
