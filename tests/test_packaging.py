"""Pins, version and packaged files agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_b2

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_requirement_is_pinned_once_and_as_the_constraints_say() -> None:
    constraints = pins("constraints")
    direct = pins("runtime") | pins("deepspeed") | pins("dev")
    assert direct.items() <= constraints.items()
    assert len(direct) == sum(len(pins(name)) for name in ("runtime", "deepspeed", "dev"))
    build = re.findall(r'"([\w-]+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert dict(build).items() <= constraints.items()
    assert all(re.fullmatch(r"[\w.]+", version) for version in constraints.values()), (
        "no local versions, no hashes"
    )


def test_version_stands_in_the_changelog() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {megatron_b2.__version__}" in changelog


def test_make_help_lists_every_target() -> None:
    output = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "quickstart", "test", "test-all", "lint", "bench"):
        assert f"make {target} " in output


def test_continuous_integration_runs_lint_and_test() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")
    assert script.read_text(encoding="utf-8").rstrip().endswith("make lint test")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_named_in_code_exist(path: Path) -> None:
    """Paths into the repository in code blocks and between backquotes; placeholders such as <name> are none."""
    text = path.read_text(encoding="utf-8")
    code = re.findall(r"```.*?```|`[^`\n]+`", text, flags=re.DOTALL)
    folders = "examples|tools|docs|tests|megatron_b2|csrc|requirements"
    named = {name for part in code for name in re.findall(rf"(?<![\w/.-])(?:{folders})/[\w/.-]+", part)}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_first_use_of_load_and_tokenizer_imports_them() -> None:
    code = "import megatron_b2; print(megatron_b2.tokenizer.load_tokenizer, megatron_b2.load)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "load_tokenizer" in done.stdout
