"""`b2 corpus remember` and `exact.seen`: what an earlier corpus had goes, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_b2.cli.main import main
from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.config import load_pipeline
from megatron_b2.corpus.pipeline.report import State
from megatron_b2.corpus.pipeline.run import run_pipeline
from megatron_b2.errors import ConfigError
from tests.corpus.models.languages import chinese_documents, english_documents
from tests.corpus.pipeline.inline import Inline

ENGLISH = english_documents()[:200]


def run(folder: Path, texts: Sequence[str], *overrides: str) -> Path:
    """The work folder of a run, of the stage `exact` unless `overrides` say otherwise."""
    (folder / "in").mkdir(parents=True, exist_ok=True)
    (folder / "in" / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path, work = folder / "p.toml", folder / "work"
    path.write_text(f'work = "{work}"\nstages = ["exact"]\n[input]\npaths = ["{folder}/in"]\n')
    config = load_pipeline(path, overrides)
    run_pipeline(config.input, config.chosen(), work=work, executor=Inline(folder / "scratch", 0))
    return work


def reasons(folder: Path, texts: Sequence[str], *overrides: str) -> list[str]:
    """Why each document went."""
    state = State.of(run(folder, texts, *overrides))
    (attributes,) = state.attribute_paths(state.units[0]).values()
    found: list[str] = read_table(attributes).column("exact.reason").to_pylist()
    return found


def test_texts_of_an_earlier_corpus_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier, chinese = ENGLISH[:100], chinese_documents(20)
    reasons(tmp_path / "a", [*earlier, *earlier[:5]])
    different = len({"".join(text.lower().split()) for text in earlier})
    a, b = str(tmp_path / "a.bloom"), str(tmp_path / "b.bloom")
    assert main(["corpus", "remember", str(tmp_path / "a" / "work"), "--out", a]) == 0
    assert f'{different} different texts; use it as exact.seen = ["{a}"]' in capsys.readouterr().out
    reasons(tmp_path / "b", chinese)
    assert main(["corpus", "remember", str(tmp_path / "b" / "work"), "--out", b]) == 0

    new = [text for text in ENGLISH[100:] if text not in earlier]
    texts = [*earlier[:30], earlier[40].upper().replace(" ", "\n"), *chinese[3:9], *new, new[0]]
    found = reasons(tmp_path / "new", texts, "--exact.seen", a, b)
    seen = "the text was in an earlier corpus"
    assert set(found[:37]) <= {seen, "the text has occurred before"}
    assert found[:37].count(seen) == 30 + 1 + 6 - (30 - len(set(earlier[:30])))
    assert seen not in found[37:]
    assert found[-1] == "the text has occurred before"
    assert reasons(tmp_path / "new", texts)[:37].count(seen) == 0


def test_another_filter_under_the_same_name_is_looked_up_again(tmp_path: Path) -> None:
    reasons(tmp_path / "a", ENGLISH[:10])
    out = tmp_path / "seen"
    assert main(["corpus", "remember", str(tmp_path / "a" / "work"), "--out", str(out)]) == 0
    texts = ENGLISH[5:15]
    first = reasons(tmp_path / "b", texts, "--exact.seen", str(out))
    reasons(tmp_path / "a", ENGLISH[:12])
    assert main(["corpus", "remember", str(tmp_path / "a" / "work"), "--out", str(out)]) == 0
    second = reasons(tmp_path / "b", texts, "--exact.seen", str(out))
    assert [bool(reason) for reason in first] == [True] * 5 + [False] * 5
    assert [bool(reason) for reason in second] == [True] * 7 + [False] * 3


def test_wrong_filters_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reasons(tmp_path / "a", ENGLISH[:10], "--exact.folded", "false")
    work, out = str(tmp_path / "a" / "work"), str(tmp_path / "seen")
    assert main(["corpus", "remember", work, "--out", out]) == 0
    (tmp_path / "text").write_text("no filter")
    with pytest.raises(ConfigError) as error:
        reasons(tmp_path / "b", ENGLISH[:10], "--exact.seen", out, str(tmp_path / "text"), "none.bloom")
    assert len(error.value.problems) == 3
    for part in (
        "seen is of texts with folded = False, but exact.folded is True",
        "text: not a Bloom",
        "none.bloom: ",
    ):
        assert part in str(error.value)
    assert main(["corpus", "remember", work, "--out", out, "--false-positive-rate", "0"]) == 2
    run(tmp_path / "c", ENGLISH[:3], "--stages", "normalize")
    assert main(["corpus", "remember", str(tmp_path / "c" / "work"), "--out", out]) == 2
    assert "the run had no stage exact" in capsys.readouterr().err


def test_an_empty_corpus_has_nothing_to_remember(tmp_path: Path) -> None:
    work, out = run(tmp_path / "a", []), tmp_path / "seen"
    assert main(["corpus", "remember", str(work), "--out", str(out)]) == 0
    assert set(reasons(tmp_path / "b", ENGLISH[:9], "--exact.seen", str(out))) == {""}
