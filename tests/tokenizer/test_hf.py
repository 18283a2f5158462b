"""The Hugging Face export against transformers and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import example, given, settings

from megatron_b2.errors import TokenizerError
from megatron_b2.tokenizer import Tokenizer, load_tokenizer
from megatron_b2.tokenizer.hf import export_hf

from .conftest import WORDS, make_documents
from .test_wrapper import TEXTS, look_alike, published_look_alike


@pytest.fixture(scope="module", params=["trained", "published"])
def source(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    return tokenizer if request.param == "trained" else Tokenizer(published_look_alike())


@pytest.fixture(scope="module")
def exported(source: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    assert [path.name for path in export_hf(source, folder)] == [
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    return folder


@pytest.fixture(scope="module")
def auto(exported: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(str(exported))


@settings(max_examples=300)
@given(text=TEXTS)
@example(text="<s></s><unk><reserved_106>\u2581 \u2581\0\r\n\t ，")
def test_same_ids_on_any_text(
    source: Tokenizer, auto: transformers.PreTrainedTokenizerFast, text: str
) -> None:
    ids = source.encode(text)
    assert auto(text)["input_ids"] == ids
    assert auto.decode(ids) == text
    assert auto.decode([1, *ids, 2], skip_special_tokens=True) == text


def test_same_ids_without_transformers(source: Tokenizer, exported: Path) -> None:
    fast = tokenizers.Tokenizer.from_file(str(exported / "tokenizer.json"))
    assert fast.get_vocab_size() == source.vocab_size
    for language in WORDS:
        for text in [*make_documents(language, 20, seed=2), "<s>a</s>", "\u2581"]:
            assert fast.encode(text).ids == source.encode(text)
            assert fast.decode(source.encode(text)) == text


def test_special_tokens_and_chat(
    source: Tokenizer, auto: transformers.PreTrainedTokenizerFast, exported: Path
) -> None:
    assert (auto.unk_token_id, auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (0, 1, 2, 0)
    assert len(auto) == source.vocab_size
    assert load_tokenizer(exported).fingerprint == source.fingerprint
    messages = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "the"},
        {"role": "user", "content": "a"},
    ]
    ids = auto.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    expected = [195, *source.encode("你好"), 196, *source.encode("the"), 195, *source.encode("a"), 196]
    assert ids == expected


def test_other_model_kinds_are_refused_and_nothing_is_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    unigram = Tokenizer(look_alike(tokenizer.model_bytes, model_type=1))
    with pytest.raises(TokenizerError, match="only byte-fallback BPE"):
        export_hf(unigram, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
