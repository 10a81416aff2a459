"""Pictures of a run: which are drawn, from what, and what they say."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bertling.files import BertlingError
from bertling.plots import plot_run

EVALUATION = {
    "eval/accuracy": 0.551,
    "eval/loss": 2.2,
    "floor/bag_of_words": 0.548,
    "floor_loss/unigram": 6.4,
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is saved."""
    axes: list[Axes] = []
    save = Figure.savefig

    def remember(self: Figure, *arguments: Any, **options: Any) -> None:
        axes.extend(self.axes)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remember)
    return axes


def make_run(folder: Path, entries: list[dict[str, Any]], about: dict[str, Any] | None = None) -> Path:
    logs = folder / "run0" / "logs"
    logs.mkdir(parents=True)
    (logs / "metrics.jsonl").write_text("".join(json.dumps({"time": 1.0, **entry}) + "\n" for entry in entries))
    if about is not None:
        (logs / "run.json").write_text(json.dumps(about))
    return logs.parent


def line(axes: Axes, number: int = 0) -> tuple[list[float], list[float]]:
    x, y = np.asarray(axes.lines[number].get_data())
    return x.tolist(), y.tolist()


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_both_pictures_with_floors_labels_and_title(tmp_path: Path, drawn: list[Axes]) -> None:
    entries = [{"step": 10, "train/loss": 3.0}, {"step": 10, **EVALUATION}, {"step": 20, **EVALUATION}]
    settings = {"task-type": "mlm", "preset": "modern", "n_layers": 6, "d_model": 768, "size": None}
    run = make_run(tmp_path, entries, {"name": "my run", "settings": settings})
    paths = plot_run(run)
    assert paths == [run / "accuracy.png", run / "loss.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    accuracy, loss = drawn
    assert texts(accuracy) == ["bag of words 54.8 %", "validation 55.1 %"]
    assert texts(loss) == ["validation 2.20", "training 3.00", "unigram 6.40"]
    assert line(accuracy)[0] == [10, 20]
    assert accuracy.lines[1].get_linestyle() == "--"
    places = [text.get_position()[1] for text in accuracy.texts]
    assert places[1] - places[0] >= 0.05  # two values that nearly touch, labels that do not
    figure = accuracy.get_figure()
    assert figure is not None
    assert [text.get_text() for text in figure.texts] == [
        "my run",
        "accuracy by step: masked language modelling, modern, 6 x 768",
    ]
    assert sorted(path.name for path in run.iterdir()) == ["accuracy.png", "logs", "loss.png"]


def test_pictures_are_drawn_again_after_more_training(tmp_path: Path) -> None:
    run = make_run(tmp_path, [{"step": 1, **EVALUATION}])
    first = [path.read_bytes() for path in plot_run(run)]
    assert [path.read_bytes() for path in plot_run(run)] == first
    with (run / "logs" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, **EVALUATION}) + "\n")
    assert all(path.read_bytes() != old for path, old in zip(plot_run(run), first, strict=True))


def test_a_run_without_evaluations_has_its_loss(tmp_path: Path, drawn: list[Axes]) -> None:
    run = make_run(tmp_path, [{"step": 1, "train/loss": 3.0}, {"step": 2, "train/loss": None}])
    assert plot_run(run) == [run / "loss.png"]
    assert line(drawn[0])[0] == [1]


def test_many_points_are_averaged(tmp_path: Path, drawn: list[Axes]) -> None:
    run = make_run(tmp_path, [{"step": step, "train/loss": float(step % 2)} for step in range(1, 3001)])
    plot_run(run)
    assert line(drawn[0]) == (list(range(20, 3001, 20)), [0.5] * 150)


def test_labels_stay_inside_the_picture(tmp_path: Path, drawn: list[Axes]) -> None:
    floors = {"floor/low": 0.1, **{f"floor/{name}": 0.9 for name in "abcd"}}
    plot_run(make_run(tmp_path, [{"step": 1, "eval/accuracy": 0.9, **floors}]))
    places = sorted(text.get_position()[1] for text in drawn[0].texts)
    assert places[-1] <= 1.0
    assert all(high - low >= 0.05 for low, high in itertools.pairwise(places))


def test_nothing_measured_draws_nothing(tmp_path: Path) -> None:
    assert plot_run(make_run(tmp_path, [])) == []


def test_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(BertlingError, match=r"metrics\.jsonl: no such file or folder"):
        plot_run(tmp_path)
