"""What a budget buys: accuracy on the validation set against minutes of pre-training, several runs in one picture.

    python benchmarks/budgets.py "ten minutes=sub/runs/ten" "an hour=sub/runs/hour" \
        --point "stock Trainer, an hour=60=14.3" --floor "commonest token=5.5" -o docs/images/budgets.png

A line joins the evaluations of a run (its logs/metrics.jsonl) and ends in a dot; a point is a run without such a log.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from bertling.files import atomic_file
from bertling.plots import BLUE, GREY, INK, ORANGE, plain_frame
from bertling.runlog import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TICKS = [5, 10, 20, 30, 60, 120, 180]


def evaluations(run: Path) -> list[tuple[float, float]]:
    """(minutes, accuracy in percent) of each evaluation after the first step."""
    entries = [entry for entry in read_metrics(run) if entry["step"] > 0 and "eval/accuracy" in entry]
    return [(entry["time"] / 60, 100 * entry["eval/accuracy"]) for entry in entries]


def dot(axes: "Axes", name: str, minutes: float, accuracy: float, colour: str) -> None:
    axes.plot(minutes, accuracy, "o", color=colour)
    text = f"{name} {accuracy:.1f} %"
    axes.annotate(text, (minutes, accuracy), (0, 7), textcoords="offset points", ha="right", color=colour)


def main() -> None:
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--point", action="append", default=[], metavar="NAME=MINUTES=PERCENT")
    parser.add_argument("--floor", action="append", default=[], metavar="NAME=PERCENT")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot(xscale="log", xlim=(TICKS[0], 1.1 * TICKS[-1]))
    for run in options.runs:
        name, folder = run.split("=", 1)
        curve = evaluations(Path(folder))
        if not curve:
            parser.error(f"{folder}: no evaluation after its first step; name a run that has one")
        axes.plot(*zip(*curve, strict=True), color=BLUE, linewidth=1.2, alpha=0.5)
        dot(axes, name, *curve[-1], BLUE)
    for point in options.point:
        name, minutes, percent = point.split("=")
        dot(axes, name, float(minutes), float(percent), ORANGE)
    for floor in options.floor:
        name, percent = floor.split("=")
        axes.axhline(float(percent), color=GREY, linewidth=1.2, linestyle=(0, (5, 3)), zorder=1)
        at = (TICKS[0], float(percent))
        axes.annotate(f"{name} {percent} %", at, (4, -14), textcoords="offset points", color=GREY)
    axes.set_ylim(0, 1.12 * axes.dataLim.y1)
    axes.set_xticks(TICKS, [str(tick) for tick in TICKS])
    axes.minorticks_off()
    axes.set_xlabel("minutes of pre-training on two cores", color=INK)
    axes.set_ylabel("masked words right, %", color=INK)
    plain_frame(axes)
    with atomic_file(options.output) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
