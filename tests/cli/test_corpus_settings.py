"""`b2 corpus settings`, `rules` and `run --help`: complete, and true to what a file may set."""

from __future__ import annotations

import re

import pytest

from megatron_b2.cli.main import main
from megatron_b2.config.fields import settings
from megatron_b2.config.keys import dotted
from megatron_b2.corpus.pipeline.config import PipelineConfig
from megatron_b2.corpus.signals.rules import RULES


def test_every_setting_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "settings"]) == 0
    found, table = [], ""
    for line in capsys.readouterr().out.splitlines():
        if heading := re.fullmatch(r"\[(.+)\]", line):
            table = f"{heading[1]}."
        elif entry := re.match(r"  (\w+): .*(required|default .+)$", line):
            found.append(f"{table}{entry[1]}")
    assert sorted(found) == sorted(dotted(setting.key) for setting in settings(PipelineConfig))


def test_some_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "settings", "minhash", "cluster"]) == 0
    output = capsys.readouterr().out
    assert "threshold: a number, default 0.8\n      Least Jaccard similarity" in output
    assert re.findall(r"^\[(.*)\]$", output, re.MULTILINE) == ["minhash", "cluster"]
    assert main(["corpus", "settings", "minhsah"]) == 2
    assert "there is no table minhsah; tables are input, execution, normalize" in capsys.readouterr().err


def test_rules(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corpus", "rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [rule.name for rule in RULES]
    assert "gopher_stop_words: stop_words >= 2  (Rae et al. 2021, A.1.1; only en)" in lines
    assert next(line for line in lines if line.startswith("c4_curly")).endswith("; off unless it is set)")


def test_help_has_an_example_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["corpus", "run", "--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Example: b2 corpus run ") for line in lines) == 3
    assert all(line.count("b2 corpus run") <= 1 for line in lines)
