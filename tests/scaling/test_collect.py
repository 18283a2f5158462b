"""Points of real runs equal their metrics; runs that are no points are named."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_b2.config import RunConfig
from megatron_b2.errors import InputError
from megatron_b2.scaling.collect import collect
from megatron_b2.scaling.points import read_points
from tests.training.runs import VOCAB, run, run_config, write_data

STEPS = 24


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of 24 steps, validated every 8."""
    folder = tmp_path_factory.mktemp("trained")
    config = run_config(folder, write_data(folder), train={"steps": STEPS, "eval_interval": 8})
    run(config)
    return config


def copy_of(config: RunConfig, folder: Path, name: str) -> Path:
    """A run folder with its own copy of configuration and metrics."""
    target = folder / name
    target.mkdir()
    source = Path(config.output_dir)
    text = (source / "config.toml").read_text()
    (target / "config.toml").write_text(text.replace('name = "tiny"', f'name = "{name}"', 1))
    (target / "metrics.jsonl").write_bytes((source / "metrics.jsonl").read_bytes())
    return target


def rewrite(folder: Path, **changes: object) -> None:
    """Replace values in the last validation of a run."""
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    last = max(index for index, record in enumerate(records) if record["kind"] == "valid")
    records[last] |= changes
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_points_equal_the_metrics(trained: RunConfig, tmp_path: Path) -> None:
    table = collect([Path(trained.output_dir)], window=5).table
    records = [
        json.loads(line) for line in (Path(trained.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    valid = {record["step"]: record["ce"] for record in records if record["kind"] == "valid"}
    train = {record["step"]: record["ce"] for record in records if record["kind"] == "train"}
    assert [point.step for point in table.points] == [8, 16, 24]
    assert [point.final for point in table.points] == [False, False, True]
    h, f = 16, 24
    n = 4 * h * h + 3 * h * f + 2 * h + h
    for point in table.points:
        assert point.tokens == point.step * 4 * 16
        assert point.valid_ce == valid[point.step]
        assert point.train_ce == pytest.approx(sum(train[point.step - i] for i in range(5)) / 5)
        assert (point.num_parameters, point.total_parameters) == (n, n + 2 * VOCAB * h)
        assert point.flops_6nd == 6 * n * point.tokens
        products = 4 * h * h + 3 * h * f + VOCAB * h + 2 * 16 * h
        assert point.flops_training == 6 * products * point.tokens
    table.write(tmp_path / "points.json")
    assert read_points(tmp_path / "points.json") == table
    with (tmp_path / "points.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["valid_ce"]) for row in rows] == [point.valid_ce for point in table.points]


def test_a_run_without_validation_gives_its_end(tmp_path: Path) -> None:
    config = run_config(tmp_path, write_data(tmp_path), data={"split": (1.0, 0.0, 0.0)})
    run(config)
    (point,) = collect([Path(config.output_dir)]).table.points
    assert (point.step, point.valid_ce, point.final) == (8, None, True)


def test_every_bad_run_is_named_at_once_and_can_be_left_out(trained: RunConfig, tmp_path: Path) -> None:
    good, nan, rising, twin = (copy_of(trained, tmp_path, name) for name in ("good", "nan", "rising", "twin"))
    rewrite(nan, ce=None)
    rewrite(rising, ce=9.0)
    config = (twin / "config.toml").read_text()
    (twin / "config.toml").write_text(config.replace('name = "twin"', 'name = "good"', 1))
    unfinished = copy_of(trained, tmp_path, "unfinished")
    text = (unfinished / "config.toml").read_text()
    (unfinished / "config.toml").write_text(text.replace(f"steps = {STEPS}", "steps = 9000", 1))
    bare = tmp_path / "bare"
    bare.mkdir()
    missing = tmp_path / "missing"
    folders = [good, nan, rising, twin, unfinished, bare, missing]
    with pytest.raises(InputError) as error:
        collect(folders)
    message = str(error.value)
    assert message.startswith("6 of 7 runs cannot be used; --skip leaves them out:")
    for part in (
        "nan: a loss that is no finite number at step 24",
        "rising: valid_ce rose from ",
        "twin: is called good, as ",
        "unfinished: unfinished, at step 24 of 9,000: run `b2 pretrain",
        "bare: has no config.toml",
        "missing: no such run",
    ):
        assert part in message
    collected = collect(folders, skip=True)
    assert {point.run for point in collected.table.points} == {"good"}
    assert len(collected.left_out) == 6
    with pytest.raises(InputError, match=r"1 of 1 runs cannot be used:"):
        collect([missing], skip=True)


def test_a_skipped_step_and_a_broken_line_are_named(trained: RunConfig, tmp_path: Path) -> None:
    skipped, broken = (copy_of(trained, tmp_path, name) for name in ("skipped", "broken"))
    path = skipped / "metrics.jsonl"
    path.write_text(path.read_text().replace('"skipped": false', '"skipped": true', 1))
    (broken / "metrics.jsonl").write_text("{nothing}\n")
    with pytest.raises(
        InputError, match=r"skipped: a skipped step at step 1 .*\n.*broken/metrics.jsonl: a line is"
    ):
        collect([skipped, broken])


def test_a_ladder_folder_stands_for_its_runs(trained: RunConfig, tmp_path: Path) -> None:
    from megatron_b2.scaling.budgets import Budget
    from megatron_b2.scaling.ladder import Cluster, plan_ladder, write_ladder
    from megatron_b2.scaling.rungs import Rung

    rungs = [Rung(hidden=16, layers=1, heads=2), Rung(hidden=32, layers=1, heads=2)]
    base = tmp_path / "base.toml"
    prefix = trained.data.sources[0].prefix
    base.write_text(
        f'extends = ["preset:toy"]\n[model]\nvocab_size = {VOCAB}\n[data]\nseq_len = 16\nsplit = [0.8, 0.2, 0]\n'
        f'[[data.sources]]\nprefix = "{prefix}"\n[optim]\nwarmup_steps = 2\n'
        "[train]\nglobal_batch_size = 4\neval_interval = 0\neval_batches = 2\n"
    )
    out = tmp_path / "ladder"
    runs = plan_ladder(rungs, [Budget.parse("1000")], out=out, base=str(base))
    write_ladder(runs, out=out, base=str(base), cluster=Cluster())
    for item in runs:
        run(replace(item.config))
    table = collect([out]).table
    assert [(p.run, p.num_parameters, p.tokens) for p in table.points] == [
        (item.name, item.rung.num_parameters, item.tokens) for item in runs
    ]
