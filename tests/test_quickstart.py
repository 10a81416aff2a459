"""The newcomer's first contact: one reduced run through the command line, checked from many sides."""

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from commands import Ended, bertling

from bertling.console import program
from bertling.files import BertlingError, locked
from bertling.tools.quickstart import FINETUNING, MARKER, MASKED, REVIEWS, STAGES, QuickstartResult, claim

REDUCED = ("--megabytes", 0.6, "--minutes", 5, "--steps", 20)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to call the command in."""
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="session")
def ended(work: Path) -> Ended:
    """The one run; on one thread, since small sums over several wait for the slowest where a machine is busy."""
    shorter = mock.patch.dict(FINETUNING, {"epochs": "2"})
    with shorter, mock.patch("bertling.runtime.available_cores", return_value=1):
        return bertling("quickstart", "--folder", "tour", "--json", *REDUCED, cwd=work)


@pytest.fixture(scope="session")
def answer(ended: Ended) -> dict[str, Any]:
    """Its JSON."""
    value: dict[str, Any] = ended.answer
    return value


def test_accuracy_leaves_the_floor_that_was_printed(ended: Ended, answer: dict[str, Any]) -> None:
    scores = answer["pretraining"]
    assert scores["accuracy"] > scores["floor"] > 0.02
    assert f"accuracy {scores['accuracy']:.1%}" in " ".join(ended.err.split())
    assert f"floor of {scores['floor']:.1%}" in " ".join(ended.err.split())
    assert scores["steps"] == 20


def test_words_are_filled_in_before_and_after(answer: dict[str, Any]) -> None:
    for part in ("before", "after"):
        assert [one["text"] for one in answer[part]] == list(MASKED)
        assert all(len(one["masks"]) == 1 and len(one["masks"][0]) == 3 for one in answer[part])
    assert answer["before"] != answer["after"]


def test_sentiment_is_scored_beside_its_floors(ended: Ended, answer: dict[str, Any]) -> None:
    scores = answer["sentiment"]
    dev = (files("bertling") / "assets" / "sentiment_dev.tsv").read_text().splitlines()
    assert scores["sentences"] == len(dev) - 1
    assert 0.45 < scores["majority"] < 0.55
    assert scores["bag_of_words"] > scores["majority"]
    assert scores["accuracy"] > scores["majority"]
    assert 0 < scores["from_scratch"] < 1
    assert scores["from_box"] > scores["from_scratch"]  # by seven points, the mean over five seeds (docs/results.md)
    assert f"package {scores['from_box']:.1%}" in " ".join(ended.err.split())
    assert [one["text"] for one in answer["classified"]] == list(REVIEWS)
    assert {one["label"] for one in answer["classified"]} <= {"negative", "positive"}


def test_all_that_is_named_is_there(work: Path, answer: dict[str, Any]) -> None:
    assert all((work / path).exists() for path in answer["written"])
    for run in ("pretrain", "sentiment", "sentiment-from-scratch", "sentiment-from-box"):
        for name in ("accuracy.png", "loss.png", "checkpoints/best/model.safetensors"):
            assert (work / "tour" / "runs" / run / name).stat().st_size > 1000
    kept = json.loads((work / "tour" / MARKER).read_text())
    assert kept == {"finished": True, **answer}


def test_stages_are_told_in_order_on_standard_error(ended: Ended) -> None:
    told = re.findall(r"^(\d)/(\d) \w", ended.err, flags=re.MULTILINE)
    assert told == [(str(number), str(STAGES)) for number in range(1, STAGES + 1)]
    assert len(ended.out.splitlines()) == 1


def shown(err: str) -> list[list[str]]:
    """The commands that the stages showed, as a shell reads them."""
    whole = err.replace(" \\\n", " ")
    return [shlex.split(line.removeprefix("  $ ")) for line in whole.splitlines() if line.startswith("  $ ")]


def test_the_commands_shown_do_what_the_stages_did(work: Path, ended: Ended, answer: dict[str, Any]) -> None:
    words_shown = shown(ended.err)
    assert [words[1] for words in words_shown] == ["vocab", "prepare", "pretrain", *["finetune"] * 3, "classify"]
    commands = {words[1]: words[1:] for words in words_shown}
    again = [word.replace("tour/vocab", "again/vocab") for word in commands["vocab"]]
    assert bertling(*again, cwd=work).status == 0
    assert (work / "again" / "vocab" / "vocab.txt").read_bytes() == (work / "tour/vocab/vocab.txt").read_bytes()
    assert "exists already" in bertling(*commands["prepare"], cwd=work).error
    assert "exists already" in bertling(*commands["pretrain"], cwd=work).error
    assert "exists already" in bertling(*commands["finetune"], cwd=work).error
    lines = bertling(*commands["classify"], cwd=work).out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [one["label"] for one in answer["classified"]]


@pytest.mark.parametrize("name", ["fill", "classify", "inspect", "summary"])
def test_what_to_try_next_works(work: Path, answer: dict[str, Any], name: str) -> None:
    words = next(words for words in map(shlex.split, answer["commands"]) if words[1] == name)
    ended = bertling(*words[1:], cwd=work)
    assert (ended.status, bool(ended.out)) == (0, True), ended.err


def test_training_on_goes_on_in_the_same_run(work: Path, answer: dict[str, Any]) -> None:
    words = next(words for words in map(shlex.split, answer["commands"]) if "--max-minutes" in words)
    ended = bertling(*words[1:], "--max-iters", 21, "--json", cwd=work)
    assert (ended.answer["step"], work / ended.answer["run"]) == (21, work / "tour" / "runs" / "pretrain")


def test_text_names_figures_folders_and_commands(answer: dict[str, Any]) -> None:
    text = QuickstartResult(**answer).text()
    for figure in (answer["pretraining"]["accuracy"], answer["pretraining"]["floor"], answer["sentiment"]["accuracy"]):
        assert f"{figure:.1%}" in text
    for name in (*answer["written"], *answer["commands"]):
        assert f"\n  {name}\n" in text


def test_a_folder_in_use_is_refused_in_one_line(work: Path, ended: Ended) -> None:
    refusal = bertling("quickstart", "--folder", "tour", *REDUCED, cwd=work).error
    assert refusal == "tour: exists already; give --force to replace it, or name another --folder"


def test_force_replaces_nothing_but_its_own(tmp_path: Path) -> None:
    claim(tmp_path / "tour", force=False)
    for name in ("runs/pretrain/config.ini", "runs/run0/config.ini", "notes.txt"):
        (tmp_path / "tour" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tour" / name).write_text("mine\n")
    claim(tmp_path / "tour", force=True)
    left = {path.relative_to(tmp_path / "tour").as_posix() for path in (tmp_path / "tour").rglob("*.*")}
    assert left == {MARKER, "notes.txt", "runs/run0/config.ini"}


def test_a_run_in_progress_is_not_taken_away(tmp_path: Path) -> None:
    claim(tmp_path, force=False)
    run = tmp_path / "runs" / "pretrain"
    run.mkdir(parents=True)
    with locked(run, wait=False), pytest.raises(BertlingError, match="another process is training this run"):
        claim(tmp_path, force=True)
    assert run.exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, force: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine\n")
    with pytest.raises(BertlingError, match="holds files, and not those of a quickstart; name another --folder"):
        claim(tmp_path, force=force)
    with pytest.raises(BertlingError, match=r"notes.txt: is a file; name another --folder"):
        claim(tmp_path / "notes.txt", force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_program_can_be_called_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bin = tmp_path / "venv" / "bin"
    bin.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(bin / "python"))
    monkeypatch.setenv("PATH", "")
    assert program() == f"{bin / 'python'} -m bertling"
    (bin / "bertling").write_text("#!/bin/sh\n")
    (bin / "bertling").chmod(0o755)
    assert program() == "venv/bin/bertling"
    monkeypatch.chdir(bin)
    assert program() == "./bertling"
    monkeypatch.setenv("PATH", str(bin))
    assert program() == "bertling"
