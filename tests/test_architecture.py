"""The shape of the code: imports go down only, files stay short, and light commands stay light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import edgegt
from edgegt.profile import profile_names

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edgegt"
# From the top. A module imports from its own layer or from those below; a folder counts as one module.
LAYERS = {
    "command line and Python": "cli __main__ trainer",
    "comparison": "comparison",
    "order": "run",
    "stages": "calibrate full trainee stopping frozen recovery rounds held prepare subject use talk conversation"
    " outlook survey doctor report export card onnx plain hf floats",
    "parts of a run": "train signals recompute skipping hidden evaluate keeper checkpoint selection importance patch"
    " speed budget job pretrained merge decoding engine sampling detokenize",
    "model and data": "model pieces trace graph architecture classifier attention experts fused head loss optimizer"
    " flops store stream source data quant native",
    "surroundings": "folder log guard watch pacing sensors home process tensorboard",
    "without torch": "calibrated prefix chunks options device profile host cost rates memory case solver"
    " baselines problem integers cases least planner value explain frontier metrics",
    "files": "sealed disk",
    "ground": "errors units version cache",
}
LEVEL = {name: level for level, names in enumerate(LAYERS.values()) for name in names.split()}
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
MAY_PRINT = ("edgegt/cli/", "edgegt/log.py")


def module_of(path: Path) -> str:
    """'edgegt/quant/linear.py' -> 'quant', the unit that layers are made of."""
    return path.parts[1].removesuffix(".py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Every module of edgegt that a file imports anywhere, in full: 'edgegt.data.read'."""
    found: set[str] = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "edgegt"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            if (node.module or "").split(".")[0] != "edgegt":
                continue
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                inner = ROOT / Path(*name.split("."))
                found.add(name if inner.with_suffix(".py").is_file() or inner.is_dir() else str(node.module))
    return found


def dotted(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def test_every_module_has_a_layer_and_every_layer_its_modules() -> None:
    assert {module_of(path) for path in MODULES} - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize("path", [path for path in MODULES if module_of(path) != "__init__"], ids=str)
def test_imports_go_down(path: Path) -> None:
    mine = LEVEL[module_of(path)]
    up = [name for name in imported(path) if name != "edgegt" and LEVEL[name.split(".")[1]] < mine]
    assert not up, f"{path} imports from a layer above its own"
    assert "edgegt" not in imported(path), f"{path} imports the package's own front"


def test_no_import_cycle_between_files() -> None:
    # A folder's __init__ and its files are one unit to others, so the folder itself is left out of its files' edges.
    graph = {dotted(path): imported(path) - {dotted(path.parent / "__init__.py")} for path in MODULES}
    order = list(TopologicalSorter(graph).static_order())
    assert len(order) >= len(MODULES)


def test_names_say_what_a_module_is_for() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "base"}
    assert not [path for path in MODULES if vague & {part.removesuffix(".py").lstrip("_") for part in path.parts}]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_file_is_short_and_says_why_it_exists(path: Path) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{path} has {lines} lines"
    assert ast.get_docstring(tree_of(path)), f"{path} has no docstring"


@pytest.mark.parametrize("path", [path for path in MODULES if not path.as_posix().startswith(MAY_PRINT)], ids=str)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
    assert not prints, f"{path} prints in lines {prints}"


def loaded_after(code: str) -> tuple[set[str], str]:
    """Top-level modules in a fresh interpreter after `code`, and what it printed before."""
    tail = "\nimport json, sys; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code + tail], cwd=ROOT, capture_output=True, text=True, check=True)
    shown, names = done.stdout.rstrip().rsplit("\n", 1)
    return set(json.loads(names)), shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--help"], "personalise"), (["run", "--help"], "--round-epochs"), (["devices"], profile_names()[-1])],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(words: list[str], expected: str) -> None:
    code = f"from edgegt.cli import main\ntry:\n    main({words!r})\nexcept SystemExit as end:\n    assert not end.code"
    loaded, shown = loaded_after(code)
    assert expected in shown
    heavy = {"torch", "transformers", "bitsandbytes", "scipy", "numpy", "matplotlib", "rich"}
    assert not loaded & (heavy | {"rouge_score", "nltk", "sacrebleu", "tensorboardX", "shtab"})


def test_the_layer_without_torch_is_without_torch() -> None:
    names = [*LAYERS["without torch"].split(), *LAYERS["ground"].split()]
    loaded, _ = loaded_after("\n".join(f"import edgegt.{name}" for name in names))
    assert "edgegt" in loaded
    assert not loaded & {"torch", "transformers", "bitsandbytes"}


def test_public_names_are_sorted_and_all_there() -> None:
    assert edgegt.__all__ == sorted(edgegt.__all__)
    assert set(edgegt.__all__) == set(edgegt._HOMES)
    for name in edgegt.__all__:
        assert getattr(edgegt, name) is not None
        assert not isinstance(getattr(edgegt, name), ModuleType), f"{name} is a module, also after it was imported"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgegt.nothing  # noqa: B018


@pytest.mark.parametrize("before", ["", "import edgegt.run; "], ids=["first", "after the module"])
def test_run_is_the_function_and_not_the_module_of_its_name(before: str) -> None:
    _, shown = loaded_after(f"{before}from edgegt import RunOptions, run; print(type(run).__name__, run.__module__)")
    assert shown.strip() == "function edgegt.run"
