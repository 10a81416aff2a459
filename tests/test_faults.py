"""Numbers that run away, a loss that does not fall, memory that is too small, a disk that is full: nothing is lost."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import VOCAB, bertling
from safetensors.torch import load_file, save_file
from torch import Tensor

from bertling import checkpoint, faults, train
from bertling.checkpoint import load_state
from bertling.console import Lasting, say
from bertling.files import BertlingError
from bertling.runlog import read_metrics
from bertling.runs import Outcome
from bertling.tasks import MaskedLMTask

Train = Callable[..., Outcome]


def spoil(monkeypatch: pytest.MonkeyPatch, spoiled: Callable[[int], bool]) -> None:
    """Give the steps (numbered from 1) that `spoiled` names a loss of infinity."""
    step = [0]
    batches, loss = MaskedLMTask.micro_batches, MaskedLMTask.loss

    def micro_batches(self: MaskedLMTask, number: int, **sizes: int) -> Any:
        step[0] = number + 1
        return batches(self, number, **sizes)

    def spoiled_loss(self: MaskedLMTask, *given: Any) -> Tensor:
        return loss(self, *given) * (float("inf") if spoiled(step[0]) else 1.0)

    monkeypatch.setattr(MaskedLMTask, "micro_batches", micro_batches)
    monkeypatch.setattr(MaskedLMTask, "loss", spoiled_loss)


def log_of(outcome: Outcome) -> str:
    return (outcome.run / "logs" / "log.txt").read_text()


def losses(run: Path) -> dict[int, float]:
    return {entry["step"]: entry["train/loss"] for entry in read_metrics(run) if "train/loss" in entry}


def test_a_bad_step_is_skipped_and_counted(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda step: step in (3, 4, 7))
    outcome = train_mlm(max_iters=8)
    assert (outcome.step, outcome.finished, outcome.skipped_steps) == (8, True, 3)
    assert "warning: step 3 was skipped: loss inf, gradient norm " in log_of(outcome)
    assert sorted(losses(outcome.run)) == [1, 2, 5, 6, 8]
    assert not (outcome.run / "nonfinite.json").exists()
    assert all(bool(value.isfinite().all()) for value in load_file(last(outcome) / "model.safetensors").values())


def test_what_is_due_at_a_bad_step_waits_for_a_good_one(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda step: step in (4, 5))
    outcome = train_mlm(max_iters=8, val_interval=4, save_every="4", max_checkpoints=9)
    evaluated = [entry["step"] for entry in read_metrics(outcome.run) if "eval/loss" in entry]
    saved = sorted(int(path.name[5:]) for path in (outcome.run / "checkpoints").glob("step-*"))
    assert (evaluated, saved) == ([0, 6, 8], [0, 6, 8])
    assert os.readlink(outcome.run / "checkpoints" / "best") == f"step-{outcome.best_step:07d}"


def last(outcome: Outcome) -> Path:
    return outcome.run / "checkpoints" / "last"


def test_many_bad_steps_send_the_run_back_once_at_half_the_rate(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"max_iters": 20, "save_every": "4", "schedule": "trapezoid", "cooldown": 0.1, "dropout": 0.1}
    seen: list[int] = []

    def spoiled(step: int) -> bool:  # the first time only
        seen.append(step)
        return 10 <= step <= 14 and seen.count(step) == 1

    spoil(monkeypatch, spoiled)
    outcome = train_mlm(**shape)
    assert (outcome.step, outcome.finished, outcome.skipped_steps) == (20, True, 5)
    assert "no finite loss and gradient in steps 10 to 14" in log_of(outcome)
    assert "back to step 8, and on at 0.5 times the learning rate" in log_of(outcome)
    report = json.loads((outcome.run / "nonfinite.json").read_text())
    assert [entry["batch"] for entry in report["steps"]] == [9, 10, 11, 12, 13]
    assert len(next(iter(report["steps"][0]["rows"].values()))) == 8
    entries = [entry for entry in read_metrics(outcome.run) if "lr" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, 21))
    assert entries[10]["lr"] == pytest.approx(entries[6]["lr"] / 2)
    evaluated = [entry["step"] for entry in read_metrics(outcome.run) if "eval/loss" in entry]
    assert evaluated == sorted(set(evaluated))
    # What came before is that of a run without the fault.
    monkeypatch.undo()
    whole = train_mlm(**shape)
    assert {k: v for k, v in losses(outcome.run).items() if k <= 8} == {
        k: v for k, v in losses(whole.run).items() if k <= 8
    }
    # The lower rate is kept by whoever goes on with the run.
    state = load_state(last(outcome))
    assert state is not None
    assert (state.numbers["rate"], state.numbers["skipped_steps"]) == (0.5, 5)
    gone_on = train_mlm(cp=outcome.run, max_iters=22)
    assert (gone_on.run, gone_on.step, gone_on.finished, gone_on.skipped_steps) == (outcome.run, 22, True, 5)
    state = load_state(last(gone_on))
    assert state is not None
    assert (state.numbers["rate"], state.numbers["skipped_steps"]) == (0.5, 5)


def test_a_run_that_runs_away_twice_ends_with_a_report(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda step: step >= 6)
    with pytest.raises(
        BertlingError, match=r"run0: no finite loss and gradient in steps 6 to 10, at 0\.5 times the"
    ) as e:
        train_mlm(max_iters=20, save_every="4")
    assert "nonfinite.json holds what was seen, batch by batch; the checkpoint of step 4 is whole" in str(e.value)


@pytest.mark.parametrize(
    ("steps", "message"), [(2, "no finite loss at step 2"), (20, "no finite loss and gradient in")]
)
def test_weights_that_ran_away_are_never_saved(train_mlm: Train, work: Path, steps: int, message: str) -> None:
    with pytest.raises(BertlingError, match=rf"run0: {message}.*the checkpoint of step 0 is whole: lower"):
        train_mlm(max_iters=steps, learning_rate=1e39, val_interval=1)
    checkpoints = work / "runs" / "run0" / "checkpoints"
    assert [path.name for path in checkpoints.glob("step-*")] == ["step-0000000"]
    assert {os.readlink(checkpoints / name) for name in ("best", "last")} == {"step-0000000"}


def test_weights_that_are_no_numbers_are_not_trained(train_mlm: Train, tmp_path: Path) -> None:
    shutil.copytree(last(train_mlm(max_iters=1)), tmp_path / "ruined")
    for name in ("manifest.json", "training_state.json", "training_state.safetensors"):  # weights from elsewhere
        (tmp_path / "ruined" / name).unlink()
    weights = load_file(tmp_path / "ruined" / "model.safetensors")
    for weight in weights.values():
        weight.fill_(3e38)  # finite, but not what is computed from it
    save_file(weights, tmp_path / "ruined" / "model.safetensors", {"format": "pt"})
    with pytest.raises(BertlingError, match="run1: the weights that it starts from give no finite loss; take others"):
        train_mlm(cp=tmp_path / "ruined", max_iters=9)


def test_a_loss_on_the_floor_is_said_with_its_causes(train_mlm: Train, tmp_path: Path) -> None:
    outcome = train_mlm(max_iters=210, val_interval=100, learning_rate=1e-9)
    assert log_of(outcome).count("warning: loss ") == 1
    assert "(no context at all): learning-rate = 1e-09 is very low; raise it" in log_of(outcome)
    late = train_mlm(max_iters=250, lr_decay_iters=250, warmup_iters=208, val_interval=200, learning_rate=1e-5)
    assert "the warm-up is not over: it takes 83% of the run" in log_of(late)


def test_odd_data_are_found(tmp_path: Path) -> None:
    words = "the old lamp of the village was bright and the river ran by it all night\n"
    (tmp_path / "repeats.txt").write_text("".join(f" = Title {i} = \n{words * 30}" for i in range(20)))
    (tmp_path / "unknown.txt").write_text("".join(f"the lamp ωψχ of the village {i} ђљњ ran\n" for i in range(900)))
    for name, cause in (("repeats", r"\d+% of the rows are repeats"), ("unknown", r"\d+% of the tokens are \[UNK\]")):
        base = tmp_path / name
        made = bertling(
            "prepare", "-i", tmp_path / f"{name}.txt", "-l", "x", "-o", base / "datasets", "-m", 16, "-v", VOCAB
        )
        assert made.status == 0, made.err
        words_of_it = (
            "--d-model 32 --heads 4 --n-layers 1 --dtype fp32 --threads 1 --batch-size 4 --max-iters 201".split()
        )
        done = bertling("pretrain", *words_of_it, "--base-dir", base, "--val-interval", 200, "--learning-rate", "1e-9")
        assert done.status == 0, done.err
        log = next((base / "runs").glob("*/logs/log.txt")).read_text()
        assert log.count("warning: loss") == 1
        assert re.search(cause, log), log


def test_a_sound_loss_is_left_alone() -> None:
    assert not faults.stays_on_the_floor(1000, 0.5, 6.0, 7.0)
    assert not faults.stays_on_the_floor(100, 0.5, 7.0, 7.0)
    assert not faults.stays_on_the_floor(1000, 0.1, 7.0, 7.0)
    assert not faults.stays_on_the_floor(1000, 0.5, 7.0, None)
    assert faults.stays_on_the_floor(1000, 0.5, 7.0, 7.0)
    assert faults.stays_on_the_floor(1000, 0.5, float("nan"), 7.0)


def test_too_little_memory_halves_the_micro_batch_and_keeps_the_gradient(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"max_iters": 4, "batch_size": 9, "learning_rate": 5e-3}
    whole = train_mlm(**shape)
    loss = MaskedLMTask.loss
    sizes: list[int] = []

    def small_memory(self: MaskedLMTask, model: Any, batch: Any) -> Tensor:
        sizes.append(len(batch.input_ids))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, model, batch)

    monkeypatch.setattr(MaskedLMTask, "loss", small_memory)
    outcome = train_mlm(**shape)
    assert sizes[:6] == [9, 5, 3, 3, 3, 3]
    assert max(sizes[2:]) == 3
    assert "note: out of GPU memory: micro-batches of 3 rows from here on, for the same gradient" in log_of(outcome)
    assert list(losses(outcome.run).values()) == pytest.approx(list(losses(whole.run).values()), rel=1e-5)
    expected = load_file(last(whole) / "model.safetensors")
    for name, value in load_file(last(outcome) / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], atol=2e-4, rtol=1e-3)


def test_memory_that_holds_not_one_row_ends_the_run(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_fits(self: MaskedLMTask, model: Any, batch: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MaskedLMTask, "loss", nothing_fits)
    with pytest.raises(torch.OutOfMemoryError):
        train_mlm(max_iters=2)


def fill_disk(monkeypatch: pytest.MonkeyPatch, refused: Callable[[int], bool], code: int = errno.ENOSPC) -> list[int]:
    """Let the n-th checkpoint (from 0) meet a full disk where `refused` says so; returns the steps that were tried."""
    tried: list[int] = []
    write_model = checkpoint.write_model

    def full(folder: Path, *rest: Any) -> None:
        tried.append(int(folder.name.split("-")[1][:7]))
        write_model(folder, *rest)
        if refused(len(tried) - 1):
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint, "write_model", full)
    monkeypatch.setattr(train, "RETRY_SECONDS", 0)
    return tried


class Dead:
    """A terminal that is gone, or a full file, in the place of standard error."""

    def __init__(self, code: int) -> None:
        self.code = code

    def write(self, text: str) -> int:
        raise OSError(self.code, os.strerror(self.code))

    def flush(self) -> None:
        self.write("")

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise OSError


@pytest.mark.parametrize("code", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_standard_error_that_nobody_takes_ends_no_training(
    code: int, train_mlm: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", Lasting(Dead(code)))  # type: ignore[arg-type]
    outcome = train_mlm(max_iters=4, val_interval=2)
    say("and what is said after it")
    assert (outcome.finished, last(outcome).resolve().name) == (True, "step-0000004")
    assert "4/4" in log_of(outcome)


def test_the_best_survives_a_last_checkpoint_that_needs_a_second_try(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_mlm(max_iters=4, val_interval=100)
    fill_disk(monkeypatch, lambda number: number == 1)
    outcome = train_mlm(max_iters=4, val_interval=100)
    assert (outcome.best_step, outcome.best_accuracy) == (whole.best_step, whole.best_accuracy) != (0, -1.0)
    assert (outcome.run / "checkpoints" / "best").readlink() == Path("step-0000004")


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_mlm(max_iters=12, save_every="2", val_interval=2)
    tried = fill_disk(monkeypatch, lambda number: number in (2, 3, 6))
    outcome = train_mlm(max_iters=12, save_every="2", val_interval=2)
    assert outcome.finished
    assert tried == [0, 2, 4, 6, 8, 10, 12, 12]
    assert log_of(outcome).count("could not be saved") == 3
    assert "warning: step 4 could not be saved (" in log_of(outcome)
    assert "the disk is full: free some space" in log_of(outcome)
    for name, value in load_file(last(whole) / "model.safetensors").items():
        assert torch.equal(load_file(last(outcome) / "model.safetensors")[name], value)
    # The best is one that is there.
    assert os.readlink(outcome.run / "checkpoints" / "best") == f"step-{outcome.best_step:07d}"


def test_a_disk_that_fails_once_costs_no_more_than_a_full_one(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, lambda number: number == 1, errno.EIO)
    outcome = train_mlm(max_iters=6, save_every="2")
    assert outcome.finished
    assert "warning: step 2 could not be saved (" in log_of(outcome)
    assert "Input/output error" in log_of(outcome)


def test_a_disk_that_stays_full_ends_the_run_with_the_checkpoint_before(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_disk(monkeypatch, lambda number: number >= 3)
    with pytest.raises(
        BertlingError, match=r"run0: stopped at step 10: 3 checkpoints in a row could not be written \(.*disk is full"
    ):
        train_mlm(max_iters=50, save_every="2", run_id="run0")
    monkeypatch.undo()
    resumed = train_mlm(resume=True)
    assert (resumed.step, resumed.finished) == (50, True)
    assert sorted(losses(resumed.run)) == list(range(1, 51))


@pytest.fixture
def small_disk() -> list[str]:
    """The words that run a shell command with a disk of 3 MiB mounted at ./disk, in a namespace of its own."""
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=3m none disk && "
    if shutil.which("unshare") is None:
        pytest.skip("unshare is missing")
    probe = subprocess.run([*words, "mkdir -p disk && " + mount + "true"], cwd="/tmp", capture_output=True)
    if probe.returncode:
        pytest.skip("no disk may be mounted here")
    return [*words, mount]


def test_a_disk_that_is_really_full_leaves_whole_checkpoints(small_disk: list[str], work: Path) -> None:
    (work / "disk").mkdir()
    train_words = (
        f"{sys.executable} -m bertling pretrain --d-model 64 --heads 4 --n-layers 2 --dtype fp32 --threads 1 "
        "--base-dir disk --batch-size 4 --save-every 2 --max-checkpoints 50 --device cpu"
    )
    script = (
        f"cp -rL datasets vocab disk/ && {train_words} --max-iters 400 --val-interval 1000 --run-id full; "
        "echo status $?; ls -A disk/runs/full/checkpoints; mount -o remount,size=9m disk; "
        f"{train_words.split(' --d-model')[0]} --cp disk/runs/full --max-checkpoints 1 --max-iters 30; echo status $?"
    )
    done = subprocess.run([*small_disk[:-1], small_disk[-1] + script], cwd=work, capture_output=True, text=True)
    assert "checkpoints in a row could not be written" in done.stderr, done.stderr
    assert "could not be saved" in done.stderr
    assert "Traceback" not in done.stderr
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 2", "status 0"], done.stdout + done.stderr
    assert ".step" not in done.stdout
    assert "passed over" not in done.stderr


def test_a_second_signal_leaves_a_whole_checkpoint(work: Path) -> None:
    # The first signal comes in the middle of a step that takes long, the second before that one has ended.
    (work / "sitecustomize.py").write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from bertling.train import Trainer\n"
        "train_step = Trainer.train_step\n"
        "def slow(self, progress):\n"
        "    if self.step == 41:\n"
        f"        Path({str(work / 'slow')!r}).touch()\n"
        "        time.sleep(60)\n"
        "    return train_step(self, progress)\n"
        "Trainer.train_step = slow\n"
    )
    path = os.pathsep.join([str(work), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = "--d-model 32 --heads 4 --n-layers 1 --dtype fp32 --threads 1 --device cpu --batch-size 4".split()
    command = [sys.executable, "-m", "bertling", "pretrain", *words, "--base-dir", str(work), "--save-every", "20"]
    process = subprocess.Popen(
        [*command, "--max-iters", "100000", "--run-id", "two"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    run = work / "runs" / "two"
    while not ((run / "checkpoints" / "step-0000040").exists() and (work / "slow").exists()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert process.poll() is None  # it waits for the end of its step
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM
    done = subprocess.run(
        [*command[:4], "--cp", str(run), "--max-iters", "30000", "--max-minutes", "0.02"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "passed over" not in done.stderr


def test_checkpoints_by_the_clock(train_mlm: Train) -> None:
    outcome = train_mlm(max_minutes=0.04, save_every="0.005m", max_checkpoints=50)  # every 0.3 of 2.4 seconds
    folders = [path.name for path in (outcome.run / "checkpoints").glob("step-*")]
    assert 5 <= len(folders) <= 10
    with pytest.raises(
        BertlingError, match=r"save-every = soon: must be a number of steps \(500\) or of minutes \(10m\)"
    ):
        train_mlm(save_every="soon")
