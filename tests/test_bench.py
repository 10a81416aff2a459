"""What the benchmark counts is what is computed, and its contestants do the same work."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands import bertling
from torch.utils.flop_counter import FlopCounterMode

from bertling.files import BertlingError
from bertling.inference import BOX
from bertling.model import BertForMaskedLM, ModelConfig
from bertling.presets import preset_config
from bertling.samples import open_samples
from bertling.tools import comparisons, programs
from bertling.tools.bench import Measured, Report, bench, flops
from bertling.tools.comparisons import Bench, Comparison, compare
from bertling.tools.contestants import Workload
from bertling.train import Trainer

TINY = "--batch-size 4 --seq-len 32 --vocab-size 128 --rounds 1 --device cpu --dtype fp32".split()


@pytest.mark.parametrize("preset", ["bert", "modern", "distilbert", "seed"])
def test_flops_are_those_that_torch_counts(preset: str) -> None:
    workload = Workload(preset, 3, 64, 4, 128, 4, 32)
    model = BertForMaskedLM(workload.config())
    ids = torch.randint(5, 128, (4, 32))
    positions, labels = torch.arange(0, 128, 8), torch.randint(5, 128, (16,))
    with FlopCounterMode(display=False) as counter:
        model(ids, None, wanted=positions, labels=labels).loss_sum.backward()
    assert counter.get_total_flops() == flops(workload.config(), 4, 32, 16)


def test_flops_of_windows_are_those_of_what_they_see() -> None:
    whole = Workload("modern", 4, 64, 4, 128, 4, 32)
    local = replace(whole, local_attention=8)  # in blocks 2 and 3 nine tokens instead of 32
    spared = 3 * 2 * 2 * 2 * (4 * 32) * (32 - 9) * 64  # of two blocks and two products, forward and backward
    assert flops(whole.config(), 4, 32, 16) - flops(local.config(), 4, 32, 16) == spared


def test_a_contestant_that_dies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bertling.tools.bench.work", os._exit)
    workload = Workload("modern", 1, 64, 2, 128, 4, 32)
    with pytest.raises(BertlingError, match="ours: its process ended, perhaps for want of memory"):
        bench(workload, against=False, rounds=1, settings={"device": "cpu"}, say=lambda text: None)


def test_ratios_are_taken_round_by_round() -> None:
    def measured(name: str, seconds: list[float]) -> Measured:
        return Measured(name, "", 0.0, 0.0, 0.0, {"step": 0.0}, 0.0, 0, seconds)

    report = Report(
        Workload("bert", 1, 8, 1, 64, 4, 8),
        1e9,
        [1e10, 1e10, 4e9],
        [measured("ours", [1.0, 2.0, 4.0]), measured("stock", [2.0, 6.0, 8.0])],
    )
    assert report.ratios() == {"stock": (2.0, 2.0, 3.0)}
    assert report.mfu == pytest.approx(1e9 / 4.0 / 4e9)  # of 10, 5 and 6.25 %
    assert report.to_dict()["peak_flops"] == 1e10


def test_bench_against_the_stock_class(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # the processes' compilers are not what is tested
    ended = bertling("bench", "--preset", "bert", "--against", "hf", *TINY, "--json")
    assert ended.status == 0, ended.err
    answer = json.loads(ended.out)
    assert [one["contestant"] for one in answer["contestants"]] == ["ours", "stock", "stock at its best"]
    ours = answer["contestants"][0]
    assert ours["tokens_per_second"] > 0
    parts = ours["milliseconds"]
    assert sum(parts[name] for name in ("data", "forward", "backward", "optimizer")) == pytest.approx(parts["step"])
    assert all(value > 0 for value in parts.values())
    assert 0 < answer["mfu"] < 1
    assert set(answer["ratios"]) == {"stock", "stock at its best"}


def test_what_cannot_be_compared_is_refused() -> None:
    assert "the preset seed has no stock class" in bertling("bench", "--preset", "seed", "--against", "hf", *TINY).error
    assert "no such preset" in bertling("bench", "--preset", "gpt", *TINY).error
    assert "--batch-size: the step's own workloads" in bertling("bench", "step", "--batch-size", "4").error
    assert "dtype = int4: must be one of" in bertling("bench", "finetune", "--dtype", "int4").error
    assert "'gpu' is not one of 'auto', 'cpu'" in bertling("bench", "step", "--device", "gpu").error


def quiet(line: str) -> None:
    """Tell nobody."""


@pytest.fixture
def tiny(tmp_path: Path) -> Bench:
    """One round over little material, with the peers."""
    data = tmp_path / "some.tsv"
    data.write_text("sentence\tlabel\n" + "a good film\t1\nbad\t0\nnot so bad , really\t1\n" * 10)
    text = tmp_path / "some.txt"
    text.write_text("a gorgeous , witty movie about nothing . " * 400)
    folder = tmp_path / "bench"
    folder.mkdir()
    return Bench(folder, True, 1, "cpu", 1, quiet, text, BOX, data)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let programs run here and be short: a process of its own for each loads the same libraries again."""
    run = comparisons.run_program

    def run_here(command: list[str]) -> str:
        if command[2] != "bertling.tools.programs":
            return run(command)
        return json.dumps(programs.PROGRAMS[command[3]](**json.loads(command[4])))

    monkeypatch.setattr(comparisons, "run_program", run_here)
    monkeypatch.setattr(programs, "WARM_UP", 1)
    monkeypatch.setattr(Trainer, "train_step", Trainer.train_step)  # theirs to replace, and here to put back


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model that classifies be a small one."""

    def small_config(preset: str, size: str, vocab_size: int, **sizes: Any) -> ModelConfig:
        return preset_config(preset, "mini", vocab_size, **{**sizes, "num_hidden_layers": 1})

    monkeypatch.setattr("bertling.presets.preset_config", small_config)


def test_ours_and_the_peer_prepare_the_same_rows(tiny: Bench, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    assert tiny.text is not None
    theirs = programs.prepare(str(tiny.text), str(BOX), str(tmp_path / "cache"), 128, 1)
    words = ["-i", tiny.text, "-l", "x", "-o", tmp_path / "ours", "-m", "128", "-v", BOX, "--split", "1,0,0"]
    assert bertling("prepare", *map(str, words)).status == 0
    (train,) = (tmp_path / "ours").glob("train_*")
    assert open_samples(train).rows == theirs["rows"] > 10


@pytest.mark.parametrize(
    ("kind", "more", "sides"),
    [
        ("prepare", {}, 2),
        ("batches", {"rows": 2, "steps": 2}, 3),
        ("finetune", {"batch": 2, "steps": 1, "blocks": 1}, 3),
        ("classify", {}, 3),
        ("startup", {}, 1),
    ],
)
def test_each_kind_of_work_beside_the_usual_tools(
    tiny: Bench, in_this_process: None, small: None, kind: str, more: dict[str, int], sides: int
) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("accelerate")
    done = getattr(tiny, kind)(**more)
    assert len(done.seconds) == sides
    assert all(len(values) == 1 and values[0] > 0 for values in done.seconds.values())


def test_classifying_in_int8_is_held_against_int8_too(
    tiny: Bench, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    theirs = mock.Mock(wraps=torch.ao.quantization.quantize_dynamic)
    monkeypatch.setattr(torch.ao.quantization, "quantize_dynamic", theirs)
    done = replace(tiny, dtype="int8").classify()
    assert next(iter(done.seconds)) == "bertling classify, int8"
    assert len(done.seconds) == 3
    theirs.assert_called_once()


def test_without_peers_and_without_material(tmp_path: Path) -> None:
    ended = bertling("bench", "batches", "startup", "--rounds", "1", "--json")
    assert ended.status == 0, ended.err
    batches, startup = map(json.loads, ended.out.splitlines())
    assert batches["unit"] == "tokens"
    assert list(batches["seconds"]) == ["bertling"]
    assert startup["ratios"] == {}


def test_a_comparison_in_words() -> None:
    told = Comparison("sing", "songs", 6, {"ours": [1.0, 2.0, 3.0], "theirs": [2.0, 6.0, 6.0]}).text()
    assert told.splitlines()[1].split() == "ours 3.0 songs/s (2 s, 1 to 3)".split()
    assert told.endswith("2.00 times as fast as theirs (2.00 to 3.00 over the rounds)")


def test_what_a_comparison_lacks_is_said_at_once(tiny: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparisons, "find_spec", lambda name: None if name == "datasets" else True)
    with pytest.raises(BertlingError, match=r"--against hf needs datasets.*bertling\[bench\]"):
        compare(["startup", "prepare"], tiny)
    assert "not found" in bertling("bench", "classify", "--data", "nowhere.tsv").error
    with pytest.raises(BertlingError, match=r"reads plain text, named \.txt"):
        replace(tiny, text=Path("some.txt.xz")).prepare()
    with pytest.raises(BertlingError, match=r"batches_ours: .*nowhere"):
        comparisons.told(comparisons.program("batches_ours", {"data": "nowhere", "vocab": BOX}, steps=1, batch=1))


def test_labelled_texts_that_train_nothing_are_named(tmp_path: Path) -> None:
    one = tmp_path / "one.tsv"
    one.write_text("sentence\tlabel\na b\t1\nc d\t1\n")
    line = bertling("bench", "finetune", "--against", "hf", "--data", one, "--rounds", 1).error
    assert line.startswith(f"{one}: all labels are of one class")
