"""benchmarks/reproduce.py: from text to a row of figures, and on from where it was stopped."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import SMALL, TEXT, bertling, write_labelled

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "reproduce.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_goes_on_where_it_was(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, dev = write_labelled(tmp_path / "train.tsv", 40), write_labelled(tmp_path / "dev.tsv", 20)
    (tmp_path / "tiny.ini").write_text("task-type = mlm\nseq-len = 16\nbatch-size = 4\nmax-iters = 2\n")
    small = " ".join(SMALL)
    tables = f"--train-input {train} --val-input {dev} --max-iters 2 --batch-size 4 --dtype fp32 --threads 1"
    words = ["-c", tmp_path / "tiny.ini", "--text", TEXT, "--val-text", TEXT, "--work", tmp_path / "work"]
    words += ["--vocab-size", 200, "--seeds", 2, "--pretrain", small, "--finetune", tables]
    asked: list[str] = []

    def run(command: Sequence[str]) -> Any:
        asked.append(" ".join(command[:2]))
        done = bertling(*command, "--json", cwd=tmp_path)
        if command[0] == "pretrain":  # killed while the finished training drew its plots
            raise KeyboardInterrupt
        if command[0] == "finetune" and "--resume" not in command:  # killed while its second seed was trained
            second = next((tmp_path / "work" / "runs").glob("*-seed124"))
            (second / "result.json").unlink()
            raise KeyboardInterrupt
        return done.answer

    monkeypatch.setattr(script, "bertling", run)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            script.main([str(word) for word in words])
    assert [command.split()[0] for command in asked] == ["vocab", "prepare", "pretrain", "evaluate", "finetune"]
    script.main([str(word) for word in words])
    assert asked[5:] == ["finetune --resume", "export --cp"]
    script.main([str(word) for word in words])
    assert len(asked) == 7

    row = capsys.readouterr().out.splitlines()[2]
    notes = json.loads((tmp_path / "work" / "reproduce.json").read_text())
    accuracy = notes["tiny-classes: train"]["answer"]["accuracy"]
    assert accuracy["n"] == 2
    assert f"| {100 * accuracy['mean']:.1f} % (" in row
    assert f"| {100 * notes['tiny-mlm: score']['answer']['accuracy']:.1f} % (" in row
    assert (tmp_path / "work" / "tiny-classes" / "model.safetensors").exists()
    with pytest.raises(SystemExit, match="'tiny-mlm: train' was done by 'bertling pretrain "):
        script.main([*map(str, words), "--pretrain", f"{small} --max-iters 3"])


def test_a_training_that_was_begun_keeps_its_words(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(command: Sequence[str]) -> Any:
        (tmp_path / "runs" / "mlm" / "checkpoints" / "step-0000002").mkdir(parents=True, exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "bertling", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            script.Steps(tmp_path).train("mlm", "pretrain", "--max-iters", 4)
    with pytest.raises(SystemExit, match="'mlm: train' was done by 'bertling pretrain --max-iters 4 "):
        script.Steps(tmp_path).train("mlm", "pretrain", "--max-iters", 5)


def test_it_ends_with_a_command_that_failed(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        script.Steps(tmp_path).do("vocab", "vocab", "-i", tmp_path / "none.txt", "-o", tmp_path / "vocab")
    assert end.value.code == 2
    assert not (tmp_path / "reproduce.json").exists()


def test_missing_tables_are_missed_at_once(script: ModuleType, tmp_path: Path) -> None:
    words = ["-c", SCRIPT.parents[1] / "configs" / "cpu-1h.ini", "--text", TEXT, "--val-text", TEXT]
    words += ["--work", tmp_path]
    with pytest.raises(SystemExit, match=r"error: .*train-00000-of-00001.parquet: missing; fetch it by 'bertling"):
        script.main([str(word) for word in words])
