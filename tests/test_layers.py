"""The architecture, held by machine: who may import whom, and what no module may do (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_b2"

# A module imports only from layers above its own line, and from its own layer.
LAYERS = (
    ("errors",),
    ("files",),
    ("config",),
    ("parallel", "ops", "documents", "tokenizer"),
    ("model", "data", "corpus"),
    ("pipeline",),
    ("optim", "checkpoint"),
    ("api",),
    ("engine",),
    ("training",),
    ("layouts",),
    ("planner", "scaling"),
    ("testing",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Beside the order: a tokenizer is trained on documents, an operation may span ranks.
SIDEWAYS = {("tokenizer", "documents"), ("ops", "parallel")}

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 60
MUTABLE_CALLS = {"list", "dict", "set", "defaultdict", "Counter", "OrderedDict", "deque", "bytearray"}
MUTABLE_LITERALS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)

FILES = sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything a module imports, also inside functions."""
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            prefix = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*prefix, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def upward(layer: str, imported: str) -> bool:
    """Whether a module of `layer` may not import from the layer `imported`."""
    if layer == imported or (layer, imported) in SIDEWAYS:
        return False
    return RANK[imported] >= RANK[layer]


def test_every_folder_has_a_place_in_the_order() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert folders | modules == set(RANK)


def test_no_upward_import() -> None:
    wrong = []
    for path in FILES:
        layer = (*path.relative_to(PACKAGE).with_suffix("").parts, "")[0]
        if layer in ("__init__", "__main__"):
            continue
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "megatron_b2" or len(parts) < 2 or parts[1] in ("__version__", "_cpu"):
                continue
            if upward(layer, parts[1]):
                wrong.append(f"{where(path, line)}: {layer} imports {name}")
    assert wrong == []


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        ("deepspeed", ("engine/deepspeed.py",)),
        ("triton", ("ops/", "testing/kernels/")),
        ("torch", ("parallel/", "ops/", "model/", "data/", "pipeline/", "optim/", "checkpoint/", "engine/", "training/", "testing/",
                   "cli/", "api.py")),
        ("transformers", ("testing/",)),
        ("ray", ("corpus/pipeline/ray_cluster.py",)),
        ("submitit", ("corpus/pipeline/slurm.py",)),
    ],
)  # fmt: skip
def test_libraries_stay_where_they_belong(library: str, homes: tuple[str, ...]) -> None:
    wrong = [
        where(path, line)
        for path in FILES
        for line, name in imports(path)
        if name.split(".")[0] == library and not str(path.relative_to(PACKAGE)).startswith(homes)
    ]
    assert wrong == []


def test_environment_is_read_in_one_place() -> None:
    def reads_environment(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv", "environb")

    wrong = [
        where(path, node.lineno)
        for path in FILES
        if path != PACKAGE / "parallel" / "launch.py"
        for node in ast.walk(tree_of(path))
        if reads_environment(node)
    ]
    assert wrong == []


def test_no_module_level_mutable_state() -> None:
    """No `global`, and no list, dict or set bound at module level, except __all__ and constants whose type
    (Mapping, Sequence) lets mypy reject a change."""
    wrong = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Global):
                wrong.append(f"{where(path, node.lineno)}: global {', '.join(node.names)}")
        for statement in tree_of(path).body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                if names != ["__all__"] and is_mutable(statement.value) and not is_read_only(statement):
                    wrong.append(f"{where(path, statement.lineno)}: {', '.join(names)} is mutable")
    assert wrong == []


def is_read_only(statement: ast.Assign | ast.AnnAssign) -> bool:
    """An UPPER_CASE constant annotated Mapping[...] or Sequence[...], also inside Final[...]."""
    if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
        return False
    names = [node.id for node in ast.walk(statement.annotation) if isinstance(node, ast.Name)]
    outer = next((name for name in names if name != "Final"), "")
    return statement.target.id.isupper() and outer in ("Mapping", "Sequence", "Collection")


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        function = value.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        return name in MUTABLE_CALLS
    return isinstance(value, MUTABLE_LITERALS)


def test_no_import_is_guarded() -> None:
    """An import that may fail is an error where it is used, never a silent fallback."""
    wrong = [
        where(path, inner.lineno)
        for path in FILES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Try) and any(catches_import_error(handler) for handler in node.handlers)
        for inner in node.body
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert wrong == []


def catches_import_error(handler: ast.ExceptHandler) -> bool:
    names = (
        {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)} if handler.type else set()
    )
    return not names or bool(names & {"ImportError", "ModuleNotFoundError", "Exception"})


def test_sizes() -> None:
    wrong = []
    for path in FILES:
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > MAX_MODULE_LINES:
            wrong.append(f"{where(path, 1)}: {length} lines, more than {MAX_MODULE_LINES}")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{where(path, node.lineno)}: {node.name} has {length} lines")
    assert wrong == []


def test_modules_say_what_they_are() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in FILES
        if ast.get_docstring(tree_of(path)) is None and path.read_text(encoding="utf-8").strip()
    ]
    assert silent == []


BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Blocker())
"""


def run_without(blocked: tuple[str, ...], code: str) -> str:
    program = BLOCKER.format(blocked=blocked) + code
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_package_and_command_need_no_heavy_library() -> None:
    blocked = (
        "torch",
        "deepspeed",
        "triton",
        "transformers",
        "matplotlib",
        "numpy",
        "sentencepiece",
        "rich",
        "tyro",
    )
    output = run_without(
        blocked, "import megatron_b2\nfrom megatron_b2.cli.main import main\nmain(['--help'])\n"
    )
    assert "pretrain" in output


def test_every_module_imports_without_deepspeed_and_triton() -> None:
    kernels = PACKAGE / "ops" / "triton"
    names = [
        module_name(path)
        for path in FILES
        if path != PACKAGE / "engine" / "deepspeed.py" and not path.is_relative_to(kernels)
    ]
    names = [name for name in names if not name.endswith("__main__")]
    code = f"import importlib\nfor name in {names!r}:\n    importlib.import_module(name)\nprint('imported')\n"
    assert run_without(("deepspeed", "triton"), code).endswith("imported\n")
