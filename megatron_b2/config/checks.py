"""Rules between settings: one named function a rule, and all violations are reported at once.

A rule takes the configuration and yields problems; each names the values and the fix. RULES hold for every
configuration, WORLD_RULES need the number of ranks, TRAINING_RULES hold when training starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from megatron_b2.config.data_checks import DATA_RULES, blends
from megatron_b2.config.deepspeed_keys import deepspeed_problems
from megatron_b2.config.layout_checks import LAYOUT_RULES, LAYOUT_WORLD_RULES
from megatron_b2.config.problem import Problem, Problems, Rule, WorldRule
from megatron_b2.config.schema import RunConfig
from megatron_b2.errors import ConfigError

POSITIVE: Final = (
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_layers",
    "model.num_heads",
    "model.vocab_size",
    "model.rope_base",
    "model.norm_eps",
    "model.init_std",
    "data.prefetch",
    "optim.max_lr",
    "optim.eps",
    "train.steps",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.log_interval",
    "train.eval_batches",
    "parallel.tensor",
    "parallel.context",
    "parallel.pipeline",
    "parallel.virtual_stages",
    "parallel.hpz",
    "parallel.memory_gb",
    "parallel.timeout_minutes",
    "parallel.first_step_seconds",
    "checkpoint.keep_last",
)
NOT_NEGATIVE: Final = (
    "optim.warmup_steps",
    "optim.weight_decay",
    "optim.grad_clip",
    "train.seed",
    "train.max_z_weight",
    "train.eval_interval",
    "parallel.whole_parameters",
    "parallel.watchdog_seconds",
    "checkpoint.interval",
    "checkpoint.keep_every",
    "checkpoint.milestone_tokens",
)


def _get(config: RunConfig, key: str) -> float:
    table, name = key.split(".")
    value: float = getattr(getattr(config, table), name)
    return value


def positive(config: RunConfig) -> Problems:
    """Sizes, counts, rates and epsilons are greater than 0."""
    for key in POSITIVE:
        if _get(config, key) <= 0:
            yield Problem((key,), f"{key} = {_get(config, key)} must be greater than 0")


def not_negative(config: RunConfig) -> Problems:
    """Settings whose 0 means "off" are not below it."""
    for key in NOT_NEGATIVE:
        if _get(config, key) < 0:
            yield Problem((key,), f"{key} = {_get(config, key)} must be 0 or more")


def named(config: RunConfig) -> Problems:
    """The run has a name and a place."""
    for key in ("name", "output_dir"):
        if not getattr(config, key).strip():
            yield Problem((key,), f"{key} is empty: give it a value")


def heads_divide_hidden(config: RunConfig) -> Problems:
    """hidden_size is a multiple of num_heads."""
    hidden, heads = config.model.hidden_size, config.model.num_heads
    if hidden > 0 and heads > 0 and hidden % heads:
        divisors = (count for count in range(1, hidden + 1) if hidden % count == 0)
        fits = sorted(sorted(divisors, key=lambda count: abs(count - heads))[:2])
        yield Problem(
            ("model.hidden_size", "model.num_heads"),
            f"model.hidden_size = {hidden} is not a multiple of model.num_heads = {heads}: "
            f"use {' or '.join(map(str, fits))} heads, or hidden_size = {-(-hidden // heads) * heads}",
        )


def head_dim_even_for_rope(config: RunConfig) -> Problems:
    """Rotary positions turn pairs of channels."""
    model = config.model
    if model.position == "rope" and model.num_heads > 0 and model.head_dim % 2:
        yield Problem(
            ("model.hidden_size", "model.num_heads", "model.position"),
            f"model.hidden_size / model.num_heads = {model.head_dim} is odd, but rope rotates pairs of "
            'channels: change num_heads, or set position = "alibi"',
        )


def skipping_needs_alibi(config: RunConfig) -> Problems:
    """Only under ALiBi do far keys have a bound on their scores that falls with the distance."""
    if config.ops.skip_negligible_keys and config.model.position != "alibi":
        yield Problem(
            ("ops.skip_negligible_keys", "model.position"),
            f'ops.skip_negligible_keys = true needs ALiBi, and model.position = "{config.model.position}": '
            'use false, or position = "alibi"',
        )


def sequence_length(config: RunConfig) -> Problems:
    """A sample predicts at least one token from another."""
    if config.data.seq_len < 2:
        yield Problem(("data.seq_len",), f"data.seq_len = {config.data.seq_len} must be at least 2")


def split_shares(config: RunConfig) -> Problems:
    """The split is a distribution with something to train on."""
    split, is_normalised = config.data.split, config.data.order != "megatron"  # there it is as 969,30,1
    if min(split) < 0 or (is_normalised and abs(sum(split) - 1) > 1e-6):
        yield Problem(
            ("data.split",),
            f"data.split = {list(split)} (train, validation, test) must be 0 or more and sum to 1; "
            f"the sum is {sum(split):g}",
        )
    elif split[0] == 0:
        message = f"data.split = {list(split)} leaves nothing to train on: raise the first share"
        yield Problem(("data.split",), message)


def source_weights(config: RunConfig) -> Problems:
    """Every source takes part in its blend."""
    for table, sources in blends(config):
        for index, source in enumerate(sources):
            if source.weight <= 0:
                key = f"{table}[{index}].weight"
                message = f"{key} = {source.weight:g} must be greater than 0: remove the source to skip it"
                yield Problem((key,), message)


def source_prefixes(config: RunConfig) -> Problems:
    """The pairs of a blend are named, and each once."""
    for table, sources in blends(config):
        counts = Counter(prefix for source in sources for prefix in (source.prefix, *source.append))
        for index, source in enumerate(sources):
            for name, prefix in (
                ("prefix", source.prefix),
                *(("append", prefix) for prefix in source.append),
            ):
                key, times = f"{table}[{index}].{name}", counts[prefix]
                if not prefix:
                    text = f"{key} is empty: give the path of a .bin/.idx pair without the extension"
                    yield Problem((key,), text)
                elif times > 1:
                    yield Problem((key,), f"{key} = {prefix!r} is given {times} times: add up the weights")


def learning_rate_floor(config: RunConfig) -> Problems:
    """The cosine ends between 0 and its peak."""
    ratio = config.optim.min_lr_ratio
    if not 0 <= ratio <= 1:
        yield Problem(("optim.min_lr_ratio",), f"optim.min_lr_ratio = {ratio:g} must be between 0 and 1")


def betas(config: RunConfig) -> Problems:
    """Adam's averages decay."""
    for key in ("optim.beta1", "optim.beta2"):
        if not 0 <= _get(config, key) < 1:
            yield Problem((key,), f"{key} = {_get(config, key):g} must be at least 0 and less than 1")


def warmup_fits(config: RunConfig) -> Problems:
    """Warm-up ends before the run does."""
    warmup, steps = config.optim.warmup_steps, config.train.steps
    if warmup > steps > 0:
        yield Problem(
            ("optim.warmup_steps", "train.steps"),
            f"optim.warmup_steps = {warmup} is more than train.steps = {steps}: lower one or raise the other",
        )


def decay_after_warmup(config: RunConfig) -> Problems:
    """The cosine has at least one step."""
    warmup, decay = config.optim.warmup_steps, config.optim.decay_steps
    if decay is not None and decay <= warmup:
        yield Problem(
            ("optim.decay_steps", "optim.warmup_steps"),
            f"optim.decay_steps = {decay} must be more than optim.warmup_steps = {warmup}: "
            "it counts from step 0; leave it out to end at train.steps",
        )


def validation_has_data(config: RunConfig) -> Problems:
    """Validating at intervals needs held-out documents."""
    if config.train.eval_interval > 0 and config.data.split[1] == 0:
        yield Problem(
            ("train.eval_interval", "data.split"),
            f"train.eval_interval = {config.train.eval_interval} needs validation data, but data.split = "
            f"{list(config.data.split)} holds none out: raise its second share or set eval_interval = 0",
        )


def bf16_needs_zero(config: RunConfig) -> Problems:
    """DeepSpeed's bf16 at ZeRO 0 takes a step too many (docs/config.md); its fp32 masters need ZeRO 1."""
    parallel = config.parallel
    is_stage_0 = parallel.zero_stage == 0 and not parallel.auto  # auto chooses 1, 2 or 3
    if parallel.engine == "deepspeed" and config.train.precision == "bf16" and is_stage_0:
        yield Problem(
            ("train.precision", "parallel.zero_stage"),
            'train.precision = "bf16" with parallel.zero_stage = 0 trains wrongly under DeepSpeed: '
            "use zero_stage 1, 2 or 3",
        )


def deepspeed_keys_used(config: RunConfig) -> Problems:
    """[deepspeed] has an effect only with that engine."""
    if config.deepspeed and config.parallel.engine != "deepspeed":
        yield Problem(
            ("parallel.engine",),
            f"[deepspeed] sets {', '.join(config.deepspeed)}, which parallel.engine = "
            f'"{config.parallel.engine}" ignores: set engine = "deepspeed" or remove the table',
        )


def keep_every_is_saved(config: RunConfig) -> Problems:
    """What is kept for good must be saved in the first place."""
    interval, keep = config.checkpoint.interval, config.checkpoint.keep_every
    if keep > 0 and (interval <= 0 or keep % interval):
        fix = "set checkpoint.interval" if interval <= 0 else f"use {-(-keep // interval) * interval}"
        yield Problem(
            ("checkpoint.keep_every", "checkpoint.interval"),
            f"checkpoint.keep_every = {keep} is not a multiple of checkpoint.interval = {interval}: {fix}",
        )


def milestones_are_apart(config: RunConfig) -> Problems:
    """A token milestone spans at least one step."""
    tokens, step = config.checkpoint.milestone_tokens, config.tokens_per_step
    if 0 < tokens < step:
        yield Problem(
            ("checkpoint.milestone_tokens",),
            f"checkpoint.milestone_tokens = {tokens} is less than the {step} tokens of one step: "
            "raise it, or set 0 for none",
        )


def single_engine_is_alone(config: RunConfig, world_size: int) -> Problems:
    """The single engine is one process."""
    if config.parallel.engine == "single" and world_size > 1:
        yield Problem(
            ("parallel.engine",),
            f'parallel.engine = "single" is one process, but {world_size} were started: '
            'set engine = "deepspeed"',
        )


def has_sources(config: RunConfig) -> Problems:
    """There is something to train on."""
    if not config.data.sources:
        yield Problem(
            ("data.sources",),
            "data.sources is empty: add a [[data.sources]] table with a prefix that `b2 preprocess` wrote, "
            "or give --data.sources PREFIX",
        )


RULES: Final[tuple[Rule, ...]] = (
    positive,
    not_negative,
    named,
    heads_divide_hidden,
    head_dim_even_for_rope,
    skipping_needs_alibi,
    sequence_length,
    split_shares,
    source_weights,
    source_prefixes,
    learning_rate_floor,
    betas,
    warmup_fits,
    decay_after_warmup,
    validation_has_data,
    bf16_needs_zero,
    deepspeed_keys_used,
    keep_every_is_saved,
    milestones_are_apart,
    *DATA_RULES,
    *LAYOUT_RULES,
)
WORLD_RULES: Final[tuple[WorldRule, ...]] = (single_engine_is_alone, *LAYOUT_WORLD_RULES)
TRAINING_RULES: Final[tuple[Rule, ...]] = (has_sources,)


def find_problems(
    config: RunConfig,
    *,
    world_size: int | None = None,
    training: bool = False,
    provenance: Mapping[str, str] | None = None,
) -> list[str]:
    """Every violated rule, as text that ends in where the values were given when `provenance` is known.

    Among them are those of [deepspeed]. `world_size` (all ranks of the run) adds WORLD_RULES; `training` adds
    TRAINING_RULES.
    """
    problems = [problem for rule in RULES for problem in rule(config)]
    problems += deepspeed_problems(config, world_size)
    if world_size is not None:
        problems += [problem for rule in WORLD_RULES for problem in rule(config, world_size)]
    if training:
        problems += [problem for rule in TRAINING_RULES for problem in rule(config)]
    return [_located(problem, provenance or {}) for problem in problems]


def check(
    config: RunConfig, *, world_size: int | None = None, provenance: Mapping[str, str] | None = None
) -> None:
    """Raise ConfigError with every violated rule for a run on `world_size` ranks, by default the fewest."""
    world_size = config.parallel.model_ranks if world_size is None else world_size
    if problems := find_problems(config, world_size=world_size, provenance=provenance):
        raise ConfigError(problems)


def check_for_training(
    config: RunConfig, *, world_size: int, provenance: Mapping[str, str] | None = None
) -> None:
    """`check`, and the rules that hold only when training starts (there is data)."""
    if problems := find_problems(config, world_size=world_size, training=True, provenance=provenance):
        raise ConfigError(problems)


def _located(problem: Problem, provenance: Mapping[str, str]) -> str:
    origins = [provenance[key] for key in problem.keys if provenance.get(key, "default") != "default"]
    return f"{problem.message} ({', '.join(dict.fromkeys(origins))})" if origins else problem.message
