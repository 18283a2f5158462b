"""The layout matrix, golden parity under tensor, pipeline and context parallelism, resharding, and refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_b2.checkpoint.store import CheckpointReader
from megatron_b2.config import checks
from megatron_b2.config.schema import ParallelConfig, RunConfig
from megatron_b2.data.batch import Batch
from megatron_b2.engine import deepspeed as _preloaded  # noqa: F401 (imported once, before the forks)
from megatron_b2.engine.build import build_engine, fill_weights, initialize_engine
from megatron_b2.errors import ConfigError, NonFiniteError
from megatron_b2.parallel.comm import Comm, ProcessGroupComm, SingleComm
from megatron_b2.testing import layouts
from megatron_b2.testing.fork import run_ranks
from megatron_b2.training.events import Callback, Outcome, StepEvent
from megatron_b2.training.metrics import read_metrics
from tests.dist.test_resume import StopAfter, rank_run
from tests.golden_model import load_golden
from tests.training.runs import run, run_config, write_data

LEGAL = layouts.legal_cases()
COVERING = layouts.covering_cases(LEGAL, seed=0)
References = dict[tuple[layouts.Style, int], layouts.Trace]


@pytest.fixture(scope="module")
def references() -> References:
    return layouts.reference_traces(LEGAL, seed=0)


def check(case: layouts.Case, references: References) -> None:
    result = layouts.compare(case, references, seed=0)
    assert result.passed, result.failure or result


@pytest.mark.parametrize("case", COVERING, ids=lambda case: case.name.replace(" ", "-"))
def test_covering_layouts_equal_one_process(case: layouts.Case, references: References) -> None:
    check(case, references)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in LEGAL if case not in COVERING], ids=lambda case: case.name.replace(" ", "-")
)
def test_every_legal_layout_equals_one_process(case: layouts.Case, references: References) -> None:
    check(case, references)


def test_the_covering_subset_has_every_pair_of_values() -> None:
    def pairs(cases: list[layouts.Case]) -> set[Any]:
        return set().union(*(layouts._pairs(case) for case in cases))

    assert pairs(COVERING) == pairs(LEGAL)
    assert set(layouts.EXTRA_CASES) <= set(COVERING)


def golden_gradients(style: str, layout: dict[str, Any]) -> tuple[float, list[Any]]:
    """The published loss and gradients through a whole engine step: AdamW's first moment is 0.1 of them."""
    golden = load_golden(style)
    ids = golden.tensors["input_ids"]
    config = replace(
        layouts.reference_config("7b", seed=0),
        model=golden.config,
        parallel=ParallelConfig(engine="deepspeed", zero_stage=1, **layout),
    )
    # The last label does not exist: one padding position makes 24 of 23, so that the sequence can be split.
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    positions = torch.arange(ids.shape[1], dtype=torch.int32).expand_as(ids)
    batch = Batch(ids, labels, torch.zeros_like(positions), positions)
    config = replace(
        config,
        data=replace(config.data, seq_len=ids.shape[1]),
        optim=replace(config.optim, grad_clip=0.0),
        train=replace(config.train, global_batch_size=2, micro_batch_size=1, max_z_weight=0.0),
    )
    engine = build_engine(config, comm=ProcessGroupComm(), device=torch.device("cpu"))
    weight = golden.named("w")
    fill_weights(engine.logical_state(), lambda name, _shape: weight(name))
    engine.state_loaded()
    rows = [Batch(*(getattr(batch, f)[i : i + 1] for f in Batch.__dataclass_fields__)) for i in (0, 1)]
    out = engine.train_step(rows, lr=0.0, step=1)
    state = engine.logical_state()
    moments = {
        name.removeprefix("optim/exp_avg/"): [(p.offsets, p.tensor / 0.1) for p in tensor.pieces if p.write]
        for name, tensor in state.items()
        if name.startswith("optim/exp_avg/")
    }
    return float(out.ce), [moments]


GOLDEN_LAYOUTS = [
    ("7b", 2, {"tensor": 2}),
    ("7b", 4, {"tensor": 4}),
    ("7b", 2, {"tensor": 2, "sequence_parallel": True}),
    ("7b", 4, {"tensor": 4, "sequence_parallel": True}),
    ("7b", 2, {"pipeline": 2}),
    ("13b", 2, {"pipeline": 2}),
    ("7b", 2, {"context": 2}),
    ("13b", 2, {"context": 2}),
]


@pytest.mark.parametrize(("style", "ranks", "layout"), GOLDEN_LAYOUTS)
def test_golden_gradients_in_every_kind_of_layout(style: str, ranks: int, layout: dict[str, Any]) -> None:
    """Cross-entropy and all gradients; the reference is autograd of the published formula on one process."""
    from tests.model.test_golden import golden_model

    golden = load_golden(style)
    model, ids = golden_model(golden), golden.tensors["input_ids"]
    count = ids[:, 1:].numel()
    model(ids[:, :-1], ids[:, 1:], ce_scale=1 / count).total.backward()
    results = run_ranks(ranks, golden_gradients, style, layout)
    for ce, _ in results:
        assert abs(ce - float(golden.tensors["ce"])) < 2e-5
    reference = {name: [((0,) * p.dim(), p.grad)] for name, p in model.named_parameters()}
    differences = layouts._differences([moments for _, (moments,) in results], reference)
    assert max(differences.values()) < 2e-5, differences


@pytest.mark.parametrize("tensor", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_40_alibi_heads_over_tensor_parallel_ranks(tensor: int, references: References) -> None:
    case = layouts.Case("13b", tensor, 1, 1, 1, False, 1, False, "1f1b")
    check(case, references)


RESHARD_TO: list[tuple[str, int, dict[str, Any] | None]] = [
    ("tp1 zero3 dp4", 4, {"zero_stage": 3}),
    ("tp4 pp1", 4, {"zero_stage": 1, "tensor": 4}),
    ("pp4", 4, {"zero_stage": 1, "pipeline": 4}),
    ("single", 1, None),
]


def reshard_config(folder: Path, prefix: Path, parallel: dict[str, Any]) -> RunConfig:
    return run_config(
        folder,
        prefix,
        model={"hidden_size": 32, "num_layers": 4, "num_heads": 4},
        train={"steps": 20, "global_batch_size": 8, "micro_batch_size": 1},
        optim={"max_lr": 3e-4},
        parallel=parallel,
        checkpoint={"interval": 20},
    )


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunConfig]:
    """20 uninterrupted steps on one process, and 10 steps at TP2 x PP2 x DP2 with ZeRO-1."""
    folder = tmp_path_factory.mktemp("reshard")
    prefix = write_data(folder, documents=200)
    straight = reshard_config(folder / "straight", prefix, {})
    run(straight)
    half = reshard_config(
        folder / "half", prefix, {"engine": "deepspeed", "zero_stage": 1, "tensor": 2, "pipeline": 2}
    )
    assert run_ranks(8, rank_run, half, StopAfter(10), timeout=240) == [Outcome.PREEMPTED] * 8
    return straight, half


class FirstStep(Callback):
    """The first step that ran, 1-based."""

    step = 0

    def step_begin(self, event: StepEvent) -> None:
        self.step = self.step or event.step + 1


def continued(config: RunConfig, comm: Comm | None = None) -> tuple[Outcome, int]:
    """Outcome and first step."""
    first = FirstStep()
    return run(config, first, comm=comm), first.step


def rank_continued(config: RunConfig) -> tuple[Outcome, int]:
    return continued(config, ProcessGroupComm())


@pytest.mark.parametrize(("name", "ranks", "parallel"), RESHARD_TO, ids=[name for name, _, _ in RESHARD_TO])
def test_a_checkpoint_of_one_layout_continues_in_another(
    tmp_path: Path,
    half_run: tuple[RunConfig, RunConfig],
    name: str,
    ranks: int,
    parallel: dict[str, Any] | None,
) -> None:
    """10 more steps elsewhere equal the uninterrupted run."""
    straight, half = half_run
    shutil.copytree(half.output_dir, tmp_path / "run")
    resumed = replace(half, output_dir=str(tmp_path / "run"))
    if parallel is None:
        resumed = replace(resumed, parallel=ParallelConfig())
        found = [continued(resumed)]
    else:
        resumed = replace(resumed, parallel=ParallelConfig(engine="deepspeed", **parallel))
        found = run_ranks(ranks, rank_continued, resumed, timeout=240)
    assert found == [(Outcome.COMPLETED, 11)] * ranks
    assert_same_run(resumed, straight)


def assert_same_run(found: RunConfig, expected: RunConfig) -> None:
    """Metrics of all steps and the final state, to 1e-5."""

    def trace(config: RunConfig) -> Tensor:
        lines = [r for r in read_metrics(Path(config.output_dir) / "metrics.jsonl") if r["kind"] == "train"]
        return torch.tensor(
            [[line[k] for k in ("step", "loss", "ce", "max_z", "grad_norm")] for line in lines]
        )

    torch.testing.assert_close(trace(found), trace(expected), atol=1e-5, rtol=1e-5)
    readers: list[Callable[[str], Tensor]] = []
    for config in (found, expected):
        step = Path(config.output_dir) / "checkpoints" / f"step_{config.train.steps:08d}"
        readers.append(CheckpointReader(step).read)
    for name in CheckpointReader(step).names():
        torch.testing.assert_close(*(read(name) for read in readers), atol=1e-5, rtol=0)


def test_bf16_with_pipeline_and_tensor_parallelism(references: References) -> None:
    case = layouts.Case("7b", 2, 2, 1, 1, True, 1, False, "1f1b")
    config = case.config(seed=0)
    traces = run_ranks(4, layouts.trace_run, replace(config, train=replace(config.train, precision="bf16")))
    expected = references["7b", case.global_batch].steps
    for trace in traces:
        difference = ((trace.steps - expected) / expected).abs()
        assert difference[:, :2].max() < 2e-3
        assert difference[:, 3].max() < 2e-2


def poisoned_pipeline(config: RunConfig) -> str:
    """A NaN in a layer of the last stage, in the second step."""
    engine = build_engine(config, comm=ProcessGroupComm(), device=torch.device("cpu"))
    initialize_engine(engine, seed=0)
    engine.train_step(layouts.micro_batches(engine, 1), lr=1e-4, step=1)
    blocks = [(n, m) for n, m in engine.module.named_modules() if n.endswith("layers.7.mlp")]
    for _, block in blocks:
        block.register_forward_hook(lambda _module, _inputs, out: out * float("nan"))
    try:
        engine.train_step(layouts.micro_batches(engine, 2), lr=1e-4, step=2)
    except NonFiniteError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("schedule", ["1f1b", "zero_bubble"])
def test_a_nan_in_a_pipeline_names_rank_and_layer_everywhere(schedule: Any) -> None:
    case = layouts.Case("7b", 1, 2, 1, 1, False, 1, False, schedule)
    for message in run_ranks(2, poisoned_pipeline, case.config(seed=0)):
        assert "step 2: rank 1: loss is not finite, first seen in the output of layers.7.mlp" in message


def test_exactly_the_illegal_layouts_are_refused() -> None:
    """The rules of `config` against `broken_rules`, which shares nothing with them, for every combination."""
    assert layouts.wrong_refusals() == []
    several = [case for case in layouts.cases() if case.world_size > 1]
    legal = [case for case in several if not layouts.broken_rules(case)]
    assert 100 < len(legal) < len(several) / 2
    assert {*legal, *layouts.EXTRA_CASES} == set(LEGAL)


def test_a_lost_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [rule for rule in checks.RULES if rule.__name__ != "pipeline_needs_zero_0_or_1"]
    assert len(kept) == len(checks.RULES) - 1
    monkeypatch.setattr(checks, "RULES", kept)
    wrong = layouts.wrong_refusals()
    assert "7b tp1 pp2 dp1 cp1 1f1b zero2 is not refused, but: a pipeline needs ZeRO-0 or 1" in wrong


PLAIN = layouts.Case("7b", 1, 1, 2, 1, False, 1, False, "1f1b")
ILLEGAL = {
    "tensor divides heads, FFN and vocabulary": replace(PLAIN, tensor=3),
    "sequence parallelism needs tensor": replace(PLAIN, sequence_parallel=True),
    "sequence parallelism splits equally": replace(
        PLAIN, style="13b", tensor=8, context=8, sequence_parallel=True, context_method="ring"
    ),
    "context divides the sequence": replace(PLAIN, context=3),
    "ulysses divides heads": replace(PLAIN, tensor=8, context=2, context_method="ulysses"),
    "a pipeline needs ZeRO-0 or 1": replace(PLAIN, pipeline=2, zero_stage=2),
    "a pipeline needs micro-batches": replace(PLAIN, pipeline=4, data=8),
    "every stage needs a layer": replace(PLAIN, pipeline=8, data=1, schedule="interleaved"),
    "interleaved needs a pipeline": replace(PLAIN, schedule="interleaved"),
    "interleaved needs whole rounds": replace(PLAIN, pipeline=3, data=1, schedule="interleaved"),
    "zero-bubble needs a pipeline": replace(PLAIN, schedule="zero_bubble"),
    "hpZ needs ZeRO-3": replace(PLAIN, hpz=True),
    "hpZ needs pipeline = 1": replace(PLAIN, pipeline=2, hpz=True),
    "hpZ needs tensor = 1": replace(PLAIN, tensor=2, zero_stage=3, hpz=True),
    "hpZ divides data x context": replace(PLAIN, data=1, zero_stage=3, hpz=True),
    "micro-batches divide the batch": replace(PLAIN, data=3),
}


class ManyComm(SingleComm):
    """One process that says it is one of many."""

    def __init__(self, size: int) -> None:
        self.many = size

    @property
    def size(self) -> int:
        return self.many


@pytest.mark.parametrize("rule", ILLEGAL)
def test_the_engine_refuses_what_breaks_a_rule_before_it_makes_anything(rule: str) -> None:
    case = ILLEGAL[rule]
    assert rule in layouts.broken_rules(case)
    with pytest.raises(ConfigError):  # without a process group, all that comes later fails otherwise
        build_engine(case.config(seed=0), comm=ManyComm(case.world_size), device=torch.device("cpu"))


def test_there_is_an_example_of_every_rule() -> None:
    assert set(ILLEGAL) == {rule for case in ILLEGAL.values() for rule in layouts.broken_rules(case)}
    assert not layouts.broken_rules(PLAIN)
