"""The version of the code that a cache's key holds: the sources of a module and of all that it imports."""

from pathlib import Path

from medicalgpt import code_version as module
from medicalgpt.code_version import code_version, import_closure
from medicalgpt.data import cache
from medicalgpt.rag import retrieval
from tests.helpers import ROOT

import pytest

PROJECT = {
    "program.py": """
        import json
        from typing import TYPE_CHECKING

        from package.first import value

        if TYPE_CHECKING:
            from package.typed import Name
        else:
            from package import other

        def main():
            import package.lazy
    """,
    "package/__init__.py": "",
    "package/first.py": "from package import second\n",
    "package/second.py": "from package.third import *\n",
    "package/third.py": "import program\n",
    "package/lazy.py": "",
    "package/other.py": "",
    "package/typed.py": "import typing\nif typing.TYPE_CHECKING:\n    import package.unrelated\nName = str\n",
    "package/unrelated.py": "",
}
REACHED = ["first", "second", "third", "lazy", "other"]


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    for name, text in PROJECT.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace("\n        ", "\n"), encoding="utf-8")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_the_closure_holds_what_is_imported_at_any_depth_and_nothing_else(project):
    files = ["program.py", "package/__init__.py", *(f"package/{name}.py" for name in REACHED)]
    assert import_closure("program") == sorted(project / name for name in files)
    assert import_closure("package.lazy", "package.typed") == [
        project / "package" / name for name in ("__init__.py", "lazy.py", "typed.py")
    ]


@pytest.mark.parametrize("name", ["program", "package/__init__", *(f"package/{name}" for name in REACHED)])
def test_a_change_in_a_module_that_is_reached_is_another_version(project, name):
    before = code_version("program")
    with (project / f"{name}.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert code_version("program") != before


@pytest.mark.parametrize("name", ["typed", "unrelated"])
def test_a_change_elsewhere_is_the_same_version(project, name):
    before = code_version("program")
    (project / "package" / f"{name}.py").write_text("changed = True\n", encoding="utf-8")
    assert code_version("program") == before


def test_a_new_import_joins_the_closure(project):
    before = code_version("program")
    (project / "package" / "third.py").write_text("import program, package.unrelated\n", encoding="utf-8")
    between = code_version("program")
    (project / "package" / "unrelated.py").write_text("changed = True\n", encoding="utf-8")
    assert len({before, between, code_version("program")}) == 3


def test_the_same_text_in_another_file_is_another_version(project):
    assert code_version("package.lazy") != code_version("package.other")


@pytest.mark.parametrize("name", ["programme", "package.fourth", "json", "numpy"])
def test_a_name_that_is_no_module_of_the_project_is_refused(project, name):
    with pytest.raises(ModuleNotFoundError, match=f"{name} is not a module of this project"):
        code_version("program", name)


def test_a_relative_import_is_refused_and_not_passed_over(project):
    (project / "package" / "first.py").write_text("\nfrom .second import value\n", encoding="utf-8")
    with pytest.raises(ValueError, match="first.py:2: a relative import"):
        code_version("program")


@pytest.mark.parametrize(
    ("names", "held"),
    [
        # `special_tokens_in` of templating.py decides which rows are problems.
        (cache.MODULES, ["models/templating", "data/encoding", "data/tokenizing", "data/batching", "data/cache"]),
        (["eval_pipeline"], ["evaluation/measures", "rewards/rewards", "rewards/math_worker", "serving/chat"]),
        ([retrieval.__name__], ["rag/retrieval", "rag/documents", "readers/text_files"]),
    ],
)
def test_what_the_caches_depend_on(names, held):
    closure = {str(file.relative_to(ROOT)) for file in import_closure(*names)}
    assert {f"medicalgpt/{name}.py" for name in held} <= closure
    assert "medicalgpt/training/runs.py" not in closure
