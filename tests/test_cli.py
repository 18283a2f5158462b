"""The `b2` command and `b2 config`."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

import megatron_b2
from megatron_b2.cli import config as config_command
from megatron_b2.cli.config_arguments import Flag, parse
from megatron_b2.cli.main import COMMANDS, main, run
from megatron_b2.config import RunConfig, from_dict, load_config
from megatron_b2.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    output = capsys.readouterr().out
    for command, line in COMMANDS.items():
        assert f"  {command:<12}{line}" in output


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron_b2 {megatron_b2.__version__}\n"


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert capsys.readouterr().err == "error: there is no command 'pretrian'; did you mean `b2 pretrain`?\n"
    assert main(["xyz"]) == 2
    assert "commands are corpus, tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_main_and_help(command: str) -> None:
    spec = find_spec(f"megatron_b2.cli.{command}")
    assert spec is not None, f"megatron_b2/cli/{command}.py is missing"
    assert spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    targets = {
        target.id for node in ast.walk(tree) for target in assigned(node) if isinstance(target, ast.Name)
    }
    assert "main" in functions
    assert "HELP" in targets


def assigned(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def test_run_turns_errors_for_users_into_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(argv: Sequence[str] | None) -> int:
        raise DataError(f"bad {argv}")

    def interrupted(argv: Sequence[str] | None) -> int:
        raise KeyboardInterrupt

    def buggy(argv: Sequence[str] | None) -> int:
        raise ZeroDivisionError

    assert run(broken, ["x"]) == 2
    assert capsys.readouterr().err == "error: bad ['x']\n"
    assert run(interrupted) == 130
    assert run(lambda argv: 75) == 75
    with pytest.raises(ZeroDivisionError):
        run(buggy)


def test_module_and_package_run_as_commands() -> None:
    for module in ("megatron_b2", "megatron_b2.cli.main", "megatron_b2.cli.config"):
        result = subprocess.run(
            [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0
        assert "config" in result.stdout


def test_show_prints_a_file_that_loads_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["config", "show", "preset:toy", "--optim.max-lr", "3e-3"]) == 0
    output = capsys.readouterr().out
    assert "max_lr = 0.003  # command line" in output
    assert "hidden_size = 256  # preset:toy:" in output
    (tmp_path / "shown.toml").write_text(output, encoding="utf-8")
    assert (
        load_config(tmp_path / "shown.toml").config
        == load_config("preset:toy", ["--optim.max-lr=3e-3"]).config
    )


def test_show_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "preset:baichuan2-13b", "--world-size", "64", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert from_dict(RunConfig, shown["config"]) == load_config("preset:baichuan2-13b").config
    assert shown["provenance"]["optim.max_lr"].startswith("preset:baichuan2-13b:")
    assert shown["deepspeed"]["gradient_accumulation_steps"] == 16
    assert shown["num_parameters"] == 13_896_668_160


def test_show_prints_the_deepspeed_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["config", "show", "preset:baichuan2-7b", "--world-size=8", "--train.micro-batch-size=4"]) == 0
    )
    output = capsys.readouterr().out
    generated = json.loads(output[output.index("\n{") :])
    assert generated["gradient_accumulation_steps"] == 32
    assert "1024 sequences a step = 8 data-parallel ranks x 32 micro-batches x 4" in output


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "check", "preset:toy"]) == 0
    assert "no problems" in capsys.readouterr().out
    assert main(["config", "check", "preset:toy", "--training", "--world-size", "3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 3 configuration errors:")
    assert "data.sources is empty" in error


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "presets", "--json"]) == 0
    rows = {row["preset"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["preset:baichuan2-7b"]["parameters"] == 7_505_973_248
    assert main(["config", "presets"]) == 0
    assert "7,505,973,248" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "`b2 config` has no action 'shwo'; did you mean show?"),
        (["show"], "CONFIG is missing"),
        (["show", "preset:toy", "--world-size", "two"], "--world-size must be a whole number of ranks"),
        (["show", "preset:toy", "--world-size"], "--world-size needs a value: --world-size N"),
        (["presets", "toy"], "`b2 config presets` takes only --json, got toy"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_help_shows_every_setting_with_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "preset:toy", "--train.seed", "77", "--help"]) == 0
    words = capsys.readouterr().out.split()
    for word in ("--optim.max-lr", "--deepspeed.KEY", "--world-size", "77"):
        assert word in words
    assert main(["config", "show", "--help"]) == 0
    assert "required" in capsys.readouterr().out


def test_parse_ignores_what_launchers_add() -> None:
    arguments = ["--local_rank=1", "a.toml", "--train.steps", "3", "--dry-run", "--limit", "5"]
    parsed = parse(arguments, usage="", description="", flags={"dry-run": Flag(""), "limit": Flag("", "N")})
    assert parsed is not None
    assert (parsed.path, parsed.overrides) == ("a.toml", ("--train.steps", "3"))
    assert parsed.flags == {"dry-run": "", "limit": "5"}
    with pytest.raises(ConfigError, match="CONFIG is missing"):
        parse([], usage="", description="")


def test_documentation_lists_the_settings_as_they_are() -> None:
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert config_command.settings_markdown() in text, (
        "put the output of `b2 config settings` into docs/config.md"
    )
