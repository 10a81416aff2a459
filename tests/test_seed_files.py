"""The settings files of the project that this one grew from run here as they are, on data in its layout."""

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from commands import TEXT, VOCAB, Ended, bertling
from test_settings import PRETRAINING

from bertling.batches import MaskedBatches
from bertling.packed import Ids
from bertling.samples import Samples

CHANGES = {
    "task-type": "sst2",
    "batch-size": "64",
    "val-interval": "200",
    "dropout": "0.0",
    "learning-rate": "6e-5",
    "min-learning-rate": "1e-7",
    "warmup-iters": "300",
    "lr-decay-iters": "8000",
    "max-iters": "10000",
    "weight-decay": "0.02",
}
SMALL = """\
batch-size = 4
max-iters = 6
warmup-iters = 2
lr-decay-iters = 5
val-interval = 3
compile = false
threads = 1
dtype = fp32
"""
SIZES = "d-model = 32\nheads = 4\nn-layer = 1\n"
SEED_MD = Path(__file__).parents[2] / "shared" / "SEED.md"


def finetune_ini() -> str:
    """The fine-tuning file: the same with other values, and without the patterns."""
    lines = [line for line in PRETRAINING.splitlines() if "dataset-pattern" not in line]
    for key, value in CHANGES.items():
        lines = [re.sub(f"^{key} = .*", f"{key} = {value}", line) for line in lines]
    return "\n".join(lines) + "\n"


def prepare(output: Path, form: str, seed: int) -> None:
    words = ["-i", TEXT, "-l", "weke", "-o", output, "-m", 128, "-v", VOCAB, "-s", seed, "--format", form]
    done = bertling("prepare", *words, "--workers", 1)
    assert done.status == 0, done.err


def make_work_folder(folder: Path, form: str) -> Path:
    """A work folder as the seed describes it, with two training files, its settings and small ones beside them."""
    (folder / "wiki" / "vocab").mkdir(parents=True)
    shutil.copy(VOCAB / "vocab.txt", folder / "wiki" / "vocab")
    data = folder / "wiki" / "datasets"
    for seed in (1, 2):
        prepare(data, form, seed)
    if form == "msgpack":  # with and without .gz
        zipped = data / "train_weke_128_2.msgpack.gz"
        zipped.with_suffix("").write_bytes(gzip.decompress(zipped.read_bytes()))
        zipped.unlink()
    (folder / "config.ini").write_text(PRETRAINING)
    (folder / "local_config.ini").write_text(SMALL + SIZES)
    texts = [f"the lamp was {('dark', 'bright')[i % 2]} for {i} nights" for i in range(24)]
    for split, rows in (("train", 24), ("validation", 12), ("test", 6)):
        labels = [-1 if split == "test" else i % 2 for i in range(rows)]
        table = pyarrow.table({"sentence": texts[:rows], "label": pyarrow.array(labels, pyarrow.int64())})
        pyarrow.parquet.write_table(table, data / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder after both trainings."""
    folder = make_work_folder(tmp_path_factory.mktemp("seed"), "msgpack")
    done = bertling("pretrain", cwd=folder)
    assert done.status == 0, done.err
    (folder / "config.ini").write_text(finetune_ini())
    (folder / "local_config.ini").write_text(SMALL + SIZES)
    done = bertling("finetune", "--cp", "wiki/runs/run0", cwd=folder)
    assert done.status == 0, done.err
    return folder


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> Iterator[float]:
    return (entry["train/loss"] for entry in metrics(run) if "train/loss" in entry)


@pytest.mark.skipif(not SEED_MD.exists(), reason="needs the seed's description")
def test_the_files_are_the_documented_ones() -> None:
    assert f"```\n{PRETRAINING}```" in SEED_MD.read_text()


@pytest.mark.parametrize(("number", "task"), [(0, "mlm"), (1, "sst2")])
def test_a_run_leaves_what_the_seed_describes(number: int, task: str, work: Path) -> None:
    run = work / "wiki" / "runs" / f"run{number}"
    log = (run / "logs" / "log.txt").read_text()
    assert re.search(
        r"^100% \| 6/6 \| e: .* \| lr: .* e-3 \| t.loss: .* \| v.loss: .* \| v.acc: .*%$", log, re.MULTILINE
    )
    assert list((run / "logs").glob("events.out.tfevents.*"))
    steps = {path.name for path in (run / "checkpoints").glob("step-*")}
    kept = {(run / "checkpoints" / name).resolve().name for name in ("best", "last")}
    assert "step-0000006" in kept
    assert steps == kept or len(steps) == 2  # max-checkpoints = 1, besides the best
    assert json.loads((run / "run.json").read_text()) == {"task": task, "finished": True}
    evaluated = [entry["step"] for entry in metrics(run) if "eval/accuracy" in entry]
    assert evaluated == [0, 3, 6]


def test_every_key_arrives_and_the_small_file_wins(work: Path) -> None:
    saved = (work / "wiki" / "runs" / "run0" / "config.ini").read_text().splitlines()
    wanted = {
        "case = dickens",
        "dropout = 0.35",
        "min-learning-rate = 5e-05",
        "max-iters = 6",
        "n-layers = 1",
        "dist-master-port = 12233",
        "dataset-pattern = train_weke_128_*.msgpack",
        "max-checkpoints = 1",
        "preset = modern",
        "optimizer = adamw",
    }
    assert wanted <= set(saved)
    tuned = (work / "wiki" / "runs" / "run1" / "config.ini").read_text().splitlines()
    assert {"task-type = sst2", "dropout = 0.0", "weight-decay = 0.02", "learning-rate = 6e-05"} <= set(tuned)


def test_the_learning_rate_goes_as_the_seed_says(work: Path) -> None:
    rates = [entry["lr"] for entry in metrics(work / "wiki" / "runs" / "run0") if "lr" in entry]
    assert rates[:2] == pytest.approx([0.5e-3, 1e-3])  # two steps of warm-up
    assert rates[1] > rates[2] > rates[3] > rates[4]
    assert rates[4:] == pytest.approx([5e-5, 5e-5])  # from lr-decay-iters on


def test_the_case_is_a_name_and_nothing_else(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "wiki" / "vocab", tmp_path / "wiki" / "vocab")
    (tmp_path / "wiki" / "datasets").symlink_to(work / "wiki" / "datasets")
    (tmp_path / "config.ini").write_text(PRETRAINING.replace("dickens", "twist"))
    (tmp_path / "local_config.ini").write_text(SMALL + SIZES)
    assert bertling("pretrain", cwd=tmp_path).status == 0
    first, second = work / "wiki" / "runs" / "run0", tmp_path / "wiki" / "runs" / "run0"
    names = [json.loads((run / "logs" / "run.json").read_text())["name"] for run in (first, second)]
    assert names == ["dickens", "twist"]
    assert list(losses(first)) == list(losses(second))


def pretrain_watched(folder: Path, *words: object) -> tuple[Ended, list[tuple[str, int]]]:
    """Pre-train, and note which rows of which training file were read."""
    seen: list[tuple[str, int]] = []
    rows = MaskedBatches.rows

    def watched(batches: MaskedBatches, step: int) -> list[tuple[Samples, Ids]]:
        parts = rows(batches, step)
        seen.extend((samples.path.name, int(index)) for samples, indices in parts for index in indices)
        return parts

    with mock.patch.object(MaskedBatches, "rows", watched):
        return bertling("pretrain", *words, cwd=folder), seen


@pytest.mark.parametrize("form", ["msgpack", "shards"])
def test_training_files_are_taken_in_turn_each_for_an_epoch(form: str, tmp_path: Path) -> None:
    folder = make_work_folder(tmp_path, form)
    done, rows = pretrain_watched(folder, "--json")
    assert done.answer["step"] == 6
    names = ["train_weke_128_1", "train_weke_128_2"]
    if form == "msgpack":
        names = [f"{names[0]}.msgpack.gz", f"{names[1]}.msgpack"]
    sizes = [len({index for name, index in rows if name == wanted}) for wanted in names]
    first = [index for name, index in rows[: sizes[0]] if name == names[0]]
    second = [index for name, index in rows[sizes[0] : sum(sizes)] if name == names[1]]
    assert sorted(first) == list(range(sizes[0]))
    assert sorted(second) == list(range(sizes[1]))
    assert len(rows) == 24 > sum(sizes)
    assert {name for name, _ in rows[sum(sizes) :]} == {names[0]}
    assert ("masks as stored in the files" in done.err) == (form == "msgpack")
    said = bertling("pretrain", "--mlm-probability", 0.3, "--epochs", 1, cwd=folder).err
    assert ("note: mlm-probability says nothing here" in said) == (form == "msgpack")
    assert "note: each epoch is over one of the 2 data sets: epochs = 1 is not all" in said
