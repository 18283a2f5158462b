"""`embed`: a dense vector for each document, by a model given by path or by features trained here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.models.embedding import (
    Embedder,
    HashedEmbedder,
    HashedOptions,
    OnnxEmbedder,
    train_hashed,
)
from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.shuffle import evenly
from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import View, read_view
from megatron_b2.documents.texts import Texts
from megatron_b2.errors import ConfigError, InputError

BATCH = 2_048
"""Documents trained on at once."""


@dataclass(frozen=True)
class Embed:
    """Vectors for `cluster`; no document goes."""

    model: str = ""
    """Folder of a sentence-transformers model in ONNX form. None: hashed words and n-grams, weighted and
    reduced by a singular value decomposition that is trained on the corpus itself."""
    dimension: int = HashedOptions.dimension
    """Length of our own vectors; no more of it is used than half as many numbers as there are documents."""
    sample: int = 5_000
    """Documents that our own features are trained on."""

    def __post_init__(self) -> None:
        try:
            self.options().check()
        except InputError as error:
            raise ConfigError(f"embed.{error}") from None
        if self.sample < 1:
            raise ConfigError(f"embed.sample = {self.sample}: must be 1 or more")

    def options(self) -> HashedOptions:
        """Of our own features."""
        return HashedOptions(dimension=self.dimension)

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """A sample, features trained on it, vectors; or vectors alone."""
        if self.model:
            sha256 = OnnxEmbedder(self.model).sha256
            yield context.for_each_unit(_embed, _Trained(self, sha256))
            return
        total = max(1, sum(unit.documents for unit in context.units))
        samples = [
            context.unit_task(
                unit, _sample, _Sample(self, -(-self.sample * unit.documents // total)), output="{}.parquet"
            )
            for unit in context.units
        ]
        yield samples
        train = context.task("features", _train, self, [task.output for task in samples], "features.parquet")
        yield [train]
        yield [context.unit_task(unit, _embed, _Trained(self), also=[train.output]) for unit in context.units]


@dataclass(frozen=True)
class _Sample:
    settings: Embed
    documents: int


@dataclass(frozen=True)
class _Trained:
    settings: Embed
    sha256: str = ""
    """Of a model that is given."""


def _sample(task: Task, _: Limits) -> Result:
    given: _Sample = task.settings
    view = read_view(task.inputs)
    chosen = evenly(len(view), given.documents)
    return Result([pa.table({"text": view.text.take(pa.array(chosen))})])


def _train(task: Task, limits: Limits) -> Result:
    settings: Embed = task.settings
    text = pa.concat_tables([read_table(path) for path in task.inputs]).column("text")
    batches = (Texts.of_arrow(text.slice(start, BATCH)) for start in range(0, len(text), BATCH))
    limits.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=limits.scratch) as folder:
        path = Path(folder) / "features.safetensors"
        train_hashed(batches, path, settings.options())
        return Result([pa.table({"model": pa.array([path.read_bytes()], pa.large_binary())})])


def _embed(task: Task, limits: Limits) -> Result:
    given: _Trained = task.settings
    if given.settings.model:
        view, embedder = read_view(task.inputs), OnnxEmbedder(given.settings.model)
        return _vectors(view, embedder)
    view = read_view(task.inputs[:-1])
    limits.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=limits.scratch) as folder:
        path = Path(folder) / "features.safetensors"
        path.write_bytes(read_table(task.inputs[-1]).column("model")[0].as_py())
        return _vectors(view, HashedEmbedder(path, verify=False))


def _vectors(view: View, embedder: Embedder) -> Result:
    vectors = embedder.embed(view.texts, precision="float16")
    flat = pa.array(vectors.reshape(-1), pa.float16())
    column = pa.FixedSizeListArray.from_arrays(flat, embedder.dimension)
    keep = np.ones(len(view), bool)
    return Result([view.write("embed", keep=keep, reason=[""] * len(view), vector=column)])
