"""What `run` and `report` say of a corpus, and that no report mixes two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import pytest

from megatron_b2.cli.main import main
from megatron_b2.corpus.pipeline.executor import TaskCrashError
from megatron_b2.corpus.pipeline.explain import explain
from megatron_b2.corpus.pipeline.extract import Input
from megatron_b2.corpus.pipeline.page import LANGUAGES, draw_funnel, examples
from megatron_b2.corpus.pipeline.report import Amount, Funnel, Report, StageReport, State
from megatron_b2.corpus.pipeline.run import STATE, run_pipeline
from megatron_b2.corpus.pipeline.stage import Stage
from megatron_b2.corpus.pipeline.tasks import forget
from megatron_b2.corpus.stages.normalize import Normalize
from megatron_b2.errors import InputError
from tests.corpus.pipeline.examples import Odd, Total, write_documents
from tests.corpus.pipeline.inline import Inline, run_here


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline over three good records, two malformed ones and an empty one."""
    records = [{"id": str(n), "text": f"document {n}"} for n in range(3)]
    lines = [*map(json.dumps, records), "no JSON", '{"id": "no text"}', '{"text": ""}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "pipeline.toml"
    work, given = json.dumps(str(tmp_path / "work")), json.dumps(str(tmp_path / "in.jsonl"))
    text = f'work = {work}\nstages = ["exact"]\n[input]\npaths = [{given}]\n[execution]\nworkers = 1\n'
    path.write_text(text)
    return path


def test_what_is_left_out_of_the_input_is_said(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "run", "--verify", str(pipeline)]) == 0
    assert "left out of the input: 2 malformed records, 1 without text" in capsys.readouterr().out
    folder = pipeline.parent
    assert main(["corpus", "report", str(folder / "work"), "--out", str(folder / "report")]) == 0
    assert "input: malformed = 2, empty = 1" in capsys.readouterr().out


def test_a_missing_pipeline_is_one_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "run", str(tmp_path / "none.toml")]) == 2
    assert capsys.readouterr().err == f"error: there is no configuration file {tmp_path / 'none.toml'}\n"


def test_a_run_that_stopped_half_way_has_no_result(tmp_path: Path) -> None:
    """Its folder holds attributes of two runs; none of the readers may take them for one."""
    write_documents(tmp_path / "in", files=1, documents=100)
    work = tmp_path / "work"

    def go(stages: dict[str, Stage]) -> str:
        inputs = Input(paths=(str(tmp_path / "in"),))
        run_pipeline(inputs, stages, work=work, executor=Inline(tmp_path / "scratch"))
        return (work / STATE).read_text()

    before = go({"odd": Odd(), "total": Total()})
    with pytest.raises((TaskCrashError, ZeroDivisionError)):
        go({"odd": Odd(flags="x"), "total": Total(crash=True)})
    with pytest.raises(InputError, match="did not end in this folder yet"):
        State.of(work)
    assert go({"odd": Odd(), "total": Total()}) == before


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"units": [1], "stages": []}', "\xff"])
def test_a_damaged_state_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / STATE).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=rf"{STATE} is damaged; give `b2 corpus run` again"):
        State.of(tmp_path)


def test_a_file_is_no_work_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be read: Not a directory"):
        State.of(tmp_path / "file")


def test_the_picture_shows_all_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More languages than colours: the others are a bar of their own, so that the bars are as long as 100 %."""
    from matplotlib.axes import Axes

    report = Report()
    for number in range(LANGUAGES + 3):
        size = 10 * (number + 1)
        parts = (Amount(1, size), {"exact": StageReport(Amount(0, size // 2))}, Amount(1, size // 2))
        report.languages[f"l{number}"] = Funnel(*parts)
        report.total.raw.add(1, size)
        report.total.stages.setdefault("exact", StageReport()).removed.add(0, size // 2)
    drawn = []
    barh = Axes.barh
    monkeypatch.setattr(
        Axes, "barh", lambda self, *a, **k: drawn.append((k["label"], a[1])) or barh(self, *a, **k)
    )
    draw_funnel(report, tmp_path / "funnel.png")
    assert drawn[-1][0] == "others"
    assert [sum(widths) for widths in zip(*(widths for _, widths in drawn), strict=True)] == pytest.approx(
        [100, 50]
    )


def test_a_picture_of_no_documents(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    draw_funnel(Report(), tmp_path / "funnel.png")
    assert (tmp_path / "funnel.png").stat().st_size > 0
    assert not recwarn.list


def test_explain_shows_a_text_that_kept_its_size(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": "x", "text": "one line\\rand another"}\n')
    inputs = Input(paths=(str(tmp_path / "in.jsonl"),))
    executor = Inline(tmp_path / "scratch")
    run_pipeline(inputs, {"normalize": Normalize()}, work=tmp_path / "work", executor=executor)
    (said,) = explain(tmp_path / "work", "x")[0].stages
    assert said.text == "one line\nand another"


def test_training_says_what_it_leaves_out(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = pipeline.parent / "in.jsonl", pipeline.parent / "model"
    assert main(["corpus", "train-perplexity", "--input", str(given), "--out", str(out)]) == 0
    assert f"2 malformed records left out, the first {given}:4: not valid JSON" in capsys.readouterr().err


def test_progress_counts_what_this_run_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of earlier runs would make the rate too high, and the time left too short."""
    shown: list[tuple[str, float, int]] = []

    class Bar:
        def __init__(self, title: str, *, total: float, unit: str) -> None:
            self._title, self._total, self._count = title, total, 0

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            shown.append((self._title, self._total, self._count))

        def advance(self, amount: int) -> None:
            self._count += amount

    write_documents(tmp_path / "in")
    run_here(tmp_path, stages=("exact",))
    (path, *others) = sorted((tmp_path / "work" / "attributes" / "exact").glob("*.parquet"))
    assert others
    forget(path)
    monkeypatch.setattr("megatron_b2.corpus.pipeline.run.ProgressBar", Bar)
    run_here(tmp_path, stages=("exact",))
    assert shown == [("exact", 1, 1)]


def test_mix_replaces_nothing_but_a_mix(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "run", str(pipeline)]) == 0
    work, mine = pipeline.parent / "work", pipeline.parent / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    command = ["corpus", "mix", str(work), "--workers", "1", "--overwrite", "--out"]
    for folder in (mine, work, work / "documents"):
        assert main([*command, str(folder)]) == 2
        assert "is not empty and no earlier result (no mix.json in it)" in capsys.readouterr().err
    assert (mine / "thesis.txt").read_text() == "years of work"
    for _ in range(2):
        assert main([*command, str(pipeline.parent / "mixed")]) == 0
    assert "no document is kept" not in capsys.readouterr().out
    assert main([*command, str(pipeline.parent / "mixed"), "--where", "1 > 2"]) == 0
    assert "no document is kept" in capsys.readouterr().out


def test_a_work_folder_that_cannot_be_made(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pipeline.parent / "file").touch()
    assert main(["corpus", "run", str(pipeline), "--work", str(pipeline.parent / "file" / "work")]) == 2
    assert "the work folder cannot be written: Not a directory" in capsys.readouterr().err


def test_a_stage_without_settings_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "settings", "pii"]) == 0
    assert capsys.readouterr().out == "\n[pii]\n  no settings\n"


def test_examples_of_one_id_show_their_own_texts(tmp_path: Path) -> None:
    lines = [json.dumps({"id": "same", "text": text}) for text in ("first", "second", "third")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text("\n".join(lines) + "\n")
    run_here(tmp_path, stages=("exact",))
    shown = examples(State.of(tmp_path / "work"))["exact"]
    assert [example.excerpt for example in shown] == ["second", "third"]


def test_no_result_yet_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"pipeline\.json is missing: `b2 corpus run` did not end"):
        State.of(tmp_path)
