"""What version of the project's own code a result was made by, so that a cache is not read by other code."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def code_version(*modules: str) -> str:
    """Hash of the sources of these modules and of every module of the project that they import, at any depth.

    Args:
        modules: dotted names, `medicalgpt.data.encoding` or `eval_pipeline` for example.

    Returns:
        64 hex digits.

    Raises:
        ModuleNotFoundError: a name is not a module of the project.
    """
    digest = hashlib.sha256()
    for file in import_closure(*modules):
        digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def import_closure(*modules: str) -> list[Path]:
    """The files of these modules and of all project modules that they import, sorted. Errors are those above."""
    found: dict[Path, None] = {}
    waiting = []
    for name in modules:
        if (file := _file_of(name)) is None:
            raise ModuleNotFoundError(f"{name} is not a module of this project")
        waiting.append(file)
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = None
            waiting.extend(_imported_files(file, file.stat().st_mtime_ns))
    return sorted(found)


def _file_of(module: str) -> Path | None:
    """The source file of a module of the project; None for any other."""
    place = ROOT.joinpath(*module.split("."))
    candidates = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@cache
def _imported_files(file: Path, modified: int) -> tuple[Path, ...]:
    """Project files that one file imports, inside functions as well. `modified` makes a changed file another key."""
    names = {name for node in _executed(ast.parse(file.read_bytes())) for name in _imported_names(node)}
    return tuple(path for name in sorted(names) if (path := _file_of(name)))


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")):
            yield from _executed(child)


def _imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        # What is imported from a package may be one of its modules.
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []
