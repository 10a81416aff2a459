"""Kills: in the middle of a checkpoint, of a training of one or two processes; what is left is enough, to the bit."""

import json
import os
import random
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
from commands import bertling
from conftest import TINY
from safetensors.torch import load_file, save_file

from bertling.checkpoint import step_folders
from bertling.files import BertlingError
from bertling.runs import Outcome, record
from bertling.settings import Settings, read_ini
from bertling.tasks import MaskedLMTask
from bertling.tools import verify_resume as tool
from bertling.tools.verify_resume import verify_resume
from bertling.train import Trainer

KILLS = Path(__file__).parent.parent / "benchmarks" / "kills.py"


def check(work: Path, *, steps: int = 30, kills: int = 2, **changes: Any) -> tool.VerifyReport:
    given = {"base_dir": work, **TINY, "dropout": 0.2, **changes}
    report = verify_resume(
        Settings(**given),
        frozenset(given),
        cp=None,
        from_scratch=False,
        steps=steps,
        kills=kills,
        seed=1,
        say=lambda text: None,
    )
    assert not list(work.glob("verify-resume-*")) or not report.passed
    return report


def test_kills_while_checkpoints_are_written_leave_one_to_go_on_from() -> None:
    done = subprocess.run(
        [sys.executable, str(KILLS), "--kills", "12", "--width", "128"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = re.match(r"12 kills among \d+ checkpoints, (\d+) of them in the middle of one: each time", done.stdout)
    assert said is not None, done.stdout
    assert int(said[1]) > 0, done.stdout


def test_a_killed_training_ends_as_one_that_ran_through(work: Path) -> None:
    report = check(work, optimizer="muon", micro_batch_size=4)
    assert report.passed, report.text()
    assert report.text().startswith("PASS: 30 steps, killed after step ")
    assert len(report.kills) >= 1
    assert all(kill.resumed_after <= kill.step < 30 for kill in report.kills)


def test_a_killed_fine_tuning_too_through_the_command(work: Path) -> None:
    lines = [f"{name.replace('_', '-')} = {value}" for name, value in TINY.items() if name != "val_interval"]
    texts = [f"train-input = {work / 'train.tsv'}", f"val-input = {work / 'dev.tsv'}", "task-type = classification"]
    (work / "tune.ini").write_text("\n".join([*lines, *texts, f"base-dir = {work}"]))
    done = bertling("verify-resume", "-c", work / "tune.ini", "--from-scratch", "--steps", 20, "--kills", 1, "--json")
    assert done.status == 0, done.err
    assert (done.answer["passed"], done.answer["steps"], len(done.answer["kills"])) == (True, 20, 1)


def test_a_signal_leaves_neither_a_training_nor_its_folder(work: Path) -> None:
    lines = [f"{name.replace('_', '-')} = {value}" for name, value in TINY.items()]
    (work / "c.ini").write_text("\n".join(lines) + "\n")
    command = ["verify-resume", "-c", work / "c.ini", "--base-dir", work, "--steps", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bertling", *map(str, command)], stderr=subprocess.PIPE, text=True
    )
    while not list(work.glob("verify-resume-*/runs/whole/logs/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert not Path(f"/proc/{child}").exists()
    assert list(work.glob("verify-resume-*")) == []


def test_a_killed_training_of_two_processes_too(work: Path) -> None:
    report = check(work, ddp=True, nproc=2, batch_size=9, kills=1)
    assert report.passed, report.text()


def test_kills_that_come_too_late_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "last_step", lambda run: 30)
    with pytest.raises(BertlingError, match="the 30 steps were over before a kill could hit them; give more --steps"):
        tool.Twin(tmp_path, ["never", "started"]).kill_and_resume("killed", 30, 2, random.Random(0))


def test_a_difference_is_found(work: Path, train_mlm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    one, same = train_mlm(max_iters=6), train_mlm(max_iters=6)
    assert tool.difference(one.run, same.run) is None
    other_seed = train_mlm(max_iters=6, seed=5)
    assert re.match(r"step 0: eval/\w+ is .* in one go, .* killed", str(tool.difference(one.run, other_seed.run)))
    longer = train_mlm(max_iters=8)
    assert "killed and resumed" in str(tool.difference(one.run, longer.run))
    last = same.run / "checkpoints" / "last"
    (last / "model.safetensors").write_bytes(
        (other_seed.run / "checkpoints" / "last" / "model.safetensors").read_bytes()
    )
    assert "model.safetensors of the last step: sha256" in str(tool.difference(one.run, same.run))
    state = json.loads((longer.run / "checkpoints" / "last" / "training_state.json").read_text())
    assert {"rate", "recent_losses", "skipped_steps"} <= state.keys()


def test_a_difference_beside_the_weights_is_found(
    work: Path, tmp_path: Path, train_mlm: Callable[..., Outcome]
) -> None:
    one = train_mlm(max_iters=6, val_interval=3).run

    def copied(name: str) -> Path:
        copy = tmp_path / name
        shutil.copytree(one, copy, symlinks=True)
        assert tool.difference(one, copy) is None
        return copy

    moments = copied("moments") / "checkpoints" / "last" / "training_state.safetensors"
    tensors = load_file(moments)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, moments)
    found = str(tool.difference(one, tmp_path / "moments"))
    assert re.fullmatch(
        r"training_state\.safetensors of the last step: sha256 \w{16} in one go, \w{16} killed and resumed", found
    )
    best = copied("best") / "checkpoints" / "best"
    before = os.readlink(best)
    best.unlink()
    best.symlink_to("step-0000000")
    assert tool.difference(one, tmp_path / "best") == (f"best: {before} in one go, step-0000000 killed and resumed")
    for key, value in {"rate": 0.5, "recent_losses": [7.5], "skipped_steps": 1, "turn": 9, "extra": 1}.items():
        file = copied(key) / "checkpoints" / "last" / "training_state.json"
        numbers = json.loads(file.read_text())
        before = numbers.get(key)
        file.write_text(json.dumps(numbers | {key: value}))
        found = str(tool.difference(one, tmp_path / key))
        assert found == f"{key}: {before} in one go, {value} killed and resumed"
    file = copied("seconds") / "checkpoints" / "last" / "training_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": 1e6}))
    assert tool.difference(one, tmp_path / "seconds") is None


def test_a_resume_that_forgets_something_fails(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself must be able to fail: resume with the optimizer's memory lost."""
    sabotage = work / "sitecustomize.py"
    sabotage.write_text("import bertling.optim as optim\noptim.unpack_state = lambda optimizers, tensors: None\n")
    monkeypatch.setenv("PYTHONPATH", str(work))
    report = check(work, learning_rate=1e-2, kills=1)
    assert not report.passed
    assert re.match(
        r"FAIL: step \d+: .* in one go, .* killed and resumed; killed after step \d+ .*; both runs are in",
        report.text(),
    )


def test_paths_stay_as_they_were_given(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = work.parent / "a #b"  # no settings file could hold it
    work.rename(odd)
    monkeypatch.chdir(odd)
    settings = Settings(**{**TINY, "vocab": Path("vocab")})
    words = tool.command_line(settings, frozenset({"vocab"}), Path(), 9, Path("runs/mine"), from_scratch=False)
    assert read_ini(Path("config.ini"))["vocab"] == Path("vocab")
    assert words[-1] == str(Path("runs/mine"))


def test_what_cannot_be_trained_is_said(work: Path) -> None:
    with pytest.raises(BertlingError, match=r"heads = 5 does not divide d-model"):
        check(work, d_model=256, heads=5)
    nothing = (
        rf"the training to verify failed: pattern 'nothing_\*': matches nothing in {re.escape(str(work))}/datasets"
    )
    with pytest.raises(BertlingError, match="--from-scratch: is for a fine-tuning"):
        verify_resume(Settings(), frozenset(), cp=None, from_scratch=True, steps=9, kills=1, seed=1, say=print)
    with pytest.raises(BertlingError, match=nothing):
        check(work, dataset_pattern="nothing_*")


def test_a_run_that_is_killed_before_its_first_step_can_be_resumed(
    train_mlm: Callable[..., Outcome], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_mlm(max_iters=3, run_id="whole").run

    def die(*arguments: Any) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", die)
        with pytest.raises(RuntimeError, match="power cut"):
            train_mlm(max_iters=3)
    assert [path.name for path in step_folders(work / "runs" / "run0" / "checkpoints")] == ["step-0000000"]
    assert tool.difference(whole, train_mlm(resume=True).run) is None


def test_a_run_that_is_killed_behind_its_last_step_tells_nothing_twice(
    train_mlm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_mlm(max_iters=3)

    def die(run: Path, settings: Settings, *, finished: bool) -> None:
        if finished:
            raise RuntimeError("power cut")
        record(run, settings, finished=finished)

    with monkeypatch.context() as patch:
        patch.setattr("bertling.train.record", die)
        with pytest.raises(RuntimeError, match="power cut"):
            train_mlm(max_iters=3)
    evaluations: list[int] = []
    evaluate = MaskedLMTask.evaluate
    monkeypatch.setattr(MaskedLMTask, "evaluate", lambda *given: evaluations.append(1) or evaluate(*given))
    resumed = train_mlm(resume=True)
    assert (resumed.step, resumed.finished, evaluations) == (3, True, [])
    assert tool.difference(whole.run, resumed.run) is None
