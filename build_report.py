"""Show what training changed: a before/after table on the terminal, and one HTML page without network requests.

    python build_report.py --eval_file outputs/eval.json --runs pt=outputs/pt sft=outputs/sft dpo=outputs/dpo \\
        --output_file outputs/report.html

Reads the results of `eval_pipeline.py` and the `run.json` and `metrics.jsonl` that each stage leaves in its output_dir.
A difference that lies within the noise of the measurement is called "no measurable change": shares of right answers are
compared by their 95% Wilson intervals (https://doi.org/10.1080/01621459.1927.10502953), perplexities by the paired
difference per document, scores of a reward model by the paired difference per prompt.
"""

import argparse
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
from medicalgpt.evaluation.significance import (
    Verdict,
    compare_perplexity,
    compare_scores,
    compare_shares,
    wilson_interval,
)
from medicalgpt.training.plots import loss_series, read_metrics, svg_curve

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

MAX_BYTES = 500_000
# A model that never stops fills a page; the whole answer stays in the evaluation's file.
MAX_SHOWN_CHARACTERS = 1_200
MAX_SHOWN_SAMPLES = 6
SHOWN_METRICS = ("loss", "perplexity", "accuracy", "reward", "margin")
EXACT = "exact match (held-out phrasings)"
RIGHT_TASKS = "right answers (held-out tasks)"
RIGHT_FORMAT = "right format (held-out tasks)"
# Curves beside the loss: the names under which stages log them, and what they are.
CURVES = {
    "accuracy": (
        ("accuracy", "rewards/accuracies"),
        "share of pairs in which the chosen answer is ahead: in score, in implicit reward or in log-probability",
    ),
    "margin": (("margin", "rewards/margins"), "by how much the chosen answer is ahead, on average"),
    "score": (("score",), "what the reward model gives to the answers of the policy, on average"),
    "reward": (
        ("reward",),
        "what the training raises, on average: in PPO the score less penalties, in GRPO the sum of weighted rewards",
    ),
    "KL": (
        ("kl",),
        "how far the policy has moved from the model before it, in nats: of an answer in PPO, of a token in GRPO",
    ),
    "length": (("length", "completions/mean_length"), "tokens of an answer, on average"),
    "end rate": (("end_rate",), "share of the answers that end by themselves"),
    "no signal": (
        ("frac_reward_zero_std",),
        "share of the groups of answers whose rewards are all equal: nothing is learned from them",
    ),
}
# A reward function of its own for each line, drawn together.
FUNCTION_REWARD = re.compile(r"(eval_)?rewards/(.+)/mean")
# What a run logs at every step if no answer was rewarded more than another, and nothing could be learned.
NO_SIGNAL = {
    "frac_reward_zero_std": (1.0, "in every group, all answers got the same reward"),
    "score_std": (0.0, "in every step, all answers got the same score"),
}


@dataclass
class Row:
    """One line of a table: a cell and a verdict per model; the first model has no verdict."""

    label: str
    cells: list[str]
    verdicts: list[Verdict | None] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    shares: list[float | None] = field(default_factory=list)


def score_row(scores: list[dict | None]) -> Row:
    """Return a row of mean scores, with the standard errors of the means."""
    row = Row("reward model's score of own answers", [], _between(scores, compare_scores))
    for score in scores:
        known = [value for value in (score or {}).get("scores", ()) if value is not None]
        row.cells.append(_significant(score["mean"]) if known else "-")
        count = f"{len(known):,} answers" if known else ""
        if len(known) > 1:
            spread = math.sqrt(sum((value - score["mean"]) ** 2 for value in known) / (len(known) - 1))
            count = f"± {_significant(spread / math.sqrt(len(known)))}, {count}"
        row.details.append(count)
    return row


def summary_rows(models: list[dict], reward: dict | None = None) -> list[Row]:
    """Return the rows of the before/after table, for what was measured in at least one model."""
    rows = []
    texts = [model.get("text") for model in models]
    if any(texts):
        rows.append(
            Row(
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
    for label, key in (("prefers the chosen answer (held-out pairs)", "preference"), ("good answers", "good")):
        counts = [model.get(key) for model in models]
        if any(counts):
            rows.append(share_row(label, counts))
    scores = [((reward or {}).get("models") or {}).get(model["name"]) for model in models]
    if any(scores):
        rows.append(score_row(scores))
    for label, key in ((RIGHT_TASKS, "task"), (RIGHT_FORMAT, "task_format")):
        counts = [model.get(key) for model in models]
        if any(counts):
            rows.append(share_row(label, counts))
    return rows


def category_rows(models: list[dict], key: str = "chat") -> list[Row]:
    """Return one row of counts per category, in the order of the last model's first appearance."""
    return _by_category([model.get(key) for model in models])


def preference_rows(models: list[dict], reward: dict | None) -> list[Row]:
    """Return one row of preference counts per category, a cell for each model and one for the reward model if any."""
    rows = _by_category([*(model.get("preference") for model in models), *([reward] if reward else [])])
    for row in rows if reward else ():
        # A reward model is no further step of the road.
        row.verdicts[-1] = None
        if row.label in reward["by_category"]:
            row.details[-1] = f"margin {_significant(reward['by_category'][row.label]['margin'])}"
    return rows


def _by_category(counts: list[dict | None]) -> list[Row]:
    names = dict.fromkeys(name for count in reversed(counts) if count for name in count["by_category"])
    return [share_row(name, [(count or {}).get("by_category", {}).get(name) for count in counts]) for name in names]


def share_row(label: str, counts: list[dict | None], key: str = "correct") -> Row:
    """Return a row of `correct/total (share)` cells with their 95% intervals."""
    row = Row(label, [])
    pairs = [(count[key], count["total"]) if count else None for count in counts]
    for pair in pairs:
        if pair is None or pair[1] == 0:
            row.cells.append("-")
            row.details.append("")
            row.shares.append(None)
            continue
        low, high = wilson_interval(*pair)
        row.cells.append(f"{pair[0]:,}/{pair[1]:,} ({pair[0] / pair[1]:.1%})")
        row.details.append(f"95%: {100 * low:.1f} to\N{NO-BREAK SPACE}{high:.1%}")
        row.shares.append(pair[0] / pair[1])
    row.verdicts = _between(pairs, compare_shares)
    return row


def display_width(text: str) -> int:
    """Return the terminal columns that `text` takes; Chinese characters take two, combining marks none."""
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


def terminal_summary(models: list[dict], reward: dict | None = None) -> str:
    """Return the plain text that ends a pipeline run: the table, the categories, and what changed."""
    names = [model["name"] for model in models]
    rows, lines = summary_rows(models, reward), []
    details = {EXACT: "chat", RIGHT_TASKS: "task", RIGHT_FORMAT: "task_format"}
    for row in rows:
        lines.append([row.label, *row.cells])
        categories = category_rows(models, details[row.label]) if row.label in details else []
        if len(categories) > 1:
            lines += [["  " + category.label, *category.cells] for category in categories]
    parts = [text_table(["", *names], lines)]
    changes = [
        f"{row.label}, {names[index - 1]} -> {names[index]}: {verdict.text}"
        for row in rows
        for index, verdict in enumerate(row.verdicts)
        if verdict
    ]
    if reward:
        changes.append(f"reward model ({reward['path']}), held-out pairs: {_reward_text(reward)}")
    return "\n".join([*parts, "", *changes])


def _reward_text(reward: dict) -> str:
    return f"accuracy {share_row('', [reward]).cells[0]}, mean margin {_significant(reward['margin'])}"


def curves_of(name: str, events: list[dict]) -> list[dict]:
    """Return drawing and caption of each of `CURVES` that the run has logged, train and held-out in one drawing."""
    curves = []
    for label, (keys, caption) in CURVES.items():
        sides = {f"train {label}": keys, f"held-out {label}": [f"eval_{key}" for key in keys]}
        curves.append((label, caption, {line: series_of(events, *logged) for line, logged in sides.items()}))
        if label == "reward":
            caption = "what each reward function gives to an answer, on average, before its weight"
            curves.append(("rewards", caption, function_rewards(events)))
    drawn = []
    for label, caption, series in curves:
        series = {line: points for line, points in series.items() if points}
        if series:
            drawn.append({"svg": Markup(svg_curve(series, f"{name}: {label}", y_label=label)), "caption": caption})
    return drawn


def function_rewards(events: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Return the mean of each reward function, a line each."""
    found = {key: match for event in events for key in event if (match := FUNCTION_REWARD.fullmatch(key))}
    return {("held-out " if match[1] else "") + match[2]: series_of(events, key) for key, match in found.items()}


def series_of(events: list[dict], *keys: str) -> list[tuple[float, float]]:
    """Return the (step, value) points that were logged under one of `keys`."""
    # A run that was resumed logs some steps again: the later event counts.
    points = {
        float(event["step"]): float(event[key])
        for event in events
        for key in keys
        if "step" in event and isinstance(event.get(key), int | float)
    }
    return sorted(points.items())


def missing_signal(events: list[dict]) -> str | None:
    """Return why nothing can have been learned from the rewards of a run; None if something can, or has no rewards."""
    for key, (empty, reason) in NO_SIGNAL.items():
        values = [value for _, value in series_of(events, key)]
        # A standard deviation of equal numbers is 0 but for rounding.
        if values and all(abs(value - empty) < 1e-5 for value in values):
            return f"no learning signal: {reason}"
    return None


def read_json(path: Path, what: str) -> dict:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist. It is written by {what}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}). It is written by {what}; run that again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object. It is written by {what}; run that again.")
    return value


def read_run(name: str, folder: Path) -> dict:
    """Collect what the report shows of one stage.

    Raises:
        UserError: the folder holds no run, or a damaged one.
    """
    run = read_json(folder / "run.json", "every training stage")
    events = read_metrics(folder)
    series = loss_series(events)
    files = []
    for entry in run.get("data") or []:
        left_out = {reason: count for reason, count in (entry.get("left_out") or {}).items() if count}
        rows, used = entry.get("rows"), entry.get("used")
        files.append(
            {
                "file": _near(str(entry.get("file"))),
                "side": entry.get("side", ""),
                "rows": rows,
                "used": used,
                "left_out": left_out,
                "sha256": str(entry.get("sha256") or "")[:12],
                "adds_up": rows is None or used is None or rows == used + sum(left_out.values()),
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
        "folder": _near(str(folder)),
        "stage": str(run.get("stage", name)).replace("_", " "),
        "status": run.get("status", "unknown"),
        "seconds": run.get("seconds"),
        "finished": run.get("finished"),
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
        "svg": Markup(svg_curve(series, f"{name}: loss")),
        "curves": curves_of(name, events),
        "missing_signal": missing_signal(events),
    }


def command_line(command: list[str] | str) -> str:
    """Return a command that can be pasted, with paths below the working folder made relative."""
    if isinstance(command, str):
        return command
    parts = [_near(str(part)) for part in command]
    if not parts:
        return ""
    if Path(parts[0]).name.startswith("python"):
        parts[0] = "python"
    elif parts[0].endswith(".py"):
        parts.insert(0, "python")
    return shlex.join(parts)


def build_html(evaluation: dict, runs: list[dict], report_command: str) -> str:
    """Return the page. Every text from a model, a file or a run is escaped."""
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
        row = share_row("reward model: ranks held-out pairs right", [reward])
        after = row.cells[0].rpartition("(")[2].rstrip(")")
        cards.append({"label": row.label, "before": None, "after": after, "verdict": None})
    versions: dict[str, str] = {}
    for versioned in (*runs, evaluation):
        versions.update(versioned.get("versions") or {})
    notes = [(model["name"], note) for model in models for note in model.get("notes") or []]
    for name, scored in ((reward or {}).get("models") or {}).items():
        notes += [
            (name, f"{count} of its answers were not scored: {reason}")
            for reason, count in scored["not_scored"].items()
        ]
    commands = [(run["stage"], run["command"]) for run in runs if run["command"]]
    commands.append(("evaluation", command_line(evaluation.get("command") or [])))
    commands.append(("this report", report_command))
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters["shown"] = _shown
    environment.filters["duration"] = _duration
    environment.filters["count"] = "{:,}".format
    return environment.from_string(PAGE).render(
        title="Before and after: " + " → ".join(names),
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
        reward_text=_reward_text(reward) if reward else "",
        preferences=preference_rows(models, reward),
        examples=_with_answers(evaluation.get("examples") or [], models, "answers"),
        prompt_examples=_with_answers(evaluation.get("prompt_examples") or [], models, "good_answers"),
        task_examples=_with_answers(evaluation.get("task_examples") or [], models, "task_answers"),
        commands=[(label, command) for label, command in commands if command],
        versions=dict(sorted(versions.items())),
        evaluation=evaluation,
    )


def _with_answers(examples: list[dict], models: list[dict], key: str) -> list[dict]:
    """Put beside each example what each model that was asked answered; `key` is where its answers are."""
    shown = []
    for index, example in enumerate(examples):
        answers = []
        for model in models:
            if not model.get(key):
                continue
            answer = model[key][index]
            answers.append(
                {
                    "name": model["name"],
                    "text": _shown(answer["text"] or ""),
                    "correct": answer["correct"],
                    "mark": {"stop": "", "length": "did not stop"}.get(
                        answer["finish_reason"], answer["finish_reason"]
                    ),
                }
            )
        shown.append({**example, "answers": answers})
    return shown


def _first_to_last(models: list[dict], row: Row, reward: dict | None) -> Verdict | None:
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


def _near(path: str) -> str:
    """Shorten an absolute path below the working folder; other text stays as it is."""
    if os.path.isabs(path) and Path(path).is_relative_to(Path.cwd()):
        return os.path.relpath(path)
    return path


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--eval_file", required=True, type=Path, help="Results of eval_pipeline.py.")
    parser.add_argument("--runs", nargs="*", default=[], metavar="NAME=DIR", help="output_dir of each stage, in order.")
    parser.add_argument("--output_file", type=Path, help="HTML page to write; unset: only the table is printed.")
    parser.add_argument(
        "--expect_exact_match",
        type=float,
        metavar="SHARE",
        help="Exit with code 1 if the last model's share of exact matches is below this (0 to 1).",
    )
    args = parser.parse_args()
    if args.expect_exact_match is not None and not 0 <= args.expect_exact_match <= 1:
        raise UserError(f"--expect_exact_match {args.expect_exact_match:g}: expected a share from 0 to 1.")

    evaluation = read_json(args.eval_file, "eval_pipeline.py")
    models = evaluation.get("models")
    if not models:
        raise UserError(f"{args.eval_file} holds no models. Run eval_pipeline.py again with --models NAME=DIR.")
    runs = [read_run(name, folder) for name, folder in _named_paths(args.runs, "--runs").items()]

    print(terminal_summary(models, evaluation.get("reward")))
    for run in runs:
        if run["missing_signal"]:
            print(f"notice: {run['name']} ({run['folder']}): {run['missing_signal']}")
    if args.output_file:
        page = build_html(evaluation, runs, command_line(sys.argv)).encode("utf-8")
        args.output_file.parent.mkdir(parents=True, exist_ok=True)
        args.output_file.write_bytes(page)
        print(f"\nreport: {args.output_file} ({len(page) / 1000:,.0f} kB, opens without a network)")
        if len(page) > MAX_BYTES:
            print(f"notice: the report is larger than {MAX_BYTES / 1000:.0f} kB; evaluate with fewer examples.")
    if args.expect_exact_match is not None:
        last = models[-1]
        chat = last.get("chat")
        if not chat or not chat["total"]:
            raise UserError(f"--expect_exact_match: {args.eval_file} holds no chat results of {last['name']}.")
        share = chat["correct"] / chat["total"]
        counts = f"exact match of {last['name']}: {chat['correct']}/{chat['total']} = {share:.1%}"
        if share < args.expect_exact_match:
            print(f"\nCHECK FAILED  {counts}, expected at least {args.expect_exact_match:.1%}", flush=True)
            sys.exit(1)
        print(f"check passed  {counts}, expected at least {args.expect_exact_match:.1%}")


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root {
  --page: #f6f7f9; --card: #fff; --text: #1b2330; --soft: #5b6675; --line: #dfe3e9; --accent: #2563eb;
  --good: #15803d; --good-back: #dcfce7; --bad: #b91c1c; --bad-back: #fee2e2; --same: #4b5563; --same-back: #e9ecf1;
}
@media (prefers-color-scheme: dark) { :root {
  --page: #10141b; --card: #181e28; --text: #e4e9f1; --soft: #9aa6b6; --line: #2c3543; --accent: #7aa7ff;
  --good: #6ee7a0; --good-back: #123524; --bad: #fda4a4; --bad-back: #421c1f; --same: #aab4c3; --same-back: #272f3c;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC",
  sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 16px 48px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 40px 0 12px; }
p { margin: 0 0 12px; }
.soft, figcaption, small { color: var(--soft); font-size: .86rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 12px; margin: 24px 0 0; }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 16px; }
.big { font-size: 1.75rem; font-weight: 650; line-height: 1.2; margin: 6px 0 8px; font-variant-numeric: tabular-nums; }
.big .from { color: var(--soft); font-weight: 400; font-size: 1.15rem; }
.tag { display: inline-block; border-radius: 999px; padding: 1px 9px; font-size: .78rem; white-space: nowrap;
  background: var(--same-back); color: var(--same); }
.better { background: var(--good-back); color: var(--good); }
.worse { background: var(--bad-back); color: var(--bad); }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 10px 14px; text-align: right; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 600; font-size: .86rem; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 500; }
td small, th small { display: block; font-weight: 400; overflow-wrap: anywhere; }
td small { font-size: .8rem; margin: 1px 0 4px; }
.nowrap { white-space: nowrap; }
.bar { height: 4px; border-radius: 2px; background: var(--same-back); margin-top: 6px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 12px; }
figure { margin: 0; }
.curve { display: block; width: 100%; max-width: 620px; height: auto; }
figcaption { margin-top: 8px; }
.example { margin-bottom: 12px; }
.turn { margin: 0 0 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.turn b { color: var(--soft); font-weight: 500; font-size: .86rem; margin-right: 6px; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); gap: 10px;
  margin-top: 10px; }
.answer { border: 1px solid var(--line); border-radius: 9px; padding: 10px 12px; min-width: 0; }
.answer.hit { border-color: var(--good); }
.answer header { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin-bottom: 6px; }
.answer header b { margin-right: auto; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .94rem; max-height: 8.2em; overflow-y: auto; }
.empty { color: var(--soft); font-style: italic; }
pre { margin: 0; padding: 14px 16px; overflow-x: auto; font-size: .82rem; line-height: 1.6;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .86em; }
summary { cursor: pointer; }
details { margin-top: 12px; }
footer { margin-top: 40px; }
@media (max-width: 560px) {
  h1 { font-size: 1.35rem; }
  th, td { padding: 8px 10px; font-size: .88rem; }
  .big { font-size: 1.5rem; }
  .nowrap, td .tag { white-space: normal; }
  td .tag { border-radius: 9px; }
  .fold tr { display: grid; grid-template-columns: repeat(var(--models), minmax(0, 1fr));
    border-top: 1px solid var(--line); }
  .fold thead tr { border-top: 0; }
  .fold th, .fold td { border-top: 0; text-align: left; overflow-wrap: anywhere; }
  .fold tr > :first-child { grid-column: 1 / -1; padding-bottom: 0; }
  .fold thead tr > :first-child { display: none; }
}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<p class="soft">Written {{ written }}</p>
{% for run in runs if run.status != "finished" %}
<p><span class="tag worse">{{ run.name }}: the run's status is “{{ run.status }}”, not “finished”</span></p>
{% endfor %}
{% for run in runs if run.missing_signal %}
<p><span class="tag worse">{{ run.name }}: {{ run.missing_signal }}</span></p>
{% endfor %}

<div class="cards">
{% for card in cards %}
<div class="box">
<div class="soft">{{ card.label }}</div>
<div class="big">
{% if card.before is not none and names|length > 1 %}<span class="from">{{ card.before }} → </span>{% endif %}
{{ card.after }}</div>
{% if card.verdict %}<span class="tag {{ card.verdict.tone }}">{{ card.verdict.text }}</span>
<small>{{ names[0] }} → {{ names[-1] }}</small>{% endif %}
</div>
{% endfor %}
</div>

<h2>Each model beside the one before it</h2>
<div class="scroll"><table class="fold" style="--models: {{ names|length }}">
<thead><tr><th></th>{% for model in models %}<th>{{ model.name }}<small><code>{{ model.path }}</code></small>
{% if model.parameters %}<small>{{ model.parameters|count }} parameters</small>{% endif %}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th>{{ row.label }}</th>
{% for cell in row.cells %}
<td><span class="nowrap">{{ cell }}</span>
{% if row.details[loop.index0] %}<small>{{ row.details[loop.index0] }}</small>{% endif %}
{% set verdict = row.verdicts[loop.index0] %}
{% if verdict %}<span class="tag {{ verdict.tone }}">{{ verdict.text }}</span>{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="soft" style="margin-top:10px">“no measurable change” means that the two values lie within the noise of the
measurement: 95% intervals that overlap, or a paired difference per document or prompt that its error can explain. An
exact match is an answer equal to the reference, character by character, but for white space at its ends.
{% if preferences %}<br>A model prefers the chosen answer of a pair if it gives it the higher log-probability per
token. A good answer holds what its prompt calls for, such as the right department and emergency advice.{% endif %}
{% if reward and reward.get("models") %}<br>The reward model <code>{{ reward.path }}</code> scores what each model
itself answers to the held-out prompts of preferences; beside the mean stands its standard error.{% endif %}
{% if evaluation.get("task") %}<br>Tasks are those of <code>{{ evaluation.task.file }}</code>; the rewards of
grpo_training.py judge the replies.{% endif %}
{% for name, note in notes %}<br>{{ name }}: {{ note }}{% endfor %}</p>

{% if runs %}
<h2>Curves of the training</h2>
<div class="grid">
{% for run in runs %}
<figure class="box">{{ run.svg }}
<figcaption>{{ run.stage }} in <code>{{ run.folder }}</code>: {{ run.steps|count }} steps
{%- if run.seconds is not none %} in {{ run.seconds|duration }}{% endif %}
{%- for key, value in run.metrics.items() %}{{ " · " if loop.first else ", " }}{{ key }} {{ value }}{% endfor %}
</figcaption>
</figure>
{% for curve in run.curves %}
<figure class="box">{{ curve.svg }}
<figcaption>{{ run.stage }}: {{ curve.caption }}</figcaption>
</figure>
{% endfor %}
{% endfor %}
</div>
{% endif %}

{% macro compared(example, mark) %}
<section class="box example">
{% for turn in example.messages %}
<p class="turn"><b>{{ turn.role }}</b>{{ turn.content|shown }}</p>
{% endfor %}
<small>{{ example.category }} · {{ example.place }} ·
{% if example.required is defined and example.required %}
required: {% for group in example.required %}{{ group|join(" or ") }}{{ "" if loop.last else ", and " }}{% endfor %} ·
{% endif %}
reference: {{ example.reference|shown }}</small>
<div class="answers">
{% for answer in example.answers %}
<div class="answer{{ ' hit' if answer.correct }}"><header><b>{{ answer.name }}</b>
{% if answer.correct %}<span class="tag better">✓ {{ mark }}</span>{% endif %}
{% if answer.mark %}<span class="tag">{{ answer.mark }}</span>{% endif %}
</header>
<div class="said{{ ' empty' if not answer.text }}" tabindex="0">{{ answer.text or "(empty)" }}</div>
</div>
{% endfor %}
</div>
</section>
{% endmacro %}
{% if preferences %}
<h2>Preferences: right pairs by category of the worse answer</h2>
{% set columns = names + (["reward model"] if reward else []) %}
<div class="scroll"><table class="fold" style="--models: {{ columns|length }}">
<thead><tr><th>category</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in preferences %}
<tr><th>{{ row.label }}</th>
{% for cell in row.cells %}
<td><span class="nowrap">{{ cell }}</span>
{% if reward and loop.last and row.details[loop.index0] %}<small>{{ row.details[loop.index0] }}</small>{% endif %}
{% if row.shares[loop.index0] is not none %}
<div class="bar"><i style="width:{{ '%.1f' % (100 * row.shares[loop.index0]) }}%"></i></div>
{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
<p class="soft" style="margin-top:10px">Held-out pairs of <code>{{ evaluation.preference.file }}</code>.
{% if reward %}The reward model <code>{{ reward.path }}</code> gives each answer a score: {{ reward_text }}.
{% endif %}</p>
{% endif %}

{% if prompt_examples %}
<h2>Prompts of preferences, before and after</h2>
<p class="soft">Greedy answers to held-out prompts. A good answer holds one string of each group that is required.</p>
{% for example in prompt_examples %}{{ compared(example, "good") }}{% endfor %}
{% endif %}

{% if task_examples %}
<h2>Tasks, before and after</h2>
<p class="soft">Greedy replies to held-out tasks. The reward <code>accuracy</code> says which are right.</p>
{% for example in task_examples %}{{ compared(example, "right") }}{% endfor %}
{% endif %}

{% if examples %}
<h2>The same questions, before and after</h2>
<p class="soft">Fixed rows of <code>{{ evaluation.chat.file }}</code>, spread over its categories. Every token of an
answer is the model's most likely one (greedy).</p>
{% for example in examples %}{{ compared(example, "exact") }}{% endfor %}
{% endif %}

{% macro by_category(title, what, rows) %}
<h2>{{ title }}</h2>
<div class="scroll"><table class="fold" style="--models: {{ names|length }}">
<thead><tr><th>{{ what }}</th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr><th>{{ row.label }}</th>
{% for cell in row.cells %}
<td><span class="nowrap">{{ cell }}</span>
{% if row.shares[loop.index0] is not none %}
<div class="bar"><i style="width:{{ '%.1f' % (100 * row.shares[loop.index0]) }}%"></i></div>
{% endif %}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% if categories %}{{ by_category("Exact match by category", "category", categories) }}{% endif %}
{% for label, rows in task_types if rows %}
{{ by_category("Tasks: right " ~ label ~ " by type", "type", rows) }}
{% endfor %}

{% if runs %}
<h2>Data: every row accounted for</h2>
<div class="scroll"><table>
<thead><tr><th>run</th><th style="text-align:left">file</th><th>rows</th><th>used</th><th>left out</th>
<th>sha256</th></tr></thead>
<tbody>
{% for run in runs %}{% for file in run.files %}
<tr><td>{{ run.name }}{% if file.side %} <small>{{ file.side }}</small>{% endif %}</td>
<td style="text-align:left"><code>{{ file.file }}</code></td>
<td>{{ file.rows|count if file.rows is not none else "-" }}</td>
<td>{{ file.used|count if file.used is not none else "-" }}</td>
<td>{% for reason, count in file.left_out.items() %}{{ count|count }} {{ reason }}<br>{% else %}0{% endfor %}
{% if not file.adds_up %}<span class="tag worse">used and left out do not add up</span>{% endif %}</td>
<td><code>{{ file.sha256 or "-" }}</code></td></tr>
{% else %}
<tr><td>{{ run.name }}</td><td style="text-align:left" colspan="5">no data files were recorded</td></tr>
{% endfor %}{% endfor %}
</tbody></table></div>
{% for run in runs if run.samples %}
<details class="box"><summary>{{ run.name }}: answers recorded by the run itself</summary>
{% for sample in run.samples %}
<div class="example" style="margin-top:14px"><p class="turn"><b>prompt</b>{{ sample.prompt|shown }}</p>
<div class="answers">
<div class="answer"><header><b>before</b></header><div class="said">{{ sample.before|shown }}</div></div>
<div class="answer"><header><b>after</b></header><div class="said">{{ sample.after|shown }}</div></div>
</div></div>
{% endfor %}
{% if run.samples_left %}<small>{{ run.samples_left }} more in {{ run.folder }}/samples.jsonl</small>{% endif %}
</details>
{% endfor %}
{% endif %}

<h2>Commands</h2>
<div class="scroll"><pre>{% for label, command in commands %}# {{ label }}
{{ command }}
{{ "" if loop.last else "\\n" }}{% endfor %}</pre></div>

{% if versions %}
<h2>Versions</h2>
<p class="soft">
{% for library, version in versions.items() %}{{ library }} {{ version }}{{ "" if loop.last else " · " }}{% endfor %}
</p>
{% endif %}

<footer class="soft">A trained model can be wrong. Its answers are no medical advice.</footer>
</main>
</body>
</html>
"""


if __name__ == "__main__":
    run_main(main)
