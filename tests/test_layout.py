"""The shape of the tree: which module may import which, and how long a file and a function may become."""

import ast
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the ground up. A module may import from its own wing and from the floors below it.
FLOORS = (
    {"logs", "refusals"},
    {"errors", "launch"},
    {"files", "encodings"},
    {"code_version", "adapter_args"},
    {"args"},
    {"parser"},
    {"models", "readers"},
    {"formats"},
    {"data"},
    {"serving", "evaluation"},
    {"training", "rewards", "rag"},
)
LONGEST_FILE = 700
LONGEST_FUNCTION = 80
# Each with its reason. The bound is today's length, rounded up: longer needs a reason of its own.
LONG_FILES = {
    "template.py": (1_050, "a catalogue: Jinja sources and their facts, read one entry at a time"),
    "openai_api.py": (1_400, "one protocol: a request's way through it is shortest in one file"),
    "ppo_training.py": (1_080, "one algorithm, read from top to bottom"),
    "grpo_training.py": (930, "one trainer on TRL's, and the rules of which flags work together"),
}
LONG_FUNCTIONS: dict[str, tuple[int, str]] = {}

PROGRAMS = sorted(ROOT.glob("*.py"))
PACKAGE = sorted((ROOT / "medicalgpt").rglob("*.py"))
SOURCES = [*PROGRAMS, *PACKAGE, *sorted((ROOT / "docs").glob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(file: Path) -> set[str]:
    """Dotted names that a file imports at any depth, what only a type checker reads left out."""
    return imports_in(tree_of(file))


def imports_in(tree: ast.Module) -> set[str]:

    def visit(node: ast.AST):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            elif not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
                yield from visit(child)

    return set(visit(tree))


def wing_of(module: str) -> str | None:
    """`data` of `medicalgpt.data.rows.Rows`; None for what is not in the package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "medicalgpt" and len(parts) > 1 else None


def floor_of(wing: str) -> int:
    return next(number for number, wings in enumerate(FLOORS) if wing in wings)


@pytest.mark.parametrize("file", PACKAGE, ids=name_of)
def test_imports_point_downward(file):
    own = file.relative_to(ROOT / "medicalgpt").with_suffix("").parts[0]
    if own == "__init__":
        assert not imports_of(file) & {"medicalgpt"}
        return
    assert any(own in wings for wings in FLOORS), f"{own} is on no floor: add it to FLOORS"
    wrong = sorted(
        module
        for module in imports_of(file)
        if (wing := wing_of(module)) and wing != own and floor_of(wing) >= floor_of(own)
    )
    assert not wrong, f"{name_of(file)} imports from its own floor or above: {', '.join(wrong)}"


def test_no_import_goes_round_in_a_circle():
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in PACKAGE}
    below = {
        name: {
            known for module in imports_of(file) for known in (module, module.rpartition(".")[0]) if known in modules
        }
        - {name}
        for name, file in modules.items()
    }
    while leaves := [name for name, targets in below.items() if not targets & below.keys()]:
        for name in leaves:
            del below[name]
    assert not below, f"imports in a circle: {', '.join(sorted(below))}"


@pytest.mark.parametrize("file", [*PROGRAMS, *PACKAGE], ids=name_of)
def test_programs_are_not_imported(file):
    # The catalogue of templates is data with two functions, meant to be imported by programs, not by the package.
    programs = {program.stem for program in PROGRAMS} - ({"template"} if file in PROGRAMS else set())
    wrong = sorted({module.split(".")[0] for module in imports_of(file)} & programs)
    assert not wrong, f"{name_of(file)} imports the program {', '.join(wrong)}"


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_no_private_name_is_imported(file):
    wrong = [
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medicalgpt")
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not wrong, f"{name_of(file)} imports {', '.join(wrong)}: make it public, or move what needs it"


def test_files_are_short_enough_to_be_read():
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCES}
    long = {name: length for name, length in lengths.items() if length > LONG_FILES.get(name, (LONGEST_FILE,))[0]}
    assert not long, f"longer than {LONGEST_FILE} lines, or than their exception allows: {long}"
    needless = [name for name in LONG_FILES if lengths.get(name, 0) <= LONGEST_FILE]
    assert not needless, f"these need no exception any more: {needless}"


def test_functions_are_short_enough_to_be_read():
    lengths = {
        f"{name_of(file)}:{node.name}": node.end_lineno - node.lineno + 1
        for file in SOURCES
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    long = {
        name: length for name, length in lengths.items() if length > LONG_FUNCTIONS.get(name, (LONGEST_FUNCTION,))[0]
    }
    assert not long, f"longer than {LONGEST_FUNCTION} lines, or than their exception allows: {long}"
    needless = [name for name in LONG_FUNCTIONS if lengths.get(name, 0) <= LONGEST_FUNCTION]
    assert not needless, f"these need no exception any more: {needless}"


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_the_search_path_is_left_alone(file):
    wrong = [node.lineno for node in ast.walk(tree_of(file)) if ast.unparse(node) in ("sys.path", "site.addsitedir")]
    assert not wrong, f"{name_of(file)} touches sys.path in line {wrong}"


@pytest.mark.parametrize("file", [*PROGRAMS, *PACKAGE], ids=name_of)
def test_the_environment_is_not_written_at_import(file):
    def at_import(node: ast.AST):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield child
                yield from at_import(child)

    wrong = [
        node.lineno
        for node in at_import(tree_of(file))
        if (isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load) and "environ" in ast.unparse(node))
        or (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).endswith(("environ.setdefault", "environ.update", "putenv"))
        )
    ]
    assert not wrong, f"{name_of(file)} writes the environment while it is imported, in line {wrong}"


def programs_in(file: Path) -> Iterator[ast.Module]:
    """The programs that a test holds as text, to start them in other processes."""
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "import " in node.value:
            with suppress(SyntaxError, ValueError):
                yield ast.parse(textwrap.dedent(node.value))


def test_tests_do_not_import_each_other():
    names = {file.stem for file in TESTS if file.stem.startswith("test_")}

    def imported(tree: ast.Module) -> set[str]:
        return {part for module in imports_in(tree) for part in module.split(".")} & names

    # A program that a test starts may import what it shares with that test.
    found = {
        name_of(file): sorted(
            imported(tree_of(file)).union(*(imported(program) - {file.stem} for program in programs_in(file)))
        )
        for file in TESTS
    }
    wrong = {name: tests for name, tests in found.items() if tests}
    assert not wrong, f"tests import from other tests: move what they share into a separate module: {wrong}"
