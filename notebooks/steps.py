"""What the notebooks share: find Python, run a program and show what it prints, a row, a curve, answers side by side.

It needs the standard library and IPython only, so a notebook runs in any Jupyter; the programs run in `.venv`.
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from IPython.display import Image, Markdown, display

# Set on Colab and on Kaggle, whose machines are thrown away afterwards: packages go into the kernel's Python there.
HOSTED = ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")
GREEN, PLAIN = "\033[32m", "\033[0m"


def python() -> str:
    """The Python that runs the programs: of `.venv`, or of the kernel if that has the packages or is thrown away."""
    local = Path(".venv", "bin", "python")
    has_packages = importlib.util.find_spec("trl") is not None
    return sys.executable if not local.exists() and (has_packages or set(HOSTED) & set(os.environ)) else str(local)


def install() -> None:
    """Install the packages of the project, unless they are there."""
    if python() == sys.executable:
        if importlib.util.find_spec("trl") is None:
            flags = ["-m", "pip", "install", "--quiet", "-r", "requirements.txt", "-c", "constraints.txt"]
            subprocess.run([sys.executable, *flags], check=True)
    elif not Path(python()).exists():
        subprocess.run(["bash", "scripts/setup.sh"], check=True)


def run(command: str) -> None:
    """Run a program of this folder and show what it prints, with the trained tokens (⟦ ⟧) in green.

    Args:
        command: as in the terminal, without `python`.

    Raises:
        RuntimeError: the program failed; what it printed says why.
    """
    print(f"$ python {' '.join(command.split())}\n")
    process = subprocess.Popen(
        [python(), *shlex.split(command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    for line in process.stdout:
        print(line.replace("⟦", f"⟦{GREEN}").replace("⟧", f"{PLAIN}⟧"), end="")
    if process.wait():
        raise RuntimeError(f"{command.split()[0]} stopped with exit code {process.returncode}: see above")


def select_rows(data: str, names: Iterable[str], folder: str) -> str:
    """Copy the rows of `data` that mention one of the names; no names keep all rows, where they are.

    Args:
        data: with the folders pretrain, finetune and reward.
        folder: where the rows are written.

    Returns:
        The folder with the rows.
    """
    names = [name.lower() for name in names]
    if not names:
        return data
    for kind in ("pretrain", "finetune", "reward"):
        for file in sorted(Path(data, kind).iterdir()):
            lines = file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if any(name in line.lower() for name in names)]
            copy = Path(folder, kind, file.name)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            print(f"{kind}/{file.name}: {len(kept)} of {len(lines)} rows")
    return folder


def show_row(file: str) -> None:
    """Print the first row of a file, a JSON one with a field on each line."""
    with open(file, encoding="utf-8") as rows:
        row = next(rows)
    print(json.dumps(json.loads(row), ensure_ascii=False, indent=1) if row.startswith("{") else row)


def show_curve(folder: str) -> None:
    """Show the loss, or in reinforcement learning the score, that a run has logged."""
    display(Image(f"{folder}/loss.png", width=640))


def merged(folder: str) -> str:
    """Merge an adapter into its base; a folder with all weights is returned as it is."""
    if not Path(folder, "adapter_config.json").exists():
        return folder
    run(f"merge_peft_adapter.py --lora_model {folder} --output_dir {folder}-merged --overwrite_output_dir True")
    return f"{folder}-merged"


def ask(model: str, questions: Sequence[str], folder: str, limit: int = 64) -> list[str]:
    """The most probable answer of a model to each question.

    Args:
        folder: where questions and answers are written.
        limit: maximum number of tokens of an answer.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    asked, answered = f"{folder}/questions.jsonl", f"{folder}/answers-{Path(model).name}.jsonl"
    rows = (json.dumps({"question": question}, ensure_ascii=False) + "\n" for question in questions)
    Path(asked).write_text("".join(rows), encoding="utf-8")
    run(
        f"inference.py --model_name_or_path {model} --data_file {asked} --output_file {answered} "
        f"--overwrite_output_file True --temperature 0 --max_new_tokens {limit}"
    )
    return [json.loads(line)["response"] for line in Path(answered).read_text(encoding="utf-8").splitlines()]


def compare(questions: Sequence[str], answers: Mapping[str, Sequence[str]], width: int = 120) -> None:
    """Show the answers of several models to the same questions as a table.

    Args:
        answers: name of a model -> its answers, in the order of the questions.
        width: characters of an answer that are shown.
    """

    def cell(text: str) -> str:
        short = text if len(text) <= width else f"{text[:width]}…"
        return " ".join(short.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("#", "\\#")

    rows = [["", *answers], ["---"] * (len(answers) + 1)]
    rows += [[cell(text) for text in row] for row in zip(questions, *answers.values(), strict=True)]
    display(Markdown("\n".join(f"| {' | '.join(row)} |" for row in rows)))
