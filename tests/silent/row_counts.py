"""How many rows a run read, used and left out, as run.json, the log and the trainer's datasets each have it."""

import re
from collections import Counter

from tests.helpers import read_json

SKIP = ["--skip_bad_rows", "True", "--skip_long_rows", "True"]


def balance(entries, side):
    """rows, used and left out by reason of one side, and the same for each file, each of them in balance."""
    of_side = [entry for entry in entries if entry["side"] == side]
    for entry in of_side:
        assert entry["rows"] == entry["used"] + sum(entry["left_out"].values()) and entry["used"] >= 0
    left_out = sum((Counter(entry["left_out"]) for entry in of_side), Counter())
    return sum(entry["rows"] for entry in of_side), sum(entry["used"] for entry in of_side), dict(left_out)


def logged(text, side):
    """The same numbers as the log gives them."""
    rows, used, reasons = re.search(rf"{side} +(\d+) rows in \d+ file\(s\), used (\d+), left out: (.*)", text).groups()
    counted = [reason.split(" ", 1) for reason in reasons.split(", ") if reasons != "none"]
    return int(rows), int(used), {name: int(count) for count, name in counted}


def check(opened, capsys, side, rows, used, left_out):
    """run.json, log and what the trainer has say the same."""
    log = capsys.readouterr().err
    opened.finish()
    entries = read_json(opened.run.output_dir / "run.json")["data"]
    dataset = {"train": opened.trainer.train_dataset, "validation": opened.trainer.eval_dataset}[side]
    assert balance(entries, side) == logged(log, side) == (rows, used, left_out)
    assert len(dataset) == used
    return entries, dataset
