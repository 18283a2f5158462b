"""Rules of the layout: which sizes of tensor, context, data and pipeline parallelism go together with which
model, batch and ZeRO stage (docs/layouts.md). LAYOUT_RULES hold for every configuration, LAYOUT_WORLD_RULES
need the number of ranks. Sizes below 1 are reported by `checks.positive`; the rules here skip them.
"""

from __future__ import annotations

from math import gcd
from typing import Final

from megatron_b2.config.problem import Problem, Problems, Rule, WorldRule
from megatron_b2.config.schema import ParallelConfig, RunConfig

SINGLE: Final = (
    ("tensor", 1),
    ("context", 1),
    ("pipeline", 1),
    ("virtual_stages", 1),
    ("hpz", 1),
    ("sequence_parallel", False),
    ("offload_optimizer", False),
    ("quantized_weights", False),
    ("quantized_gradients", False),
    ("auto", False),
    ("whole_parameters", 0),
)
"""Settings of [parallel] that one process cannot have, and their values there."""

ZERO_3_ONLY: Final = ("hpz", "quantized_weights", "quantized_gradients", "whole_parameters")
"""Settings of [parallel] that change how ZeRO-3 partitions or gathers parameters."""


def _is_on(parallel: ParallelConfig, name: str) -> bool:
    return bool(getattr(parallel, name) != (1 if name == "hpz" else 0))


def _shown(parallel: ParallelConfig, name: str) -> str:
    value = getattr(parallel, name)
    return f"parallel.{name} = {str(value).lower() if isinstance(value, bool) else value}"


def _either(numbers: list[int]) -> str:
    *some, last = map(str, numbers)
    return f"{', '.join(some)} or {last}" if some else last


def _divisors(number: int, *, limit: int = 64) -> list[int]:
    return [size for size in range(1, min(number, limit) + 1) if number % size == 0]


def _tensor_degrees(config: RunConfig) -> str:
    """Tensor-parallel sizes that divide heads, FFN and vocabulary."""
    model = config.model
    return _either(_divisors(gcd(gcd(model.num_heads, model.ffn_hidden_size), model.vocab_size)))


def single_engine_has_no_layout(config: RunConfig) -> Problems:
    """One process splits nothing."""
    parallel = config.parallel
    if parallel.engine != "single":
        return
    for name, alone in SINGLE:
        if getattr(parallel, name) != alone:
            fix = f"use {alone}" if not isinstance(alone, bool) else "turn it off"
            yield Problem(
                (f"parallel.{name}", "parallel.engine"),
                f'{_shown(parallel, name)} needs parallel.engine = "deepspeed", since "single" is one plain '
                f"process: set the engine or {fix}",
            )


def _divides_tensor(config: RunConfig, name: str) -> Problems:
    size, total = config.parallel.tensor, getattr(config.model, name)
    if size > 1 and total > 0 and total % size:
        yield Problem(
            (f"model.{name}", "parallel.tensor"),
            f"model.{name} = {total} is not a multiple of parallel.tensor = {size}: "
            f"this model splits over {_tensor_degrees(config)} tensor-parallel ranks",
        )


def heads_divide_tensor(config: RunConfig) -> Problems:
    """Every tensor-parallel rank has whole attention heads, and equally many."""
    return _divides_tensor(config, "num_heads")


def ffn_divides_tensor(config: RunConfig) -> Problems:
    """Every tensor-parallel rank has an equal part of the feed-forward layer."""
    return _divides_tensor(config, "ffn_hidden_size")


def vocabulary_divides_tensor(config: RunConfig) -> Problems:
    """Every tensor-parallel rank has equally many rows of the embedding and of NormHead."""
    return _divides_tensor(config, "vocab_size")


def sequence_parallel_needs_tensor(config: RunConfig) -> Problems:
    """Sequence shards are those of the tensor-parallel ranks."""
    if config.parallel.sequence_parallel and config.parallel.tensor == 1:
        yield Problem(
            ("parallel.sequence_parallel", "parallel.tensor"),
            "parallel.sequence_parallel = true splits the sequence over tensor-parallel ranks, but "
            "parallel.tensor = 1: raise tensor, or turn it off (parallel.context splits without it)",
        )


def sequence_divides_context(config: RunConfig) -> Problems:
    """Every context-parallel rank has an equal part of the sequence."""
    size, length = config.parallel.context, config.data.seq_len
    if size > 1 and length % size:
        yield Problem(
            ("data.seq_len", "parallel.context"),
            f"data.seq_len = {length} is not a multiple of parallel.context = {size}: "
            f"use seq_len = {-(-length // size) * size}, or context = {_either(_divisors(length))}",
        )


def sequence_divides_tensor(config: RunConfig) -> Problems:
    """Under sequence parallelism, the part of a context-parallel rank is split again."""
    parallel, length = config.parallel, config.data.seq_len
    tensor, context = parallel.tensor, parallel.context
    if not parallel.sequence_parallel or min(tensor, context) < 1 or length % context:
        return
    part, unit = length // context, tensor * context
    if part % tensor:
        yield Problem(
            ("data.seq_len", "parallel.tensor", "parallel.sequence_parallel"),
            f"data.seq_len / parallel.context = {part} is not a multiple of parallel.tensor = {tensor}, as "
            f"sequence_parallel needs: use seq_len = {-(-length // unit) * unit}, or turn it off",
        )


def ulysses_divides_heads(config: RunConfig) -> Problems:
    """Ulysses exchanges the parts of the sequence for heads."""
    parallel, heads = config.parallel, config.model.num_heads
    if parallel.context_method != "ulysses" or parallel.tensor < 1 or heads % parallel.tensor:
        return
    local = heads // parallel.tensor
    if parallel.context > 1 and local % parallel.context:
        yield Problem(
            ("parallel.context_method", "parallel.context", "model.num_heads", "parallel.tensor"),
            f"model.num_heads / parallel.tensor = {local} is not a multiple of parallel.context = "
            f'{parallel.context}, as context_method = "ulysses" needs: use "ring", or context = '
            f"{_either(_divisors(local))}",
        )


def stored_attention_needs_ulysses(config: RunConfig) -> Problems:
    """Attention that stores its probabilities has no log-sum-exp by which the ring could merge parts."""
    parallel, heads = config.parallel, config.model.num_heads
    method, tensor, context = parallel.context_method, parallel.tensor, parallel.context
    if config.ops.attention != "cuda" or min(heads, tensor) < 1 or context < 2 or heads % tensor:
        return
    divides = heads // tensor % context == 0
    if method == "ring" or (method == "auto" and not divides):
        fitting = "" if divides else f" and context = {_either(_divisors(heads // tensor))}"
        yield Problem(
            ("ops.attention", "parallel.context_method", "parallel.context"),
            'ops.attention = "cuda" stores its probabilities, which the ring cannot merge, and '
            f'parallel.context_method = "{method}" {"means" if method == "auto" else "is"} the ring with '
            f'parallel.context = {context}: use "ulysses"{fitting}, or another ops.attention',
        )


def pipeline_needs_zero_0_or_1(config: RunConfig) -> Problems:
    """ZeRO-2 and 3 reduce gradients after every micro-batch, in which a pipeline stage is not in step."""
    parallel = config.parallel
    if parallel.pipeline > 1 and parallel.zero_stage > 1 and not parallel.auto:  # auto chooses the stage
        stages = "1" if config.train.precision == "bf16" else "0 or 1"
        yield Problem(
            ("parallel.pipeline", "parallel.zero_stage"),
            f"parallel.pipeline = {parallel.pipeline} with parallel.zero_stage = {parallel.zero_stage}: a "
            f"pipeline keeps whole gradients until its last micro-batch; "
            f"use zero_stage {stages}, or pipeline = 1",
        )


def partitioning_needs_zero_3(config: RunConfig) -> Problems:
    """hpZ, qwZ, qgZ and whole parameters are ways of partitioning parameters, without pipeline stages."""
    parallel = config.parallel
    for name in ZERO_3_ONLY:
        is_stage_3 = parallel.zero_stage == 3 or parallel.auto
        if not _is_on(parallel, name) or (is_stage_3 and parallel.pipeline == 1):
            continue
        wrong = [] if is_stage_3 else [f"parallel.zero_stage = {parallel.zero_stage}"]
        wrong += [f"parallel.pipeline = {parallel.pipeline}"] if parallel.pipeline > 1 else []
        yield Problem(
            (f"parallel.{name}", "parallel.zero_stage", "parallel.pipeline"),
            f"{_shown(parallel, name)} needs ZeRO-3 without pipeline stages, but {' and '.join(wrong)}: "
            f"set zero_stage = 3 and pipeline = 1, or remove {name}",
        )


def node_groups_need_no_tensor(config: RunConfig) -> Problems:
    """DeepSpeed makes the groups of hpZ and qgZ of neighbouring ranks, which tensor parallelism takes."""
    parallel = config.parallel
    for name in ("hpz", "quantized_gradients"):
        if _is_on(parallel, name) and parallel.tensor > 1:
            yield Problem(
                (f"parallel.{name}", "parallel.tensor"),
                f"{_shown(parallel, name)} works among neighbouring ranks, but parallel.tensor = "
                f"{parallel.tensor} makes them hold different parts of the matrices: use tensor = 1 or "
                f"remove {name}",
            )


def virtual_stages_need_interleaving(config: RunConfig) -> Problems:
    """Only the interleaved schedule runs several chunks of layers on a rank."""
    parallel = config.parallel
    if parallel.schedule != "interleaved":
        if parallel.virtual_stages > 1:
            yield Problem(
                ("parallel.virtual_stages", "parallel.schedule"),
                f'parallel.virtual_stages = {parallel.virtual_stages} needs schedule = "interleaved", but '
                f'it is "{parallel.schedule}": set the schedule or use virtual_stages = 1',
            )
    elif parallel.virtual_stages == 1 or parallel.pipeline == 1:
        yield Problem(
            ("parallel.schedule", "parallel.virtual_stages", "parallel.pipeline"),
            'parallel.schedule = "interleaved" needs several chunks on several ranks, but virtual_stages '
            f'= {parallel.virtual_stages} and pipeline = {parallel.pipeline}: raise both above 1, or "1f1b"',
        )


def zero_bubble_needs_pipeline(config: RunConfig) -> Problems:
    """Without stages there is no bubble, and backward is not split."""
    parallel = config.parallel
    if parallel.schedule == "zero_bubble" and parallel.pipeline == 1:
        yield Problem(
            ("parallel.schedule", "parallel.pipeline"),
            'parallel.schedule = "zero_bubble" fills the idle time of pipeline stages, but '
            'parallel.pipeline = 1: raise pipeline, or use "1f1b"',
        )


def layers_fill_stages(config: RunConfig) -> Problems:
    """Every virtual stage has at least one layer."""
    parallel, layers = config.parallel, config.model.num_layers
    stages = parallel.pipeline * parallel.virtual_stages
    if 0 < layers < stages:
        yield Problem(
            ("model.num_layers", "parallel.pipeline", "parallel.virtual_stages"),
            f"model.num_layers = {layers} is less than parallel.pipeline x virtual_stages = "
            f"{parallel.pipeline} x {parallel.virtual_stages} = {stages}: every stage needs a layer; "
            "lower one of the two",
        )


def offload_needs_zero(config: RunConfig) -> Problems:
    """DeepSpeed moves the optimizer to the CPU only where ZeRO holds it."""
    parallel = config.parallel
    if parallel.offload_optimizer and parallel.zero_stage == 0 and not parallel.auto:  # it chooses 1, 2 or 3
        yield Problem(
            ("parallel.offload_optimizer", "parallel.zero_stage"),
            "parallel.offload_optimizer = true needs ZeRO, but parallel.zero_stage = 0: "
            "use zero_stage 1, 2 or 3",
        )


def auto_decides_alone(config: RunConfig) -> Problems:
    """What `auto` chooses is not given as well."""
    if not config.parallel.auto:
        return
    given = {
        "train.recompute_layers": list(config.train.recompute_layers),
        "parallel.whole_parameters": config.parallel.whole_parameters,
    }
    for key, value in given.items():
        if value:
            yield Problem(
                (key, "parallel.auto"),
                f"{key} = {value} is chosen by parallel.auto = true: remove it or turn auto off",
            )


def recomputed_layers_exist(config: RunConfig) -> Problems:
    """recompute_layers names blocks of the model, each once, and there is something to recompute."""
    layers, count, keys = config.train.recompute_layers, config.model.num_layers, ("train.recompute_layers",)
    if layers and config.train.recompute == "none":
        yield Problem(
            (*keys, "train.recompute"),
            f'train.recompute_layers names {len(layers)} blocks, but train.recompute = "none": '
            'use "selective" or "full", or remove recompute_layers',
        )
    if wrong := [layer for layer in layers if not 0 <= layer < count]:
        yield Problem(
            keys,
            f"train.recompute_layers has {_either(wrong)}: the blocks of this model are 0 to {count - 1}",
        )
    if len(set(layers)) < len(layers):
        twice = sorted({layer for layer in layers if layers.count(layer) > 1})
        yield Problem(
            keys, f"train.recompute_layers has {_either(twice)} more than once: name each block once"
        )


def ranks_fill_layout(config: RunConfig, world_size: int) -> Problems:
    """The data dimension is what the others leave of the ranks, a whole number."""
    parallel = config.parallel
    unit = parallel.model_ranks
    if unit > 0 and world_size % unit:
        choices = sorted({max(world_size // unit, 1) * unit, (world_size // unit + 1) * unit})
        yield Problem(
            ("parallel.tensor", "parallel.context", "parallel.pipeline"),
            f"{world_size} ranks is not a multiple of tensor x context x pipeline = {parallel.tensor} x "
            f"{parallel.context} x {parallel.pipeline} = {unit}: start {_either(choices)} ranks",
        )


def _data_size(config: RunConfig, world_size: int) -> int:
    """Ranks of the data dimension; 0 where `ranks_fill_layout` has reported a problem."""
    unit = config.parallel.model_ranks
    return 0 if unit < 1 or world_size % unit else world_size // unit


def batch_divides(config: RunConfig, world_size: int) -> Problems:
    """Every data-parallel rank runs the same whole number of micro-batches."""
    total, micro = config.train.global_batch_size, config.train.micro_batch_size
    data = _data_size(config, world_size)
    unit = micro * data
    if total > 0 and unit > 0 and total % unit:
        choices = sorted({max(total // unit, 1) * unit, (total // unit + 1) * unit})
        ranks = "ranks" if config.parallel.model_ranks == 1 else "data-parallel ranks"
        yield Problem(
            ("train.global_batch_size", "train.micro_batch_size"),
            f"train.global_batch_size = {total} is not a multiple of train.micro_batch_size x {ranks} = "
            f"{micro} x {data} = {unit}: use {' or '.join(map(str, choices))}",
        )


def micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches a rank and step; 0 where another rule has reported a problem."""
    unit = config.train.micro_batch_size * _data_size(config, world_size)
    total = config.train.global_batch_size
    return 0 if unit < 1 or total < 1 or total % unit else total // unit


def micro_batches_fill_pipeline(config: RunConfig, world_size: int) -> Problems:
    """With fewer micro-batches than stages some ranks never work (torchtitan #775: it hung)."""
    stages, count = config.parallel.pipeline, micro_batches(config, world_size)
    if 0 < count < stages:
        data = _data_size(config, world_size)
        yield Problem(
            ("parallel.pipeline", "train.global_batch_size", "train.micro_batch_size"),
            f"{count} micro-batches a step (global_batch_size / (micro_batch_size x data) = "
            f"{config.train.global_batch_size} / ({config.train.micro_batch_size} x {data})) are fewer than "
            f"parallel.pipeline = {stages} stages: use global_batch_size = "
            f"{stages * config.train.micro_batch_size * data} or more, or fewer stages",
        )


def interleaving_has_whole_rounds(config: RunConfig, world_size: int) -> Problems:
    """The interleaved schedule runs micro-batches in rounds of as many as there are pipeline ranks."""
    stages, count = config.parallel.pipeline, micro_batches(config, world_size)
    if config.parallel.schedule == "interleaved" and stages > 1 and count % stages:
        unit = stages * config.train.micro_batch_size * _data_size(config, world_size)
        total = config.train.global_batch_size
        choices = sorted({max(total // unit, 1) * unit, (total // unit + 1) * unit})
        yield Problem(
            ("parallel.schedule", "parallel.pipeline", "train.global_batch_size"),
            f"{count} micro-batches a step is not a multiple of parallel.pipeline = {stages}, as schedule = "
            f'"interleaved" needs: use global_batch_size = {_either(choices)}, or "1f1b"',
        )


def hpz_divides_data(config: RunConfig, world_size: int) -> Problems:
    """The ranks that ZeRO partitions over split into equal secondary groups."""
    hpz, ranks = config.parallel.hpz, _data_size(config, world_size) * config.parallel.context
    if hpz > 1 and ranks > 0 and ranks % hpz:
        yield Problem(
            ("parallel.hpz",),
            f"parallel.hpz = {hpz} does not divide the {ranks} ranks (data x context) that share parameters: "
            f"use {_either(_divisors(ranks))}",
        )


LAYOUT_RULES: Final[tuple[Rule, ...]] = (
    single_engine_has_no_layout,
    heads_divide_tensor,
    ffn_divides_tensor,
    vocabulary_divides_tensor,
    sequence_parallel_needs_tensor,
    sequence_divides_context,
    sequence_divides_tensor,
    ulysses_divides_heads,
    stored_attention_needs_ulysses,
    pipeline_needs_zero_0_or_1,
    partitioning_needs_zero_3,
    node_groups_need_no_tensor,
    virtual_stages_need_interleaving,
    zero_bubble_needs_pipeline,
    layers_fill_stages,
    offload_needs_zero,
    auto_decides_alone,
    recomputed_layers_exist,
)
LAYOUT_WORLD_RULES: Final[tuple[WorldRule, ...]] = (
    ranks_fill_layout,
    batch_divides,
    micro_batches_fill_pipeline,
    interleaving_has_whole_rounds,
    hpz_divides_data,
)
