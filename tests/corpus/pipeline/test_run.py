"""The driver: the same files whoever works, nothing twice, and every kind of damage repaired."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_b2.corpus.pipeline.checked import DamagedFileError, read_table
from megatron_b2.corpus.pipeline.executor import TaskCrashError
from megatron_b2.corpus.pipeline.explain import explain
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.local import LocalExecutor
from megatron_b2.corpus.pipeline.report import State, make_report
from megatron_b2.corpus.pipeline.run import STATE, Run, run_pipeline
from megatron_b2.corpus.pipeline.stage import Stage
from megatron_b2.corpus.pipeline.tasks import Limits
from megatron_b2.errors import InputError, OutputError
from tests.corpus.pipeline.examples import Odd, Total, write_documents
from tests.disk import small_disk


def go(
    folder: Path, work: str = "work", *, workers: int = 1, stages: Mapping[str, Stage] | None = None
) -> Run:
    inputs = Input(paths=(str(folder / "input"),), unit_mb=1)
    chosen = {"odd": Odd(), "total": Total()} if stages is None else stages
    with LocalExecutor(workers, Limits(1 << 30, folder)) as executor:
        return run_pipeline(inputs, chosen, work=folder / work, executor=executor)


def state(folder: Path, work: str = "work") -> str:
    return (folder / work / STATE).read_text()


def tasks_run(run: Run) -> dict[str, int]:
    return {name: spent.tasks for name, spent in run.times.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_documents(tmp_path / "input")
    return tmp_path


def test_any_number_of_workers_gives_the_same_files(folder: Path) -> None:
    run = go(folder)
    assert len(run.units) >= 3
    assert run.units[1].first == run.units[0].documents
    for workers in (2, 4):
        go(folder, f"work{workers}", workers=workers)
        assert state(folder, f"work{workers}") == state(folder)
    files = json.loads(state(folder))["files"]
    assert set(files) == {
        str(path.relative_to(folder / "work"))
        for kind in ("documents", "attributes", "between")
        for path in (folder / "work" / kind).rglob("*")
        if path.is_file() and path.suffix != ".json"
    }


def test_stages_see_what_earlier_ones_left(folder: Path) -> None:
    run = go(folder)
    work = State.of(folder / "work")
    odd, total = (read_table(path) for path in work.attribute_paths(run.units[0].name).values())
    documents = read_table(run.units[0].path)
    assert documents.column("text")[2].as_py() == "document 3 of file 0 " * 3  # the first one is empty
    assert odd.column("odd.keep").to_pylist()[:3] == [True, False, True]
    assert odd.column("odd.text")[2].as_py() == "document 3 of file 0 " * 6
    assert total.column("total.keep").to_pylist()[:3] == [True, None, True]
    kept = sum(
        2 * len(text) for unit in run.units for text in read_table(unit.path).column("text").to_pylist()[::2]
    )
    assert set(total.column("total.sum").to_pylist()) == {kept, None}
    assert total.column("total.left")[2].as_py() == 2 * len(documents.column("text")[2].as_py())
    said = {stage.name: stage for stage in explain(folder / "work", "0-2").stages}
    assert said["odd"].verdict == "REMOVED: odd"
    assert said["total"].verdict == "not seen: it had gone before"
    kept_text = explain(folder / "work", "0-3").stages[0].text
    assert kept_text == "document 3 of file 0 " * 6
    with pytest.raises(InputError, match="no document has the id 'nobody'"):
        explain(folder / "work", "nobody")


def test_the_funnel_adds_up(folder: Path) -> None:
    run = go(folder)
    report = make_report(folder / "work")
    texts = [text for unit in run.units for text in read_table(unit.path).column("text").to_pylist()]
    for funnel in (report.total, report.languages["en"]):
        assert (funnel.raw.documents, funnel.raw.bytes) == (len(texts), sum(map(len, texts)))
        for kind in ("documents", "bytes"):
            removed = sum(getattr(stage.removed, kind) for stage in funnel.stages.values())
            assert getattr(funnel.raw, kind) == removed + getattr(funnel.kept, kind)
    # Units have their own rows, so about half the documents go; the others' texts become twice as long.
    assert report.total.stages["odd"].reasons["odd"] == report.total.stages["odd"].removed.documents
    assert report.total.stages["odd"].cut < 0
    assert report.empty == 3 * 34


def test_nothing_is_done_twice(folder: Path) -> None:
    first = go(folder)
    assert set(tasks_run(go(folder)).values()) == {0}
    # A new file: the other files' units stay, only what looks at all units is done for them again.
    shutil.copy(folder / "input" / "1.jsonl", folder / "input" / "9.jsonl")
    fresh = go(folder, "fresh")
    added = len({unit.name for unit in fresh.units} - {unit.name for unit in first.units})
    assert 0 < added < len(fresh.units)
    assert tasks_run(go(folder)) == {"extract": 1 + added, "odd": added, "total": added + len(fresh.units)}
    assert state(folder) == state(folder, "fresh")
    # Without the last stage its files go.
    go(folder, stages={"odd": Odd()})
    assert not list((folder / "work" / "attributes").glob("total/*"))


@pytest.mark.parametrize("how", ["truncated", "one byte", "gone", "manifest"])
@pytest.mark.parametrize("what", ["documents/*.parquet", "attributes/odd/*.parquet", "between/total/*.parts"])
def test_a_damaged_file_is_named_and_made_again(folder: Path, what: str, how: str) -> None:
    go(folder)
    before = state(folder)
    path = sorted((folder / "work").glob(what))[1]
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "one byte":
        content[len(content) // 4] ^= 1
        path.write_bytes(content)
    elif how == "gone":
        path.unlink()
    else:
        path.with_name(path.name + ".json").write_text("{")
    for later in (folder / "work" / "attributes" / "total").glob("*.json"):
        later.unlink()  # what reads the damaged file is to be done
    run = go(folder)
    assert state(folder) == before
    # Where the size shows the damage the file is simply made again; else its reader finds it.
    assert [str(path) in line for line in run.repaired] == ([True] if how == "one byte" else [])


def test_a_killed_worker_costs_its_task_only(folder: Path) -> None:
    go(folder, "calm")
    (folder / "die").touch()
    run = go(folder, workers=2, stages={"odd": Odd(flags=str(folder)), "total": Total()})
    assert not (folder / "die").exists()
    assert run.repaired == []
    files, calm = (json.loads(state(folder, work))["files"] for work in ("work", "calm"))
    assert files == calm


def test_a_mistake_in_a_stage_is_shown_once(folder: Path) -> None:
    with pytest.raises(
        TaskCrashError, match=r"total count-\w+\.parts failed:\n(.*\n)*.*a mistake in a stage"
    ):
        go(folder, stages={"odd": Odd(), "total": Total(crash=True)})
    assert not (folder / "work" / STATE).exists()
    assert tasks_run(go(folder))["odd"] == 0


def drive(folder: Path) -> None:
    os.setpgrp()
    go(folder, workers=2)


@pytest.mark.slow
def test_the_driver_may_be_killed_at_any_moment(folder: Path) -> None:
    go(folder, "calm")
    started = time.monotonic()
    go(folder, "timed", workers=2)
    duration = time.monotonic() - started
    chance = random.Random(0)
    for _ in range(20):
        process = multiprocessing.get_context("spawn").Process(target=drive, args=(folder,))
        process.start()
        time.sleep(chance.uniform(0, duration))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)  # its workers find the pipe closed and end
        process.join()
        if chance.random() < 0.5:
            shutil.rmtree(folder / "work", ignore_errors=True)
    go(folder, workers=2)
    assert state(folder) == state(folder, "calm")
    assert not list((folder / "work").rglob(".*.tmp"))


def test_a_full_disk_is_an_error_and_no_loss(folder: Path) -> None:
    with small_disk(folder / "disk", "100k"):
        with pytest.raises(OutputError, match="No space left"):
            go(folder, "disk/work")
        go(folder)
        subprocess.run(["mount", "-o", "remount,size=100m", str(folder / "disk")], check=True)
        go(folder, "disk/work")
        assert state(folder, "disk/work") == state(folder)


def test_two_drivers_do_not_share_a_folder(folder: Path) -> None:
    ready, proceed = multiprocessing.Event(), multiprocessing.Event()

    class Slow(Odd):
        def phases(self, context):  # type: ignore[no-untyped-def]
            ready.set()
            proceed.wait(30)
            return iter(())

    process = multiprocessing.get_context("fork").Process(target=lambda: go(folder, stages={"odd": Slow()}))
    process.start()
    assert ready.wait(30)
    with pytest.raises(InputError, match="another `b2 corpus run` works here"):
        go(folder)
    proceed.set()
    process.join()


def test_no_result_yet_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pipeline\.json is missing: `b2 corpus run` did not end"):
        State.of(tmp_path)


def test_damage_reads_as_one_line(tmp_path: Path) -> None:
    assert str(DamagedFileError(tmp_path / "x", "is short")) == f"{tmp_path / 'x'}: is short"
