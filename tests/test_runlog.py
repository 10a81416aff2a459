"""The run log: what it writes, what a resumed run keeps, and what it says where it cannot."""

import builtins
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bertling.files import BertlingError
from bertling.runlog import RunLog, format_status, progress_of, read_metrics


def open_log(folder: Path, **changes: Any) -> RunLog:
    arguments: dict[str, Any] = {"total_steps": 100, "total_minutes": None, "run_name": "demo", "settings": {}}
    return RunLog(folder, **(arguments | changes))


def train(log: RunLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        loss = 1 / step if step % 2 == 0 else None
        log.train_step(step, loss=loss, learning_rate=1e-3, tokens=50, seconds=step / 2)
        if step % 10 == 0:
            log.evaluation(
                step, {"eval/loss": 2.0, "eval/accuracy": step / 100, "floor/unigram": 0.05}, seconds=step / 2
            )
            log.line(f"saved after {step}")


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / "logs"))
    accumulator.Reload()
    return accumulator


def test_status_line_has_the_agreed_form() -> None:
    line = format_status(
        3000,
        total_steps=25_000,
        fraction=0.12,
        elapsed=600,
        remaining=4390,
        seconds_per_step=0.2,
        learning_rate=0.9876e-3,
        train_loss=2.34,
        val_loss=2.2,
        val_accuracy=0.551,
    )
    assert line == (
        "12% | 3,000/25,000 | e: 00:10 | r: 01:13 | 03:20 /Kit | lr: 0.9876 e-3"
        " | t.loss: 2.34 | v.loss: 2.20 | v.acc: 55.1%"
    )


def test_status_line_of_a_short_run_shows_seconds_and_leaves_out_what_is_unknown() -> None:
    line = format_status(7, total_steps=None, fraction=0.29, elapsed=65, remaining=130, seconds_per_step=None)
    assert line == "29% | 7 | e: 0:01:05 | r: 0:02:10"


@pytest.mark.parametrize(
    ("total_steps", "total_minutes", "expected"),
    [
        (200, None, (0.25, 300.0)),
        (None, 10, (0.5, 300.0)),
        (200, 10, (0.5, 300.0)),
        (60, 100, (50 / 60, 20.0)),
        (50, None, (1.0, 0.0)),
        (None, None, (None, None)),
    ],
)
def test_progress_follows_the_limit_reached_first(
    total_steps: int | None, total_minutes: float | None, expected: tuple[float | None, float | None]
) -> None:
    assert progress_of(50, 300.0, 2.0, total_steps, total_minutes) == pytest.approx(expected)


def test_time_left_is_unknown_before_the_first_step() -> None:
    assert progress_of(0, 0.0, None, 100, None) == (0.0, None)


def test_a_run_is_told_everywhere_but_on_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path, settings={"d-model": 64, "base-dir": Path("wiki")}) as log:
        train(log, 1, 10)
        log.illustration("/plain/", Text("/plain/", style="on green"))
    entries = read_metrics(tmp_path)
    assert entries[0] == {"step": 2, "time": 1.0, "train/loss": 0.5, "lr": 1e-3, "perf/tokens_per_s": 100.0}
    assert entries[-1] == {"step": 10, "time": 5.0, "eval/loss": 2.0, "eval/accuracy": 0.1, "floor/unigram": 0.05}
    assert [entry["step"] for entry in entries] == [2, 4, 6, 8, 10, 10]
    status = "10% | 10/100 | e: 0:00:05 | r: 0:00:45 | 08:20 /Kit | lr: 1.0000 e-3 | t.loss: 0.10 | v.loss: 2.00"
    said = f"{status} | v.acc: 10.0%\nsaved after 10\n/plain/\n"
    assert (tmp_path / "logs" / "log.txt").read_text() == said
    assert capsys.readouterr() == ("", said)
    scalars = events(tmp_path)
    assert sorted(scalars.Tags()["scalars"]) == ["eval/accuracy", "eval/loss", "lr", "perf/tokens_per_s", "train/loss"]
    assert [(point.step, point.value) for point in scalars.Scalars("train/loss")][:2] == [(2, 0.5), (4, 0.25)]
    about = json.loads((tmp_path / "logs" / "run.json").read_text())
    assert about == {"name": "demo", "settings": {"d-model": 64, "base-dir": "wiki"}}


def test_resuming_cuts_what_a_killed_run_wrote_of_later_steps(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with open_log(whole) as log:
        train(log, 1, 40)
    with open_log(resumed) as log:
        train(log, 1, 33)
    for name in ("metrics.jsonl", "log.txt"):
        with (resumed / "logs" / name).open("a") as file:
            file.write('{"step": 34, "ti')  # torn
    with open_log(resumed, start_step=20, start_seconds=10.0) as log:
        train(log, 21, 40)
    assert read_metrics(resumed) == read_metrics(whole)
    lines = (resumed / "logs" / "log.txt").read_text().splitlines()
    assert lines[4] == "resumed after step 20"
    assert lines[:4] + lines[5:] == (whole / "logs" / "log.txt").read_text().splitlines()
    for tag in ("train/loss", "eval/accuracy"):
        told = [[(point.step, point.value) for point in events(run).Scalars(tag)] for run in (whole, resumed)]
        assert told[0] == told[1]


def test_speed_counts_neither_evaluations_nor_the_time_before_a_resume(tmp_path: Path) -> None:
    with open_log(tmp_path, start_step=3, start_seconds=70.0) as log:
        log.train_step(4, loss=None, learning_rate=1e-3, tokens=5, seconds=70.5)
        log.evaluation(4, {"eval/loss": 1.0}, seconds=90.0)
        log.train_step(5, loss=1.0, learning_rate=1e-3, tokens=5, seconds=90.5)
    entry = read_metrics(tmp_path)[-1]
    assert (entry["time"], entry["perf/tokens_per_s"]) == (90.5, 10.0)


def test_lines_are_on_the_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    train(log, 1, 10)
    assert len(read_metrics(tmp_path)) == 6
    assert "saved after 10" in (tmp_path / "logs" / "log.txt").read_text()
    assert len(events(tmp_path).Scalars("train/loss")) == 5
    log.close()
    log.close()


def test_loss_that_is_not_finite_stays_readable_json(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.train_step(1, loss=float("nan"), learning_rate=1e-3, tokens=5, seconds=0.5)
    assert read_metrics(tmp_path)[0]["train/loss"] is None


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path / "run", enabled=False, wandb=True) as log:
        train(log, 1, 10)
        log.illustration("a", "a")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_terminal_shows_progress_and_colour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=140)
    with open_log(tmp_path, console=console) as log:
        train(log, 1, 10)
        log.illustration("/~plain~/", Text("/colour/", style="black on green"))
        print("an answer")
    shown = screen.getvalue()
    assert "10/100 | 0:00:45 left | loss 0.100 | 100 tokens/s" in shown
    assert "\x1b[30;42m/colour/" in shown
    assert capsys.readouterr().out == "an answer\n"
    assert "/~plain~/" not in shown
    assert "/~plain~/" in (tmp_path / "logs" / "log.txt").read_text()


def test_damaged_metrics_are_named_by_line(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.jsonl").write_text('{"step": 1}\n[]\n{"step": 2}\n')
    with pytest.raises(BertlingError, match=r"metrics\.jsonl: line 2 is not a metrics entry .* delete that line"):
        read_metrics(tmp_path)
    with pytest.raises(BertlingError, match="line 2 is not a metrics entry"):
        open_log(tmp_path)


def test_run_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(BertlingError, match=r"metrics\.jsonl: no such file or folder"):
        read_metrics(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_what_a_full_disk_refuses_waits_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    with open_log(whole) as log:
        train(log, 1, 30)
    with open_log(full) as log:
        (full / "logs" / name).symlink_to("/dev/full")
        train(log, 1, 20)
        (full / "logs" / name).unlink()  # room again
        train(log, 21, 30)
    assert (full / "logs" / name).read_text() == (whole / "logs" / name).read_text()
    assert capsys.readouterr().err.count(f"{name}: the disk is full; what is logged waits until it can") == 1


def test_a_log_that_cannot_be_written_waits_and_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with open_log(whole) as log:
        train(log, 1, 30)
    with open_log(broken) as log:
        (broken / "logs").rename(tmp_path / "away")  # as when a network disk is gone for a while
        train(log, 1, 20)
        (tmp_path / "away").rename(broken / "logs")
        train(log, 21, 30)
    for name in ("log.txt", "metrics.jsonl"):
        assert (broken / "logs" / name).read_text() == (whole / "logs" / name).read_text()
    assert capsys.readouterr().err.count("No such file or directory; what is logged waits until it can") == 1


def test_missing_wandb_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_wandb(name: str, *rest: Any, **more: Any) -> Any:
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(BertlingError, match="wandb: the package is not installed; pip install wandb"):
        open_log(tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()


class FakeWandb:
    """Stands for the package: keeps what it is told."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.finished = error, 0
        self.told: list[dict[str, float]] = []
        self.step_metric = ""
        self.init_arguments: dict[str, Any] = {}
        self.Settings = SimpleNamespace

    def init(self, **arguments: Any) -> "FakeWandb":
        if self.error:
            raise self.error
        self.init_arguments = arguments
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.step_metric = step_metric

    def log(self, metrics: dict[str, float]) -> None:
        self.told.append(metrics)

    def finish(self) -> None:
        self.finished += 1


@pytest.mark.parametrize(("key", "mode"), [(None, "offline"), ("0123", "online")])
def test_wandb_is_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, mode: str
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", key) if key else monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with open_log(tmp_path / "run", wandb=True, settings={"seed": 1}) as log:
        train(log, 1, 10)
    assert fake.init_arguments["mode"] == mode
    assert fake.init_arguments["config"] == {"seed": 1}
    assert fake.told[-1] == {"step": 10, "eval/loss": 2.0, "eval/accuracy": 0.1}
    assert (fake.step_metric, fake.finished) == ("step", 1)
    begun = fake.init_arguments
    with open_log(tmp_path / "run", wandb=True, start_step=10):
        pass
    assert (fake.init_arguments["id"], fake.init_arguments["resume"]) == (begun["id"], "allow")


def test_wandb_that_does_not_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(RuntimeError("no route")))
    with pytest.raises(BertlingError, match=r"wandb: it did not start \(no route\); set WANDB_MODE=offline"):
        open_log(tmp_path / "run", wandb=True)
