"""The generated JSON, against DeepSpeed's own reading of it."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from megatron_b2.config import RunConfig, load_config
from megatron_b2.config.deepspeed_keys import EXTRA_KEYS, OURS, SOURCES, TUNABLE
from megatron_b2.engine.deepspeed_config import deepspeed_json
from megatron_b2.errors import ConfigError


def config_with(**deepspeed: Any) -> RunConfig:
    return replace(load_config("preset:baichuan2-7b").config, deepspeed=deepspeed)


def flat(mapping: dict[str, Any], path: str = "") -> dict[str, Any]:
    items: dict[str, Any] = {}
    for name, value in mapping.items():
        items |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return items


def test_numbers_come_from_the_configuration() -> None:
    generated = deepspeed_json(config_with(), world_size=256)
    assert generated["train_batch_size"] == 1_024
    assert generated["train_micro_batch_size_per_gpu"] == 1
    assert generated["gradient_accumulation_steps"] == 4
    assert generated["gradient_clipping"] == 0.5
    assert generated["bf16"]["enabled"]
    assert generated["data_types"] == {"grad_accum_dtype": "fp32"}
    assert generated["zero_optimization"]["stage"] == 1
    assert "optimizer" not in generated
    assert "scheduler" not in generated
    assert json.loads(json.dumps(generated)) == generated


def test_deepspeed_counts_a_sample_for_each_context_parallel_rank() -> None:
    config = config_with()
    layout = replace(config.parallel, tensor=2, context=4, pipeline=2)
    generated = deepspeed_json(replace(config, parallel=layout), world_size=256)
    assert generated["gradient_accumulation_steps"] == 1_024 // (256 // 16)
    # What DeepSpeed checks with the mpu's data-parallel size, data x context.
    assert generated["train_batch_size"] == 1 * generated["gradient_accumulation_steps"] * (256 // 16 * 4)


def test_zero_settings_come_from_the_configuration() -> None:
    config = config_with()
    layout = replace(
        config.parallel,
        zero_stage=3,
        hpz=8,
        quantized_weights=True,
        quantized_gradients=True,
        offload_optimizer=True,
        whole_parameters=1_000_000,
    )
    zero = deepspeed_json(replace(config, parallel=layout), world_size=64)["zero_optimization"]
    assert (zero["zero_hpz_partition_size"], zero["overlap_comm"]) == (8, True)
    assert (zero["zero_quantized_weights"], zero["zero_quantized_gradients"]) == (True, True)
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert (
        zero["stage3_param_persistence_threshold"] == zero["stage3_model_persistence_threshold"] == 1_000_000
    )
    with pytest.raises(ConfigError, match=r"offload_optimizer = .* contradicts the generated None"):
        deepspeed_json(config_with(zero_optimization={"offload_optimizer": {"device": "cpu"}}), world_size=8)


def test_is_a_pure_function_that_imports_no_torch() -> None:
    config = config_with(flops_profiler={"enabled": True})
    before = copy.deepcopy(config)
    first = deepspeed_json(config, world_size=4)
    first["flops_profiler"]["enabled"] = False
    assert config == before
    code = (
        "import sys; from megatron_b2.config import load_config; "
        "from megatron_b2.engine.deepspeed_config import deepspeed_json; "
        "deepspeed_json(load_config('preset:baichuan2-7b').config, world_size=8); "
        "print([m for m in ('torch', 'deepspeed') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout == "[]\n"


def test_extra_keys_are_merged() -> None:
    extra = {
        "flops_profiler": {"enabled": True},
        "zero_optimization": {"reduce_bucket_size": 1_000, "sub_group_size": 10, "stage": 1},
        "gradient_clipping": 0.5,
    }
    generated = deepspeed_json(config_with(**extra), world_size=1)
    assert generated["flops_profiler"] == {"enabled": True}
    assert generated["zero_optimization"]["reduce_bucket_size"] == 1_000
    assert generated["zero_optimization"]["sub_group_size"] == 10
    assert generated["zero_optimization"]["contiguous_gradients"] is True


def test_all_contradictions_name_both_values_and_the_setting() -> None:
    extra = {
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": True, "contiguous_gradients": False},
        "bf16": False,
        "optimizer": {"type": "Adam"},
        "gradient_cliping": 1.0,
    }
    with pytest.raises(ConfigError) as caught:
        deepspeed_json(config_with(**extra), world_size=1)
    assert set(caught.value.problems) == {
        "deepspeed.gradient_clipping = 1.0 contradicts the generated 0.5: change optim.grad_clip instead",
        "deepspeed.zero_optimization.stage = True contradicts the generated 1: change parallel.zero_stage instead",
        "deepspeed.zero_optimization.contiguous_gradients = False contradicts the generated True: "
        "remove it; the generated value is what we test",
        "deepspeed.bf16 = False contradicts the generated {'enabled': True, 'check_grad_overflow': True}: "
        "remove it; the generated value is what we test",
        "deepspeed.optimizer must not be given: AdamW comes from [optim]",
        "deepspeed.gradient_cliping is not a key of DeepSpeed that can be set here; did you mean gradient_clipping?",
    }


def test_rules_hold_first() -> None:
    with pytest.raises(ConfigError, match="not a multiple"):
        deepspeed_json(config_with(), world_size=3)


def test_tables_of_keys_name_generated_keys() -> None:
    generated = deepspeed_json(config_with(), world_size=1)
    assert TUNABLE | set(SOURCES) <= set(flat(generated))
    assert not set(generated) & (EXTRA_KEYS | set(OURS))


def deepspeed_source() -> Path:
    spec = find_spec("deepspeed")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def test_every_top_level_key_is_one_that_deepspeed_reads() -> None:
    files = [*deepspeed_source().glob("runtime/**/*.py"), *deepspeed_source().glob("[cmpau]*/**/con*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = [*deepspeed_json(config_with(), world_size=1), *EXTRA_KEYS, *OURS]
    assert [name for name in names if f'"{name}"' not in source and f"'{name}'" not in source] == []


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 3), ("bf16", 1), ("bf16", 2)])
def test_deepspeed_reads_it_as_meant(precision: Any, stage: Any) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_config(
        "preset:toy",
        [
            *(
                "--parallel.engine",
                "deepspeed",
                "--train.precision",
                precision,
                f"--parallel.zero-stage={stage}",
            ),
            *("--train.global-batch-size", "16", "--train.micro-batch-size", "8"),
        ],
    ).config
    generated = deepspeed_json(config, world_size=1)
    read = DeepSpeedConfig(copy.deepcopy(generated))
    assert (read.train_batch_size, read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps) == (
        config.train.global_batch_size,
        config.train.micro_batch_size,
        config.train.global_batch_size // config.train.micro_batch_size,
    )
    assert read.gradient_clipping == 0.5
    assert read.bfloat16_config.enabled == (precision == "bf16")
    assert not read.float16_config.enabled
    assert read.grad_accum_dtype == "fp32"
    assert str(read.communication_data_type) == "torch.float32"
    assert read.zero_optimization_stage == stage
    assert read.optimizer_name is None
    assert read.scheduler_name is None
    by_alias = read.zero_config.model_dump(by_alias=True)
    assert generated["zero_optimization"].items() <= by_alias.items()
