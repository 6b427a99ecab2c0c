"""Loss curves of a finished run.

Reads the files in the `output_dir` of a stage. For live logging see `--report_to`.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType

from medicalgpt.errors import UserError

from loguru import logger

Point = tuple[float, float]

# Name of a curve, and its key in the log. In reinforcement learning the loss says nothing.
LOSSES = (("train loss", "loss"), ("eval loss", "eval_loss"))
SCORES = (("score", "score"), ("eval score", "eval_score"))
REWARDS = (("reward", "reward"), ("eval reward", "eval_reward"))

# Mid-tones with a contrast of at least 3:1 against both a white and a near-black page.
COLOURS = ("#3b82f6", "#ea580c", "#0d9488", "#a855f7", "#db2777", "#65a30d")


def read_metrics(output_dir: str | Path) -> list[dict]:
    """Return the log events of a run in the order in which they were written.

    `metrics.jsonl` is read if it exists, otherwise the `log_history` of `trainer_state.json`.

    Raises:
        UserError: `output_dir` has neither file, or a line is not a JSON object; the message names `file:line`. A last
            line that is not complete, as a killed run leaves it, is skipped with a warning.
    """
    output_dir = Path(output_dir)
    metrics_file = output_dir / "metrics.jsonl"
    state_file = output_dir / "trainer_state.json"
    if metrics_file.is_file():
        events = []
        lines = metrics_file.read_text(encoding="utf-8", errors="replace").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except json.JSONDecodeError as error:
                if number == len(lines):
                    logger.warning(f"{metrics_file}:{number}: the last line is not complete and is skipped")
                    continue
                raise UserError(f"{metrics_file}:{number}: not JSON ({error.msg}): {line[:80]!r}") from None
            if not isinstance(event, dict):
                raise UserError(f"{metrics_file}:{number}: expected a JSON object, found {line[:80]!r}")
            events.append(event)
        return events
    if state_file.is_file():
        try:
            return list(json.loads(state_file.read_text(encoding="utf-8"))["log_history"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{state_file}: no readable log_history ({error!r}).") from None
    raise UserError(
        f"{output_dir} has neither metrics.jsonl nor trainer_state.json. Is it the output_dir of a training run?"
    )


def loss_series(events: Sequence[Mapping]) -> dict[str, list[Point]]:
    """Return the (step, loss) points of the train and the eval loss; a series without points is omitted.

    A loss that was logged as null or not as a number becomes NaN, so that a curve shows the gap. A resumed run logs
    some steps again: the later event counts.
    """
    return _series(events, LOSSES)


BLOCKS = "▁▂▃▄▅▆▇█"


def loss_line(output_dir: str | Path, width: int = 40) -> str | None:
    """The training loss (or score, or reward) of a run as one line of text; None with fewer than two values.

    Args:
        width: at most so many blocks; each is the mean of its part of the log, from the lowest block to the highest.
    """
    events = read_metrics(output_dir)
    for name in ("score", "reward", "loss"):
        found = _series(events, [(name, name)]).get(name, [])
        values = [value for _, value in found if math.isfinite(value)]
        if len(values) > 1:
            return f"{name} {values[0]:.4g} {_blocks(values, width)} {values[-1]:.4g}"
    return None


def _blocks(values: Sequence[float], width: int) -> str:
    count = min(width, len(values))
    edges = [len(values) * number // count for number in range(count + 1)]
    means = [math.fsum(values[start:end]) / (end - start) for start, end in zip(edges, edges[1:], strict=False)]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(BLOCKS[round((mean - low) / span * (len(BLOCKS) - 1))] for mean in means)


def _series(events: Sequence[Mapping], curves: Sequence[tuple[str, str]]) -> dict[str, list[Point]]:
    series: dict[str, dict[float, float]] = {name: {} for name, _ in curves}
    for event in events:
        for name, key in curves:
            if key in event and "step" in event:
                series[name][float(event["step"])] = _number(event[key])
    return {name: sorted(points.items()) for name, points in series.items() if points}


def plot_loss(output_dir: str | Path) -> Path:
    """Write `loss.png` into `output_dir` and return its path: train and eval loss, or score or reward, by step.

    A run that logged no loss gets an image that says so: a finished training must not fail because of its plot.
    Raises what `read_metrics` raises.
    """
    events = read_metrics(output_dir)
    found = ((label, _series(events, curves)) for label, curves in (("score", SCORES), ("reward", REWARDS)))
    label, series = next(((label, series) for label, series in found if series), ("loss", loss_series(events)))
    # The object interface needs no backend. A program that Jupyter starts inherits Jupyter's, whose package may be
    # missing here, and importing matplotlib would fail.
    os.environ.pop("MPLBACKEND", None)
    # Imported here because it takes about a second.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=120)
    FigureCanvasAgg(figure)
    # Fixed margins: to find them, matplotlib would have to draw everything twice.
    figure.subplots_adjust(left=0.1, right=0.98, bottom=0.12, top=0.92)
    axes = figure.add_subplot()
    for colour, (name, points) in zip(COLOURS, series.items(), strict=False):
        # Markers keep a single point between two gaps visible.
        marker = "o" if name.startswith("eval") or len(points) <= 40 else None
        axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, markersize=3, linewidth=1.5)
    if series:
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
    else:
        axes.text(0.5, 0.5, "no loss was logged", ha="center", va="center", transform=axes.transAxes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.set_title(label)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path(output_dir) / "loss.png"
    figure.savefig(path)
    return path


def svg_curve(
    series: Mapping[str, Sequence[Point]],
    title: str,
    x_label: str = "step",
    y_label: str = "loss",
    width: int = 440,
    height: int = 280,
    max_points: int = 600,
    *,
    held_out: Collection[str] = (),
    chinese: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Return an inline SVG line chart, for a page without network requests.

    Text and grid have the page's text colour (`currentColor`), so the chart follows light and dark mode.

    Args:
        series: name -> (x, y) points, drawn in order of x. A y that is not finite is a gap in the line.
        width, height: size of the viewBox; on the page the chart scales to the available width.
        max_points: a longer series is reduced to the lowest and the highest point of groups of equal size.
        held_out: names of series that were measured on held-out data. There are few of these points, so each is drawn,
            on a dashed line, and the last one has its value next to it.
        chinese: of labels and names. Such a text is written twice, with the classes `en` and `zh`, one of which the
            page shows.

    Raises:
        ValueError: an x is not finite.
    """
    ordered = {name: sorted(points, key=lambda point: point[0]) for name, points in series.items()}
    for name, points in ordered.items():
        for x, _ in points:
            if not math.isfinite(x):
                raise ValueError(f"{title}: series {name!r} has an x that is not finite: {x!r}")
    ordered = {name: points for name, points in ordered.items() if any(math.isfinite(y) for _, y in points)}

    parts = [
        f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">',
        _svg_text(title, 'x="8" y="18" font-size="14" font-weight="600"', chinese),
    ]
    if not ordered:
        place = f'x="{width / 2:g}" y="{height / 2:g}" text-anchor="middle"'
        parts.append(_svg_text("no values were logged", place, chinese))
        return "".join(parts) + "</svg>"

    legend_rows = (len(ordered) + 1) // 2
    left, right, top, bottom = 52, width - 14, 34 + 18 * legend_rows, height - 42
    xs = [x for points in ordered.values() for x, y in points if math.isfinite(y)]
    ys = [y for points in ordered.values() for _, y in points if math.isfinite(y)]
    x_ticks, x_low, x_high = _axis(min(xs), max(xs), integers=all(x == int(x) for x in xs), widen=False)
    y_ticks, y_low, y_high = _axis(min(ys), max(ys), integers=False, widen=True)

    def place(x: float, y: float) -> Point:
        return (
            left + (x - x_low) / (x_high - x_low) * (right - left),
            bottom - (y - y_low) / (y_high - y_low) * (bottom - top),
        )

    parts += _svg_ticks(y_ticks, x_ticks, place, (left, right, bottom))
    centred = 'text-anchor="middle" opacity="0.8"'
    parts.append(_svg_text(x_label, f'x="{(left + right) / 2:g}" y="{height - 8}" {centred}', chinese))
    turned = f'transform="translate(13 {(top + bottom) / 2:g}) rotate(-90)"'
    parts.append(_svg_text(y_label, f"{turned} {centred}", chinese))
    for index, (name, points) in enumerate(ordered.items()):
        parts.append(_svg_legend(index, len(ordered), name, points, width, name in held_out, chinese))
        if name in held_out:
            parts += _svg_points(
                COLOURS[index % len(COLOURS)], [place(*point) for point in points if math.isfinite(point[1])]
            )
            parts.append(_svg_last_value(name, points, place, (left, top + 12, right), chinese))
        else:
            parts += _svg_line(_stroke(index, len(ordered)), points, place, max_points)
    return "".join(parts) + "</svg>"


def _svg_ticks(
    y_ticks: Sequence[tuple[float, str]],
    x_ticks: Sequence[tuple[float, str]],
    place: Callable[[float, float], Point],
    box: tuple[float, float, float],
) -> Iterator[str]:
    """Yield the grid, the ticks and the x axis; `box` is left, right and bottom of the drawing."""
    left, right, bottom = box
    for value, label in y_ticks:
        y = place(0, value)[1]
        yield (
            f'<line x1="{left}" x2="{right}" y1="{y:.2f}" y2="{y:.2f}" stroke="currentColor" stroke-opacity="0.15"/>'
            f'<text class="y-tick" x="{left - 7}" y="{y + 4:.2f}" text-anchor="end" opacity="0.8">{label}</text>'
        )
    for value, label in x_ticks:
        x = place(value, 0)[0]
        yield (
            f'<line x1="{x:.2f}" x2="{x:.2f}" y1="{bottom}" y2="{bottom + 4}" stroke="currentColor" '
            f'stroke-opacity="0.5"/><text class="x-tick" x="{x:.2f}" y="{bottom + 17}" text-anchor="middle" '
            f'opacity="0.8">{label}</text>'
        )
    yield f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="currentColor" stroke-opacity="0.5"/>'


def _svg_text(text: str, attributes: str, chinese: Mapping[str, str], suffix: str = "") -> str:
    texts = {"en": text, "zh": chinese[text]} if text in chinese else {"": text}
    return "".join(
        f"<text {attributes}" + (f' class="{language}"' if language else "") + f">{escape(said + suffix)}</text>"
        for language, said in texts.items()
    )


def _stroke(index: int, count: int) -> str:
    # Dashes distinguish the series for readers who cannot tell the colours apart.
    dash = ("", "6 3", "2 3")[index // len(COLOURS) % 3] if count > len(COLOURS) else ("", "7 3")[index % 2]
    return f'stroke="{COLOURS[index % len(COLOURS)]}" stroke-width="1.8"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _svg_legend(
    index: int,
    count: int,
    name: str,
    points: Sequence[Point],
    width: int,
    held_out: bool,
    chinese: Mapping[str, str],
) -> str:
    """Return sign, name, and first and last value of series number `index` of `count`."""
    values = [y for _, y in points if math.isfinite(y)]
    change = " → ".join(f"{y:#.3g}".rstrip(".") for y in (values[0], values[-1])[: len(values)])
    x, y = 8 + index % 2 * (width / 2), 38 + index // 2 * 18
    if held_out:
        (sign,) = _svg_points(COLOURS[index % len(COLOURS)], [(x + 9, y - 4)])
    else:
        sign = f'<line x1="{x:g}" x2="{x + 18:g}" y1="{y - 4}" y2="{y - 4}" {_stroke(index, count)}/>'
    return sign + _svg_text(name, f'x="{x + 24:g}" y="{y}"', chinese, f": {change}")


def _svg_line(
    stroke: str, points: Sequence[Point], place: Callable[[float, float], Point], max_points: int
) -> Iterator[str]:
    """Yield the line of a series; `place` turns a point into its position."""
    colour = stroke.split('"')[1]
    for run in _unbroken_runs(points):
        run = [place(x, y) for x, y in _thin(run, max_points)]
        if len(run) > 1:
            path = " ".join(f"{x:.2f},{y:.2f}" for x, y in run)
            yield f'<polyline points="{path}" fill="none" {stroke} stroke-linejoin="round"/>'
        if len(run) == 1 or len(points) <= 30:
            yield from (f'<circle cx="{x:.2f}" cy="{y:.2f}" r="2.6" fill="{colour}"/>' for x, y in run)


def _svg_points(colour: str, places: Sequence[Point]) -> Iterator[str]:
    if len(places) > 1:
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in places)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.4" stroke-dasharray="3 4"/>'
    yield from (f'<circle cx="{x:.2f}" cy="{y:.2f}" r="4" fill="{colour}"/>' for x, y in places)


def _svg_last_value(
    name: str,
    points: Sequence[Point],
    place: Callable[[float, float], Point],
    box: tuple[float, float, float],
    chinese: Mapping[str, str],
) -> str:
    """Return name and value next to the last point, on its inner side; `box` is left, top and right of the drawing."""
    left, top, right = box
    last = next(point for point in reversed(points) if math.isfinite(point[1]))
    x, y = place(*last)
    anchor, x = ("end", x - 8) if x > (left + right) / 2 else ("start", x + 8)
    place_of_text = f'x="{x:.2f}" y="{max(y - 7, top):.2f}" text-anchor="{anchor}" font-weight="600" '
    # A halo in the colour of the page keeps the text readable on top of a line.
    place_of_text += 'style="paint-order:stroke;stroke:var(--card,#fff);stroke-width:4px"'
    return _svg_text(name, place_of_text, chinese, f" {last[1]:#.3g}".rstrip("."))


def _number(value: object) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _axis(low: float, high: float, integers: bool, widen: bool) -> tuple[list[tuple[float, str]], float, float]:
    """Return labelled ticks at 1, 2 or 5 times a power of ten, and the ends of the axis."""
    if low == high:
        margin = max(abs(low) * 0.1, 0.5)
        low, high = low - margin, high + margin
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    if integers:
        step = max(step, 1.0)
    if widen:
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = []
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        value = index * step
        plain = decimals <= 4 and abs(value) < 1e7
        ticks.append((value, f"{value:,.{decimals}f}" if plain else f"{value:.4g}"))
    return ticks, low, high


def _unbroken_runs(points: Sequence[Point]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _thin(points: list[Point], max_points: int) -> list[Point]:
    if len(points) <= max_points:
        return points
    size = math.ceil(len(points) / max(1, max_points // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        group = range(start, min(start + size, len(points)))
        kept.add(min(group, key=lambda index: points[index][1]))
        kept.add(max(group, key=lambda index: points[index][1]))
    return [points[index] for index in sorted(kept)]
