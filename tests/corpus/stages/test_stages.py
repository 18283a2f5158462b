"""The stages on a small corpus with planted defects: each finds its own and nothing else."""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_b2.cli.main import main
from megatron_b2.corpus.pipeline.checked import read_table
from megatron_b2.corpus.pipeline.config import ALL_STAGES, load_pipeline
from megatron_b2.corpus.pipeline.explain import explain
from megatron_b2.corpus.pipeline.mix import Group, folder_of, mix, write_blend
from megatron_b2.corpus.pipeline.report import State, make_report
from megatron_b2.corpus.pipeline.run import run_pipeline
from megatron_b2.documents import read_documents
from megatron_b2.errors import ConfigError, InputError
from tests.corpus.pipeline.inline import Inline
from tests.corpus.prose import prose


def planted() -> dict[str, str]:
    """Documents by id; what is wrong with one is in its name."""
    chance = random.Random(1)
    documents = {f"good-{i}": prose(chance) for i in range(60)}
    first = documents["good-0"]
    documents["exact"] = first.upper().replace("\n", " \n")
    documents["short"] = "Too short to be of any use."
    # One word in every third sentence: no paragraph and no three sentences in a row are the same.
    pieces = documents["good-1"].split(" seen ")
    joints = [" found " if n % 3 == 2 else " seen " for n in range(len(pieces) - 1)]
    documents["near"] = "".join(piece + joint for piece, joint in zip(pieces, [*joints, ""], strict=True))
    paragraph = documents["good-2"].split("\n\n")[1]
    documents["paragraph"] = "\n\n".join([prose(chance), paragraph, prose(chance)])
    question = "WHICH   river crosses-the silver forest, behind the old harbour of the northern island today?"
    documents["eval"] = f"{prose(chance)} {question}"
    documents["pii"] = f"{prose(chance)} Write to jane.doe@example.org or call +44 20 7946 0958 about it."
    documents["spam"] = prose(chance) + " online casino, casino bonus, free spins and sports betting! " * 6
    documents["chinese"] = "在河边的村庄里，有一位老师和一位画家，他们在早晨看见了山上的光。" * 3
    documents["controls"] = prose(chance).replace(" ", "\u0000 ", 3) + "\r\nschÃ¶n"
    return documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "input.jsonl").open("w", encoding="utf-8") as file:
        for name, text in planted().items():
            record = {"id": name, "text": text, "source": "trusted" if name == "good-5" else "web"}
            file.write(json.dumps(record) + "\n")
        file.write(json.dumps({"id": "good-3", "text": prose(random.Random(9)), "source": "web"}) + "\n")
        file.write("{broken\n")
    question = "Which river crosses the silver forest behind the old harbour of the northern island today?"
    (folder / "eval.jsonl").write_text(
        json.dumps({"id": "q1", "text": question}) + "\n" + json.dumps({"id": "q2", "text": "Who?"}) + "\n"
    )
    (folder / "pipeline.toml").write_text(
        f"""
work = "{folder}/work"
[input]
paths = ["{folder}/input.jsonl"]
[language]
keep = ["en"]
[heuristics.rules]
gopher_duplicate_5_grams = 0.9
gopher_duplicate_6_grams = 0.9
gopher_duplicate_7_grams = 0.9
gopher_duplicate_8_grams = 0.9
gopher_duplicate_9_grams = 0.9
gopher_duplicate_10_grams = 0.9
[embed]
dimension = 8
[cluster]
threshold = 1.0
[decontaminate]
paths = ["{folder}/eval.jsonl"]
[safety]
trusted_sources = ["^trusted$"]
"""
    )
    config = load_pipeline(folder / "pipeline.toml")
    run_pipeline(config.input, config.chosen(), work=folder / "work", executor=Inline(folder / "scratch"))
    return folder


def attributes(folder: Path) -> dict[str, dict[str, Any]]:
    """Columns of all stages, by document."""
    state = State.of(folder / "work")
    (unit,) = state.units
    rows: list[dict[str, Any]] = [{} for _ in read_table(state.unit_path(unit)).to_pylist()]
    for path in state.attribute_paths(unit).values():
        for row, more in zip(rows, read_table(path).to_pylist(), strict=True):
            row |= more
    return {str(row["id"]) if n < len(planted()) else f"{row['id']} again": row for n, row in enumerate(rows)}


def test_every_stage_removes_what_was_planted_for_it(folder: Path) -> None:
    rows = attributes(folder)
    gone = {
        name: stage
        for name, row in rows.items()
        for stage in ALL_STAGES
        if row[f"{stage}.keep"] is False
    }
    assert gone == {
        "chinese": "language",
        "exact": "exact",
        "good-3 again": "exact",
        "short": "heuristics",
        "near": "minhash",
        "spam": "safety",
        "eval": "decontaminate",
    }
    assert rows["exact"]["exact.reason"] == "the text has occurred before"
    assert rows["good-3 again"]["exact.reason"] == "the id has occurred before"
    assert rows["short"]["heuristics.reason"] == "gopher_words_min"
    assert rows["near"]["minhash.similarity"] > 0.8
    assert rows["eval"]["decontaminate.items"] == ["eval.jsonl:q1"]


def test_texts_are_normalized_cut_and_cleaned(folder: Path) -> None:
    documents, rows = planted(), attributes(folder)
    assert rows["controls"]["normalize.text"].endswith("\nschön")
    assert "\x00" not in rows["controls"]["normalize.text"]
    start, end = rows["paragraph"]["sentence.cuts"]
    removed = documents["paragraph"].encode()[start:end].decode()
    assert removed.strip() == documents["good-2"].split("\n\n")[1]
    assert "<EMAIL>" in rows["pii"]["pii.text"]
    assert "jane.doe" not in rows["pii"]["pii.text"]
    assert (rows["pii"]["pii.email"], rows["pii"]["pii.phone"]) == (1, 1)
    assert rows["good-7"]["pii.text"] is None


def test_weights(folder: Path) -> None:
    rows = attributes(folder)
    assert rows["good-5"]["safety.trusted"]
    assert rows["good-5"]["weights.weight"] > rows["good-6"]["weights.weight"]
    powers = 2 * np.log2([row["weights.weight"] for row in rows.values() if row["weights.weight"]])
    np.testing.assert_allclose(powers, np.round(powers), atol=1e-9)


def test_explain_names_the_duplicates(folder: Path) -> None:
    said = {stage.name: stage for stage in explain(folder / "work", "near")[0].stages}
    assert said["minhash"].verdict == "REMOVED: near-duplicate"
    assert said["minhash"].relatives == ("good-1",)
    assert said["weights"].verdict == "not seen: it had gone before"


def test_explain_shows_every_document_of_an_id(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = explain(folder / "work", "good-3")
    verdicts = [next(stage for stage in one.stages if stage.name == "exact") for one in (first, second)]
    assert [said.verdict for said in verdicts] == ["kept", "REMOVED: the id has occurred before"]
    assert [said.relatives for said in verdicts] == [("good-3",), ("good-3",)]
    assert first.row < second.row
    path = folder / "explained.json"
    assert main(["corpus", "explain", str(folder / "work"), "good-3", "--json", str(path)]) == 0
    assert capsys.readouterr().out.count("REMOVED: the id has occurred before") == 1
    assert [one["row"] for one in json.loads(path.read_text())] == [first.row, second.row]


def test_explain_names_where_a_paragraph_has_occurred(folder: Path) -> None:
    for name, other in (("paragraph", "good-2"), ("good-2", "paragraph")):
        said = {stage.name: stage for stage in explain(folder / "work", name)[0].stages}
        assert said["sentence"].relatives == (other,)
        assert said["paragraph"].relatives == ()


def test_report_and_mix_by_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work, out = str(folder / "work"), folder / "out"
    assert main(["corpus", "report", work, "--out", str(folder / "report")]) == 0
    plain = json.loads((folder / "report" / "report.json").read_text())
    total = plain["total"]
    # Nothing but normalization, cuts and placeholders changes the size of a text that stays.
    changing = {"normalize", "sentence", "paragraph", "pii"}
    assert {name for name, stage in total["stages"].items() if stage["cut_bytes"]} <= changing
    shares = [stage["percent_of_bytes"] for stage in total["stages"].values()]
    assert sum(shares) + total["kept"]["percent_of_bytes"] == pytest.approx(100)
    assert plain["input"]["malformed"] == 1
    assert (folder / "report" / "funnel.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report" / "report.html").read_text()
    assert "near-duplicate" in page
    assert "good-3" in page
    assert "input: malformed = 1, empty = 0" in page
    assert "decontaminate: items = " in page
    assert main(["corpus", "mix", work, "--out", str(out), "--workers", "1"]) == 0
    summary = json.loads((out / "mix.json").read_text())["groups"]
    kept = make_report(folder / "work").total.kept
    assert sum(group["documents"] for group in summary.values()) == kept.documents
    assert sum(group["bytes"] for group in summary.values()) == kept.bytes
    blend = (out / "blend.toml").read_text()
    assert blend.count("[[data.sources]]") == len(summary)
    capsys.readouterr()
    assert main(["corpus", "mix", work, "--out", str(out), "--overwrite", "--where", '"no.column" > 1']) == 2
    assert 'unable to find column "no.column"' in capsys.readouterr().err
    assert (out / "blend.toml").read_text() == blend


def test_the_blend_has_no_weight_of_zero(tmp_path: Path) -> None:
    groups = {"much": Group("en", 8.0, bytes=10**12), "little": Group("en", 0.125, bytes=10)}
    write_blend(tmp_path / "blend.toml", groups, tmp_path)
    sources = tomllib.loads((tmp_path / "blend.toml").read_text())["data"]["sources"]
    assert [source["prefix"] for source in sources] == ["tokens/much", "tokens/little"]
    assert sources[1]["weight"] == pytest.approx(0.125 * 10 / (8 * 10**12), rel=1e-9, abs=0)


@given(st.lists(st.text(max_size=5), unique=True, max_size=20))
@example(["a/b", "a_b", "", "_", "%", ".", "..", "../x"])
def test_every_group_has_a_folder_of_its_own(groups: list[str]) -> None:
    names = [folder_of(group) for group in groups]
    assert len(set(names)) == len(groups)
    assert not [name for name in names if not name or "/" in name or name.startswith(".")]


def test_small_groups_join_the_nearest_of_their_language(folder: Path) -> None:
    apart = mix(folder / "work", folder / "apart", least_bytes=0)
    languages = {group.language for group in apart.values()}
    smallest, *others = sorted(apart, key=lambda name: apart[name].bytes)
    small = apart[smallest]
    least = {small.bytes + 1: len(apart) - 1, 10**9: len(languages)}
    for least_bytes, expected in least.items():
        joined = mix(folder / "work", folder / "joined", least_bytes=least_bytes, overwrite=True)
        assert len(joined) == expected < len(apart)
        assert sum(group.bytes for group in joined.values()) == sum(group.bytes for group in apart.values())
        for name, group in joined.items():
            place = folder / "joined" / name
            assert sorted(f"{name}/{path.name}" for path in place.iterdir()) == sorted(group.files)
            documents = list(read_documents([place]))
            assert len(documents) == group.documents
            assert {document.language for document in documents} == {group.language}
    joined = mix(folder / "work", folder / "joined", least_bytes=small.bytes + 1, overwrite=True)
    (home,) = (name for name in joined if any(smallest in file for file in joined[name].files))
    distance = {
        name: abs(np.log(apart[name].weight / small.weight))
        for name in others
        if apart[name].language == small.language
    }
    assert distance[home] == min(distance.values())


def test_mix_takes_a_condition(folder: Path) -> None:
    groups = mix(folder / "work", folder / "chosen", where='"safety.trusted"')
    assert sum(group.documents for group in groups.values()) == 1


def test_another_order_of_work_gives_the_same_files(folder: Path) -> None:
    config = load_pipeline(folder / "pipeline.toml", ["--work", str(folder / "again")])
    run_pipeline(config.input, config.chosen(), work=folder / "again", executor=Inline(folder / "scratch", 5))
    assert (folder / "again" / "pipeline.json").read_text() == (folder / "work" / "pipeline.json").read_text()


def test_wrong_settings_are_reported_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load_pipeline(
            folder / "pipeline.toml",
            ["--minhash.bandss", "3", "--language.keep", "en", "--input.unit-mb", "x", "--stages", "exakt"],
        )
    assert len(error.value.problems) == 3
    assert "did you mean --minhash.bands?" in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("minhash.threshold", "1.5"),
        ("normalize.max-blank-lines", "-1"),
        ("sentence.run-length", "-1"),
        ("paragraph.least-bytes", "-4"),
        ("embed.sample", "0"),
        ("embed.dimension", "0"),
        ("weights.limits", "8 0.1"),
    ],
)
def test_a_value_out_of_range_names_the_setting(folder: Path, setting: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{setting.replace('-', '_')} .*must"):
        load_pipeline(folder / "pipeline.toml", [f"--{setting}", *value.split()])


def test_cluster_needs_embed(folder: Path) -> None:
    config = load_pipeline(
        folder / "pipeline.toml", ["--stages", "normalize", "cluster", "--work", str(folder / "x")]
    )
    with pytest.raises(ConfigError, match="put embed before it"):
        run_pipeline(config.input, config.chosen(), work=folder / "x", executor=Inline(folder / "scratch"))


def test_missing_models_are_named(folder: Path) -> None:
    config = load_pipeline(folder / "pipeline.toml", ["--work", str(folder / "y"), "--stages", "language"])
    stages = {"language": type(config.language)(model=str(folder / "none.bin"))}
    with pytest.raises(InputError, match="no such file"):
        run_pipeline(config.input, stages, work=folder / "y", executor=Inline(folder / "scratch"))
