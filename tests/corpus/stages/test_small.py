"""Corpora of few documents, or of none that is left, through all stages with their default settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_b2.corpus.pipeline.config import ALL_STAGES, load_pipeline
from megatron_b2.corpus.pipeline.report import Report, make_report
from megatron_b2.corpus.pipeline.run import run_pipeline
from tests.corpus.models.languages import english_documents
from tests.corpus.pipeline.inline import Inline
from tests.corpus.semantic.paraphrases import paraphrased_documents


def reported(folder: Path, files: list[list[str]], *overrides: str) -> Report:
    """A run with a unit a file."""
    (folder / "in").mkdir()
    for number, texts in enumerate(files):
        lines = [json.dumps({"text": text, "language": "en"}) + "\n" for text in texts]
        (folder / "in" / f"{number}.jsonl").write_text("".join(lines))
    path = folder / "pipeline.toml"
    path.write_text(f'work = "{folder}/work"\n[input]\npaths = ["{folder}/in"]\n')
    config = load_pipeline(path, overrides)
    run_pipeline(config.input, config.chosen(), work=folder / "work", executor=Inline(folder / "scratch", 0))
    return make_report(folder / "work")


@pytest.mark.parametrize("count", [0, 3, 100])
def test_all_stages_by_default(tmp_path: Path, count: int) -> None:
    report = reported(tmp_path, [english_documents()[:count]])
    assert list(report.total.stages) == list(ALL_STAGES)
    assert report.total.raw.documents == count
    assert report.total.stages["cluster"].removed.documents == 0
    assert report.total.kept.documents >= 0.6 * count


def test_nothing_is_left_for_the_later_stages(tmp_path: Path) -> None:
    report = reported(
        tmp_path, [english_documents()[:40], english_documents()[40:70]], "--language.keep", "sw"
    )
    assert report.total.stages["language"].removed.documents == 70
    assert report.total.kept.documents == 0


def test_fewer_are_left_than_topics_were_asked_for(tmp_path: Path) -> None:
    """One unit keeps nothing, the other less than there are topics."""
    files = [[f"第{n}段话是用中文写的。" for n in range(30)], english_documents()[:7]]
    stages = ("--stages", "normalize", "language", "minhash", "embed", "cluster")
    report = reported(tmp_path, files, *stages, "--cluster.clusters", "50", "--language.keep", "en")
    removed = {name: stage.removed.documents for name, stage in report.total.stages.items()}
    assert removed == {"normalize": 0, "language": 30, "minhash": 0, "embed": 0, "cluster": 0}


def test_a_small_corpus_loses_its_paraphrases(tmp_path: Path) -> None:
    originals, paraphrases = paraphrased_documents(25)
    stages = ("--stages", "normalize", "minhash", "embed", "cluster")
    report = reported(tmp_path, [originals, paraphrases], *stages, "--cluster.threshold", "0.85")
    assert report.total.stages["minhash"].removed.documents == 0
    assert 23 <= report.total.stages["cluster"].removed.documents <= 25
