"""`weights`: scores and clusters become sampling weights, and documents of equal weight a group.

The report says that scores steer sampling and gives no formula (section 2.1); this one is ours. The weight is
a product: of the document's language, of its quality tier (quantiles of the score within the language, by
bytes), of its topic cluster ((share of the cluster / mean share) ^ -cluster_power, so that large topics do
not drown small ones) and of trust. It is rounded to a power of the square root of 2, so that a group, which
is a source of the blend, holds documents of one language and one weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.stage import Context
from megatron_b2.corpus.pipeline.tasks import Limits, Result, Task
from megatron_b2.corpus.pipeline.view import View, languages_of, read_view
from megatron_b2.errors import ConfigError

BINS = 1_000
"""Of scores, which lie from 0 to 1."""
SCORE, CLUSTER, TRUSTED = "quality.score", "cluster.cluster", "safety.trusted"


@dataclass(frozen=True)
class Weights:
    """Sampling weights of the documents that are left."""

    tier_weights: tuple[float, ...] = (0.5, 1.0, 1.0, 2.0)
    """One for each quality tier, from the lowest scores to the highest; tiers have equal numbers of bytes."""
    languages: Mapping[str, float] = field(default_factory=dict)
    """Weight by language tag; 1 for those not named."""
    cluster_power: float = 0.25
    """0: topics as they are; 1: every topic as much as any other."""
    trusted_weight: float = 3.0
    """Of documents from the sources that the stage `safety` was told to trust."""
    limits: tuple[float, float] = (0.125, 8.0)
    """Smallest and largest weight."""

    def __post_init__(self) -> None:
        named = {
            "tier_weights": self.tier_weights,
            "languages": tuple(self.languages.values()),
            "trusted_weight": (self.trusted_weight,),
            "limits": self.limits,
        }
        problems = [
            f"weights.{name} has {value}: weights must be positive numbers"
            for name, values in named.items()
            for value in values
            if not (isinstance(value, int | float) and 0 < value < math.inf)
        ]
        if self.limits[0] > self.limits[1]:
            problems.append(f"weights.limits are {self.limits}: the first must not be above the second")
        if not self.tier_weights:
            problems.append("weights.tier_weights is empty: give one weight for each tier")
        if not 0 <= self.cluster_power <= 1:
            problems.append(f"weights.cluster_power is {self.cluster_power}: must be from 0 to 1")
        if problems:
            raise ConfigError(problems)

    def phases(self, context: Context) -> Iterator[Sequence[Task]]:
        """Bytes by score and by cluster; tiers and factors of clusters from all; weights."""
        counts = [context.unit_task(unit, _count, self, output="{}.parquet") for unit in context.units]
        yield counts
        inputs = [task.output for task in counts]
        whole = context.task("all", _combine, self, inputs, "all.parquet")
        yield [whole]
        yield [context.unit_task(unit, _weigh, self, also=[whole.output]) for unit in context.units]


@dataclass(frozen=True)
class _Documents:
    """What the weights depend on, for the N documents of a view."""

    languages: np.ndarray
    bins: np.ndarray
    """int64 [N], of the scores."""
    clusters: np.ndarray
    """int64 [N]; -1 without clusters."""
    trusted: np.ndarray

    @classmethod
    def of(cls, view: View) -> _Documents:
        names, count = view.attributes.column_names, len(view)
        score = _column(view, SCORE) if SCORE in names else np.zeros(count)
        bins = np.clip((score * BINS).astype(np.int64), 0, BINS - 1)
        clusters = _column(view, CLUSTER).astype(np.int64) if CLUSTER in names else np.full(count, -1)
        trusted = _column(view, TRUSTED).astype(bool) if TRUSTED in names else np.zeros(count, bool)
        return cls(np.array(languages_of(view), dtype=object), bins, clusters, trusted)


def _column(view: View, name: str) -> np.ndarray:
    return view.attributes.column(name).to_numpy()


def _view(paths: Sequence[object]) -> View:
    return read_view(paths, wanted=["language.tag", SCORE, CLUSTER, TRUSTED])  # type: ignore[arg-type]


def _count(task: Task, _: Limits) -> Result:
    view = _view(task.inputs)
    documents = _Documents.of(view)
    columns = {
        "language": documents.languages.tolist(),
        "bin": documents.bins,
        "cluster": documents.clusters,
        "bytes": np.diff(view.texts.offsets),
    }
    types = [("language", "string"), ("bin", "int64"), ("cluster", "int64"), ("bytes", "int64")]
    return Result([_sum(pa.table(columns, schema=pa.schema(types)))])


def _sum(table: pa.Table) -> pa.Table:
    keys = ["language", "bin", "cluster"]
    summed = table.group_by(keys).aggregate([("bytes", "sum")]).rename_columns([*keys, "bytes"])
    return summed.sort_by([(key, "ascending") for key in keys])


def _combine(task: Task, _: Limits) -> Result:
    """Rows (language, bin, tier) and (cluster, factor)."""
    settings: Weights = task.settings
    table = _sum(pa.concat_tables([read_table(path) for path in task.inputs]))
    size = table.column("bytes").to_numpy().astype(float)
    languages = np.array(table.column("language").to_pylist(), dtype=object)
    bins, clusters = table.column("bin").to_numpy(), table.column("cluster").to_numpy()
    rows: list[dict[str, object]] = []
    for language in sorted(set(languages)):
        here = languages == language
        weight = np.bincount(bins[here], weights=size[here], minlength=BINS)
        # A bin belongs to the tier in which the middle of its bytes lies.
        middle = (np.cumsum(weight) - weight / 2) / max(weight.sum(), 1)
        tiers = np.minimum((middle * len(settings.tier_weights)).astype(int), len(settings.tier_weights) - 1)
        used = np.flatnonzero(weight)
        rows += [{"language": language, "bin": int(b), "tier": int(tiers[b])} for b in used]
    number, index = np.unique(clusters, return_inverse=True)
    share = np.bincount(index, weights=size)
    factor = (np.maximum(share, 1) / max(share.mean(), 1)) ** -settings.cluster_power if len(share) else share
    rows += [{"cluster": int(c), "factor": float(f)} for c, f in zip(number, factor, strict=True)]
    numbers = [(name, pa.int64()) for name in ("bin", "tier", "cluster")]
    schema = pa.schema([("language", pa.string()), *numbers, ("factor", pa.float64())])
    return Result([pa.Table.from_pylist(rows, schema=schema)])


def _weigh(task: Task, _: Limits) -> Result:
    settings: Weights = task.settings
    tiers: dict[tuple[str, int], int] = {}
    factors: dict[int, float] = {}
    for row in read_table(task.inputs[-1]).to_pylist():
        if row["language"] is not None:
            tiers[row["language"], row["bin"]] = row["tier"]
        else:
            factors[row["cluster"]] = row["factor"]
    view = _view(task.inputs[:-1])
    documents = _Documents.of(view)
    keys = zip(documents.languages.tolist(), documents.bins.tolist(), strict=True)
    tier = np.array([tiers[key] for key in keys], dtype=np.int64)
    weight = np.array(settings.tier_weights)[tier] if len(tier) else np.empty(0)
    weight = weight * [settings.languages.get(language, 1.0) for language in documents.languages]
    weight = weight * [factors[cluster] for cluster in documents.clusters.tolist()]
    weight = weight * np.where(documents.trusted, settings.trusted_weight, 1.0)
    weight = 2 ** (np.round(2 * np.log2(np.clip(weight, *settings.limits))) / 2)
    pairs = zip(documents.languages.tolist(), weight.tolist(), strict=True)
    group = pa.array([f"{language}-{value:.3g}" for language, value in pairs], pa.string())
    keep = np.ones(len(view), bool)
    return Result(
        [view.write("weights", keep=keep, reason=[""] * len(view), weight=weight, tier=tier, group=group)]
    )
