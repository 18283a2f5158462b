"""`b2 scaling` from a table to a prediction, and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_b2.cli.main import main
from tests.scaling.laws import TRUTH, compute_samples, point_rows, write_points

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def points(tmp_path: Path) -> Path:
    return write_points(tmp_path / "points.json", point_rows(compute_samples(noise=1e-4, seed=1)))


def test_from_points_to_a_prediction(
    points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit, out = tmp_path / "fit.json", tmp_path / "prediction.json"
    assert main(["scaling", "fit", str(points), "--out", str(fit), "--compute", "6ND", "--draws", "300"]) == 0
    text = capsys.readouterr().out
    assert "L = a*C^b + L_inf" in text
    assert "7 runs, which deviate by at most 0.0" in text
    assert "without n3.02e+09: predicted" in text
    assert "not fitted: L = E + A/N^alpha + B/D^beta needs at least 3 token budgets" in text
    report = json.loads(fit.read_text())["laws"]["compute"]
    assert report["constants"]["L_inf"] == pytest.approx(TRUTH["L_inf"], abs=0.05)
    assert report["largest_left_out"]["inside_band"]
    assert fit.with_suffix(".png").read_bytes().startswith(PNG)
    command = ["scaling", "predict", str(fit), "--model", "preset:baichuan2-13b", "--tokens", "2.6e12"]
    assert main([*command, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{12_609_541_120 * 2.6 / 3019.33e6:.2f} times the largest fitted run" in text
    assert "95 % band" in text
    assert "warning: 11 times the compute" in text
    assert json.loads(out.read_text())["tokens"] == 2.6e12
    assert main([*command[:4], "baichuan2-13b", *command[5:]]) == 0  # the name alone
    assert text.startswith(capsys.readouterr().out)
    assert main([*command[:4], "baichuan3", *command[5:]]) == 2
    assert "there is no configuration file baichuan3" in capsys.readouterr().err
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    assert main(["scaling", "best", str(fit), "--flops", "1e21"]) == 2
    assert "no law of size and tokens" in capsys.readouterr().err


def test_the_same_points_give_the_same_fit(points: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one.json", "two.json")]
    for file in files:
        assert main(["scaling", "fit", str(points), "--out", str(file), "--draws", "200"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def rows_with(index: int, **changes: object) -> list[dict[str, object]]:
    rows = point_rows(compute_samples())
    rows[index] |= changes
    return rows


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (point_rows(compute_samples())[:3], (), "3 constants and there are 3 runs: at least 4 are needed"),
        (point_rows(compute_samples(truth={"a": 1e-3, "b": 0.1, "L_inf": 1.0})), (), "the loss does not fall with compute"),
        (rows_with(1, valid_ce=float("nan")), (), "point 2 (n5.16e+07): valid_ce = nan is not a positive loss"),
        (rows_with(1, tokens="many"), (), "point 2 (n5.16e+07): tokens = 'many' is not a positive number"),
        (rows_with(1, valid_ce=None), (), "n5.16e+07: no valid_ce at the end of the run"),
        (point_rows(compute_samples()), ("--loss", "train_ce"), "no train_ce at the end of the run; fit the other loss"),
        ([row | {"final": False} for row in point_rows(compute_samples())], (), "no final points"),
        ([], (), "has no points"),
        (point_rows(compute_samples()), ("--draws", "5"), "--draws 5: must be 100 or more"),
        (point_rows(compute_samples()), ("--confidence", "95"), "--confidence 95.0: must be at least 0.5 and below 1"),
    ],
)  # fmt: skip
def test_bad_points_are_one_message(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, object]],
    options: tuple[str, ...],
    message: str,
) -> None:
    points, fit = write_points(tmp_path / "points.json", rows), tmp_path / "fit.json"
    assert main(["scaling", "fit", str(points), "--out", str(fit), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not fit.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "not a file that `b2 scaling collect` wrote"),
        ('{"format": "megatron_b2 scaling points 1", "points": [{"run": "r"}]}', "point 1 has no num_parameters"),
        ('{"format": "megatron_b2 scaling points 1", "points": [3]}', "point 1 is no object: 3"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, message: str
) -> None:
    path = tmp_path / "points.json"
    if text is not None:
        path.write_text(text)
    assert main(["scaling", "fit", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_fit_is_named(points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = tmp_path / "fit.json"
    assert main(["scaling", "fit", str(points), "--out", str(fit), "--draws", "100"]) == 0
    document = json.loads(fit.read_text())
    del document["laws"]["compute"]["origin"]
    fit.write_text(json.dumps(document))
    assert main(["scaling", "predict", str(fit), "--model", "preset:toy"]) == 2
    assert "the fit of compute is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("collect", "nowhere", "--out", "x.json"), "nowhere: no such run"),
        (("collect", "nowhere", "--out", "x.json", "--window", "0"), "--window 0: must be 1 or more"),
        (("predict", "no.json", "--model", "preset:toy"), "no.json: cannot be read"),
        (("ladder", "--out", "x", "--budget", "1e12", "--nodes", "0"), "--nodes 0: must be 1 or more"),
        (("ladder", "--out", "x", "--budget"), "--budget needs at least one value"),
        (("ladder", "--out", "x", "--budget", "1e12", "--time", "a day"), "--time 'a day': write it as SLURM does"),
        (("ladder", "--out", "x", "--budget", "lots"), "--budget 'lots': write tokens, as 1e12"),
        (("ladder", "--out", "x", "--budget", "1e12", "--base", "no.toml"), "there is no configuration file no.toml"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["scaling", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
