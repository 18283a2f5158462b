"""Each rule of the layout: what breaks it, what the message says, and what is just allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from megatron_b2.config import RunConfig, check, find_problems, layout_checks, load_config
from megatron_b2.errors import ConfigError

GOOD = load_config("preset:baichuan2-13b", ["--train.precision", "fp32"]).config
"""40 heads, FFN 13,696, vocabulary 125,696, 40 layers, sequences of 4,096, batches of 1,024, DeepSpeed."""


def changed(changes: Mapping[str, Any]) -> RunConfig:
    config = GOOD
    for key, value in changes.items():
        table, name = key.split(".")
        config = replace(config, **{table: replace(getattr(config, table), **{name: value})})
    return config


def parallel(**settings: Any) -> dict[str, Any]:
    return {f"parallel.{name}": value for name, value in settings.items()}


CASES: dict[str, list[tuple[dict[str, Any], str]]] = {
    "single_engine_has_no_layout": [
        (
            parallel(engine="single", tensor=2),
            'parallel.tensor = 2 needs parallel.engine = "deepspeed", since "single" is one plain process: '
            "set the engine or use 1",
        ),
        (
            parallel(engine="single", offload_optimizer=True),
            'parallel.offload_optimizer = true needs parallel.engine = "deepspeed", since "single" is one plain '
            "process: set the engine or turn it off",
        ),
    ],
    "heads_divide_tensor": [
        (
            parallel(tensor=16),
            "model.num_heads = 40 is not a multiple of parallel.tensor = 16: this model splits over "
            "1, 2, 4 or 8 tensor-parallel ranks",
        ),
    ],
    "ffn_divides_tensor": [
        (
            parallel(tensor=5),
            "model.ffn_hidden_size = 13696 is not a multiple of parallel.tensor = 5: this model splits over "
            "1, 2, 4 or 8 tensor-parallel ranks",
        ),
    ],
    "vocabulary_divides_tensor": [
        ({**parallel(tensor=8), "model.vocab_size": 125_700}, "model.vocab_size = 125700 is not a multiple of"),
    ],
    "sequence_parallel_needs_tensor": [
        (
            parallel(sequence_parallel=True),
            "parallel.sequence_parallel = true splits the sequence over tensor-parallel ranks, but parallel.tensor = 1",
        ),
    ],
    "sequence_divides_context": [
        (
            parallel(context=3),
            "data.seq_len = 4096 is not a multiple of parallel.context = 3: use seq_len = 4098, or context = 1, 2, 4",
        ),
    ],
    "sequence_divides_tensor": [
        (
            {**parallel(context=2, tensor=8, sequence_parallel=True), "data.seq_len": 4_104},
            "data.seq_len / parallel.context = 2052 is not a multiple of parallel.tensor = 8, as sequence_parallel "
            "needs: use seq_len = 4112",
        ),
    ],
    "ulysses_divides_heads": [
        (
            parallel(context=4, tensor=4, context_method="ulysses"),
            "model.num_heads / parallel.tensor = 10 is not a multiple of parallel.context = 4, as "
            'context_method = "ulysses" needs: use "ring", or context = 1, 2, 5 or 10',
        ),
    ],
    "stored_attention_needs_ulysses": [
        (
            {"ops.attention": "cuda", **parallel(context=2, context_method="ring")},
            'ops.attention = "cuda" stores its probabilities, which the ring cannot merge, and '
            'parallel.context_method = "ring" is the ring with parallel.context = 2: '
            'use "ulysses", or another ops.attention',
        ),
        (
            {"ops.attention": "cuda", **parallel(tensor=4, context=4)},
            'ops.attention = "cuda" stores its probabilities, which the ring cannot merge, and '
            'parallel.context_method = "auto" means the ring with parallel.context = 4: '
            'use "ulysses" and context = 1, 2, 5 or 10, or another ops.attention',
        ),
    ],
    "pipeline_needs_zero_0_or_1": [
        (
            parallel(pipeline=2, zero_stage=2),
            "parallel.pipeline = 2 with parallel.zero_stage = 2: a pipeline keeps whole gradients until its last "
            "micro-batch; use zero_stage 0 or 1, or pipeline = 1",
        ),
        (
            {**parallel(pipeline=2, zero_stage=3), "train.precision": "bf16"},
            "parallel.pipeline = 2 with parallel.zero_stage = 3: a pipeline keeps whole gradients until its last "
            "micro-batch; use zero_stage 1, or pipeline = 1",
        ),
    ],
    "partitioning_needs_zero_3": [
        (
            parallel(hpz=8, zero_stage=1, pipeline=2),
            "parallel.hpz = 8 needs ZeRO-3 without pipeline stages, but parallel.zero_stage = 1 and "
            "parallel.pipeline = 2: set zero_stage = 3 and pipeline = 1, or remove hpz",
        ),
        (parallel(quantized_weights=True, zero_stage=2), "parallel.quantized_weights = true needs ZeRO-3"),
        (parallel(quantized_gradients=True, zero_stage=2), "parallel.quantized_gradients = true needs ZeRO-3"),
        (parallel(whole_parameters=10, zero_stage=2), "parallel.whole_parameters = 10 needs ZeRO-3"),
    ],
    "node_groups_need_no_tensor": [
        (
            parallel(hpz=8, zero_stage=3, tensor=8),
            "parallel.hpz = 8 works among neighbouring ranks, but parallel.tensor = 8 makes them hold different parts",
        ),
        (
            parallel(quantized_gradients=True, zero_stage=3, tensor=2),
            "parallel.quantized_gradients = true works among neighbouring ranks",
        ),
    ],
    "virtual_stages_need_interleaving": [
        (
            parallel(virtual_stages=2, pipeline=2, zero_stage=1),
            'parallel.virtual_stages = 2 needs schedule = "interleaved", but it is "1f1b": set the schedule',
        ),
        (
            parallel(schedule="interleaved", pipeline=2, zero_stage=1),
            'parallel.schedule = "interleaved" needs several chunks on several ranks, but virtual_stages = 1 and '
            'pipeline = 2: raise both above 1, or "1f1b"',
        ),
        (
            parallel(schedule="interleaved", virtual_stages=2),
            'parallel.schedule = "interleaved" needs several chunks on several ranks, but virtual_stages = 2 and '
            "pipeline = 1",
        ),
    ],
    "zero_bubble_needs_pipeline": [
        (
            parallel(schedule="zero_bubble"),
            'parallel.schedule = "zero_bubble" fills the idle time of pipeline stages, but parallel.pipeline = 1',
        ),
    ],
    "layers_fill_stages": [
        (
            parallel(pipeline=16, virtual_stages=3, schedule="interleaved", zero_stage=1),
            "model.num_layers = 40 is less than parallel.pipeline x virtual_stages = 16 x 3 = 48: every stage",
        ),
    ],
    "offload_needs_zero": [
        (
            parallel(offload_optimizer=True, zero_stage=0),
            "parallel.offload_optimizer = true needs ZeRO, but parallel.zero_stage = 0: use zero_stage 1, 2 or 3",
        ),
    ],
    "auto_decides_alone": [
        (
            {**parallel(auto=True), "train.recompute_layers": (0, 1)},
            "train.recompute_layers = [0, 1] is chosen by parallel.auto = true: remove it or turn auto off",
        ),
        (
            parallel(auto=True, zero_stage=3, whole_parameters=5),
            "parallel.whole_parameters = 5 is chosen by parallel.auto = true",
        ),
    ],
    "recomputed_layers_exist": [
        (
            {"train.recompute": "none", "train.recompute_layers": (0, 1)},
            'train.recompute_layers names 2 blocks, but train.recompute = "none": use "selective" or "full"',
        ),
        ({"train.recompute_layers": (0, 40, -1)}, "train.recompute_layers has 40 or -1: the blocks of this model are 0 to 39"),
        ({"train.recompute_layers": (3, 3)}, "train.recompute_layers has 3 more than once: name each block once"),
    ],
}  # fmt: skip

WORLD_CASES: dict[str, list[tuple[dict[str, Any], int, str]]] = {
    "ranks_fill_layout": [
        (
            parallel(tensor=8, pipeline=4, zero_stage=1),
            1_000,
            "1000 ranks is not a multiple of tensor x context x pipeline = 8 x 1 x 4 = 32: start 992 or 1024 ranks",
        ),
        (parallel(tensor=8), 1, "1 ranks is not a multiple of tensor x context x pipeline = 8 x 1 x 1 = 8: start 8"),
    ],
    "batch_divides": [
        (
            {**parallel(tensor=8), "train.global_batch_size": 100},
            64,
            "train.global_batch_size = 100 is not a multiple of train.micro_batch_size x data-parallel ranks = "
            "1 x 8 = 8: use 96 or 104",
        ),
        (
            {"train.global_batch_size": 100},
            64,
            "train.global_batch_size = 100 is not a multiple of train.micro_batch_size x ranks = 1 x 64 = 64: use 64",
        ),
    ],
    "micro_batches_fill_pipeline": [
        (
            parallel(pipeline=8, zero_stage=1),
            2_048,
            "4 micro-batches a step (global_batch_size / (micro_batch_size x data) = 1024 / (1 x 256)) are fewer than "
            "parallel.pipeline = 8 stages: use global_batch_size = 2048 or more, or fewer stages",
        ),
    ],
    "interleaving_has_whole_rounds": [
        (
            {
                **parallel(pipeline=4, virtual_stages=2, schedule="interleaved", zero_stage=1),
                "train.global_batch_size": 60,
            },
            24,
            "10 micro-batches a step is not a multiple of parallel.pipeline = 4, as schedule = \"interleaved\" needs: "
            'use global_batch_size = 48 or 72, or "1f1b"',
        ),
    ],
    "hpz_divides_data": [
        (
            parallel(hpz=3, zero_stage=3),
            8,
            "parallel.hpz = 3 does not divide the 8 ranks (data x context) that share parameters: use 1, 2, 4 or 8",
        ),
    ],
}  # fmt: skip


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == {rule.__name__ for rule in layout_checks.LAYOUT_RULES}
    assert set(WORLD_CASES) == {rule.__name__ for rule in layout_checks.LAYOUT_WORLD_RULES}
    assert all(rule.__doc__ for rule in (*layout_checks.LAYOUT_RULES, *layout_checks.LAYOUT_WORLD_RULES))


@pytest.mark.parametrize(
    ("rule", "changes", "message"), [(rule, *case) for rule, cases in CASES.items() for case in cases]
)
def test_rule(rule: str, changes: dict[str, Any], message: str) -> None:
    assert list(getattr(layout_checks, rule)(GOOD)) == []
    problems = [problem.message for problem in getattr(layout_checks, rule)(changed(changes))]
    assert any(text.startswith(message) for text in problems)
    assert set(problems) <= set(find_problems(changed(changes)))


@pytest.mark.parametrize(
    ("rule", "changes", "world_size", "message"),
    [(rule, *case) for rule, cases in WORLD_CASES.items() for case in cases],
)
def test_world_rule(rule: str, changes: dict[str, Any], world_size: int, message: str) -> None:
    assert list(getattr(layout_checks, rule)(GOOD, 1024)) == []
    (problem,) = getattr(layout_checks, rule)(changed(changes), world_size)
    assert problem.message.startswith(message)
    with pytest.raises(ConfigError) as caught:
        check(changed(changes), world_size=world_size)
    assert problem.message in caught.value.problems


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        (parallel(tensor=8, sequence_parallel=True), 1024),
        (parallel(tensor=4, context=2, context_method="ulysses"), 1024),
        (parallel(tensor=4, context=4, context_method="ring"), 1024),
        ({"ops.attention": "cuda", **parallel(tensor=4, context=2)}, 1024),
        ({"ops.attention": "cuda", **parallel(context_method="ring")}, 1024),
        (parallel(pipeline=8, zero_stage=1), 1024),
        (parallel(pipeline=4, tensor=8, zero_stage=1, schedule="zero_bubble"), 1024),
        (parallel(pipeline=4, virtual_stages=10, schedule="interleaved", zero_stage=1), 128),
        (parallel(zero_stage=3, hpz=8, quantized_weights=True), 1024),
        (parallel(zero_stage=3, hpz=4, context=4), 16),
        (parallel(zero_stage=3, tensor=2, whole_parameters=1_000_000), 16),
        (parallel(auto=True), 64),
        (parallel(auto=True, zero_stage=0, offload_optimizer=True), 64),
        ({**parallel(auto=True, zero_stage=0), "train.precision": "bf16"}, 64),
        ({"train.recompute_layers": (0, 39)}, 64),
        (parallel(offload_optimizer=True), 64),
    ],
    ids=str,
)
def test_just_allowed(changes: dict[str, Any], world_size: int) -> None:
    assert find_problems(changed(changes), world_size=world_size) == []


def test_the_fewest_ranks_are_the_default() -> None:
    check(changed(parallel(tensor=8, pipeline=4, zero_stage=1)))


def test_every_problem_is_reported_at_once() -> None:
    bad = changed(
        {
            **parallel(tensor=16, pipeline=64, zero_stage=3, hpz=2, virtual_stages=2),
            "train.global_batch_size": 7,
        }
    )
    problems = find_problems(bad, world_size=100)
    assert len(problems) == 7, problems
    assert all(": " in problem for problem in problems)


@pytest.mark.parametrize("key", ["tensor", "context", "pipeline", "virtual_stages", "hpz"])
def test_sizes_below_one_are_one_problem_and_no_crash(key: str) -> None:
    problems = find_problems(changed({f"parallel.{key}": 0}), world_size=8)
    assert any(problem.startswith(f"parallel.{key} = 0 must be greater than 0") for problem in problems)
