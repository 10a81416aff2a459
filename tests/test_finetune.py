"""Fine-tuning through the command: formats of labelled texts, SST-2's files, seeds, floors, what is written."""

import contextlib
import csv
import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from commands import SMALL, VOCAB, Ended, World, bertling, make_world, write_labelled

from bertling.checkpoint import load_checkpoint
from bertling.finetune import FinetuneResult, SeedResult
from bertling.labelled import load_labelled, summarise_seeds
from bertling.runs import Outcome
from bertling.runtime import Runtime, int8_pays
from bertling.tasks import ClassificationTask
from bertling.tokenizer import Tokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data" / "sst2"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.getbasetemp())


def finetune(world: World, base: Path, *words: object, steps: int = 2) -> Ended:
    return bertling(
        "finetune",
        *["--base-dir", base, "--batch-size", 8, "--max-iters", steps, "--val-interval", 2],
        *["--dtype", "fp32", "--threads", 1, "--json"],
        *words,
    )


def rows_of(path: Path) -> list[tuple[str, int]]:
    data = load_labelled(path)
    assert data.labels is not None
    return list(zip(data.texts, data.labels.tolist(), strict=True))


def write_parquet(path: Path, rows: list[tuple[str, int]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    texts, labels = zip(*rows, strict=True)
    pyarrow.parquet.write_table(pyarrow.table({"idx": range(len(rows)), "sentence": texts, "label": labels}), path)
    return path


def test_sst2_files_are_found_in_the_work_folder(world: World, tmp_path: Path) -> None:
    for split, path in (("train", world.train), ("validation", world.dev)):
        write_parquet(tmp_path / "datasets" / f"{split}-00000-of-00001.parquet", rows_of(path))
    unlabelled = [(text, -1) for text, _ in rows_of(world.dev)]
    write_parquet(tmp_path / "datasets" / "test-00000-of-00001.parquet", unlabelled)
    done = finetune(world, tmp_path, "--cp", world.mlm)
    run = Path(done.answer["seeds"][0]["run"])
    assert run == tmp_path / "runs" / "run0"
    assert "classes: negative, positive" in done.err
    assert "fresh, because the checkpoint has none for this task: classifier" in done.err
    config = json.loads((run / "checkpoints" / "last" / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert (run / "checkpoints" / "best" / "model.safetensors").is_file()
    assert (run / "accuracy.png").is_file()
    assert json.loads((run / "run.json").read_text()) == {"task": "sst2", "finished": True}


def test_it_trains_in_int8_and_says_so(world: World, tmp_path: Path) -> None:
    inputs = ["--train-input", world.train, "--val-input", world.dev]
    done = finetune(world, tmp_path, "--cp", world.mlm, *inputs, "--dtype", "int8")
    assert done.status == 0, done.err
    chosen = "1 threads, int8 and" if int8_pays() else "note: dtype = int8 is for CPUs with instructions for it"
    assert chosen in done.err


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_labelled_texts_come_in_many_forms(form: str, world: World, tmp_path: Path) -> None:
    paths = [tmp_path / f"train.{form}", tmp_path / f"dev.{form}"]
    for path, source in zip(paths, (world.train, world.dev), strict=True):
        rows = [(f'{text}, "{i}"', label) for i, (text, label) in enumerate(rows_of(source))]
        if form == "csv":
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([("label", "review"), *((label, text) for text, label in rows)])
        elif form == "jsonl":
            names = ("bad", "good")
            path.write_text("".join(json.dumps({"text": t, "class": names[label]}) + "\n" for t, label in rows))
        else:
            write_parquet(path, rows)
    done = finetune(world, tmp_path, "--cp", world.mlm, "--train-input", paths[0], "--val-input", paths[1])
    assert sum(map(sum, done.answer["seeds"][0]["confusion"])) == 20
    assert f"classes: {'bad, good' if form == 'jsonl' else '0, 1'}" in done.err


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the SST-2 files")
def test_files_of_glue_as_they_are(world: World, tmp_path: Path) -> None:
    for name, lines in (("train.tsv", 300), ("dev.tsv", 100)):
        with (SHARED / name).open() as file:
            (tmp_path / name).write_text("".join(next(file) for _ in range(lines)))
    inputs = ["--train-input", tmp_path / "train.tsv", "--val-input", tmp_path / "dev.tsv"]
    done = finetune(world, tmp_path, "--cp", world.mlm, *inputs)
    assert "data: 299 texts to train on, 99 to evaluate on" in done.err
    assert 0.5 < done.answer["floors"]["majority"] < 0.6
    assert 0.5 < done.answer["floors"]["bag_of_words"] < 0.8


def test_seeds_have_a_run_each_and_one_result(world: World, tmp_path: Path) -> None:
    inputs = ["--train-input", world.train, "--val-input", world.dev]
    done = finetune(world, tmp_path, "--cp", world.mlm, *inputs, "--seeds", 3, "--seed", 5, "--run-id", "mine")
    result = done.answer
    assert [one["seed"] for one in result["seeds"]] == [5, 6, 7]
    runs = [Path(one["run"]) for one in result["seeds"]]
    assert [run.name for run in runs] == ["mine-seed5", "mine-seed6", "mine-seed7"]
    assert [json.loads((run / "result.json").read_text()) for run in runs] == [result] * 3
    assert [f"seed = {seed}\n" in (run / "config.ini").read_text() for seed, run in zip((5, 6, 7), runs, strict=True)]
    # Each log begins with what was said of all, and then of its own seed.
    for seed, run in zip((5, 6, 7), runs, strict=True):
        log = (run / "logs" / "log.txt").read_text()
        assert log.startswith("data: 40 texts to train on")
        assert [seed] == [int(found) for found in re.findall(r"parameters; seed (\d)", log)]
    longer = bertling("finetune", "--cp", runs[1], "--max-iters", 4)
    assert "max-iters = 4: the run" in longer.error
    assert "was started with 2 and keeps it" in longer.error
    assert "is finished, and so are the other seeds" in bertling("finetune", "--cp", runs[1]).error
    accuracies = [one["accuracy"] for one in result["seeds"]]
    assert result["accuracy"] == vars(summarise_seeds(accuracies))
    assert len({one["loss"] for one in result["seeds"]}) == 3
    assert result["floors"]["majority"] == 0.5


def test_seeds_go_on_where_they_were_stopped(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = tmp_path / "elsewhere" / "runs" / "mlm"
    shutil.copytree(world.mlm, origin, symlinks=True)
    inputs = ["--train-input", world.train, "--val-input", world.dev, "--cp", origin]
    words = [*inputs, "--seeds", 3, "--seed", 5, "--save-every", 2]
    whole = finetune(world, tmp_path, *words, "--run-id", "whole", steps=6).answer
    batches, calls = ClassificationTask.micro_batches, [0]

    def micro_batches(self: ClassificationTask, step: int, **sizes: int) -> object:
        calls[0] += 1
        if calls[0] == 10:  # in the second seed
            signal.raise_signal(signal.SIGTERM)
        return batches(self, step, **sizes)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "micro_batches", micro_batches)
        stopped = finetune(world, tmp_path, *words, "--run-id", "stopped", steps=6)
    assert stopped.status == 3
    assert [one["finished"] for one in json.loads(stopped.out)["seeds"]] == [True, False]
    shutil.rmtree(origin)  # as a pre-training that goes on deletes the checkpoint that the third seed starts from
    resumed = bertling("finetune", "--resume", "--base-dir", tmp_path, "--json").answer
    assert [Path(one["run"]).name for one in resumed["seeds"]] == [f"stopped-seed{seed}" for seed in (5, 6, 7)]
    assert resumed["accuracy"] == whole["accuracy"]
    for key in ("loss", "confusion", "best_step", "finished", "step"):
        assert [one[key] for one in resumed["seeds"]] == [one[key] for one in whole["seeds"]], key
    assert not list((tmp_path / "runs").glob("*/origin"))


def test_a_stop_at_the_very_end_of_a_seed_ends_all(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--train-input", world.train, "--val-input", world.dev, "--cp", world.mlm, "--seeds", 2]
    evaluate = ClassificationTask.evaluate

    def signal_at_the_end(self: ClassificationTask, *arguments: Any) -> dict[str, float]:
        if (tmp_path / "runs" / "run0" / "checkpoints" / "step-0000000").exists():
            signal.raise_signal(signal.SIGTERM)
        return evaluate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "evaluate", signal_at_the_end)
        stopped = finetune(world, tmp_path, *words)
    assert stopped.status == 3
    assert [one["finished"] for one in json.loads(stopped.out)["seeds"]] == [True]
    resumed = bertling("finetune", "--resume", "--base-dir", tmp_path, "--json").answer
    assert [one["finished"] for one in resumed["seeds"]] == [True, True]


def test_a_run_finds_its_texts_from_another_folder(world: World, tmp_path: Path) -> None:
    for path in (world.train, world.dev):
        shutil.copy(path, tmp_path)
    words = ["--train-input", "train.tsv", "--val-input", "dev.tsv"]
    with contextlib.chdir(tmp_path):
        assert finetune(world, Path(), "--cp", world.mlm, *words).status == 0
    (tmp_path / "below").mkdir()
    with contextlib.chdir(tmp_path / "below"):
        longer = ["finetune", "--cp", "../runs/run0", "--max-iters", 4, "--json"]
        assert "train.tsv: no such file" in bertling(*longer).error
        moved = ["--train-input", "../train.tsv", "--val-input", "../dev.tsv"]
        assert bertling(*longer, *moved).answer["seeds"][0]["step"] == 4
        other = ["--train-input", "../dev.tsv", *moved[2:]]
        assert "was trained on train.tsv of 40 rows" in bertling(*longer[:3], "--max-iters", 6, *other).error
        text = Path("../train.tsv").read_text()
        Path("../train.tsv").write_text(text.replace("lovely", "dreary"))
        mended = bertling(*longer[:3], "--max-iters", 6, *moved).error
        assert "was trained on train.tsv of 40 rows, and now it is train.tsv of 40 others" in mended


@pytest.mark.parametrize("killed", ["between seeds", "as the next began", "before the sums"])
def test_seeds_go_on_where_they_were_killed(world: World, tmp_path: Path, killed: str) -> None:
    inputs = ["--train-input", world.train, "--val-input", world.dev, "--cp", world.mlm]
    words = [*inputs, "--seeds", 3, "--seed", 5, "--run-id", "mine"]
    whole = finetune(world, tmp_path, *words, steps=6).answer
    runs = tmp_path / "runs"
    if killed == "before the sums":
        (runs / "mine-seed7" / "result.json").unlink()
    else:
        shutil.rmtree(runs / "mine-seed7")
        shutil.rmtree(runs / "mine-seed6" / "checkpoints")
    if killed == "as the next began":
        (runs / "mine-seed6" / "checkpoints").mkdir()
    if killed == "between seeds":
        shutil.rmtree(runs / "mine-seed6")
    resumed = bertling("finetune", "--resume", "--base-dir", tmp_path, "--json").answer
    for key in ("seed", "loss", "confusion", "best_step", "finished", "step"):
        assert [one[key] for one in resumed["seeds"]] == [one[key] for one in whole["seeds"]], key
    assert resumed["accuracy"] == whole["accuracy"]
    assert "holds no unfinished run" in bertling("finetune", "--resume", "--base-dir", tmp_path).error


def test_a_collapsed_seed_is_counted() -> None:
    outcome = Outcome(Path("runs/run0"), 9, 1.0, {}, 0.5, 9, True)
    scores = [{"accuracy": value, "macro_f1": 0.4, "confusion": [[1, 0], [1, 0]]} for value in (0.5, 0.51, 0.8)]
    seeds = [SeedResult(seed, outcome, one) for seed, one in enumerate(scores)]
    result = FinetuneResult(seeds, summarise_seeds([0.5, 0.51, 0.8]), {"floor/majority": 0.505})
    assert result.to_dict()["collapsed"] == 2
    assert "mean of 3 seeds: 60.3%, sd 17.0%" in result.text()
    assert "collapsed: 2" in result.text()
    one = FinetuneResult(seeds[:1], summarise_seeds([0.5]), {"floor/majority": 0.505, "floor/bag_of_words": 0.6})
    assert "95 % interval 18.0% to 100.0%" in result.text()
    assert one.text().splitlines()[:2] == ["accuracy 50.0%", "floors: majority class 50.5%, bag of words 60.0%"]


def test_from_scratch_learns_separable_texts(world: World, tmp_path: Path) -> None:
    inputs = ["--train-input", world.train, "--val-input", world.dev, "--vocab", VOCAB]
    fast = ["--learning-rate", 5e-3, "--val-interval", 100, "--dropout", 0]
    done = finetune(world, tmp_path, "--from-scratch", *SMALL, *inputs, *fast, steps=60)
    assert done.answer["accuracy"]["mean"] == 1.0
    assert done.answer["seeds"][0]["confusion"] == [[10, 0], [0, 10]]
    assert "weights:" not in done.err
    asked = bertling("classify", "--cp", tmp_path / "runs" / "run0", "her voice was lovely on day 3", "--json")
    assert asked.answer["label"] == "1"
    scored = bertling("evaluate", "--cp", tmp_path / "runs" / "run0", "--data", world.dev, "--json").answer
    assert scored["confusion"] == [[10, 0], [0, 10]]


def test_texts_that_are_cut_are_said(world: World, tmp_path: Path) -> None:
    inputs = ["--train-input", world.train, "--val-input", world.dev, "--seq-len", 8]
    done = finetune(world, tmp_path, "--cp", world.mlm, *inputs)
    assert "note: 40 training texts are longer than 8 tokens, and cut there" in done.err
    inputs[-1] = 512
    done = finetune(world, tmp_path, "--cp", world.mlm, *inputs)
    assert "note: seq-len = 512: the model reads at most 16 tokens" in done.err


def test_the_dev_set_is_tokenized_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(VOCAB)
    data = load_labelled(world.dev)
    task = ClassificationTask(data, data, tokenizer, batch_size=8, seq_len=16, seed=1, floors={})
    import torch

    from bertling.checkpoint import load_checkpoint
    from bertling.distributed import Ranks

    model = load_checkpoint(world.classifier).model
    runtime = Runtime(torch.device("cpu"), torch.float32, compile=False)
    first = task.evaluate(model, runtime, Ranks())
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    assert task.evaluate(model, runtime, Ranks()) == first


def test_labels_of_the_dev_set_are_those_of_training(world: World, tmp_path: Path) -> None:
    dev = tmp_path / "dev.tsv"
    dev.write_text(write_labelled(tmp_path / "all.tsv", 20).read_text().replace("\t0", "\t7"))
    done = finetune(world, tmp_path, "--cp", world.mlm, "--train-input", world.train, "--val-input", dev)
    assert replace(done, out="").error.startswith(f"{dev}: label '7' does not occur in {world.train}")


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_frozen_blocks_stay_as_they_are(task: str, world: World, tmp_path: Path) -> None:
    (tmp_path / "datasets").symlink_to(world.data)
    begin = [*SMALL, "--n-layers", 2, "--batch-size", 4, "--max-iters", 4, "--base-dir", tmp_path, "--run-id", "two"]
    assert bertling("pretrain", *begin).status == 0
    mlm = tmp_path / "runs" / "two"
    words = ["--cp", mlm, "--freeze-blocks", 1, "--learning-rate", 0.1, "--run-id", "frozen", "--base-dir", tmp_path]
    if task == "pretrain":
        words += ["--max-iters", 4, "--batch-size", 4, "--optimizer", "muon"]
    else:
        words += ["--max-iters", 2, "--train-input", world.train, "--val-input", world.dev]
    assert bertling(task, *words).status == 0
    before = dict(load_checkpoint(mlm).model.named_parameters())
    after = dict(load_checkpoint(tmp_path / "runs" / "frozen" / "checkpoints" / "last").model.named_parameters())
    same = {name for name in before.keys() & after.keys() if before[name].equal(after[name])}
    assert same == {name for name in after if name.startswith(("embeddings.", "encoder.layers.0."))}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--freeze-blocks", 1], "freeze-blocks 1: must be below the model's number of blocks, 1"),
        (["--from-scratch", "--freeze-blocks", 1], "freeze-blocks: blocks of random weights must learn"),
    ],
)
def test_something_must_learn(words: list[object], says: str, world: World, tmp_path: Path) -> None:
    start = [] if "--from-scratch" in words else ["--cp", world.mlm]
    done = finetune(world, tmp_path, *start, *words, "--train-input", world.train, "--val-input", world.dev)
    assert done.error.startswith(says)
    assert not (tmp_path / "runs").exists()


def test_pretraining_cannot_begin_frozen(world: World, tmp_path: Path) -> None:
    (tmp_path / "datasets").symlink_to(world.data)
    done = bertling("pretrain", *SMALL, "--freeze-blocks", 1, "--base-dir", tmp_path)
    assert done.error.startswith("freeze-blocks: blocks of random weights must learn")
