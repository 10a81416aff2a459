"""Pictures of a run, drawn from its metrics: accuracy and loss against steps, with their floors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bertling.files import atomic_file, read_json
from bertling.runlog import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours, which stay apart for colour-blind readers; floors are grey, and dashed.
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#6b6b6b", "#222222"
MOST_POINTS = 150
TASKS = {"mlm": "masked language modelling", "sst2": "SST-2", "classification": "classification"}


@dataclass(frozen=True)
class Curve:
    """One line of a plot: its name, and values against steps."""

    name: str
    points: list[tuple[int, float]]
    colour: str


def plot_run(run_folder: Path) -> list[Path]:
    """Draw accuracy.png and loss.png into the run folder, replacing earlier ones; return those that had any data.

    Raises BertlingError where the folder has no readable logs/metrics.jsonl.
    """
    entries = read_metrics(run_folder)
    title = _title(run_folder)
    pictures = {
        "accuracy.png": ([Curve("validation", _series(entries, "eval/accuracy"), BLUE)], "floor/", _percent),
        "loss.png": (
            [
                Curve("training", _thinned(_series(entries, "train/loss")), ORANGE),
                Curve("validation", _series(entries, "eval/loss"), BLUE),
            ],
            "floor_loss/",
            "{:.2f}".format,
        ),
    }
    written = []
    for file_name, (curves, floor_prefix, show) in pictures.items():
        drawn = [curve for curve in curves if curve.points]
        if drawn:
            path = run_folder / file_name
            _draw(path, title, Path(file_name).stem, drawn, _floors(entries, floor_prefix), show)
            written.append(path)
    return written


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of each entry that has a number (a null stands for a loss that was not finite)."""
    return [(entry["step"], float(entry[key])) for entry in entries if isinstance(entry.get(key), int | float)]


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over equal stretches where there are more points than a picture can show."""
    if len(points) <= MOST_POINTS:
        return points
    stretches = np.array_split(np.array(points), MOST_POINTS)
    return [(int(stretch[-1, 0]), float(stretch[:, 1].mean())) for stretch in stretches]


def _floors(entries: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """The last value of each floor, by a readable name."""
    keys = dict.fromkeys(key for entry in entries for key in entry if key.startswith(prefix))
    series = {key: _series(entries, key) for key in keys}
    return {key.removeprefix(prefix).replace("_", " "): points[-1][1] for key, points in series.items() if points}


def _title(run_folder: Path) -> tuple[str, str]:
    """The run's name, and what was trained as far as its settings say."""
    path = run_folder / "logs" / "run.json"
    facts = read_json(path, "description of a run") if path.exists() else {}
    given = facts.get("settings")
    settings = {key.replace("-", "_"): value for key, value in given.items()} if isinstance(given, dict) else {}
    task = "classification" if settings.get("train_input") else str(settings.get("task_type") or "")
    model = " ".join(str(settings[key]) for key in ("preset", "size") if settings.get(key))
    shape = " x ".join(str(settings[key]) for key in ("n_layers", "d_model") if settings.get(key))
    batch = " x ".join(str(settings[key]) for key in ("batch_size", "seq_len") if settings.get(key))
    parts = [TASKS.get(task, task), model, shape, f"batch {batch}" if batch else ""]
    return str(facts.get("name") or run_folder.resolve().name), ", ".join(part for part in parts if part)


def _draw(
    path: Path,
    title: tuple[str, str],
    what: str,
    curves: Sequence[Curve],
    floors: Mapping[str, float],
    show: Callable[[float], str],
) -> None:
    # A Figure of one's own: pyplot keeps global state and may look for a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

    figure = Figure(figsize=(8, 4.8), dpi=150)
    axes = figure.add_axes((0.085, 0.12, 0.68, 0.72))
    figure.text(0.085, 0.93, title[0], fontsize=15, fontweight="bold", color=INK)
    figure.text(0.085, 0.875, f"{what} by step" + (f": {title[1]}" if title[1] else ""), fontsize=11, color=GREY)
    labels = []
    for curve in curves:
        steps, values = zip(*curve.points, strict=True)
        axes.plot(steps, values, color=curve.colour, linewidth=2, marker="o" if len(steps) <= 30 else "", markersize=4)
        labels.append((values[-1], f"{curve.name} {show(values[-1])}", curve.colour))
    for name, value in floors.items():
        axes.axhline(value, color=GREY, linewidth=1.3, linestyle=(0, (5, 3)), zorder=1)
        labels.append((value, f"{name} {show(value)}", GREY))
    shown = [value for value, _, _ in labels] + [value for curve in curves for _, value in curve.points]
    low, high = _limits(min(shown), max(shown), from_zero=what == "accuracy" and min(shown) < 0.3)
    last_step = max(step for curve in curves for step, _ in curve.points)
    axes.set_ylim(low, high)
    axes.set_xlim(0, max(last_step, 1) * 1.02)
    axes.set_xlabel("step", fontsize=11, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if what == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.04 else 1, symbol=" %"))
    plain_frame(axes)
    _label(axes, labels, low, high)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def plain_frame(axes: "Axes") -> None:
    """A light grid, and the bottom line of the frame alone."""
    axes.tick_params(labelsize=11, colors=INK, length=0)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")


def _limits(least: float, most: float, *, from_zero: bool) -> tuple[float, float]:
    """Ends of the value axis with some air, also where all values are equal."""
    bottom = 0.0 if from_zero else least
    margin = 0.06 * (most - bottom) or 0.05 * abs(most) or 1.0
    return bottom if from_zero else bottom - margin, most + margin


def _label(axes: "Axes", labels: Sequence[tuple[float, str, str]], low: float, high: float) -> None:
    """Write the labels at the right edge, each beside its value, moved apart where they would touch."""
    height = 0.058  # of a line, as a share of the axes
    ordered = sorted(labels)
    places: list[float] = []
    for value, _, _ in ordered:
        wanted = (value - low) / (high - low)
        places.append(max(wanted, places[-1] + height) if places else max(wanted, 0.0))
    ceiling = 1.0
    for index in reversed(range(len(places))):  # push down again what was pushed over the top
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - height
    for (_, text, colour), place in zip(ordered, places, strict=True):
        axes.text(1.015, place, text, transform=axes.transAxes, color=colour, fontsize=11, va="center")
