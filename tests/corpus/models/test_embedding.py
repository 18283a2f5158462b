"""Dense features: our own against numpy's SVD of the same matrix, ONNX against torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_b2._cpu import hashed_ngrams, sparse_times, transposed_times
from megatron_b2.corpus.models.embedding import HashedEmbedder, HashedOptions, OnnxEmbedder, train_hashed
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import InputError
from tests.corpus.models.languages import chinese_documents, english_documents

DOCUMENTS = [*english_documents()[:150], *chinese_documents(100)]


def dense_counts(texts: Texts, bits: int) -> np.ndarray:
    starts, columns, counts = hashed_ngrams(texts.data, texts.offsets, bits=bits)
    dense = np.zeros((len(texts), 1 << bits))
    for row in range(len(texts)):
        dense[row, columns[starts[row] : starts[row + 1]]] = counts[starts[row] : starts[row + 1]]
    return dense


def expected_features(words: list[str]) -> Counter[str]:
    pieces = [f"<{word}>"[i : i + 4] for word in words if len(word) > 3 for i in range(len(word) - 1)]
    pairs = [f"{a} {b}" for a, b in pairwise(words)]
    return Counter([*(f"<{word}>" for word in words), *pairs, *pieces])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The cats' CATS, the", ["the", "cats", "cats", "the"]),
        ("文本 abcde文", ["文", "本", "abcde", "文"]),
        ("", []),
    ],
)
def test_features_are_words_pairs_and_pieces(text: str, words: list[str]) -> None:
    """Which columns is the hash's affair; how many, and how often, is not."""
    texts = Texts.of([text])
    _, columns, counts = hashed_ngrams(texts.data, texts.offsets, bits=30)
    assert sorted(counts) == sorted(expected_features(words).values())
    assert list(columns) == sorted(set(columns))


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(0, 1_000))
def test_sparse_products(rows: int, columns: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.integers(-2, 3, (rows, columns)).astype(np.float32)
    starts = np.cumsum([0, *(matrix != 0).sum(axis=1)]).astype(np.int64)
    sparse = (starts, np.nonzero(matrix)[1].astype(np.int32), matrix[matrix != 0])
    right, left = (rng.integers(-3, 4, (n, width)).astype(np.float32) for n in (columns, rows))
    np.testing.assert_array_equal(sparse_times(*sparse, right), matrix @ right)
    np.testing.assert_array_equal(transposed_times(*sparse, left, num_columns=columns), matrix.T @ left)


def test_malformed_sparse_matrices_are_refused() -> None:
    one, values = np.ones((2, 1), np.float32), np.ones(1, np.float32)
    for starts, columns in (([0, 1], [2]), ([0, 1], [-1]), ([0, 2], [0]), ([1, 1], [0]), ([], [])):
        with pytest.raises(ValueError, match="no sparse matrix"):
            sparse_times(np.array(starts, np.int64), np.array(columns, np.int32), values, one)


def tf_idf(texts: Texts, bits: int) -> np.ndarray:
    """float64 [N, 2^bits], from the counts."""
    counts = dense_counts(texts, bits)
    documents = (counts > 0).sum(axis=0)
    kept = (documents >= 2) & (documents <= 0.5 * len(texts))
    idf = np.where(kept, np.log((1 + len(texts)) / (1 + documents)) + 1, 0)
    weighted = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    rows: np.ndarray = weighted / np.linalg.norm(weighted, axis=1, keepdims=True)
    return rows


def test_embedding_is_the_whitened_svd_of_the_tf_idf_matrix(tmp_path: Path) -> None:
    """Cosines against those of an exact SVD in float64; with as many random directions as documents, the randomised
    one is exact too."""
    chosen = DOCUMENTS[:16] + DOCUMENTS[-16:]
    halves = [Texts.of(chosen[:7]), Texts.of(chosen[7:])]
    embedder = train_hashed(halves, tmp_path / "m", HashedOptions(dimension=16, bits=12))
    weighted = tf_idf(Texts.of(chosen), 12)
    _, values, basis = np.linalg.svd(weighted, full_matrices=False)
    exact = weighted @ basis[:16].T / values[:16]
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    found = embedder.embed(Texts.of(chosen))
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found @ found.T, exact @ exact.T, atol=5e-3)


def test_randomised_svd_keeps_nearly_what_the_best_one_keeps(tmp_path: Path) -> None:
    texts = Texts.of(DOCUMENTS)
    embedder = train_hashed([texts], tmp_path / "m", HashedOptions(dimension=16, bits=12))
    directions = np.array(embedder._basis, np.float64)
    directions /= np.linalg.norm(directions, axis=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(16), atol=1e-4)
    weighted = tf_idf(texts, 12)
    best = (np.linalg.svd(weighted, compute_uv=False)[:16] ** 2).sum()
    assert ((weighted @ directions) ** 2).sum() > 0.99 * best


def test_embedding_twice_in_halves_and_after_loading(tmp_path: Path) -> None:
    texts = Texts.of(DOCUMENTS)
    for name in ("a", "b"):
        train_hashed([texts], tmp_path / name, HashedOptions(dimension=8, bits=10), facts={"n": 2})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    embedder = HashedEmbedder(tmp_path / "a")
    assert embedder.dimension == 8
    assert embedder.facts["n"] == 2
    whole = embedder.embed(texts)
    halves = [embedder.embed(Texts.of(DOCUMENTS[:99])), embedder.embed(Texts.of(DOCUMENTS[99:]))]
    np.testing.assert_array_equal(whole, np.concatenate(halves))
    assert not embedder.embed(Texts.of(["", "?!"])).any()
    half = embedder.embed(texts, precision="float16")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, whole, atol=1e-3)
    assert embedder.embed(Texts.of([])).shape == (0, 8)
    english, chinese = whole[:150], whole[150:]
    assert (english @ english.T).mean() > 3 * abs((english @ chinese.T).mean())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (HashedOptions(dimension=0), "dimension = 0"),
        (HashedOptions(bits=40), "bits = 40"),
        (HashedOptions(min_documents=0), "min_documents = 0"),
        (HashedOptions(max_documents=0), "max_documents = 0"),
    ],
)
def test_errors_of_training(tmp_path: Path, options: HashedOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_hashed([Texts.of(DOCUMENTS[:3])], tmp_path / "m", options)


@pytest.mark.parametrize("documents", [0, 1, 2, 3, 9, 40])
def test_a_small_sample_gives_as_many_directions_as_it_can(tmp_path: Path, documents: int) -> None:
    """Vectors keep their length; columns beyond half of the documents are 0, and nothing is blown up."""
    chosen = DOCUMENTS[:documents]
    embedder = train_hashed([Texts.of(chosen)] if chosen else [], tmp_path / "m", HashedOptions(bits=12))
    found = embedder.embed(Texts.of(DOCUMENTS[:50]))
    assert found.shape == (50, 128)
    assert not found[:, documents // 2 :].any()
    norms = np.linalg.norm(found, axis=1)
    np.testing.assert_allclose(norms[norms > 0], 1, atol=1e-5)
    assert (norms[:documents] > 0).mean() > 0.9 if documents > 3 else True
    assert HashedEmbedder(tmp_path / "m").dimension == 128


def test_copies_give_no_direction_of_their_own(tmp_path: Path) -> None:
    """40 documents of rank 4: directions of rounding errors, divided by their tiny values, would decide all."""
    texts = Texts.of([DOCUMENTS[i // 10] for i in range(40)])
    options = HashedOptions(bits=12, dimension=16, max_documents=1.0)
    found = train_hashed([texts], tmp_path / "m", options).embed(texts)
    assert not found[:, 4:].any()
    cosines = found @ found.T
    np.testing.assert_allclose(cosines[::10, ::10], np.eye(4), atol=0.05)
    np.testing.assert_allclose(cosines[:10, :10], 1, atol=1e-5)


VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "the": 2, "cat": 3, "sat": 4, "dog": 5}
DIMENSION = 6


def write_onnx(
    folder: Path, *, inputs: tuple[str, ...] = ("input_ids", "attention_mask"), pooled: bool = False
) -> np.ndarray:
    """A model whose hidden states are rows of a table (of which it also masks none), with a tokenizer."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    folder.mkdir(parents=True, exist_ok=True)
    table = np.random.default_rng(0).normal(size=(len(VOCABULARY), DIMENSION)).astype(np.float32)
    helper, types = onnx.helper, onnx.TensorProto
    nodes = [helper.make_node("Gather", ["table", inputs[0]], ["rows"])]
    nodes += (
        [helper.make_node("ReduceMean", ["rows", "axes"], ["last_hidden_state"], keepdims=0)]
        if pooled
        else []
    )
    output = "last_hidden_state" if pooled else "rows"
    shape = ["n", DIMENSION] if pooled else ["n", "t", DIMENSION]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, types.INT64, ["n", "t"]) for name in inputs],
        [helper.make_tensor_value_info(output, types.FLOAT, shape)],
        [onnx.numpy_helper.from_array(table, "table"), onnx.numpy_helper.from_array(np.array([1]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return table


def test_onnx_model_is_pooled_over_its_tokens(tmp_path: Path) -> None:
    table = torch.tensor(write_onnx(tmp_path))
    embedder = OnnxEmbedder(tmp_path, batch_size=2, max_tokens=4)
    texts = ["the cat sat", "dog", "", "the dog the cat sat sat", "zebra"]
    found = embedder.embed(Texts.of(texts))
    assert embedder.dimension == DIMENSION
    for text, row in zip(texts, found, strict=True):
        ids = [VOCABULARY.get(word, 1) for word in text.split()][:4]
        if not ids:
            assert not row.any()
            continue
        expected = torch.nn.functional.normalize(table[ids].mean(dim=0), dim=0)
        np.testing.assert_allclose(row, expected, atol=1e-6)
    assert embedder.embed(Texts.of(texts), precision="float16").dtype == np.float16
    assert math.isclose(float(np.linalg.norm(found[0])), 1, abs_tol=1e-6)


def test_onnx_folder_of_sentence_transformers_and_its_errors(tmp_path: Path) -> None:
    write_onnx(tmp_path / "m")
    (tmp_path / "m" / "onnx").mkdir()
    (tmp_path / "m" / "model.onnx").rename(tmp_path / "m" / "onnx" / "model.onnx")
    assert OnnxEmbedder(tmp_path / "m").dimension == DIMENSION
    with pytest.raises(InputError, match="has neither model"):
        OnnxEmbedder(tmp_path / "none")
    (tmp_path / "m" / "onnx" / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not an ONNX model"):
        OnnxEmbedder(tmp_path / "m")
    write_onnx(tmp_path / "odd", inputs=("pixels",))
    with pytest.raises(InputError, match=r"inputs \['pixels'\]"):
        OnnxEmbedder(tmp_path / "odd")
    write_onnx(tmp_path / "pooled", pooled=True)
    with pytest.raises(InputError, match="expected hidden states"):
        OnnxEmbedder(tmp_path / "pooled")
    write_onnx(tmp_path / "bad")
    (tmp_path / "bad" / "tokenizer.json").write_text(json.dumps({"x": 1}))
    with pytest.raises(InputError, match="not a tokenizer file"):
        OnnxEmbedder(tmp_path / "bad")
