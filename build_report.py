"""Show what training changed: a before/after table on the terminal, and a single HTML page without network requests.

The page is in English and in Chinese, with a switch; --lang chooses the language of the table and of the page at first.

    python build_report.py --eval_file outputs/eval.json --runs pt=outputs/pt sft=outputs/sft dpo=outputs/dpo \\
        --output_file outputs/report.html

It reads the results of `eval_pipeline.py`, and `run.json` and `metrics.jsonl` in the output_dir of each stage. A
difference within the noise of the measurement is called "no measurable change": shares of correct answers are compared
by their 95% Wilson intervals (https://doi.org/10.1080/01621459.1927.10502953), perplexities by the paired difference
per document, scores of a reward model by the paired difference per prompt.
"""

import argparse
import functools
import json
import math
import os
import re
import shlex
import sys
import unicodedata
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from medicalgpt.errors import UserError, run_main
from medicalgpt.evaluation.fluency import UNENDED
from medicalgpt.evaluation.report_runs import (
    merges_of,
    missing_signal,
    near,
    parent_of,
    run_warnings,
    series_of,
)
from medicalgpt.evaluation.report_texts import (
    HIGHER_HELD_OUT,
    LANGUAGES,
    LOSS_OF_STAGE,
    LOSSES,
    MEASURES,
    STAGES,
    both,
    chart_texts,
    either,
    in_language,
)
from medicalgpt.evaluation.significance import (
    Verdict,
    compare_perplexity,
    compare_scores,
    compare_shares,
    wilson_interval,
)
from medicalgpt.files import write_atomically
from medicalgpt.training.plots import loss_series, read_metrics, svg_curve

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

# What shows that a page is a report: it names its generator, which earlier ones did not.
REPORT_MARKS = ("MedicalGPT build_report.py", "content=\"default-src 'none'; style-src 'unsafe-inline'\"")
MAX_BYTES = 500_000
# A model that never stops fills a page; the complete answer is in the results of the evaluation.
MAX_SHOWN_CHARACTERS = 1_200
MAX_SHOWN_SAMPLES = 6
# Of a kind; further ones are folded.
MAX_OPEN_EXAMPLES = 4
SHOWN_METRICS = ("loss", "perplexity", "accuracy", "reward", "margin")
EXACT = "exact match (held-out phrasings)"
EVERYDAY = "correct answers (everyday questions)"
DECLINED = "declined (was not taught)"
NEEDLESS = "declined needlessly (everyday questions)"
CORRECT_TASKS = "correct answers (held-out tasks)"
CORRECT_FORMAT = "correct format (held-out tasks)"
# Curves shown next to the loss: the keys under which stages log them, and their captions.
CURVES = {
    "accuracy": (
        ("accuracy", "rewards/accuracies"),
        "share of pairs in which the chosen answer has the higher score, implicit reward or log-probability",
    ),
    "margin": (("margin", "rewards/margins"), "mean difference between the chosen and the rejected answer"),
    "score": (("score",), "mean reward model score of the policy's answers"),
    "reward": (
        ("reward",),
        "mean of what training maximizes: in PPO the score less penalties, in GRPO the weighted sum of rewards",
    ),
    "KL": (
        ("kl",),
        "KL divergence of the policy from its reference in nats: per answer in PPO, per token in GRPO",
    ),
    "length": (("length", "completions/mean_length"), "mean number of tokens per answer"),
    "end rate": (("end_rate",), "share of answers that end by themselves"),
    "no signal": (
        ("frac_reward_zero_std",),
        "share of groups in which all answers get the same reward: nothing is learned from them",
    ),
}
# The rewards of single functions, one line each in one chart.
FUNCTION_REWARD = re.compile(r"(eval_)?rewards/(.+)/mean")


@dataclass
class TableRow:
    """One line of a table: a cell and a verdict per model; the first model has no verdict."""

    label: str
    cells: list[str]
    verdicts: list[Verdict | None] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    shares: list[float | None] = field(default_factory=list)


def score_row(scores: list[dict | None]) -> TableRow:
    """Return a row of mean reward model scores with their standard errors."""
    row = TableRow("reward model score (greedy answers)", [], _between(scores, compare_scores))
    for score in scores:
        known = [value for value in (score or {}).get("scores", ()) if value is not None]
        row.cells.append(_significant(score["mean"]) if known else "-")
        count = f"n = {len(known):,}" if known else ""
        if len(known) > 1:
            spread = math.sqrt(sum((value - score["mean"]) ** 2 for value in known) / (len(known) - 1))
            count = f"± {_significant(spread / math.sqrt(len(known)))}, {count}"
        row.details.append(count)
    return row


def summary_rows(models: list[dict], reward: dict | None = None) -> list[TableRow]:
    """Return the rows of the before/after table, for what was measured in at least one model."""
    # Plain questions first: they are what a reader would ask.
    labels = {EVERYDAY: "everyday", DECLINED: "declined", NEEDLESS: "needless"}
    rows = share_rows(models, labels)
    texts = [model.get("text") for model in models]
    if any(texts):
        rows.append(
            TableRow(
                "perplexity on held-out text",
                [_significant(text["perplexity"]) if text else "-" for text in texts],
                _between(texts, compare_perplexity),
                [f"{text['tokens']:,} tokens" if text else "" for text in texts],
            )
        )
    chats = [model.get("chat") for model in models]
    if any(chats):
        rows.append(share_row(EXACT, chats, "correct"))
        rows.append(share_row("stops by itself", chats, "stopped"))
    rows += share_rows(models, {"preference accuracy (held-out pairs)": "preference", "good answers": "good"})
    scores = [((reward or {}).get("models") or {}).get(model["name"]) for model in models]
    if any(scores):
        rows.append(score_row(scores))
    return rows + share_rows(models, {CORRECT_TASKS: "task", CORRECT_FORMAT: "task_format"})


def share_rows(models: list[dict], keys: dict[str, str]) -> list[TableRow]:
    """Return a row for each label whose counts, under its key of the results, at least one model has."""
    rows = [share_row(label, counts) for label, key in keys.items() if any(counts := [m.get(key) for m in models])]
    for row in rows:
        if row.label == NEEDLESS:
            # Fewer are better, and the row of correct answers gives the verdict.
            row.verdicts = [None] * len(models)
    return rows


def category_rows(models: list[dict], key: str = "chat") -> list[TableRow]:
    """Return one row of counts per category, in the order of the last model's first appearance."""
    return _by_category([model.get(key) for model in models])


def preference_rows(models: list[dict], reward: dict | None) -> list[TableRow]:
    """Return one row of preference counts per category, a cell for each model and one for the reward model, if any."""
    rows = _by_category([*(model.get("preference") for model in models), *([reward] if reward else [])])
    for row in rows if reward else ():
        # The reward model is not a stage after the last model.
        row.verdicts[-1] = None
        if row.label in reward["by_category"]:
            row.details[-1] = _significant(reward["by_category"][row.label]["margin"])
    return rows


def _by_category(counts: list[dict | None]) -> list[TableRow]:
    names = dict.fromkeys(name for count in reversed(counts) if count for name in count["by_category"])
    return [share_row(name, [(count or {}).get("by_category", {}).get(name) for count in counts]) for name in names]


def share_row(label: str, counts: list[dict | None], key: str = "correct") -> TableRow:
    """Return a row of `correct/total (share)` cells with their 95% intervals."""
    row = TableRow(label, [])
    pairs = [(count[key], count["total"]) if count else None for count in counts]
    for pair in pairs:
        if pair is None or pair[1] == 0:
            row.cells.append("-")
            row.details.append("")
            row.shares.append(None)
            continue
        low, high = wilson_interval(*pair)
        row.cells.append(f"{pair[0]:,}/{pair[1]:,} ({pair[0] / pair[1]:.1%})")
        row.details.append(f"95%: {100 * low:.1f}\N{WORD JOINER}–\N{WORD JOINER}{high:.1%}")
        row.shares.append(pair[0] / pair[1])
    row.verdicts = _between(pairs, compare_shares)
    return row


def display_width(text: str) -> int:
    """Return the width of `text` in terminal columns: two for a Chinese character, none for a combining mark."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Align columns by display width: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(display_width(line[column]) for line in lines) for column in range(len(header))]
    out = []
    for line in lines:
        cells = []
        for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
            pad = " " * (width - display_width(cell))
            cells.append(cell + pad if column == 0 else pad + cell)
        out.append("  ".join(cells).rstrip())
    out.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(out)


def terminal_summary(models: list[dict], reward: dict | None = None, language: str = "en") -> str:
    """Return the plain text that ends a pipeline run: the table, the categories, and what changed."""

    def said(text: str) -> str:
        return in_language(text, language)

    names = [model["name"] for model in models]
    rows, lines = summary_rows(models, reward), []
    details = {EXACT: "chat", CORRECT_TASKS: "task", CORRECT_FORMAT: "task_format"}
    for row in rows:
        lines.append([said(row.label), *row.cells])
        categories = category_rows(models, details[row.label]) if row.label in details else []
        if len(categories) > 1:
            lines += [["  " + category.label, *category.cells] for category in categories]
    parts = [text_table(["", *names], lines)]
    changes = [
        f"{said(row.label)}, {names[index - 1]} -> {names[index]}: {said(verdict.text)}"
        for row in rows
        for index, verdict in enumerate(row.verdicts)
        if verdict
    ]
    if reward:
        share, margin = _reward_values(reward)
        text = "reward model ({path}), held-out pairs: accuracy {share}, mean margin {margin}"
        changes.append(said(text).format(path=reward["path"], share=share, margin=margin))
    return "\n".join([*parts, "", *changes])


def _reward_values(reward: dict) -> tuple[str, str]:
    return share_row("", [reward]).cells[0], _significant(reward["margin"])


def curves_of(name: str, events: list[dict]) -> list[dict]:
    """Return chart and caption of each of `CURVES` that the run has logged, with training and held-out values."""
    curves = []
    for label, (keys, caption) in CURVES.items():
        sides = {f"train {label}": keys, f"held-out {label}": [f"eval_{key}" for key in keys]}
        curves.append((label, caption, {line: series_of(events, *logged) for line, logged in sides.items()}))
        if label == "reward":
            caption = "mean of each reward function, before weighting"
            curves.append(("rewards", caption, function_rewards(events)))
    drawn = []
    for label, caption, series in curves:
        series = {line: points for line, points in series.items() if points}
        if series:
            drawn.append({"svg": chart(name, label, series), "caption": caption})
    return drawn


def chart(name: str, label: str, series: dict[str, list[tuple[float, float]]]) -> Markup:
    """Return the chart of `label` of the run `name`, in both languages: held-out values as dots on the same axes."""
    held_out = {line for line in series if line.startswith("held-out ")}
    texts = chart_texts(name, label)
    return Markup(svg_curve(series, f"{name}: {label}", y_label=label, held_out=held_out, chinese=texts))


def ends_above(series: dict[str, list[tuple[float, float]]], line: str, other: str) -> bool:
    """Whether the last value of a series is above that of another; False if one has none."""
    return bool(series.get(line) and series.get(other)) and series[line][-1][1] > series[other][-1][1]


def function_rewards(events: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each reward function's mean, by its name."""
    found = {key: match for event in events for key in event if (match := FUNCTION_REWARD.fullmatch(key))}
    return {("held-out " if match[1] else "") + match[2]: series_of(events, key) for key, match in found.items()}


def read_json(path: Path, what: str) -> dict:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or contains something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. It is written by {what}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}). It is written by {what}; run that again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must contain a JSON object. It is written by {what}; run that again.")
    return value


def read_run(name: str, folder: Path) -> dict:
    """Collect what the report shows of one stage.

    Raises:
        UserError: the folder has no run, or a damaged one.
    """
    run = read_json(folder / "run.json", "every training stage")
    events = read_metrics(folder)
    loss = {line.replace("eval ", "held-out "): points for line, points in loss_series(events).items()}
    files = []
    for entry in run.get("data") or []:
        skipped = {reason: count for reason, count in (entry.get("left_out") or {}).items() if count}
        rows, used = entry.get("rows"), entry.get("used")
        files.append(
            {
                "file": near(str(entry.get("file"))),
                "side": entry.get("side", ""),
                "rows": rows,
                "used": used,
                "skipped": skipped,
                "sha256": str(entry.get("sha256") or "")[:12],
                "adds_up": rows is None or used is None or rows == used + sum(skipped.values()),
            }
        )
    samples_file = folder / "samples.jsonl"
    samples = []
    if samples_file.is_file():
        for number, line in enumerate(samples_file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                samples.append({key: _as_text(json.loads(line)[key]) for key in ("prompt", "before", "after")})
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{samples_file}:{number}: no prompt, before and after ({error!r}).") from None
    return {
        "name": name,
        "folder": near(str(folder)),
        "stage": str(run.get("stage", name)).replace("_", " "),
        "explained": STAGES.get(run.get("stage")),
        "seconds": run.get("seconds"),
        **parent_of(run),
        "command": command_line(run.get("command") or []),
        "versions": run.get("versions") or {},
        "metrics": {
            key: _significant(value)
            for key, value in (run.get("metrics") or {}).items()
            if isinstance(value, int | float) and any(word in key for word in SHOWN_METRICS)
        },
        "files": files,
        "samples": samples[:MAX_SHOWN_SAMPLES],
        "samples_left": len(samples) - len(samples[:MAX_SHOWN_SAMPLES]),
        "steps": max((int(event["step"]) for event in events if "step" in event), default=0),
        "svg": chart(name, "loss", loss),
        "loss_explained": LOSSES.get(run.get("stage"), LOSS_OF_STAGE),
        "higher_held_out": HIGHER_HELD_OUT if ends_above(loss, "held-out loss", "train loss") else None,
        "curves": curves_of(name, events),
        "missing_signal": missing_signal(events),
        "warnings": list(run_warnings(run, events, files, loss)),
    }


def command_line(command: list[str] | str) -> str:
    """Return a command that can be pasted, with relative paths below the working folder."""
    if isinstance(command, str):
        return command
    parts = [near(str(part)) for part in command]
    if not parts:
        return ""
    if Path(parts[0]).name.startswith("python"):
        parts[0] = "python"
    elif parts[0].endswith(".py"):
        parts.insert(0, "python")
    return shlex.join(parts)


def build_html(evaluation: dict, runs: list[dict], report_command: str, language: str = "en") -> str:
    """Return the page. Every text from a model, a file or a run is escaped.

    Args:
        language: the one that is shown until the reader chooses the other, `en` or `zh`.
    """
    models, reward = evaluation["models"], evaluation.get("reward")
    names = [model["name"] for model in models]
    cards = []
    for row in summary_rows(models, reward):
        before, after = row.cells[0], row.cells[-1]
        if row.shares:
            before, after = (cell.rpartition("(")[2].rstrip(")") for cell in (before, after))
        verdict = row.verdicts[-1] if len(names) == 2 else _first_to_last(models, row, reward)
        cards.append({"label": row.label, "before": before, "after": after, "verdict": verdict})
    if reward:
        row = share_row("reward model accuracy (held-out pairs)", [reward])
        after = row.cells[0].rpartition("(")[2].rstrip(")")
        cards.append({"label": row.label, "before": None, "after": after, "verdict": None})
    versions: dict[str, str] = {}
    for versioned in (*runs, evaluation):
        versions.update(versioned.get("versions") or {})
    notes = [(model["name"], note) for model in models for note in model.get("notes") or []]
    for name, scored in ((reward or {}).get("models") or {}).items():
        notes += [
            (name, both("{count} of its answers were not scored: {reason}", count=count, reason=reason))
            for reason, count in scored["not_scored"].items()
        ]
    commands = [(run["stage"], run["command"]) for run in runs if run["command"]]
    commands.append(("evaluation", command_line(evaluation.get("command") or [])))
    commands.append(("this report", report_command))
    environment = Environment(
        loader=PackageLoader("medicalgpt.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals.update(both=both, either=either, chinese=functools.partial(in_language, language="zh"))
    environment.filters["shown"] = _shown
    environment.filters["duration"] = _duration
    environment.filters["count"] = "{:,}".format
    return environment.get_template("report.html").render(
        title=in_language("Before and after", language) + ": " + " → ".join(names),
        language=language,
        languages=LANGUAGES,
        measures=MEASURES,
        shown_examples=MAX_OPEN_EXAMPLES,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        models=models,
        names=names,
        rows=summary_rows(models, reward),
        categories=category_rows(models),
        task_types=[
            (label, category_rows(models, key)) for label, key in (("answers", "task"), ("format", "task_format"))
        ],
        cards=cards,
        notes=notes,
        runs=runs,
        reward=reward,
        reward_values=_reward_values(reward) if reward else (),
        checkpoints=[*runs, *merges_of(models)],
        preferences=preference_rows(models, reward),
        examples=_with_answers(evaluation.get("examples") or [], models, "answers"),
        everyday_examples=_with_answers(evaluation.get("everyday_examples") or [], models, "everyday_answers"),
        prompt_examples=_with_answers(evaluation.get("prompt_examples") or [], models, "good_answers"),
        task_examples=_with_answers(evaluation.get("task_examples") or [], models, "task_answers"),
        commands=[(label, command) for label, command in commands if command],
        versions=dict(sorted(versions.items())),
        evaluation=evaluation,
    )


def _with_answers(examples: list[dict], models: list[dict], key: str) -> list[dict]:
    """Add to each example the answers of the models that were asked; `key` is where they are in a result."""
    shown = []
    for index, example in enumerate(examples):
        answers = []
        for model in models:
            if not model.get(key):
                continue
            answer = model[key][index]
            fault, reason = answer.get("fault"), answer["finish_reason"]
            marks = [{"stop": "", "length": "did not stop"}.get(reason, reason)]
            if not (fault == UNENDED and marks[0]):
                marks.append(fault)
            answers.append(
                {
                    "name": model["name"],
                    "text": _shown(answer["text"] or ""),
                    "correct": answer["correct"] and not fault,
                    "marks": [mark for mark in marks if mark],
                }
            )
        shown.append({**example, "answers": answers})
    return shown


def _first_to_last(models: list[dict], row: TableRow, reward: dict | None) -> Verdict | None:
    if len(models) < 2:
        return None
    rows = {other.label: other for other in summary_rows([models[0], models[-1]], reward)}
    return rows[row.label].verdicts[-1] if row.label in rows else None


def _between(values: list, compare) -> list[Verdict | None]:
    """Compare each value with the one before it."""
    verdicts: list[Verdict | None] = [None]
    for before, after in zip(values, values[1:], strict=False):
        verdicts.append(compare(before, after) if before and after else None)
    return verdicts


def _significant(value: float) -> str:
    if isinstance(value, int) or (abs(value) >= 1000 and math.isfinite(value)):
        return f"{value:,.0f}"
    return f"{value:#.4g}".rstrip(".")


def _shown(text: str) -> str:
    if len(text) <= MAX_SHOWN_CHARACTERS:
        return text
    return f"{text[:MAX_SHOWN_CHARACTERS]} … ({len(text) - MAX_SHOWN_CHARACTERS:,} more characters)"


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number) or "0 s"


def _named_paths(values: list[str], flag: str) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise UserError(f"{flag} {value}: expected NAME=FOLDER, for example {flag} sft=outputs/sft")
        if name in named:
            raise UserError(f"{flag}: the name {name!r} is given twice.")
        named[name] = Path(path)
    return named


def check_output_file(path: Path) -> None:
    """Raise UserError if a report would replace a file that is not one."""
    if path.is_dir():
        raise UserError(f"--output_file {path} is a folder; give the name of a file in it.")
    if not path.exists():
        return
    with path.open("rb") as file:
        beginning = file.read(1000).decode("utf-8", errors="replace")
    if not any(mark in beginning for mark in REPORT_MARKS):
        raise UserError(f"--output_file {path} exists and is not a report. Choose another file, or remove it first.")


def language_of_the_system() -> str:
    """Return `zh` if the messages of the system are in Chinese, otherwise `en`."""
    set_to = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if set_to.startswith("zh") else "en"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--eval_file", required=True, type=Path, help="Results of eval_pipeline.py.")
    parser.add_argument(
        "--runs", nargs="*", default=[], metavar="NAME=DIR", help="The output_dir of each stage, in order."
    )
    parser.add_argument("--output_file", type=Path, help="HTML page to write; unset: only the table is printed.")
    parser.add_argument(
        "--lang",
        choices=LANGUAGES,
        default=language_of_the_system(),
        help="Language of the table, and of the page until the reader chooses the other: en or zh. Default: Chinese if "
        "LC_ALL, LC_MESSAGES or LANG is, otherwise English.",
    )
    parser.add_argument(
        "--expect_exact_match",
        type=float,
        metavar="SHARE",
        help="Exit with code 1 if the last model's share of exact matches is below this (0 to 1).",
    )
    args = parser.parse_args()
    if args.expect_exact_match is not None and not 0 <= args.expect_exact_match <= 1:
        raise UserError(f"--expect_exact_match {args.expect_exact_match:g}: expected a share from 0 to 1.")

    if args.output_file:
        check_output_file(args.output_file)
    evaluation = read_json(args.eval_file, "eval_pipeline.py")
    models = evaluation.get("models")
    if not models:
        raise UserError(f"{args.eval_file} has no models. Run eval_pipeline.py again with --models NAME=DIR.")
    runs = [read_run(name, folder) for name, folder in _named_paths(args.runs, "--runs").items()]

    print(terminal_summary(models, evaluation.get("reward"), args.lang))
    for run in runs:
        for text, values in run["warnings"]:
            print(f"notice: {run['name']} ({run['folder']}): {in_language(text, args.lang).format(**values)}")
    if args.output_file:
        page = build_html(evaluation, runs, command_line(sys.argv), args.lang).encode("utf-8")
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output_file, page)
        print(f"\nreport: {args.output_file} ({len(page) / 1000:,.0f} kB, opens without a network)")
        if len(page) > MAX_BYTES:
            print(f"notice: the report is larger than {MAX_BYTES / 1000:.0f} kB; evaluate with fewer examples.")
    if args.expect_exact_match is not None:
        last = models[-1]
        chat = last.get("chat")
        if not chat or not chat["total"]:
            raise UserError(f"--expect_exact_match: {args.eval_file} has no chat results of {last['name']}.")
        share = chat["correct"] / chat["total"]
        counts = f"exact match of {last['name']}: {chat['correct']}/{chat['total']} = {share:.1%}"
        if share < args.expect_exact_match:
            print(f"\nCHECK FAILED  {counts}, expected at least {args.expect_exact_match:.1%}", flush=True)
            sys.exit(1)
        print(f"check passed  {counts}, expected at least {args.expect_exact_match:.1%}")


if __name__ == "__main__":
    run_main(main)
