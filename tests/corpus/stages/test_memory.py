"""What the tasks of `minhash` that look at the whole corpus hold: at most 16 bytes a document, beside buffers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_b2.corpus.neighbours.settings import NearDuplicates
from megatron_b2.corpus.neighbours.verify import ShingleSets
from megatron_b2.corpus.pipeline.checked import read_table, write_parts, write_table
from megatron_b2.corpus.pipeline.config import PipelineConfig
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.run import STATE, run_pipeline
from megatron_b2.corpus.pipeline.stage import Unit
from megatron_b2.corpus.pipeline.tasks import Limits, Task, run_task
from megatron_b2.corpus.stages import minhash
from tests.corpus.models.languages import english_documents
from tests.corpus.pipeline.inline import Inline

DOCUMENTS, UNITS, SHARE = 4_000_000, 40, 0.9
BUFFERS = 24 << 20

MEASURED = """
import sys
from pathlib import Path
from tests.corpus.stages.test_memory import {make}
from megatron_b2.corpus.pipeline.tasks import Limits, run_task

def peak(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1]) * 1024

task = {make}(Path(sys.argv[1]), *sys.argv[2:])
before = peak("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
run_task(task, Limits(32 << 20, Path(sys.argv[1])))
print(peak("VmHWM") - before)
"""


def grown(folder: Path, make: str, *arguments: str) -> int:
    """Bytes by which a process grew at most in one task."""
    command = [sys.executable, "-c", MEASURED.format(make=make), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def units(documents: int, count: int) -> tuple[Unit, ...]:
    size = documents // count
    return tuple(Unit(str(n), Path("x"), n * size, size) for n in range(count))


def whole_task(folder: Path, which: str) -> Task:
    """Pairs of 90 % of the documents, in files of 100,000."""
    first = np.arange(0, int(DOCUMENTS * SHARE) - 1, 2)
    paths = []
    for number, left in enumerate(np.array_split(first, 18)):
        table = minhash._pair_table(np.stack([left, left + 1], 1), jaccard=np.ones(len(left)))
        paths.append(folder / f"{number}.parquet")
        write_table(paths[-1], table, fingerprint="", facts={})
    given = minhash._Whole(NearDuplicates(), units(DOCUMENTS, UNITS))
    together = Task("t", minhash._bring_together, 1, given, tuple(paths), folder / "together.parts")
    if which == "move":
        run_task(together, Limits(1 << 30, folder))
        inputs = (paths[7], together.output)
        return Task(
            "t", minhash._move, 1, minhash._Partition(NearDuplicates(), 0, 4), inputs, folder / "m.parts"
        )
    if which == "cluster":
        return Task("t", minhash._cluster, 1, given, tuple(paths), folder / "cluster.parts")
    return together


@pytest.mark.parametrize("which", ["together", "cluster", "move"])
def test_tasks_over_the_whole_corpus(tmp_path: Path, which: str) -> None:
    found = grown(tmp_path, "whole_task", which)
    print(f"{found / DOCUMENTS:.1f} bytes a document")
    assert found <= 16 * DOCUMENTS + BUFFERS


def one_component(folder: Path) -> Task:
    """8 units of 16 MB of shingle sets each, all documents of which hang together."""
    each, count, shingles = 500, 8, 4_000
    rng = np.random.default_rng(0)
    given = minhash._Compare(NearDuplicates(), 0, units(each * count, count))
    paths = []
    for unit in given.units:
        values = np.sort(rng.integers(0, 1 << 63, (each, shingles), np.uint64), axis=1)
        sets = ShingleSets(
            np.arange(unit.first, unit.first + each), values.ravel(), shingles * np.arange(each + 1)
        )
        paths.append(folder / f"sets-{unit.name}.parts")
        write_parts(paths[-1], [sets.to_arrow()], fingerprint="", facts={})
    pairs = np.sort(rng.permutation(each * count).reshape(-1, 2), axis=1)
    paths.append(folder / "moved.parts")
    write_parts(paths[-1], [minhash._pair_table(pairs[np.argsort(pairs[:, 0])])], fingerprint="", facts={})
    return Task("t", minhash._compare, 1, given, tuple(paths), folder / "edges.parquet")


def test_a_giant_component_keeps_to_the_limit(tmp_path: Path) -> None:
    """Its shingle sets are 128 MB, the limit is 32: two units at a time fit."""
    assert grown(tmp_path, "one_component") <= (32 << 20) + BUFFERS
    assert read_table(tmp_path / "edges.parquet").num_rows == 0


@pytest.mark.parametrize("memory", [1, 200_000])
def test_the_limit_changes_no_result(tmp_path: Path, memory: int) -> None:
    """Documents in pairs across units, some of them near a threshold."""
    (tmp_path / "in").mkdir()
    texts = [text for text in english_documents() if len(text) > 400][:60]
    for unit in range(5):
        with (tmp_path / "in" / f"{unit}.jsonl").open("w") as file:
            for number, text in enumerate(texts[unit * 6 :]):
                words = text.split()
                words[unit * 7 % len(words)] = f"unit{unit if number % 2 else ''}"
                file.write(json.dumps({"text": " ".join(words)}) + "\n")
            file.write(json.dumps({"text": "filling " * (1 << 16)}) + "\n")
    states = []
    for name, limit in (("a", 1 << 30), ("b", memory)):
        inputs = Input(paths=(str(tmp_path / "in"),), unit_mb=1)
        stages = PipelineConfig(work="", input=inputs, stages=("minhash",)).chosen()
        executor = Inline(tmp_path / "scratch", 0)
        executor._limits = Limits(limit, tmp_path / "scratch")
        run_pipeline(inputs, stages, work=tmp_path / name, executor=executor)
        states.append(json.loads((tmp_path / name / STATE).read_text()))
    assert len(states[0]["units"]) >= 3
    assert states[0] == states[1]
    (edges,) = (tmp_path / "a" / "between" / "minhash").glob("edges-*.parquet")
    table = read_table(edges)
    assert table.num_rows > 100
    assert table.equals(table.sort_by([("left", "ascending"), ("right", "ascending")]))
