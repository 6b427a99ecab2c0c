"""Run the notebooks from top to bottom and keep their outputs in the files, without times and paths of this machine.

    OMP_NUM_THREADS=1 python -m docs.run_notebooks
    OMP_NUM_THREADS=1 python -m docs.run_notebooks your_own_data

It takes some minutes each, and needs the packages of requirements-dev.txt. `outputs/notebook-*` is removed first.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"


def main() -> None:
    """Run the named notebooks, or all."""
    known = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all if none is given")
    names = parser.parse_args().names or known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    for name in names:
        print(f"running {name}", file=sys.stderr)
        for old in (ROOT / "outputs").glob("notebook-*"):
            shutil.rmtree(old)
        run_notebook(FOLDER / f"{name}.ipynb", FOLDER / f"{name}.ipynb")


def run_notebook(source: Path, target: Path, settings: Mapping[str, object] | None = None) -> None:
    """Run a notebook in a kernel that starts in `notebooks/`, and write it with its outputs.

    Args:
        settings: variables of the cell of settings, which are set at its end.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed. Nothing is written then.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(source, as_version=4)
    cell = next(cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", ()))
    original = cell.source
    cell.source = "\n".join([original, *(f"{name} = {value!r}" for name, value in (settings or {}).items())])
    NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
        coalesce_streams=True,
    ).execute()
    cell.source = original
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if "text" in output:
                output["text"] = output["text"].replace(f"{ROOT}/", "").replace(str(ROOT), ".")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    nbformat.write(notebook, target)


if __name__ == "__main__":
    main()
