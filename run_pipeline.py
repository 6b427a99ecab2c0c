"""Run the whole pipeline on one machine: base model, pretraining, fine-tuning, preferences, reinforcement learning;
then the table, a report and a few answers.

    bash scripts/run_pipeline.sh                               a tiny model, on a laptop, without GPU, network or hub
    NAME=小医 AUTHOR=我 bash scripts/run_pipeline.sh --fresh     the model introduces itself by that name
    MODEL=Qwen/Qwen3-0.6B bash scripts/run_pipeline.sh         the same pipeline with a real model on a GPU
    STAGES="pt sft rm ppo" bash scripts/run_pipeline.sh        other stages; unset: pt sft dpo
    STAGES="pt sft grpo" bash scripts/run_pipeline.sh          reward functions instead of a reward model
    bash scripts/run_pipeline.sh --fresh                       start over; without it, finished stages are kept

Stages: pt (pretraining), sft (fine-tuning), rm (reward model), dpo, orpo (preferences), ppo, grpo (reinforcement
learning), in this order. Each starts from the model that the previous one saved, with its adapter merged. No
stage starts from the reward model: it is measured, ppo learns from its scores, and it scores the answers of all models.

The settings of a stage are in recipes/tiny, or with MODEL in recipes/real; its program reads them with --config.
REWARD_MODEL=folder replaces the stage rm. Everything is written to OUT=folder, by default outputs (for a real model
outputs/<model>). DATA=folder is your own data, with the layout of data/. VENV=folder is the environment, by default
.venv; it is created first if necessary, so this program imports only the standard library.
"""

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

# The program of each stage and the folder of its rows below DATA, in the order in which they can run. A new stage is a
# line here and its recipes.
STAGES = {
    "pt": ("pretraining.py", "pretrain"),
    "sft": ("supervised_finetuning.py", "finetune"),
    "rm": ("reward_modeling.py", "reward"),
    "dpo": ("dpo_training.py", "reward"),
    "orpo": ("orpo_training.py", "reward"),
    "ppo": ("ppo_training.py", "reward"),
    "grpo": ("grpo_training.py", "grpo"),
}
QUESTIONS = ("你是谁？", "感冒了怎么办？", "急性心肌梗死有哪些情况要马上打120？", "阿莫西林吃几片？")
MAX_NEW_TOKENS = ("--max_new_tokens", "96")


def main() -> None:
    """Check the variables; then train, measure, and let the last model answer."""
    fresh = parse_arguments()
    os.chdir(Path(__file__).resolve().parent)
    sys.stdout.reconfigure(line_buffering=True)
    # When the reader of the output (head, less) exits, this program ends as well.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    pipeline = Pipeline()
    run("bash", "scripts/setup.sh")
    # Waiting threads should not keep a core busy that another program could use: spinning doubles the time of both.
    os.environ["OMP_WAIT_POLICY"] = variable("OMP_WAIT_POLICY", "PASSIVE")

    began = time.time()
    pipeline.check_folders(fresh)
    if fresh:
        pipeline.remove_results()
    pipeline.prepare()
    pipeline.train()
    pipeline.measure()
    pipeline.answer()
    print(f"all steps took {time.time() - began:.0f} s")


class Pipeline:
    """What the environment variables request, and the progress so far.

    Attributes:
        policy: the latest model, from which the next stage starts.
        models: name and folder of each model to measure, in order of training.
        parent: digest of the steps that the next one depends on.

    Raises:
        SystemExit: code 2 if the variables request something impossible; nothing has been done by then.
    """

    def __init__(self):
        self.stages = check_stages(os.environ.get("STAGES", "pt sft dpo"))
        self.reward_model = check_reward_model(variable("REWARD_MODEL"), self.stages)
        self.model = variable("MODEL")
        self.data = Path(variable("DATA", "data"))
        self.out = Path(variable("OUT", f"outputs/{Path(self.model).name}" if self.model else "outputs"))
        self.python = f"{variable('VENV', '.venv')}/bin/python"
        self.policy = self.model or str(self.out / "tiny-base")
        self.models = {"base": self.policy}
        self.parent = "start"

    def check_folders(self, fresh: bool) -> None:
        """Exit if a folder would be replaced that this pipeline has not made, or something given would be removed."""
        made = self.results()
        folders = {"base": "tiny-base", "data": "data"}
        if self.model:
            del folders["base"]
        if not (variable("NAME") or variable("AUTHOR")):
            del folders["data"]
            self.check_rows()
        folders |= {name: name for stage in self.stages for name in (stage, f"{stage}-merged")}
        for folder in folders.values():
            path = self.out / folder
            if path.is_dir() and any(path.iterdir()) and path not in made:
                refuse(
                    f"{path} was not made by this pipeline, which would replace it. Choose another folder, "
                    "OUT=outputs/other, or move it away."
                )
        given = {"REWARD_MODEL": self.reward_model, "MODEL": self.model, "DATA": str(self.data)}
        for name, value in given.items() if fresh else ():
            inside = [path for path in made if value and Path(value).resolve().is_relative_to(path.resolve())]
            if inside:
                refuse(f"--fresh would remove {name}={value}. Start over in another folder: OUT=outputs/other")

    def results(self) -> list[Path]:
        """What earlier runs wrote, by the marks that they left in stamps/."""
        names = {"base": "tiny-base", "data": "data", "eval.json": "eval.json", "report.html": "report.html"}
        names |= {name: name for stage in STAGES for name in (stage, f"{stage}-merged")}
        stamps = self.out / "stamps"
        marked = [name for name in names if (stamps / name).is_file() or (stamps / f"{name}.started").is_file()]
        return [self.out / names[name] for name in marked]

    def remove_results(self) -> None:
        """Remove what earlier runs wrote, and nothing else."""
        run("rm", "-rf", "--", *self.results(), self.out / "stamps")

    def start(self, name: str, wanted: str = "") -> None:
        """Leave a mark that what a step writes is this pipeline's, before it writes anything.

        Args:
            wanted: digest of everything that the step depends on.
        """
        mark = self.out / "stamps" / f"{name}.started"
        mark.parent.mkdir(parents=True, exist_ok=True)
        write(mark, wanted)

    def prepare(self) -> None:
        """Write rows with NAME and AUTHOR if set, build the tiny base, and check that all stages have rows."""
        names = (("--name", variable("NAME")), ("--author", variable("AUTHOR")))
        if flags := [word for flag, name in names if name for word in (flag, name)]:
            self.data = self.out / "data"
            self.step("data", self.data, "data/build_samples.py", "--output_dir", self.data, *flags)
        if not self.model:
            base = Path(self.policy)
            self.step("base", base, "build_tiny_model.py", "--output_dir", base, "--data_dir", self.data)
        self.check_rows()

    def check_rows(self) -> None:
        """Exit if a stage has no rows."""
        for stage in self.stages:
            rows = self.rows_of(stage)
            if not rows.exists():
                refuse(f"the stage {stage} needs {rows}, which does not exist")

    def train(self) -> None:
        """Run the stages, each from the model that the previous one saved."""
        scoring = ""
        if "rm" in self.stages:
            self.reward_model = str(self.out / "rm")
        elif self.reward_model:
            scoring = digest_of_files(self.reward_model)
        for stage in self.stages:
            before, folder = self.parent, self.out / stage
            if stage == "ppo":
                # What it learns depends on the reward model as well.
                self.parent += scoring
            recipe = Path("recipes", "real" if self.model else "tiny", f"{stage}.yaml")
            command = [STAGES[stage][0], "--config", recipe, *self.flags_of(stage), "--output_dir", folder]
            self.step(stage, folder, *command, settings=read_settings(recipe), resumable=True)
            if stage == "rm":
                # The next stage starts from the model before the reward model, and does not depend on it.
                scoring, self.parent = self.parent, before
                continue
            self.policy, merged = str(folder), self.out / f"{stage}-merged"
            if (folder / "adapter_config.json").is_file():
                self.step(merged.name, merged, "merge_peft_adapter.py", "--lora_model", folder, "--output_dir", merged)
                self.policy = str(merged)
            elif stage != "pt" and not merged.exists():
                # All weights were trained, so there is nothing to merge; the guides name the model like this.
                self.start(merged.name)
                merged.symlink_to(folder.name, target_is_directory=True)
            self.models[stage] = self.policy

    def flags_of(self, stage: str) -> list[str | Path]:
        """The model and the rows that a stage starts from, and the reward model of ppo."""
        rows = self.rows_of(stage)
        flags = ["--model_name_or_path", self.policy, "--train_file_dir", rows]
        # A folder contains its held-out rows.
        if rows.is_file() and (held_out := rows.with_name("validation.jsonl")).is_file():
            flags += ["--validation_file_dir", held_out]
        return [*flags, "--reward_model_path", self.reward_model] if stage == "ppo" else flags

    def rows_of(self, stage: str) -> Path:
        """File or folder of the training rows of a stage."""
        # Rewards are for consultations; the pairs that teach when to be brief are for stages that imitate.
        rewarded = stage in ("rm", "ppo") or (stage == "grpo" and not self.model)
        folder = self.data / ("reward" if rewarded else STAGES[stage][1])
        return folder / "train.jsonl" if rewarded and (folder / "train_short.jsonl").is_file() else folder

    def step(self, name: str, folder: Path, *command: str | Path, settings: str = "", resumable: bool = False) -> None:
        """Run a program, unless it has finished before with the same arguments and settings, after the same steps.

        Args:
            name: of the step. A finished one writes a digest of everything that it depends on to stamps/.
            folder: where the program writes. An unfinished result is resumed from its checkpoint, or written again.
            command: the program and its arguments.
            settings: what it reads from its recipe.
            resumable: whether it saves checkpoints.
        """
        stamp, mark = self.out / "stamps" / name, self.out / "stamps" / f"{name}.started"
        self.parent = wanted = digest(self.parent, *map(str, command), settings)
        begun = stamp if stamp.is_file() else mark
        # Without a checkpoint and a model card, an unfinished step starts from the beginning, whatever it is to do.
        resumed = resumable and (any(folder.glob("checkpoint-*/manifest.json")) or (folder / "README.md").is_file())
        # An earlier version has left empty marks.
        if begun.is_file() and (begun == stamp or resumed) and begun.read_text(encoding="utf-8") not in ("", wanted):
            sys.exit(
                f"error: {folder} contains the result of other settings. Start over: bash scripts/run_pipeline.sh "
                "--fresh, or choose another folder: OUT=outputs/other bash scripts/run_pipeline.sh"
            )
        if stamp.is_file() and folder.is_dir():
            print(f"== {name}: finished before, kept ({folder})")
            return
        print(f"== {name}")
        began = time.time()
        self.start(name, wanted)
        if name == "data":
            run("rm", "-rf", "--", folder)
        # The program replaces an unfinished result only when it has another.
        more = ("--resume", "auto") if resumable else () if name == "data" else ("--overwrite_output_dir",)
        run(self.python, *command, *more)
        write(stamp, wanted)
        print(f"== {name} took {time.time() - began:.0f} s")

    def measure(self) -> None:
        """Compare all models on held-out rows, and write the report."""
        flags = ["--models", *(f"{name}={folder}" for name, folder in self.models.items())]
        # Models that have not been taught to answer write up to the limit each time; 200 questions are enough for them.
        if taught := [name for name in self.models if name not in ("base", "pt")]:
            flags += ["--first_chat_model", taught[0]]
        flags += self.measured_on("pretrain/validation*", "--text_file_dir", self.data / "pretrain")
        chat, pairs, tasks = (self.data / name / "validation.jsonl" for name in ("finetune", "reward", "grpo"))
        flags += self.measured_on("finetune/validation.jsonl", "--chat_file", chat)
        flags += self.measured_on("everyday/questions.jsonl", "--everyday_file", self.data / "everyday/questions.jsonl")
        scored = ("--reward_model", self.reward_model) if self.reward_model else ()
        flags += self.measured_on("reward/validation.jsonl", "--preference_file", pairs, *scored)
        # Other stages do not teach the format of replies to tasks.
        if self.model and "grpo" in self.stages:
            flags += self.measured_on("grpo/validation.jsonl", "--task_file", tasks, "--task_max_new_tokens", "512")
        print("== evaluation")
        results, report = self.out / "eval.json", self.out / "report.html"
        self.start(results.name)
        self.start(report.name)
        limits = ("--batch_size", "64", "--max_chat_samples_before", "200", *MAX_NEW_TOKENS)
        run(self.python, "eval_pipeline.py", *flags, "--output_file", results, *limits)
        runs = (f"{stage}={self.out / stage}" for stage in self.stages)
        run(self.python, "build_report.py", "--eval_file", results, "--runs", *runs, "--output_file", report)

    def measured_on(self, files: str, *flags: str | Path) -> tuple[str | Path, ...]:
        """These flags if DATA has such held-out files; none otherwise."""
        if any(self.data.glob(files)):
            return flags
        print(f"notice: there is no {self.data / files}; what is measured on it is skipped")
        return ()

    def answer(self) -> None:
        """Ask the last model some questions, and show how to ask more."""
        chat = ("inference.py", "--model_name_or_path", self.policy)
        print()
        for question in QUESTIONS:
            print(f"> {question}")
            run(self.python, *chat, "--query", question, *MAX_NEW_TOKENS)
        print(f"\nreport: {self.out / 'report.html'}")
        print(f"chat:   {self.python} {' '.join(chat)} --interactive")


def parse_arguments() -> bool:
    """Whether to start over: --fresh is the only flag."""
    parser = argparse.ArgumentParser(
        usage="bash scripts/run_pipeline.sh [--fresh]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--fresh", action="store_true", help="remove what earlier runs wrote, and start over")
    parser.error = lambda text: refuse(f"{text.replace('unrecognized arguments:', 'unknown argument')}; known: --fresh")
    return parser.parse_args().fresh


def check_stages(text: str) -> list[str]:
    """The names in STAGES. Unknown, repeated and misplaced ones are refused."""
    left, known = list(STAGES), " ".join(STAGES)
    for name in text.split():
        if name not in STAGES:
            refuse(f'STAGES="{text}": unknown stage {name}; known, in this order: {known}')
        if name not in left:
            refuse(f'STAGES="{text}": {name} is repeated or out of order; each stage once, in this order: {known}')
        left = left[left.index(name) + 1 :]
    return text.split() or refuse(f"STAGES is empty; known, in this order: {known}")


def check_reward_model(folder: str, stages: list[str]) -> str:
    """The folder in REWARD_MODEL, empty if unset. Two reward models are refused, and ppo without one."""
    if folder and not Path(folder).is_dir():
        refuse(f"REWARD_MODEL={folder}: there is no such folder")
    if folder and "rm" in stages:
        refuse(f"REWARD_MODEL={folder} and the stage rm: two reward models; omit one of them")
    if "ppo" in stages and not folder and "rm" not in stages:
        refuse(
            f'STAGES="{variable("STAGES")}": ppo needs a reward model. Train one with the stage rm before ppo, '
            "or give the folder of one: REWARD_MODEL=outputs/rm"
        )
    return folder


def variable(name: str, default: str = "") -> str:
    """An environment variable; an empty one counts as unset."""
    return os.environ.get(name) or default


def write(path: Path, text: str) -> None:
    """Write a small file in one step, so that a kill leaves none or all of it."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def refuse(problem: str) -> NoReturn:
    """Print what is wrong and exit with code 2."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def run(*command: str | Path) -> None:
    """Run a command; if it fails, end with its exit code."""
    process = subprocess.Popen(command)
    code = None
    while code is None:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            continue  # Ctrl-C has reached the command as well; its exit code counts
    if code:
        sys.exit(128 - code if code < 0 else code)


def read_settings(recipe: Path) -> str:
    """What a recipe sets, without comments: if only they change, a finished stage is kept."""
    lines = (re.sub(r"(^|\s)#.*", "", line).rstrip() for line in recipe.read_text(encoding="utf-8").splitlines())
    return "\n".join(line for line in lines if line)


def digest(*parts: str) -> str:
    """SHA-256 of some texts."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


def digest_of_files(folder: str) -> str:
    """SHA-256 of the names and contents of the files in a folder, without its subfolders."""
    parts = []
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        with path.open("rb") as file:
            parts += [path.name, hashlib.file_digest(file, "sha256").hexdigest()]
    return digest(*parts)


if __name__ == "__main__":
    main()
