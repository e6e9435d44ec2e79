"""The house keeps its shape: file sizes, who imports whom, few flags, no knots."""

import argparse
import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("0*.py"))
SHARED = sorted(path for path in ROOT.glob("common/**/*.py") if path.name != "__init__.py")
TOOLS = sorted(ROOT.glob("tools/*.py"))
FLOORS = [  # a room imports from lower floors only
    ["run_folder"],
    ["records", "lexicon", "stats", "throttle", "failures"],
    ["constraints"],
    ["prompts", "texts", "spoilt", "mutation", "answers", "store", "policy"],
    ["endpoint", "engine", "trainers", "reward_model", "characters", "pairs", "search"],
    ["client", "memory", "signs", "novelty"],
    ["judge", "debate", "greetings", "evaluators", "flaws", "likelihood"],
    ["rewards", "watch", "hard", "cost", "people", "bought", "readings", "critic", "tiny_model"],
    ["grpo_trainer"],
    ["figures"],
    ["pages"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# The stand-ins of --offline, and who may ask for them: inside a function.
STAND_INS = {("client", "critic"), ("endpoint", "critic"), ("policy", "tiny_model")}
SLOW = {"torch", "transformers", "vllm", "trl", "peft", "datasets", "matplotlib", "numpy", "sklearn", "pandas"}
LONGEST_SCRIPT, LONGEST_ROOM, SCRIPTS_TOGETHER, TOGETHER = 400, 350, 1950, 8860  # lines
FLAGS = {"04_grpo": 28}  # of its own; the others 24
COMPREHENSIONS = 8  # in 100 lines of a script's code
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def size(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names: `common.records`, `common.offline.critic`, `numpy`; of things in a module also the module's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(tree: ast.AST) -> set[str]:
    """The rooms of common/ that a file imports, by their last name."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.stem for path in SHARED}
    return {files[name] for name in imports(tree) if name in files}


def at_module_level(tree: ast.Module) -> ast.Module:
    return ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])


def lines_of_code(path: Path, tree: ast.Module) -> int:
    """Without blank lines, comments and docstrings."""
    lines = path.read_text(encoding="utf-8").splitlines()
    code = {number for number, line in enumerate(lines, 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            code -= set(range(node.lineno, node.end_lineno + 1))
    return len(code)


def deepest_knot(node: ast.AST, depth: int = 0) -> int:
    """How many comprehensions stand inside one another."""
    depth += isinstance(node, COMPREHENSION)
    return max([depth, *(deepest_knot(child, depth) for child in ast.iter_child_nodes(node))])


@pytest.mark.parametrize("path", SCRIPTS + SHARED, ids=lambda path: path.stem)
def test_a_file_is_short_and_has_no_knots(path: Path) -> None:
    tree = parse(path)
    assert size(path) <= (LONGEST_SCRIPT if path in SCRIPTS else LONGEST_ROOM)
    assert deepest_knot(tree) <= 2, "two comprehensions inside a third: write a loop"
    assert not SLOW & {name.split(".")[0] for name in imports(at_module_level(tree))}, "--help has to be instant"


def test_the_whole_is_short() -> None:
    assert sum(map(size, SCRIPTS)) <= SCRIPTS_TOGETHER
    assert sum(map(size, SCRIPTS + SHARED)) <= TOGETHER
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1600
    assert sum(path.read_text(encoding="utf-8").count("# fmt: skip") for path in SCRIPTS + SHARED) <= 10


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.stem)
def test_a_room_imports_from_lower_floors_only(path: Path) -> None:
    assert path.stem in FLOOR, "give the new room a floor"
    tree = parse(path)
    higher = {room for room in rooms(tree) if FLOOR[room] >= FLOOR[path.stem]}
    assert all((path.stem, room) in STAND_INS for room in higher), higher
    if "offline" not in path.parts:
        assert not rooms(at_module_level(tree)) & {"flaws", "critic", "tiny_model"}


@pytest.mark.parametrize("path", SCRIPTS + TOOLS, ids=lambda path: path.stem)
def test_a_script_needs_no_other_script_and_no_stand_in(path: Path) -> None:
    assert 'import_module("0' not in path.read_text(encoding="utf-8")
    assert not rooms(parse(path)) & {"flaws", "critic", "tiny_model"}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_few_flags_each_in_a_titled_group(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [call for call in ast.walk(parse(path)) if isinstance(call, ast.Call) and adds_a_flag(call)]
    assert len(own) <= FLAGS.get(path.stem, 24)
    parsers: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *rest: object) -> None:
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    monkeypatch.setattr(sys, "argv", [str(path)])
    with pytest.raises(SystemExit):
        importlib.import_module(path.stem).parse_args()
    assert [action.dest for action in parsers[0]._optionals._group_actions] == ["help"]


def adds_a_flag(call: ast.Call) -> bool:
    first = call.args[0] if call.args else None
    return isinstance(first, ast.Constant) and str(first.value).startswith("--") and bool(call.keywords)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_prefers_loops_to_comprehensions(path: Path) -> None:
    tree = parse(path)
    comprehensions = sum(isinstance(node, COMPREHENSION) for node in ast.walk(tree))
    per_100 = 100 * comprehensions / lines_of_code(path, tree)
    print(f"{path.stem}: {per_100:.1f} comprehensions per 100 lines of code")
    assert per_100 <= COMPREHENSIONS
