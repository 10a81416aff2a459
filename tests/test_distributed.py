"""Two processes train as one does; a launch passes on settings, signals and statuses; bad input never gets there."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from bertling import cli, distributed
from bertling.checkpoint import load_state
from bertling.distributed import Ranks, check_processes, join, launch
from bertling.files import BertlingError, write_json
from bertling.finetune import FinetuneResult
from bertling.runlog import read_metrics
from bertling.runs import Outcome, in_progress
from bertling.settings import Settings, key_of

# An odd number of rows for two processes, cut into several micro-batches on each.
SHAPE: dict[str, Any] = {**TINY, "batch_size": 9, "micro_batch_size": 2, "dropout": 0.0, "learning_rate": 5e-3}
# Steps of half a second, each of them logged (of 400 and more only some are).
SLOW: dict[str, Any] = SHAPE | {"batch_size": 512, "d_model": 128, "max_iters": 399}
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "--",
    "bertling",
]


def flags(**settings: Any) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{key_of(name)}", str(value))]


def start(command: list[str], folder: Path) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(run: Path) -> dict[int, float]:
    entries = read_metrics(run)
    steps = [entry["step"] for entry in entries if "train/loss" in entry]
    assert steps == sorted(set(steps))
    return {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}


def start_two(work: Path, shape: dict[str, Any], steps: int = 1) -> "tuple[subprocess.Popen[str], Path]":
    """A training on two processes that has logged this many steps, and its run folder."""
    command = [sys.executable, "-m", "bertling", "pretrain", "--ddp", "--nproc", "2"]
    process = start([*command, *flags(base_dir=work, run_id="two", **shape)], work)
    run = work / "runs" / "two"
    deadline = time.monotonic() + 240
    while not ((run / "logs" / "metrics.jsonl").exists() and len(losses(run)) >= steps):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, run


def workers(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that a launcher watches over."""
    return [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def evaluations(run: Path) -> list[dict[str, float]]:
    keys = ("step", "eval/loss", "eval/accuracy", "floor/unigram")
    return [{key: entry[key] for key in keys if key in entry} for entry in read_metrics(run) if "eval/loss" in entry]


def assert_same_curve(one: Path, two: Path, steps: int) -> None:
    expected, found = losses(one), losses(two)
    assert sorted(expected) == sorted(found) == list(range(1, steps + 1))
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-4)
    for first, second in zip(evaluations(one), evaluations(two), strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=0.02)  # accuracies: a near tie may fall the other way
    weights = [load_file(run / "checkpoints" / "last" / "model.safetensors") for run in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-3, rtol=1e-2)


def test_torchrun_trains_as_one_process_does(work: Path, train_mlm: Callable[..., Outcome]) -> None:
    shape = SHAPE | {"max_iters": 20, "val_interval": 10}
    process = start([*TORCHRUN, "pretrain", *flags(base_dir=work, run_id="two", **shape)], work)
    one = train_mlm(**shape)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "; 2 processes" in err
    assert out.count("validation accuracy") == 1  # only one of them answers
    assert err.count("settings: ") == err.count("run folder: ") == 1
    assert_same_curve(one.run, work / "runs" / "two", 20)
    assert (work / "runs" / "two" / "accuracy.png").exists()


def test_ddp_fine_tunes_as_one_process_does(work: Path, train_classifier: Callable[..., FinetuneResult]) -> None:
    # 61 texts in batches of 7: the last batch of an epoch has 5, of which one process gets 2.
    shape = SHAPE | {"batch_size": 7, "max_iters": 20, "preset": "bert", "val_interval": 10}
    texts = {"train_input": work / "train.tsv", "val_input": work / "dev.tsv"}
    command = [sys.executable, "-m", "bertling", "finetune", "--from-scratch", "--ddp", "--nproc", "2"]
    process = start([*command, *flags(base_dir=work, run_id="two", **texts, **shape)], work)
    one = train_classifier(from_scratch=True, **shape).seeds[0]
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_curve(one.outcome.run, work / "runs" / "two", 20)
    assert (work / "runs" / "two" / "result.json").exists()


def test_a_signal_to_the_launcher_saves_and_can_be_resumed_by_one_process(
    work: Path, train_mlm: Callable[..., Outcome]
) -> None:
    shape = SHAPE | {"max_iters": 399, "max_minutes": 60.0}
    process, run = start_two(work, shape, steps=20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == cli.STOPPED, err
    assert "Traceback" not in err
    state = load_state(run / "checkpoints" / "last")
    assert state is not None
    step = state.numbers["step"]
    assert step in (max(losses(run)), max(losses(run)) + 1)
    assert train_mlm(cp=run, max_iters=step + 1, ddp=False).finished


def test_a_launch_that_is_stopped_before_it_saved_says_so(work: Path) -> None:
    command = [sys.executable, "-m", "bertling", "pretrain", "--ddp", "--nproc", "2"]
    process = start([*command, *flags(base_dir=work, **SHAPE, max_iters=399)], work)
    deadline = time.monotonic() + 60
    while len(workers(process)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # both are started, and still loading
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert not (work / "runs").exists()


def test_a_process_whose_launcher_is_gone_before_it_watches_ends() -> None:
    code = "import time; from bertling.distributed import watch_launcher; watch_launcher(); time.sleep(100)"
    gone = subprocess.Popen(["true"])
    gone.wait()
    ended = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {distributed.LAUNCHER: str(gone.pid)}, timeout=90
    )
    assert ended.returncode == 1


def test_a_port_in_use_is_one_line(work: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        command = [sys.executable, "-m", "bertling", "pretrain", "--ddp", "--nproc", "2"]
        process = start([*command, *flags(base_dir=work, dist_master_port=port, **SHAPE, max_iters=2)], work)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("error: dist-master-port: the processes could not meet (")
    assert "Traceback" not in err


def test_a_process_that_is_killed_ends_the_others_in_one_line(work: Path) -> None:
    process, _ = start_two(work, SLOW)
    os.kill(workers(process)[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, cli.STOPPED)
    assert "Traceback" not in err
    assert "error: another process of this training ended" in err


def test_a_signal_to_all_processes_saves_once(work: Path) -> None:
    process, run = start_two(work, SLOW)
    for number in [*workers(process), process.pid]:
        os.kill(number, signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == cli.STOPPED, err
    assert "Traceback" not in err
    state = load_state(run / "checkpoints" / "last")
    assert state is not None
    assert state.numbers["step"] >= max(losses(run)) > 0


def test_another_number_of_processes_goes_on_with_the_same_batches(
    work: Path, train_mlm: Callable[..., Outcome]
) -> None:
    shape = SHAPE | {"max_iters": 12, "val_interval": 6, "save_every": "6", "max_checkpoints": 9}
    whole = train_mlm(**shape, run_id="whole").run
    for name in ("other", "back"):
        shutil.copytree(whole, work / "runs" / name, symlinks=True)
        for path in (work / "runs" / name / "checkpoints").iterdir():
            if path.is_symlink():
                path.unlink()
        shutil.rmtree(work / "runs" / name / "checkpoints" / "step-0000012")
        write_json(work / "runs" / name / "run.json", {"task": "mlm", "finished": False})
    command = [sys.executable, "-m", "bertling", "pretrain", "--ddp", "--nproc", "2", "--cp", "runs/other"]
    process = start(command, work)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "; 2 processes" in err
    assert_same_curve(whole, work / "runs" / "other", 12)
    assert train_mlm(cp=work / "runs" / "back").step == 12
    assert_same_curve(whole, work / "runs" / "back", 12)


def test_the_processes_die_with_a_launcher_that_is_killed(work: Path) -> None:
    process, run = start_two(work, SLOW | {"save_every": "1000000"})
    assert in_progress(run)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while in_progress(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not in_progress(run)


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is started, and this process is none of several."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("torch.distributed.run.main", lambda words: pytest.fail("started"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "--dataset-pattern", "nothing_*"], "nothing_*"),
        (["pretrain", "--seq-len", "64"], "seq-len = 64: "),
        (["pretrain", "--heads", "3"], "heads = 3 does not divide d-model = 256"),
        (["pretrain", "--batch-size", "1"], "batch-size = 1 is less than one row for each of the 2 processes"),
        (["pretrain", "--cp", "nowhere"], "nowhere: no such folder"),
        (["finetune"], "--cp: name the checkpoint to fine-tune"),
        (["finetune", "--from-scratch"], "train-00000-of-00001.parquet"),
        (["finetune", "--from-scratch", "--train-input", "one.tsv", "--val-input", "one.tsv"], "all labels are of one"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_launched(
    work: Path,
    no_launch: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    (work / "one.tsv").write_text("sentence\tlabel\na\t1\nb\t1\n")
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["bertling", *words, "--ddp", "--nproc", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("settings: ")]
    assert (end.value.code, captured.out, len(errors)) == (2, "", 1)
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not (work / "runs").exists()


def test_a_launch_refuses_a_name_that_is_taken(
    work: Path, no_launch: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "runs" / "taken" / "checkpoints" / "step-0000000").mkdir(parents=True)
    words = ["pretrain", "--base-dir", str(work), "--run-id", "taken", "--ddp", "--nproc", "2"]
    monkeypatch.setattr(sys, "argv", ["bertling", *words])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "taken: exists already; go on with it by --cp" in capsys.readouterr().err


def test_a_launch_of_several_seeds_looks_at_the_names_that_they_get(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "runs" / "taken" / "checkpoints" / "step-0000000").mkdir(parents=True)
    monkeypatch.setattr(distributed, "launch", lambda settings, words: 0)
    texts = ["--train-input", str(work / "train.tsv"), "--val-input", str(work / "dev.tsv"), "--from-scratch"]
    words = ["finetune", "--base-dir", str(work), "--run-id", "taken", "--seeds", "2", "--ddp", *texts]
    monkeypatch.setattr(sys, "argv", ["bertling", *words])
    with pytest.raises(SystemExit, match="0"):
        cli.main()


def test_a_launch_resumes_the_run_that_was_found(
    work: Path, train_mlm: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_mlm(max_iters=2).run
    write_json(run / "run.json", {"task": "mlm", "finished": False})
    launched: list[list[str]] = []

    def note(settings: Settings, words: list[str]) -> int:
        launched.append(words)
        return 0

    monkeypatch.setattr(distributed, "launch", note)
    extra = ["--base-dir", str(work), "--ddp", "--nproc", "2", "--max-iters", "4"]
    monkeypatch.setattr(sys, "argv", ["bertling", "pretrain", "--resume", *extra])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert launched == [["pretrain", "--cp", str(run), *extra]]


def test_a_launch_passes_its_settings_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr("torch.distributed.run.main", calls.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launch(Settings(nproc=3), ["pretrain", "--ddp"]) == 0
    assert launch(Settings(nproc=2, dist_master_addr="10.0.0.1", dist_master_port=12233), ["finetune"]) == 0
    assert calls[0][-4:] == ["--", "bertling", "pretrain", "--ddp"]
    assert {"--nproc-per-node=3", "--standalone"} <= set(calls[0])
    assert {"--nproc-per-node=2", "--master-addr=10.0.0.1", "--master-port=12233"} <= set(calls[1])
    assert "--standalone" not in calls[1]


@pytest.mark.parametrize(("exitcode", "status"), [(2, 2), (3, 3), (-9, 1)])
def test_a_launch_ends_with_the_status_of_what_failed(
    monkeypatch: pytest.MonkeyPatch, exitcode: int, status: int
) -> None:
    def fail(words: list[str]) -> None:
        raise ChildFailedError("bertling", {0: ProcessFailure(0, 1, exitcode, "")})

    monkeypatch.setattr("torch.distributed.run.main", fail)
    assert launch(Settings(nproc=2), []) == status


def test_a_launch_that_signals_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(words: list[str]) -> None:
        raise SignalException("stopped", signal.SIGINT)

    monkeypatch.setattr("torch.distributed.run.main", stop)
    assert launch(Settings(nproc=2), []) == -signal.SIGINT


def test_fewer_rows_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(BertlingError, match="batch-size = 3 is less than one row for each of the 4 processes: raise"):
        join(Settings(batch_size=3))


def test_a_process_that_is_alone_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    ranks = join(Settings())
    assert ranks == Ranks()
    assert ranks.first
    assert ranks.from_first([1.5, 2.0]) == [1.5, 2.0]
    assert ranks.sum(torch.tensor(3.0)) == 3
    assert not distributed.dist.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BertlingError, match="nproc = 2: there are 1 GPUs here, and each process needs its own"):
        check_processes(Settings(), 2, 2)
    check_processes(Settings(device="cpu"), 2, 2)


def test_several_processes_on_an_apple_gpu_are_refused() -> None:
    with pytest.raises(BertlingError, match="device = mps: several processes cannot train on it together; give device"):
        check_processes(Settings(device="mps"), 2, 2)
    check_processes(Settings(device="mps"), 1, 1)
