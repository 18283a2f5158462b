"""Strict TOML, extends, command line, provenance, and the round trip."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_b2.config import (
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    from_dict,
    load_config,
    to_dict,
    to_toml,
)
from megatron_b2.config.decode import Decoder
from megatron_b2.config.fields import field_docs, optional_inner, settings, type_hints
from megatron_b2.errors import ConfigError

SMALL = """
[model]
hidden_size = 64
ffn_hidden_size = 128
num_layers = 2
num_heads = 4

[optim]
warmup_steps = 5

[train]
steps = 10
global_batch_size = 4
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path | str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_minimal_file_takes_defaults() -> None:
    config = load_config(write(Path("a.toml"), SMALL)).config
    assert config.model == ModelConfig(hidden_size=64, ffn_hidden_size=128, num_layers=2, num_heads=4)
    assert config.train == TrainConfig(steps=10, global_batch_size=4)
    assert config.data.sources == ()


def test_integers_are_numbers_but_not_the_reverse() -> None:
    assert load_config(write(Path("a.toml"), SMALL + "[data]\nsplit = [1, 0, 0]\n")).config.data.split == (
        1.0,
        0.0,
        0.0,
    )
    text = SMALL.replace("steps = 10", "steps = 1e1")
    assert problems_of(write(Path("a.toml"), text)) == (
        "a.toml:12: train.steps must be an integer, got 10.0; write 10",
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("steps = true", "train.steps must be an integer, got True"),
        ("deterministic = 1", "train.deterministic must be true or false, got 1"),
        (
            'max_z_weight = "2e-4"',
            "train.max_z_weight must be a number, got '2e-4' (a string; write it without quotes)",
        ),
        ("max_z_weight = nan", "train.max_z_weight must be a finite number, got nan"),
        ("seed = [1]", "train.seed must be an integer, got [1]"),
        (
            'precision = "bf15"',
            "train.precision must be one of 'fp32', 'bf16', got 'bf15'; did you mean 'bf16'?",
        ),
        ("evel_interval = 3", "unknown key train.evel_interval; did you mean train.eval_interval?"),
        ("max_lr = 3", "unknown key train.max_lr; did you mean optim.max_lr?"),
    ],
)
def test_one_problem_names_file_line_and_fix(line: str, problem: str) -> None:
    path = write(
        Path("a.toml"), SMALL.replace("steps = 10", "steps = 10 # was here") + f"\n# a comment\n{line}\n"
    )
    if line.startswith("steps"):
        path = write(path, SMALL.replace("steps = 10", "") + f"\n# a comment\n{line}\n")
    assert problems_of(path) == (f"a.toml:16: {problem}",)


def test_all_problems_at_once() -> None:
    text = 'extend = ["preset:toy"]\nname = 3\n[model]\nhiden_size = 4\nnum_layers = "2"\n[[data.sources]]\nprefx = "a"\n'
    assert problems_of(
        write(Path("a.toml"), text), "--optim.max-lrr", "1", "--train.steps", "ten", "stray"
    ) == (
        "command line: unknown flag --optim.max-lrr; did you mean --optim.max-lr?",
        "command line: --train.steps takes one value, got 2: ['ten', 'stray']",
        "a.toml:1: unknown key extend; known here: name, output_dir, model, data, tokenizer, optim, train, "
        "parallel, ops, checkpoint, deepspeed",
        "a.toml:2: name must be a string, got 3",
        "a.toml:4: unknown key model.hiden_size; did you mean model.hidden_size?",
        "a.toml:5: model.num_layers must be an integer, got '2' (a string; write it without quotes)",
        "a.toml:7: unknown key data.sources[0].prefx; did you mean data.sources[0].prefix?",
        *(
            f"{key} is missing: set {key.rsplit('.', 1)[-1]} under [{key.rsplit('.', 1)[0]}], or extend a preset, "
            'as in extends = ["preset:toy"]'
            for key in (
                "model.hidden_size",
                "model.ffn_hidden_size",
                "model.num_heads",
                "data.sources[0].prefix",
                "train.steps",
                "train.global_batch_size",
            )
        ),
    )


def test_syntax_error_names_file_and_place() -> None:
    (problem,) = problems_of(write(Path("a.toml"), "[model]\nhidden_size = = 3\n"))
    assert problem.startswith("a.toml: not valid TOML: ")
    assert "line 2" in problem


def test_tables_and_lists_in_the_wrong_place() -> None:
    assert problems_of(
        write(Path("a.toml"), SMALL.replace("[optim]\nwarmup_steps = 5", "") + "\n[optim.eps]\nx = 1\n")
    )[0].endswith("optim.eps must be a number, got {'x': 1}")
    text = "optim = 3\n" + SMALL.replace("[optim]\nwarmup_steps = 5", "")
    assert problems_of(write(Path("a.toml"), text)) == ("a.toml:1: optim must be a table, got 3",)
    text = SMALL + "[data]\nsplit = [0.5, 0.5]\n"
    assert problems_of(write(Path("a.toml"), text)) == (
        "a.toml:15: data.split must be a list of 3, each a number, got 2 values: [0.5, 0.5]",
    )


def test_extends_merges_in_order_and_remembers_where(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "one.toml", SMALL + '[[data.sources]]\nprefix = "old"\nweight = 3.0\n')
    write(tmp_path / "base" / "two.toml", "[optim]\nmax_lr = 2e-3\neps = 1e-6\n")
    text = 'extends = ["base/one.toml", "base/two.toml"]\n[optim]\nmax_lr = 5e-3\n[[data.sources]]\nprefix = "new"\n'
    resolved = load_config(write(tmp_path / "run.toml", text), ["--optim.beta2=0.99"])
    assert resolved.config.optim.max_lr == 5e-3
    assert resolved.config.data.sources == (SourceConfig(prefix="new"),), "a list is replaced whole"
    expected = {
        "model.hidden_size": "base/one.toml:3",
        "optim.max_lr": "run.toml:3",
        "optim.eps": "base/two.toml:3",
        "optim.beta2": "command line",
        "optim.beta1": "default",
        "data.sources[0].prefix": "run.toml:5",
        "data.sources[0].weight": "default",
    }
    assert expected.items() <= resolved.provenance.items()


def test_extends_problems() -> None:
    write(Path("a.toml"), 'extends = [\n  "b.toml",\n]\n')
    write(Path("b.toml"), 'extends = ["a.toml"]\n')
    assert problems_of("a.toml") == (
        "b.toml:1: a.toml extends b.toml extends a.toml: a circle; remove one of these extends",
    )
    assert problems_of(write(Path("a.toml"), '\nextends = ["preset:tyo"]\n')) == (
        "a.toml:2: there is no preset:tyo; did you mean preset:toy?",
    )
    assert problems_of(write(Path("a.toml"), 'extends = "preset:toy"\n' + SMALL)) == (
        'a.toml:1: extends must be a list of strings, as in extends = ["preset:toy"]',
    )
    (problem,) = problems_of("nowhere.toml")
    assert problem == "there is no configuration file nowhere.toml"
    assert problems_of("toy") == ("there is no configuration file toy; did you mean preset:toy?",)


def test_command_line_forms() -> None:
    arguments = (
        "--data.sources data/zh:0.6 data/en c:/x:2 --data.split 0.5 0.25 0.25 --train.no-deterministic "
        "--data.document-masking false --parallel.engine deepspeed --parallel.zero_stage=2 --optim.max-lr 1 "
        "--train.steps 1_000 --optim.decay-steps none --checkpoint.init-from some/folder --train.seed 1 "
        "--train.seed 2 --deepspeed.flops-profiler.enabled true --deepspeed.log-level info"
    )
    config = load_config("preset:toy", arguments.split()).config
    assert config.data.sources == (
        SourceConfig(prefix="data/zh", weight=0.6),
        SourceConfig(prefix="data/en"),
        SourceConfig(prefix="c:/x", weight=2.0),
    )
    assert config.data.split == (0.5, 0.25, 0.25)
    assert not config.train.deterministic
    assert not config.data.document_masking
    assert (config.parallel.engine, config.parallel.zero_stage) == ("deepspeed", 2)
    assert (config.optim.max_lr, config.optim.decay_steps, config.train.steps) == (1.0, None, 1000)
    assert config.checkpoint.init_from == "some/folder"
    assert config.train.seed == 2, "the last flag wins"
    assert config.deepspeed == {"flops_profiler": {"enabled": True}, "log_level": "info"}


def test_required_settings_may_come_from_the_command_line() -> None:
    path = write(Path("a.toml"), SMALL.replace("steps = 10", ""))
    assert load_config(path, ["--train.steps", "10"]).config.train.steps == 10


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--steps", "3"], "unknown flag --steps; did you mean --train.steps?"),
        (["--train.step", "3"], "unknown flag --train.step; did you mean --train.steps?"),
        (["100"], "'100' is not a flag; settings are written --table.key VALUE"),
        (["--train.steps"], "--train.steps takes one value, got 0: []"),
        (
            ["--train.precision", "fp16"],
            "train.precision must be one of 'fp32', 'bf16', got 'fp16'; did you mean 'bf16'?",
        ),
        (["--data.split", "1", "0"], "data.split must be a list of 3, each a number, got 2 values: [1, 0]"),
        (["--train.no-seed"], "unknown flag --train.no-seed; did you mean --train.seed?"),
    ],
)
def test_command_line_problems(arguments: list[str], problem: str) -> None:
    assert problems_of("preset:toy", *arguments) == (f"command line: {problem}",)


def test_from_dict_is_strict() -> None:
    mapping = to_dict(load_config("preset:toy").config)
    assert from_dict(RunConfig, mapping) == load_config("preset:toy").config
    mapping["optim"]["max_lrr"] = 3
    del mapping["train"]["steps"]
    with pytest.raises(ConfigError) as caught:
        from_dict(RunConfig, mapping)
    assert len(caught.value.problems) == 2


def test_every_setting_is_documented_and_decodable() -> None:
    def schemas(schema: type) -> list[type]:
        nested = [hint for hint in type_hints(schema).values() if dataclasses.is_dataclass(hint)]
        return [schema, *(inner for item in nested for inner in schemas(item))]

    for schema in [*schemas(RunConfig), SourceConfig]:
        assert set(field_docs(schema)) == {field.name for field in dataclasses.fields(schema)}
        assert schema.__doc__
    for setting in settings(RunConfig):
        if optional_inner(setting.annotation) is not None:
            assert setting.default is None, (
                "TOML has no null: a setting that may be unset must be so by default"
            )
        elif not setting.required:
            decoder = Decoder({})
            assert decoder.value(setting.annotation, setting.default, setting.key) == setting.default


def test_config_imports_no_torch() -> None:
    code = (
        "import sys, megatron_b2.config; print([m for m in ('torch', 'numpy', 'rich') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout == "[]\n"


ROOT = Path(__file__).resolve().parents[2]
text = st.text(st.characters(codec="utf-8"), max_size=12)
plain = st.recursive(
    st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), text),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


def strategy(annotation: Any) -> st.SearchStrategy[Any]:
    """Any value of a schema type, right or wrong for training."""
    inner = optional_inner(annotation)
    if inner is not None:
        return st.none() | strategy(inner)
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return st.builds(
            annotation, **{name: strategy(hint) for name, hint in type_hints(annotation).items()}
        )
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is tuple and get_args(annotation)[-1] is Ellipsis:
        return st.lists(strategy(get_args(annotation)[0]), max_size=3).map(tuple)
    if get_origin(annotation) is tuple:
        return st.tuples(*map(strategy, get_args(annotation)))
    simple = {bool: st.booleans(), int: st.integers(), str: text}
    simple[float] = st.floats(allow_nan=False, allow_infinity=False)
    return simple.get(annotation, st.dictionaries(text, plain, max_size=3))


@hypothesis_settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(strategy(RunConfig))
def test_round_trips_exactly(config: RunConfig) -> None:
    assert from_dict(RunConfig, to_dict(config)) == config
    for provenance in ({}, dict.fromkeys(("name", "optim.max_lr"), "a\nfile:3")):
        assert from_dict(RunConfig, tomllib.loads(to_toml(config, provenance=provenance))) == config


@pytest.mark.parametrize("name", ["toy", "baichuan2-7b", "baichuan2-13b"])
def test_resolved_text_loads_to_the_same_run(name: str) -> None:
    overrides = ["--data.sources", "a:0.3", 'b"\\:0.7', "--tokenizer.path", "词/表", "--name", "x\ty"]
    resolved = load_config(f"preset:{name}", overrides)
    for stored in (to_toml(resolved.config), to_toml(resolved.config, provenance=resolved.provenance)):
        assert load_config(write(Path("config.toml"), stored)).config == resolved.config
