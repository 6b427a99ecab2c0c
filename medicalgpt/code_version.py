"""Which version of the project's own code made a result, so that a cache is never read by other code."""

import ast
import hashlib
from collections.abc import Iterable
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
    for name in modules:
        if _source_file(name) is None:
            raise ModuleNotFoundError(f"{name} is not a module of this project")
    found: set[Path] = set()
    waiting = {file for name in _with_packages(modules) if (file := _source_file(name))}
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting |= _imported_files(file, file.stat().st_mtime_ns)
    return sorted(found)


def _source_file(module: str) -> Path | None:
    """The source file of a module of the project; None for any other."""
    place = ROOT.joinpath(*module.split("."))
    candidates = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def _with_packages(modules: Iterable[str]) -> set[str]:
    """The names, and those of the packages that they are in, which an import runs as well."""
    split = [name.split(".") for name in modules]
    return {".".join(parts[:end]) for parts in split for end in range(1, len(parts) + 1)}


@cache
def _imported_files(file: Path, modified: int) -> frozenset[Path]:
    """Project files that one file imports, inside functions as well. `modified` makes a changed file another key."""
    names = _imported_names(ast.parse(file.read_bytes()), file)
    return frozenset(path for name in _with_packages(names) if (path := _source_file(name)))


def _imported_names(tree: ast.Module, file: Path) -> set[str]:
    """Dotted names that the code may import; not those that only a type checker sees."""
    names: set[str] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{file}:{node.lineno}: a relative import, which this project does not use")
            # What is imported from a package may be one of its modules.
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        waiting.extend(ast.iter_child_nodes(node))
    return names


def _is_type_checking(test: ast.expr) -> bool:
    """Whether this is `TYPE_CHECKING` or `typing.TYPE_CHECKING`."""
    return getattr(test, "id", getattr(test, "attr", None)) == "TYPE_CHECKING"
