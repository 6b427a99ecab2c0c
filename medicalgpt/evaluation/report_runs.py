"""What a report warns of in a run, and from which checkpoints a model was made."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What a run logs at every step if no answer gets more than another, so that nothing can be learned.
NO_SIGNAL = {
    "frac_reward_zero_std": (1.0, "no learning signal: in every group, all answers got the same reward"),
    "score_std": (0.0, "no learning signal: in every step, all answers got the same score"),
}
# A held-out loss that ends by more than this share above its lowest value has risen.
RISE = 0.02
MAX_SHOWN_STEPS = 5
# A smaller share of skipped rows is in the table of the data only.
SKIPPED = 0.01

# A text of the report, and what fills its places.
Remark = tuple[str, dict[str, Any]]


def near(path: str) -> str:
    """Make an absolute path below the working folder relative; other text stays as it is."""
    if os.path.isabs(path) and Path(path).is_relative_to(Path.cwd()):
        return os.path.relpath(path)
    return path


def series_of(events: Sequence[Mapping[str, Any]], *keys: str) -> list[tuple[float, float]]:
    """Return the (step, value) points that were logged under one of `keys`."""
    # A resumed run logs some steps again: the later event counts.
    points = {
        float(event["step"]): float(event[key])
        for event in events
        for key in keys
        if "step" in event and isinstance(event.get(key), int | float)
    }
    return sorted(points.items())


def missing_signal(events: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why nothing can have been learned from the rewards of a run; None if it can, or without rewards."""
    for key, (empty, reason) in NO_SIGNAL.items():
        values = [value for _, value in series_of(events, key)]
        # The standard deviation of equal numbers is 0 except for rounding.
        if values and all(abs(value - empty) < 1e-5 for value in values):
            return reason
    return None


def run_warnings(
    run: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    files: Sequence[Mapping[str, Any]],
    loss: Mapping[str, Sequence[tuple[float, float]]],
) -> Iterator[Remark]:
    """Yield what a reader of a run's results has to know first.

    Args:
        run: the content of run.json.
        events: of metrics.jsonl.
        files: what the report shows of the run's data.
        loss: (step, loss) by the name of the series; NaN where it was logged as something else than a number.
    """
    if (status := run.get("status", "unknown")) != "finished":
        yield "the run's status is “{status}”, not “finished”", {"status": status}
    if reason := missing_signal(events):
        yield reason, {}
    broken = [f"{step:g}" for points in loss.values() for step, value in points if not math.isfinite(value)]
    if broken:
        more = ", …" if len(broken) > MAX_SHOWN_STEPS else ""
        yield "the loss was not finite at step {steps}", {"steps": ", ".join(broken[:MAX_SHOWN_STEPS]) + more}
    measured = [(value, step) for step, value in loss.get("held-out loss", ()) if math.isfinite(value)]
    if measured and measured[-1][0] > min(measured)[0] * (1 + RISE) > 0:
        (lowest, step), (last, _) = min(measured), measured[-1]
        values = {"lowest": f"{lowest:.3g}", "step": f"{step:g}", "last": f"{last:.3g}"}
        yield "the held-out loss rose from {lowest} at step {step} to {last}: trained too long or too fast", values
    for line in run.get("observed") or []:
        if line.get("agrees") is False:
            seen = {key: line.get(key) for key in ("name", "requested", "observed")}
            yield "{name}: requested {requested}, observed {observed}", seen
    changed = dict.fromkeys(name for resume in run.get("changed_on_resume") or [] for name in resume["changes"])
    if changed:
        yield "resumed with other settings: {names}", {"names": ", ".join(changed)}
    for file in files:
        if (count := sum(file["skipped"].values())) > SKIPPED * (file["rows"] or 0):
            skipped = {"count": f"{count:,}", "rows": f"{file['rows'] or 0:,}", "file": file["file"]}
            yield "{count} of {rows} rows of {file} were skipped", skipped


def parent_of(run: Mapping[str, Any]) -> dict[str, str]:
    """Return what a checkpoint was made `of` and `by`, its `finished` time and `commit`, as far as run.json has it."""
    arguments, base = run.get("arguments") or {}, run.get("base") or {}
    merged = run.get("stage") == "merge_peft_adapter"
    if merged:
        adapter = run.get("adapter") or ""
        sources = [base.get("name") or "", *([adapter] if isinstance(adapter, str) else map(str, adapter))]
    else:
        sources = [run.get("parent") or base.get("name") or ""]
    adapted = arguments.get("use_peft")
    how = "merge" if merged else "" if adapted is None else "adapter" if adapted else "full fine-tuning"
    return {
        "of": " + ".join(near(source) for source in sources if source),
        "by": how,
        "finished": str(run.get("finished") or "")[:16].replace("T", " "),
        "commit": str(run.get("git_commit") or "")[:10],
    }


def merges_of(models: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Yield the merged checkpoints among the models, if their folders are still there."""
    for model in models:
        record = Path(str(model.get("path"))) / "run.json"
        try:
            run = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(run, dict) and run.get("stage") == "merge_peft_adapter":
            yield {"name": "", "folder": near(str(record.parent)), "stage": "", **parent_of(run)}
