"""The driver: the same files whoever works, nothing twice, and every kind of damage repaired."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Self

import psutil
import pytest

from megatron_b2.corpus.pipeline.checked import DamagedFileError, read_table
from megatron_b2.corpus.pipeline.executor import TaskCrashError
from megatron_b2.corpus.pipeline.explain import explain
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.local import LocalExecutor
from megatron_b2.corpus.pipeline.mix import mix
from megatron_b2.corpus.pipeline.report import State, make_report
from megatron_b2.corpus.pipeline.run import FOLDERS, MARKER, STATE, Run, run_pipeline
from megatron_b2.corpus.pipeline.stage import Context, Stage
from megatron_b2.corpus.pipeline.tasks import Limits, Task, forget, run_task
from megatron_b2.corpus.stages.minhash import MinHash
from megatron_b2.corpus.stages.repeats import Exact, Sentence
from megatron_b2.errors import InputError, OutputError
from tests.corpus.pipeline.examples import Odd, Total, write_documents
from tests.corpus.pipeline.held import Held, held
from tests.corpus.pipeline.inline import Inline
from tests.corpus.prose import prose
from tests.disk import small_disk

BOTH: Mapping[str, Stage] = {"odd": Odd(), "total": Total()}


def go(folder: Path, work: str = "work", *, workers: int = 1, stages: Mapping[str, Stage] = BOTH) -> Run:
    inputs = Input(paths=(str(folder / "input"),), unit_mb=1)
    with LocalExecutor(workers, Limits(1 << 30, folder)) as executor:
        return run_pipeline(inputs, stages, work=folder / work, executor=executor)


def here(folder: Path, stages: Mapping[str, Stage], work: str = "work") -> Run:
    """As `go`, in this process."""
    inputs = Input(paths=(str(folder / "input"),), unit_mb=1)
    return run_pipeline(inputs, stages, work=folder / work, executor=Inline(folder))


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
    said = {stage.name: stage for stage in explain(folder / "work", "0-2")[0].stages}
    assert said["odd"].verdict == "REMOVED: odd"
    assert said["total"].verdict == "not seen: it had gone before"
    kept_text = explain(folder / "work", "0-3")[0].stages[0].text
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
    here(folder, BOTH)
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
    run = go(folder) if how == "one byte" else here(folder, BOTH)
    assert state(folder) == before
    # Where the size shows the damage the file is simply made again; else its reader finds it.
    assert [str(path) in line for line in run.repaired] == ([True] if how == "one byte" else [])


def report_of(work: Path) -> object:
    return make_report(work)


def mixed(work: Path) -> object:
    return mix(work, work.parent / "mixed", overwrite=True)


def explained(work: Path) -> object:
    return explain(work, "0-3")


@pytest.mark.parametrize("read", [report_of, mixed, explained])
def test_a_damaged_result_is_named_and_made_again_by_the_next_run(
    folder: Path, read: Callable[[Path], object]
) -> None:
    here(folder, {"odd": Odd()})
    before, sound = state(folder), read(folder / "work")
    path = State.of(folder / "work").attribute_paths(explain(folder / "work", "0-3")[0].unit)["odd"]
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 1
    path.write_bytes(content)
    # No task reads a result of the last stage, so a run alone does not see that its bytes have changed.
    assert tasks_run(here(folder, {"odd": Odd()}))["odd"] == 0
    for _ in range(2):
        with pytest.raises(
            DamagedFileError, match=rf"{path}: .*\. Give `b2 corpus run` again: it makes the file again"
        ):
            read(folder / "work")
    assert tasks_run(here(folder, {"odd": Odd()}))["odd"] == 1
    assert (state(folder), read(folder / "work")) == (before, sound)


def test_verify_finds_every_damaged_file(folder: Path) -> None:
    here(folder, BOTH)
    before = state(folder)
    files = sorted(path for path in (folder / "work").rglob("*") if path.suffix in (".parquet", ".parts"))
    damaged = files[::2]
    assert len(damaged) > 5
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[-len(content) // 3] ^= 1
        path.write_bytes(content)
    run = run_pipeline(
        Input(paths=(str(folder / "input"),), unit_mb=1),
        BOTH,
        work=folder / "work",
        executor=Inline(folder),
        verify=True,
    )
    assert run.repaired == [line for path in damaged for line in run.repaired if line.startswith(f"{path}: ")]
    assert len(run.repaired) == len(damaged)
    assert sum(tasks_run(run).values()) == len(damaged)
    assert state(folder) == before
    make_report(folder / "work")


def test_damage_is_not_repaired_beside_a_run(folder: Path) -> None:
    here(folder, {"odd": Odd()})
    path = next((folder / "work" / "attributes" / "odd").glob("*.parquet"))
    path.write_bytes(bytes(path.stat().st_size))
    with (folder / "work" / MARKER).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another `b2 corpus run` works here"):
            make_report(folder / "work")
    assert tasks_run(here(folder, {"odd": Odd()}))["odd"] == 0


def names(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_a_folder_of_the_user_is_no_work_folder(folder: Path) -> None:
    (folder / "mine").mkdir()
    shutil.move(folder / "input", folder / "mine" / "documents")
    before = names(folder)
    inputs = Input(paths=(str(folder / "mine" / "documents"),))
    with pytest.raises(
        InputError, match=r"mine: is not empty and no work folder of `b2 corpus run`; give a new"
    ):
        run_pipeline(inputs, {"odd": Odd()}, work=folder / "mine", executor=Inline(folder))
    assert names(folder) == before


@pytest.mark.parametrize("given", ["input", "input/*/documents", "input/work/documents/*.parquet", "here"])
def test_inputs_and_work_are_not_inside_each_other(folder: Path, given: str) -> None:
    work = folder / "input" / "work"
    if "documents" in given:
        here(folder, {"odd": Odd()}, "first")
        shutil.move(folder / "first", work)
    (folder / "here").symlink_to(folder / "input")
    before = names(folder) | {work, work / MARKER}
    inputs = Input(paths=(str(folder / given),))
    with pytest.raises(InputError, match=r"inside"):
        run_pipeline(inputs, {"odd": Odd()}, work=work, executor=Inline(folder))
    assert names(folder) <= before


def test_only_files_of_ours_are_removed(folder: Path) -> None:
    here(folder, BOTH)
    work = folder / "work"
    mine = [
        work / "documents" / "mine.jsonl",
        work / "attributes" / "total" / "notes.json",
        work / "x.parquet",
    ]
    for path in mine:
        path.write_text("{}")
    left = work / "between" / "total" / ".count-x.parts.host.1.tmp"
    left.write_text("of a killed worker")
    here(folder, {"odd": Odd()})
    rest = {path for kind in ("documents", "attributes", "between") for path in names(work / kind)}
    assert set(mine[:2]) <= rest
    assert mine[2].exists()
    assert not left.exists()
    assert {path.parent.name for path in rest if path.suffix == ".parquet"} == {"documents", "odd", "extract"}


def test_what_killed_tasks_left_in_scratch_goes(folder: Path) -> None:
    here(folder, {"odd": Odd()})
    scratch = folder / "work" / "scratch"
    (scratch / "tmpx").mkdir(parents=True)
    (scratch / "tmpx" / "records.npy").write_bytes(bytes(1000))
    seen: list[bool] = []

    class Looks(Odd):
        def phases(self, context: Context) -> Iterator[Sequence[Task]]:
            seen.append(scratch.exists())
            return super().phases(context)

    here(folder, {"odd": Looks()})
    assert seen == [False]
    # A worker that dies in this run.
    with LocalExecutor(1, Limits(1 << 30, scratch)) as executor:
        inputs = Input(paths=(str(folder / "input"),), unit_mb=1)
        (folder / "die").touch()
        stages = {"odd": Odd(flags=str(folder), leave=True)}
        run_pipeline(inputs, stages, work=folder / "work", executor=executor)
    assert not (folder / "die").exists()
    assert not scratch.exists()


def test_a_killed_worker_costs_its_task_only(folder: Path) -> None:
    go(folder, "calm")
    (folder / "die").touch()
    run = go(folder, workers=2, stages={"odd": Odd(flags=str(folder)), "total": Total()})
    assert not (folder / "die").exists()
    assert run.repaired == []
    files, calm = (json.loads(state(folder, work))["files"] for work in ("work", "calm"))
    assert files == calm


def test_a_task_whose_worker_died_before_it_answered_is_not_done_twice(folder: Path) -> None:
    run = here(folder, {"odd": Odd()})
    ((task,),) = Odd().phases(Context(folder / "work", run.units[:1], "odd", ()))
    before = finished(folder / "work")
    run_task(task, Limits(1 << 20, folder))
    assert finished(folder / "work") == before
    forget(task.output)
    run_task(task, Limits(1 << 20, folder))
    assert finished(folder / "work") != before


def test_a_mistake_in_a_stage_is_shown_once(folder: Path) -> None:
    with pytest.raises(
        TaskCrashError, match=r"total count-\w+\.parts failed:\n(.*\n)*.*a mistake in a stage"
    ):
        go(folder, stages={"odd": Odd(), "total": Total(crash=True)})
    assert not (folder / "work" / STATE).exists()
    assert tasks_run(go(folder))["odd"] == 0


def hold(folder: Path) -> None:
    go(folder, workers=2, stages={"held": Held(str(folder / "flags"))})


def test_workers_end_with_their_driver(folder: Path) -> None:
    (folder / "flags").mkdir()
    driver = multiprocessing.get_context("spawn").Process(target=hold, args=(folder,))
    driver.start()
    workers = [psutil.Process(number) for number in held(folder / "flags", at_least=2)]
    driver.kill()
    driver.join()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


REAL: Mapping[str, Stage] = {"exact": Exact(), "sentence": Sentence(), "minhash": MinHash()}


def drive(folder: Path) -> None:
    inputs = Input(paths=(str(folder / "prose"),), unit_mb=1)
    work = folder / "work"
    with LocalExecutor(2, Limits(1 << 26, work / "scratch")) as executor:
        run_pipeline(inputs, REAL, work=work, executor=executor)


def write_prose(folder: Path) -> None:
    """Three files with copies, near-copies and repeated sentences."""
    chance = random.Random(0)
    folder.mkdir()
    texts = [prose(chance) for _ in range(1_500)]
    texts += [text.replace(" seen ", " found ", 1) for text in texts[::7]] + texts[::11]
    texts += [f"{prose(chance, 4)} {text}" for text in texts[::9]]
    chance.shuffle(texts)
    for number in range(3):
        with (folder / f"{number}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[number::3])


def finished(work: Path) -> dict[Path, tuple[int, int]]:
    """What tells one writing of a file from the next, of all files that have a manifest."""
    found = {}
    for path in (path for folder in FOLDERS for path in (work / folder).rglob("*.json")):
        with suppress(FileNotFoundError):
            facts = path.stat()
            found[path] = (facts.st_ino, facts.st_mtime_ns)
    return found


def is_worker(process: psutil.Process) -> bool:
    """Not one that has ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        return "spawn_main" in "".join(process.cmdline())
    return False


class Killed:
    """Drivers of FOLDER/work, one after the other, until the pipeline has ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver = self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.kill()
        self.driver.join()

    def _start(self) -> SpawnProcess:
        driver = multiprocessing.get_context("spawn").Process(target=drive, args=(self.folder,))
        driver.start()
        return driver

    def wait_for_work(self, known: int) -> None:
        """Until a task more is finished, or the driver has ended."""
        while self.driver.is_alive() and len(finished(self.folder / "work")) <= known:
            time.sleep(0.01)

    def kill(self, what: str) -> bool:
        """False: the driver has ended before, or has no worker now."""
        if not self.driver.is_alive() or self.driver.pid is None:
            return False
        victims = [psutil.Process(self.driver.pid)]
        if what == "worker":
            victims = [child for child in victims[0].children() if is_worker(child)]
        if not victims:
            return False
        random.choice(victims).kill()
        if what == "driver":
            self.driver.join()
            self.driver = self._start()
        return True


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_workers_and_the_driver_may_be_killed_at_any_moment(tmp_path: Path, kills: int) -> None:
    """From the first finished task to the end; what was finished at a kill is never made again."""
    write_prose(tmp_path / "prose")
    started = time.monotonic()
    drive(tmp_path)
    duration = min(time.monotonic() - started, 3.0)  # a busy machine makes the test no longer
    (tmp_path / "work").rename(tmp_path / "calm")
    chance, done, survived = random.Random(0), 0, 0
    while done < kills:
        before: dict[Path, tuple[int, int]] = {}
        with Killed(tmp_path) as run:
            while run.driver.is_alive():
                run.wait_for_work(len(before))
                time.sleep(chance.uniform(0, duration / 2))
                if done < kills and run.kill(("worker", "driver")[done % 2]):
                    done += 1
                    now = finished(tmp_path / "work")
                    assert before.items() <= now.items()
                    before = now
                    survived += len(before)
            assert run.driver.exitcode == 0
        assert before.items() <= finished(tmp_path / "work").items()
        assert state(tmp_path) == state(tmp_path, "calm")
        assert not list((tmp_path / "work").rglob(".*.tmp"))
        assert not (tmp_path / "work" / "scratch").exists()
        shutil.rmtree(tmp_path / "work")
    assert survived > 5 * kills  # the kills did not all come before there was anything to lose


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


def test_another_version_of_the_package_repeats_everything(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(folder, {"odd": Odd()})
    assert tasks_run(here(folder, {"odd": Odd()})) == {"extract": 0, "odd": 0}
    monkeypatch.setattr("megatron_b2.corpus.pipeline.tasks.__version__", "9.9.9")
    run = here(folder, {"odd": Odd()})
    assert {name: spent.reused for name, spent in run.times.items()} == {"extract": 0, "odd": 0}


def test_damage_reads_as_one_line(tmp_path: Path) -> None:
    assert str(DamagedFileError(tmp_path / "x", "is short")) == f"{tmp_path / 'x'}: is short"
