"""The loop: it learns, resumes bit for bit, adds up micro-batches, keeps the best, and ends when it should."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ASSETS, SEQ_LEN
from safetensors.torch import load_file

from bertling import faults, tasks
from bertling.batches import Batch
from bertling.budget import total_steps
from bertling.checkpoint import TrainingState, load_state, step_folders
from bertling.distributed import Ranks
from bertling.files import BertlingError
from bertling.model import BertForMaskedLM
from bertling.prepare import prepare
from bertling.presets import preset_config
from bertling.runlog import read_metrics
from bertling.runs import Outcome
from bertling.runtime import Runtime, int8_pays, step_seed
from bertling.samples import match_samples, open_samples
from bertling.settings import Settings
from bertling.tasks import MaskedLMTask
from bertling.tokenizer import Tokenizer
from bertling.tools.verify_resume import timeless
from bertling.train import Trainer

# Losses of steps 1, 10, 20, 30, 40, 50 of the run in the test below, fp32, one thread, torch 2.13.
GOLDEN = {
    "adamw": [6.02405, 5.72091, 5.37644, 5.42409, 5.66332, 5.92345],
    "muon": [6.02405, 5.70136, 5.35384, 5.42375, 5.66392, 5.90643],
}
BEFORE = {"seconds": 1.0, "best_accuracy": 0.0, "best_step": 0}
Train = Callable[..., Outcome]


def weights(run: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / which / "model.safetensors")


def assert_equal_runs(first: Path, second: Path) -> None:
    """Bit-equal weights and optimizers, and the same log but for the time."""
    for name in ("model", "training_state"):
        expected, found = (load_file(run / "checkpoints" / "last" / f"{name}.safetensors") for run in (first, second))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(value, found[key]), key
    assert timeless(first) == timeless(second)
    states = [load_state(run / "checkpoints" / "last") for run in (first, second)]
    for name in ("step", "turn", "best_step", "best_accuracy", "metrics"):
        assert [state.numbers[name] for state in states if state] == [states[0].numbers[name]] * 2, name


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Have `action` happen in the middle of the step after `step`."""
    whole = MaskedLMTask.micro_batches

    def micro_batches(self: MaskedLMTask, number: int, **arguments: int) -> tuple[list[Batch], int]:
        if number == step:
            action()
        return whole(self, number, **arguments)

    monkeypatch.setattr(MaskedLMTask, "micro_batches", micro_batches)


def make_task(base: Path, tokenizer: Tokenizer, **changes: Any) -> MaskedLMTask:
    train_set, val = (open_samples(match_samples(base, f"{split}_*")[0]) for split in ("train", "val"))
    arguments: dict[str, Any] = {"batch_size": 8, "seed": 1, "mlm_probability": 0.15} | changes
    return MaskedLMTask([train_set], val, tokenizer, **arguments)


def make_trainer(run: Path, task: Any, tokenizer: Tokenizer, settings: Settings, **changes: Any) -> Trainer:
    config = preset_config(
        "modern",
        "mini",
        tokenizer.vocab_size,
        max_position_embeddings=SEQ_LEN,
        pad_token_id=tokenizer.pad_id,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = BertForMaskedLM(config, torch.Generator().manual_seed(1))
    runtime = Runtime(torch.device("cpu"), torch.float32, compile=False)
    return Trainer(task, model, tokenizer, settings, runtime, changes.pop("ranks", Ranks()), run, **changes)


def test_one_batch_is_learnt_by_heart(work: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task = make_task(work, tiny_tokenizer)
    first = task.micro_batches(0, rank=0, world_size=1, micro_batch_size=8)
    task.micro_batches = lambda step, **sizes: first  # type: ignore[method-assign]
    settings = Settings(batch_size=8, max_iters=160, learning_rate=1e-2, val_interval=1000)
    trainer = make_trainer(tmp_path / "run", task, tiny_tokenizer, settings)
    trainer.train()
    batch = first[0][0]
    trainer.model.eval()
    with torch.inference_mode():
        output = trainer.model(batch.input_ids, batch.attention_mask, wanted=batch.wanted, labels=batch.labels)
    assert int(output.correct) == batch.count > 30
    assert float(output.loss_sum) / batch.count < 0.1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_losses_of_50_steps_are_those_on_record(train_mlm: Train, optimizer: str) -> None:
    outcome = train_mlm(max_iters=50, optimizer=optimizer, learning_rate=5e-3)
    losses = {entry["step"]: entry["train/loss"] for entry in read_metrics(outcome.run) if "train/loss" in entry}
    assert sorted(losses) == list(range(1, 51))
    assert [losses[step] for step in (1, 10, 20, 30, 40, 50)] == pytest.approx(GOLDEN[optimizer], rel=2e-3)


def test_products_in_int8_learn_as_fast(train_mlm: Train) -> None:
    outcome = train_mlm(max_iters=50, optimizer="muon", learning_rate=5e-3, dtype="int8")
    losses = {entry["step"]: entry["train/loss"] for entry in read_metrics(outcome.run) if "train/loss" in entry}
    found = [losses[step] for step in (1, 10, 20, 30, 40, 50)]
    assert found == pytest.approx(GOLDEN["muon"], rel=1e-2)
    if int8_pays():
        assert found != pytest.approx(GOLDEN["muon"], rel=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "preset", "dtype"),
    [("adamw", "bert", "fp32"), ("muon", "modern", "fp32"), ("muon", "modern", "int8")],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch, optimizer: str, preset: str, dtype: str
) -> None:
    shape = {
        "optimizer": optimizer,
        "preset": preset,
        "dropout": 0.2,
        "val_interval": 4,
        "max_iters": 14,
        "dtype": dtype,
    }
    monkeypatch.setattr("bertling.train.LOG_POINTS", 3)  # every fourth step is logged: the stop comes in between
    whole = train_mlm(**shape)
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(signal.SIGINT))
        stopped = train_mlm(**shape)
    assert (stopped.step, stopped.finished) == (6, False)
    state = load_state(stopped.run / "checkpoints" / "last")
    assert state is not None
    assert len(state.numbers["recent_losses"]) == 2
    assert signal.getsignal(signal.SIGINT) is handler
    assert "stopped at step 6, and saved; go on with --cp" in (stopped.run / "logs" / "log.txt").read_text()
    resumed = train_mlm(cp=stopped.run)
    assert (resumed.run, resumed.step, resumed.finished) == (stopped.run, 14, True)
    assert_equal_runs(whole.run, resumed.run)
    assert (resumed.best_step, resumed.best_accuracy, resumed.metrics) == (
        whole.best_step,
        whole.best_accuracy,
        whole.metrics,
    )
    assert resumed.seconds > stopped.seconds
    logged = [entry["step"] for entry in read_metrics(resumed.run) if "train/loss" in entry]
    assert logged == [4, 8, 12, 14]


def test_the_clock_of_a_resumed_run_goes_on(work: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    task, run = make_task(work, tiny_tokenizer), tmp_path / "run"
    settings = Settings(batch_size=8, max_iters=2, val_interval=1000)
    assert make_trainer(run, task, tiny_tokenizer, settings).train().seconds < 100
    before = load_state(run / "checkpoints" / "last")
    assert before is not None
    before = TrainingState(before.numbers | {"seconds": 100.0}, before.tensors)
    longer = replace(settings, max_iters=3)
    outcome = make_trainer(run, task, tiny_tokenizer, longer, state=before).train()
    assert 100 <= outcome.seconds < 200
    after = load_state(run / "checkpoints" / "last")
    assert after is not None
    assert (after.numbers["step"], after.numbers["seconds"] >= 100) == (3, True)


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch, work: Path
) -> None:
    shape = {"dropout": 0.2, "val_interval": 4, "max_iters": 14}
    whole = train_mlm(**shape, run_id="whole")

    def die() -> None:
        raise RuntimeError("power cut")

    at_step(monkeypatch, 11, die)
    with pytest.raises(RuntimeError, match="power cut"):
        train_mlm(**shape, run_id="cut")
    monkeypatch.undo()
    run = work / "runs" / "cut"
    assert [entry["step"] for entry in read_metrics(run) if "train/loss" in entry] == list(range(1, 12))
    assert os.readlink(run / "checkpoints" / "last") == "step-0000008"
    assert train_mlm(resume=True).run == run
    assert_equal_runs(whole.run, run)


def test_a_stop_before_the_first_step_can_be_resumed_too(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train_mlm(max_iters=3)
    evaluate = MaskedLMTask.evaluate

    def interrupted(self: MaskedLMTask, *arguments: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return evaluate(self, *arguments)

    monkeypatch.setattr(MaskedLMTask, "evaluate", interrupted)
    stopped = train_mlm(max_iters=3)
    monkeypatch.undo()
    assert (stopped.step, stopped.finished) == (0, False)
    assert train_mlm(cp=stopped.run).step == 3
    for name, value in weights(whole.run).items():
        assert torch.equal(value, weights(stopped.run)[name]), name


def test_until_the_first_evaluation_the_last_state_is_the_best(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = train_mlm(max_iters=10)
    assert (stopped.step, stopped.finished) == (3, False)
    assert (stopped.run / "checkpoints" / "best").resolve().name == "step-0000003"


def test_a_closed_terminal_asks_for_a_stop_too(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGHUP))
    stopped = train_mlm(max_iters=10)
    assert (stopped.step, stopped.finished) == (3, False)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    monkeypatch.undo()
    at_step(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGHUP))
    assert train_mlm(cp=stopped.run).finished
    signal.signal(signal.SIGHUP, before)


def test_what_is_evaluated_after_the_last_save_is_kept(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    stopped = train_mlm(max_iters=10)
    done = train_mlm(cp=stopped.run, max_iters=3)  # nothing is left to train, but it is still to be scored
    state = load_state(done.run / "checkpoints" / "last")
    assert state is not None
    assert (done.finished, done.best_step, state.numbers["best_step"]) == (True, 3, 3)
    assert state.numbers["metrics"] == done.metrics != {}


def test_several_processes_leave_a_second_signal_to_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with faults.stop_requests() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()


def test_a_second_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", calls.append)
    with faults.stop_requests() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked()
        assert calls == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5])
def test_micro_batches_add_up_to_one_batch(
    train_mlm: Train, tmp_path: Path, tiny_tokenizer: Tokenizer, micro_batch_size: int
) -> None:
    base = tmp_path / "segments"  # cut by characters: rows of different lengths, so of different numbers of masks
    tiny_tokenizer.save(base / "vocab")
    prepare([ASSETS / "tiny.txt"], "cut", base / "datasets", SEQ_LEN, tiny_tokenizer, method="segment", workers=1)
    batches, _ = make_task(base, tiny_tokenizer).micro_batches(0, rank=0, world_size=1, micro_batch_size=1)
    assert len({batch.count for batch in batches}) > 1
    shape = {"base_dir": base, "max_iters": 8, "learning_rate": 5e-3, "optimizer": "adamw", "preset": "bert"}
    one, many = train_mlm(**shape), train_mlm(**shape, micro_batch_size=micro_batch_size)
    expected, found = (
        [entry["train/loss"] for entry in read_metrics(outcome.run) if "train/loss" in entry] for outcome in (one, many)
    )
    assert found == pytest.approx(expected, rel=1e-5)
    for name, value in weights(one.run).items():
        torch.testing.assert_close(weights(many.run)[name], value, atol=2e-4, rtol=1e-3)


def test_the_best_is_that_of_the_evaluations_while_training(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.9, 0.1, 0.5, 0.4, 0.5, 0.2])
    monkeypatch.setattr(
        MaskedLMTask, "evaluate", lambda *_: {"eval/loss": 1.0, "eval/accuracy": next(scores), "eval/scored": 10.0}
    )
    # save-every is never reached: a new best is saved all the same.
    outcome = train_mlm(max_iters=10, val_interval=2, save_every="1000")
    assert (outcome.best_step, outcome.best_accuracy) == (4, 0.5)
    folder = outcome.run / "checkpoints"
    assert (os.readlink(folder / "best"), os.readlink(folder / "last")) == ("step-0000004", "step-0000010")
    assert [path.name for path in step_folders(folder)] == ["step-0000004", "step-0000010"]


def test_unset_intervals_give_ten_evaluations_and_checkpoints(train_mlm: Train) -> None:
    outcome = train_mlm(max_iters=25, val_interval=None, max_checkpoints=100)
    evaluated = [entry["step"] for entry in read_metrics(outcome.run) if "eval/accuracy" in entry]
    assert evaluated == [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    assert [int(path.name[5:]) for path in step_folders(outcome.run / "checkpoints")] == evaluated


def test_a_budget_of_time_ends_the_run_in_time(train_mlm: Train) -> None:
    outcome = train_mlm(max_minutes=0.03)
    assert outcome.finished
    assert 1.8 <= outcome.seconds < 10
    lrs = [entry["lr"] for entry in read_metrics(outcome.run) if "lr" in entry]
    assert outcome.step > 5
    assert min(lrs[-1:], default=1.0) < max(lrs)  # the schedule ran by the clock


def test_the_first_limit_that_is_reached_ends_the_run() -> None:
    def steps(**given: Any) -> int | None:
        return total_steps(Settings(**given), 7.5)

    assert steps() == 10_000
    assert steps(task_type="sst2") == 23
    assert steps(epochs=2.0) == 15
    assert steps(epochs=2.0, max_iters=9) == 9
    assert steps(epochs=1.0, max_iters=9, max_minutes=1.0) == 8
    assert steps(max_minutes=1.0) is None
    assert steps(epochs=0.001) == 1


def test_gradients_are_clipped(work: Path, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    settings = Settings(batch_size=8, max_iters=5, grad_clip=1e-4)
    trainer = make_trainer(tmp_path / "run", make_task(work, tiny_tokenizer), tiny_tokenizer, settings)
    norms = []
    step = trainer.optimizers[0].step
    trainer.optimizers[0].step = lambda *a, **k: (  # type: ignore[method-assign]
        norms.append(float(torch.cat([p.grad.flatten() for p in trainer.parameters]).norm())) or step(*a, **k)
    )
    trainer.train_step(0.0)
    assert norms == pytest.approx([1e-4], rel=1e-3)


def test_each_process_has_dropout_of_its_own(
    work: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "sum_gradients", lambda *_: None)
    monkeypatch.setattr(Ranks, "any", lambda self, flag: flag)
    settings = Settings(batch_size=8, max_iters=5, seed=3)
    task = make_task(work, tiny_tokenizer)
    trainers = [make_trainer(tmp_path, task, tiny_tokenizer, settings, ranks=Ranks(rank, 2)) for rank in (0, 1)]
    seeds: list[int] = []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for trainer in trainers:
        trainer.train_step(0.0)
    trainers[1].step = 4
    trainers[1].train_step(0.0)
    assert seeds == [step_seed(3, 0, 0), step_seed(3, 0, 1), step_seed(3, 4, 1)]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize(
    ("numbers", "tensors"),
    [
        ({}, {}),
        ({"step": "soon", **BEFORE}, {}),
        ({"step": 1, "seconds": 1, "best_accuracy": 0, "best_step": 0}, {"x": torch.ones(1)}),
    ],
)
def test_a_training_state_that_does_not_fit_is_refused(
    work: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    full = {"turn": 0, "evaluated_step": 0, "metrics": {}, "recent_losses": [], "rate": 1.0, "skipped_steps": 0}
    full |= {"scaler": {}} | numbers
    with pytest.raises(BertlingError, match=r"run: its training state does not fit these settings \(.*start a new run"):
        make_trainer(
            tmp_path / "run",
            make_task(work, tiny_tokenizer),
            tiny_tokenizer,
            Settings(batch_size=8, max_iters=5),
            state=TrainingState(full, tensors),
        )


def test_the_log_has_the_settings_the_floors_and_an_example(train_mlm: Train) -> None:
    said: list[str] = []
    outcome = train_mlm(max_iters=2, case="Demo run", say=said.append)
    text = (outcome.run / "logs" / "log.txt").read_text()
    assert json.loads((outcome.run / "logs" / "run.json").read_text())["name"] == "Demo run"
    evaluation = next(entry for entry in read_metrics(outcome.run) if "eval/accuracy" in entry)
    assert {"eval/loss", "floor/unigram", "floor_loss/unigram"} <= evaluation.keys()
    assert " out of " in text or " of " in text
    whole = "\n".join(said)
    assert "model: modern, 2 x 32, 2 heads" in whole
    assert "floors on the validation set: accuracy" in whole
    assert f"run folder: {outcome.run}" in whole
    assert tasks.EVAL_MASKS.mlm_probability == 0.15


def test_an_overflow_in_one_optimizer_skips_the_step_of_both(
    work: Path, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(work, tiny_tokenizer)
    trainer = make_trainer(tmp_path, task, tiny_tokenizer, Settings(optimizer="muon", max_iters=10, batch_size=8))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    embeddings = trainer.model.embeddings.word_embeddings.weight
    poisoned = embeddings.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([7]), float("nan")))
    trainer.train_step(0.5)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.scaler.get_scale() == 2.0
    poisoned.remove()
    trainer.train_step(0.5)
    assert not torch.equal(embeddings, before["embeddings.word_embeddings.weight"])


def test_a_batch_that_was_drawn_early_is_the_one_that_is_trained_on(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train_mlm(max_iters=5)
    backward_at = Trainer.backward_at

    def and_draw_the_next(self: Trainer, size: int) -> Any:  # as on a CUDA GPU
        loss = backward_at(self, size)
        self.draw(self.step + 1, size)
        return loss

    monkeypatch.setattr(Trainer, "backward_at", and_draw_the_next)
    early = train_mlm(max_iters=5)
    assert_equal_runs(early.run, plain.run)


def test_words_are_masked_whole_where_that_is_asked(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    masked: list[tuple[torch.Tensor, torch.Tensor]] = []  # what was read, and what stood at the masked places
    loss = MaskedLMTask.loss

    def seen(self: MaskedLMTask, model: BertForMaskedLM, batch: Batch) -> torch.Tensor:
        assert batch.wanted is not None
        used = batch.labels >= 0
        original = batch.input_ids.flatten().clone()
        original[batch.wanted[used]] = batch.labels[used]
        hidden = torch.zeros(len(original), dtype=torch.bool)
        hidden[batch.wanted[used]] = True
        masked.append((original, hidden))
        return loss(self, model, batch)

    monkeypatch.setattr(MaskedLMTask, "loss", seen)
    torn = []
    for whole in (True, False):
        masked.clear()
        run = train_mlm(max_iters=6, whole_word_masking=whole).run
        tokenizer = Tokenizer.load(run / "checkpoints" / "last")
        continues = torch.tensor(tokenizer.continues)
        # A piece that goes on with a word is hidden where the one before it is, no other; a row may begin with one.
        apart = [
            continues[ids[1:]] & (hidden[1:] != hidden[:-1]) & (ids[:-1] != tokenizer.cls_id) for ids, hidden in masked
        ]
        torn.append(int(torch.cat(apart).sum()))
    assert torn[0] == 0 < torn[1]
