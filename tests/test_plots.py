"""medicalgpt/training/plots.py: reading a run, loss.png and the inline SVG chart."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from medicalgpt.errors import UserError
from medicalgpt.training.plots import loss_series, plot_loss, read_metrics, svg_curve

import pytest

ROOT = Path(__file__).resolve().parent.parent


def write_metrics(folder, events):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return folder


def classed(svg, name):
    return [node for node in ElementTree.fromstring(svg).iter() if node.get("class") == name]


def polylines(svg):
    return [
        [tuple(map(float, pair.split(","))) for pair in node.get("points").split()]
        for node in ElementTree.fromstring(svg).iter("polyline")
    ]


def scale(ticks, coordinate):
    """Read a linear scale off two labelled ticks: drawing position -> value on the axis."""
    (first, first_at), (last, last_at) = (
        (float(node.text.replace(",", "")), float(node.get(coordinate))) for node in (ticks[0], ticks[-1])
    )
    return lambda position: first + (position - first_at) / (last_at - first_at) * (last - first)


def test_metrics_come_from_the_jsonl_in_order(tmp_path):
    events = [{"step": 10, "loss": 3.0}, {"step": 10, "eval_loss": 2.5}, {"step": 20, "loss": 2.0}]
    write_metrics(tmp_path, events)
    (tmp_path / "trainer_state.json").write_text('{"log_history": []}')
    assert read_metrics(tmp_path) == events
    assert loss_series(events) == {"train loss": [(10, 3.0), (20, 2.0)], "eval loss": [(10, 2.5)]}


def test_metrics_fall_back_to_the_trainer_state(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 4.0}]}')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 4.0}]


@pytest.mark.parametrize("line", ['{"step": 1', "[1, 2]"])
def test_a_bad_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:3"):
        read_metrics(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(UserError, match="neither metrics.jsonl nor trainer_state.json"):
        read_metrics(tmp_path)


def test_a_loss_that_is_no_number_is_a_gap():
    (points,) = loss_series([{"step": 1, "loss": None}, {"step": 2, "loss": "nan"}]).values()
    assert [x for x, _ in points] == [1, 2] and all(math.isnan(y) for _, y in points)


def test_steps_that_a_resumed_run_logged_again_count_once():
    events = [{"step": step, "loss": loss} for step, loss in ((10, 3.0), (20, 2.0), (30, 1.5), (20, 2.1), (30, 1.6))]
    assert loss_series(events) == {"train loss": [(10, 3.0), (20, 2.1), (30, 1.6)]}


@pytest.mark.parametrize(
    "events",
    [
        [{"step": 5, "loss": 3.0}, {"step": 10, "loss": 2.0}, {"step": 10, "eval_loss": 2.1}],
        [{"step": 5, "loss": 3.0}],
        [{"step": 5, "loss": math.nan}],
        [{"step": 5, "reward": 1.0}],
    ],
    ids=["train and eval", "one point", "only NaN", "no loss logged"],
)
def test_loss_png_is_written(tmp_path, events):
    path = plot_loss(write_metrics(tmp_path / "运行", events))
    assert path.name == "loss.png" and path.read_bytes().startswith(b"\x89PNG")


def test_svg_points_are_drawn_at_their_values():
    data = [(0, 8.5), (50, 4.25), (100, 3.0), (150, 2.75)]
    svg = svg_curve({"train loss": data}, "pt")
    to_x, to_y = scale(classed(svg, "x-tick"), "x"), scale(classed(svg, "y-tick"), "y")
    # The text of a tick is 4 units below its line, so its baseline reads as the line does when shifted by 4.
    (line,) = polylines(svg)
    assert [(to_x(x), to_y(y + 4)) for x, y in line] == [pytest.approx(point, abs=0.02) for point in data]


def test_svg_points_are_drawn_in_order_of_x():
    (line,) = polylines(svg_curve({"a": [(3, 1.0), (1, 2.0), (2, 3.0)]}, "t"))
    assert [x for x, _ in line] == sorted(x for x, _ in line)


def test_svg_breaks_the_line_at_a_gap_and_keeps_lone_points():
    data = [(0, 3.0), (1, 2.0), (2, math.nan), (3, 2.5), (4, math.inf), (5, 1.0), (6, 0.5)]
    svg = svg_curve({"loss": data}, "t")
    assert [len(line) for line in polylines(svg)] == [2, 2]
    assert "nan" not in svg and "inf" not in svg
    assert len(list(ElementTree.fromstring(svg).iter("circle"))) == 5


@pytest.mark.parametrize("value", [2.0, 0.0, -3.5, 1e-6, 5e8])
def test_svg_with_one_point(value):
    svg = svg_curve({"loss": [(7, value)]}, "t")
    (circle,) = ElementTree.fromstring(svg).iter("circle")
    assert not polylines(svg)
    assert 0 < float(circle.get("cx")) < 440 and 0 < float(circle.get("cy")) < 280
    assert len(classed(svg, "y-tick")) >= 2


def test_svg_without_values_says_so():
    assert "no values were logged" in svg_curve({}, "t")
    assert "no values were logged" in svg_curve({"loss": [(1, math.nan)]}, "t")


def test_svg_escapes_labels_and_names():
    svg = svg_curve({"<b>&": [(1, 1.0), (2, 2.0)]}, '<script>"x"', x_label="a<b", y_label="c&d")
    ElementTree.fromstring(svg)
    assert "<script>" not in svg and "<b>" not in svg and "&lt;script&gt;" in svg


def test_svg_refuses_a_step_that_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        svg_curve({"loss": [(math.nan, 1.0)]}, "t")


def test_svg_ticks_are_round_and_whole_for_steps():
    svg = svg_curve({"loss": [(1, 8.7), (3, 2.1)]}, "t")
    assert [node.text for node in classed(svg, "x-tick")] == ["1", "2", "3"]
    assert [node.text for node in classed(svg, "y-tick")] == ["2", "4", "6", "8", "10"]


def test_svg_of_a_long_series_stays_small_and_keeps_its_extremes():
    data = [(step, 2 + math.sin(step / 50)) for step in range(20_000)]
    data[12_345] = (12_345, 9.0)
    svg = svg_curve({"loss": data}, "t", max_points=600)
    (line,) = polylines(svg)
    assert len(line) <= 602 and len(svg) < 20_000
    to_x, to_y = scale(classed(svg, "x-tick"), "x"), scale(classed(svg, "y-tick"), "y")
    x, y = min(line, key=lambda point: point[1])
    assert to_x(x) == pytest.approx(12_345, abs=1) and to_y(y + 4) == pytest.approx(9.0, abs=0.02)
    assert to_x(line[0][0]) == pytest.approx(0, abs=1) and to_x(line[-1][0]) == pytest.approx(19_999, abs=1)


def test_svg_requests_nothing():
    assert not re.search(r"https?:|url\(|href", svg_curve({"loss": [(1, 1.0), (2, 2.0)]}, "t"))


def test_svg_marks_what_is_held_out_and_writes_both_languages():
    chinese = {"held-out loss": "留出数据的损失", "step": "步"}
    series = {"train loss": [(1, 5.0), (9, 0.12)], "held-out loss": [(4, 4.0), (9, 3.86)]}
    svg = svg_curve(series, "pt", held_out={"held-out loss"}, chinese=chinese)
    train, held_out = ElementTree.fromstring(svg).iter("polyline")
    assert held_out.get("stroke-dasharray") and not train.get("stroke-dasharray")
    # One x axis for both: the last points are at the same place.
    assert held_out.get("points").split(",")[-2].split()[-1] == train.get("points").split(",")[-2].split()[-1]
    assert [node.text for node in classed(svg, "en")] == [
        "step",
        "held-out loss: 4.00 → 3.86",
        "held-out loss 3.86",
    ]
    assert [node.text for node in classed(svg, "zh")] == ["步", "留出数据的损失: 4.00 → 3.86", "留出数据的损失 3.86"]


def test_a_program_that_jupyter_starts_draws_its_plot(tmp_path):
    """It inherits a backend whose package it may lack; matplotlib reads the variable when it is imported."""
    folder = write_metrics(tmp_path, [{"step": 1, "loss": 2.0}])
    code = f"from medicalgpt.training.plots import plot_loss; plot_loss({str(folder)!r})"
    environment = {**os.environ, "MPLBACKEND": "no_such_backend"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert (folder / "loss.png").is_file()
