"""What keeps the house in order: imports point one way, everything public is documented, config files hold every default."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import hf_compact
from hf_compact.config import MethodConfig, Recipe
from hf_compact.methods import METHODS

REPOSITORY = Path(__file__).parents[1]
ROOT = REPOSITORY / "hf_compact"
ORDER = [
    "errors",
    "version",
    "products",
    "stored",
    "functional",
    "fitting",
    "kernels",
    "config",
    "select",
    "arch",
    "reorder",
    "groups",
    "calibration",
    "scoring",
    "distributed",
    "budget",
    "report",
    "sensitivity",
    "checkpoint",
    "footprint",
    "capture",
    "results",
    "speed",
    "distillation",
    "measurement",
    "planner",
    "profiling",
    "training",
    "methods",
    "verify",
    "hf",
    "recovery",
    "api",
    "harness",
    "benchmark",
    "cli",
]
SLICE_ORDER = [
    "config", "functional", "joint", "layer", "model", "cache", "allocation", "apply", "exchange", "optimizer", "cric", "experts", "callback", "__init__",
]  # fmt: skip
#: Slices that are no stage of a recipe, so no entry of METHODS: a PEFT method, and those that change training and not the model.
OTHER_SLICES = {"compacter", "distillation", "one_bit_adam", "sorted_net"}
#: The package's public face and its entry point import downwards from above everything.
TOP = ("__init__.py", "__main__.py")
#: The fresh process of a verification registers the plugin by importing the package, once.
ALLOWED_SELF_IMPORTS = {("verify.py", "hf_compact")}

SOURCES = sorted(ROOT.rglob("*.py"))
ORDERED = [path for path in SOURCES if path.relative_to(ROOT).as_posix() not in TOP]
PURE = [path for path in SOURCES if "functional" in path.relative_to(ROOT).with_suffix("").parts or path.parent.name == "kernels"]
SLICES = [path for path in ORDERED if path.is_relative_to(ROOT / "methods") and path.parent != ROOT / "methods"]
CONFIG_FILES = sorted((REPOSITORY / "configs" / "methods").glob("*.yaml"))


def relative(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, dotted module) of every import statement; `from . import x` gives `x`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module),) if node.module else ((node.level, alias.name) for alias in node.names)


def internal_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Targets below the package, as parts."""
    package = path.relative_to(ROOT).parts[:-1]
    for level, name in imports(path):
        if level:
            assert level - 1 <= len(package), f"{relative(path)} imports from above the package"
            yield (*package[: len(package) - level + 1], *name.split("."))


def test_sources_are_seen():
    assert len(SOURCES) >= 25
    assert len(ORDERED) == len(SOURCES) - len(TOP)
    assert {"api", "config", "capture", "functional", "methods", "hf"} <= {
        p.relative_to(ROOT).parts[0].removesuffix(".py") for p in ORDERED
    }


@pytest.mark.parametrize("path", ORDERED, ids=relative)
def test_imports_point_left(path):
    here = path.relative_to(ROOT).with_suffix("").parts
    assert here[0] in ORDER, f"{relative(path)} has no place in the order of imports"
    for target in internal_imports(path):
        if target[0] == here[0]:
            continue
        assert ORDER.index(target[0]) < ORDER.index(here[0]), f"{relative(path)} imports {'.'.join(target)}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_of_the_package_are_relative(path):
    absolute = {name for level, name in imports(path) if level == 0 and name.split(".")[0] == "hf_compact"}
    allowed = {name for file, name in ALLOWED_SELF_IMPORTS if path == ROOT / file}
    assert absolute == allowed, f"{relative(path)} imports the package by its own name"


@pytest.mark.parametrize("path", SLICES, ids=relative)
def test_slices_stand_alone(path):
    here = path.relative_to(ROOT).with_suffix("").parts
    assert len(here) == 3
    assert here[2] in SLICE_ORDER, f"{relative(path)}: a slice holds {', '.join(SLICE_ORDER)}"
    for target in internal_imports(path):
        if target[0] == "methods":
            assert target[1] == here[1], f"{relative(path)} imports the sibling slice {target[1]}"
            assert SLICE_ORDER.index(target[2]) < SLICE_ORDER.index(here[2]), f"{relative(path)} imports {target[2]}"


def test_slices_are_seen():
    assert len(SLICES) >= 5
    assert {path.parent.name for path in SLICES} == set(METHODS) | OTHER_SLICES


def test_pure_files_are_seen():
    assert {"hf_compact/functional/gram.py", "hf_compact/functional/packing.py"} <= {relative(path) for path in PURE}
    assert sum(path.name == "functional.py" for path in PURE) == sum(
        (ROOT / "methods" / name / "functional.py").exists() for name in {*METHODS, *OTHER_SLICES}
    )


@pytest.mark.parametrize("path", PURE, ids=relative)
def test_pure_math_imports_numbers_only(path):
    for target in internal_imports(path):
        assert target[0] == "functional", f"{relative(path)} imports {'.'.join(target)}"
    outside = {name.split(".")[0] for level, name in imports(path) if level == 0}
    assert outside <= {"torch", "numpy", "constriction", *sys.stdlib_module_names}, f"{relative(path)} imports {outside}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_everything_public_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{relative(path)} has no header"
    for owner in [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]:
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{relative(path)}:{node.lineno} {node.name} has no docstring"


def test_every_config_of_a_stage_is_a_name_of_the_package():
    assert {method.config.__name__ for method in METHODS.values()} <= set(hf_compact.__all__)


def test_every_method_has_a_config_file():
    assert [path.stem for path in CONFIG_FILES] == sorted(METHODS)
    assert len(CONFIG_FILES) >= 1


@pytest.mark.parametrize("path", CONFIG_FILES, ids=relative)
def test_config_file_holds_every_default(path):
    text = path.read_text(encoding="utf-8")
    expected = Recipe(stages=(MethodConfig.registry[path.stem](),))
    assert text.startswith(f"# hf-compact compress MODEL --recipe {relative(path)} --output DIR\n")
    assert yaml.safe_load(text) == expected.to_dict()
    assert Recipe.from_yaml(path) == expected
