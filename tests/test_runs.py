"""Where a training begins: a new run, the middle of an old one, or the weights of another; and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import ASSETS, SEQ_LEN, TINY
from safetensors.torch import load_file

from bertling.batches import Batch
from bertling.checkpoint import load_checkpoint, point
from bertling.files import BertlingError
from bertling.finetune import FinetuneResult
from bertling.model import BertForSequenceClassification
from bertling.prepare import prepare
from bertling.runlog import RunLog, read_metrics
from bertling.runs import Outcome, Start, checkpoint_meant, new_folder, open_run, record, resolve_start
from bertling.settings import Settings, read_ini
from bertling.tasks import MaskedLMTask
from bertling.tokenizer import Tokenizer
from bertling.train import Trainer

Train = Callable[..., Outcome]
Classify = Callable[..., FinetuneResult]


@pytest.fixture
def stopped(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of `bert`s that was cut off after step 2 of 4."""
    run = cut_off(train_mlm, monkeypatch, preset="bert", dropout=0.1, max_iters=4, val_interval=2)
    assert run.name == "run0"
    return run


def cut_off(train_mlm: Train, monkeypatch: pytest.MonkeyPatch, **flags: Any) -> Path:
    """Start a training, and kill it in the fourth step."""
    whole = MaskedLMTask.micro_batches

    def micro_batches(self: MaskedLMTask, step: int, **sizes: int) -> tuple[list[Batch], int]:
        if step == 3:
            raise RuntimeError("killed")
        return whole(self, step, **sizes)

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(MaskedLMTask, "micro_batches", micro_batches)
        with pytest.raises(RuntimeError, match="killed"):
            train_mlm(**flags, say=said.append)
    return Path(next(text for text in said if text.startswith("run folder: ")).removeprefix("run folder: "))


def folders(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "runs").iterdir())


def about(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def test_runs_are_numbered_or_named(work: Path) -> None:
    def start(**flags: Any) -> Path:
        settings = Settings(base_dir=work, **flags)
        with open_run(Start(settings, frozenset())) as run:
            record(run, settings, finished=False)
            return run

    (work / "runs" / "run7").mkdir(parents=True)
    (work / "runs" / "runner").mkdir()
    assert [start().name, start(run_id="mine").name, start().name] == ["run8", "mine", "run9"]
    assert read_ini(work / "runs" / "mine" / "config.ini")["run_id"] == "mine"
    assert about(work / "runs" / "run8") == {"task": "mlm", "finished": False}
    (work / "runs" / "mine" / "logs").mkdir()
    assert start(run_id="mine") == work / "runs" / "mine"  # killed before its first checkpoint: nothing is lost
    assert not (work / "runs" / "mine" / "logs").exists()
    (work / "runs" / "mine" / "checkpoints" / "step-0000000").mkdir()
    with pytest.raises(BertlingError, match="mine: exists already; go on with it by --cp, or choose another run-id"):
        start(run_id="mine")


def test_trainings_that_start_together_get_folders_of_their_own(work: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(new_folder, [Settings(base_dir=work)] * 40))
    assert len(set(made)) == 40
    assert {path.name for path in made} == {f"run{i}" for i in range(40)}


def test_a_finished_run_is_told_so_and_can_be_made_longer(train_mlm: Train, work: Path) -> None:
    run = train_mlm(max_iters=3).run
    assert about(run)["finished"] is True
    with pytest.raises(BertlingError, match=r"run0: is finished; raise --max-iters \(or --max-minutes, --epochs\)"):
        train_mlm(cp=run)
    longer = train_mlm(cp=run / "checkpoints" / "last", max_iters=5)
    assert (longer.run, longer.step, folders(work)) == (run, 5, ["run0"])


def test_a_longer_run_that_is_cut_off_remembers_its_length(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_mlm(max_iters=2).run
    assert cut_off(train_mlm, monkeypatch, cp=run, max_iters=6) == run
    assert about(run)["finished"] is False
    assert train_mlm(resume=True).step == 6


def test_a_training_that_could_not_be_set_up_leaves_the_run_as_it_was(
    train_mlm: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train_mlm(max_iters=2).run
    before = [(run / name).read_bytes() for name in ("config.ini", "run.json")]

    def no_log(self: Trainer) -> RunLog:
        raise BertlingError("wandb: not installed")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "open_log", no_log)
        with pytest.raises(BertlingError, match="not installed"):
            train_mlm(cp=run, max_iters=4, wandb=True)
    assert [(run / name).read_bytes() for name in ("config.ini", "run.json")] == before
    assert train_mlm(cp=run, max_iters=4).step == 4


def test_resume_takes_the_newest_unfinished_run(
    train_mlm: Train, stopped: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = cut_off(train_mlm, monkeypatch, max_iters=5, val_interval=1)
    train_mlm(max_iters=1)  # finished
    (work / "runs" / "strange" / "checkpoints" / "last").mkdir(parents=True)  # no run of ours
    for run, seconds in ((stopped, 100), (second, 200)):
        folder = run / "checkpoints" / "last"
        os.utime(folder.resolve(), (seconds, seconds))
    outcome = train_mlm(resume=True)
    assert (outcome.run, outcome.step) == (second, 5)
    assert train_mlm(resume=True).run == stopped
    with pytest.raises(BertlingError, match="runs: holds no unfinished run to resume; start one without --resume"):
        train_mlm(resume=True)
    with pytest.raises(BertlingError, match="--resume finds the run itself, --cp names one: give one of them"):
        train_mlm(resume=True, cp=stopped)


def test_a_resumed_run_keeps_its_settings(train_mlm: Train, stopped: Path) -> None:
    for name, value, before in (
        ("batch_size", 16, "8"),
        ("seed", 5, "123"),
        ("preset", "modern", "bert"),
        ("size", "mini", "none"),
        ("freeze_blocks", 1, "0"),
    ):
        key = name.replace("_", "-")
        with pytest.raises(
            BertlingError, match=rf"^{key} = {value}: the run .*run0 was started with {before} and keeps"
        ):
            train_mlm(cp=stopped, **{name: value})
    assert train_mlm(cp=stopped, batch_size=8, micro_batch_size=4, max_iters=5).step == 5


def test_another_task_starts_a_new_run_from_the_best(
    train_mlm: Train, train_classifier: Classify, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.0, 0.3, 0.2, 0.0, 0.1])
    monkeypatch.setattr(MaskedLMTask, "evaluate", lambda *_: {"eval/loss": 1.0, "eval/accuracy": next(scores)})
    run = train_mlm(max_iters=4, val_interval=2).run
    assert [os.readlink(run / "checkpoints" / name)[-1] for name in ("best", "last")] == ["2", "4"]
    result = train_classifier(cp=run, max_iters=1, learning_rate=1e-9)
    tuned = result.seeds[0].outcome.run
    assert (tuned.name, about(tuned)["task"], about(run)["task"]) == ("run1", "sst2", "mlm")
    key = "model.layers.1.mlp.Wo.weight"
    found, best, last = (
        load_file(folder / "model.safetensors")[key]
        for folder in (tuned / "checkpoints" / "last", run / "checkpoints" / "best", run / "checkpoints" / "last")
    )
    torch.testing.assert_close(found, best, atol=1e-6, rtol=0)
    assert not torch.allclose(found, last, atol=1e-6, rtol=0)
    # And back: the classifier's encoder under a fresh head for masked words.
    again = train_mlm(cp=tuned, max_iters=1, **{name: TINY[name] for name in ("device", "dtype", "threads")})
    assert again.run.name == "run2"


def test_plain_weights_start_a_new_run_with_their_own_architecture(
    train_mlm: Train, stopped: Path, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "from elsewhere"
    shutil.copytree(stopped / "checkpoints" / "best", plain)
    for name in ("training_state.json", "training_state.safetensors", "manifest.json"):
        (plain / name).unlink()
    machine = {"device": "cpu", "dtype": "fp32", "threads": 1, "batch_size": 8}
    with pytest.raises(
        BertlingError, match="preset = modern: the checkpoint has bert, and a checkpoint's architecture"
    ):
        train_mlm(cp=plain, preset="modern", **machine)
    with pytest.raises(BertlingError, match=r"d-model = 64: the checkpoint has 32, .* wins; leave d-model out"):
        train_mlm(cp=plain, d_model=64, **machine)
    with pytest.raises(
        BertlingError, match="size = small: that is 6 x 512 with 8 heads, the checkpoint has 2 x 32 with 2"
    ):
        train_mlm(cp=plain, size="small", **machine)
    assert folders(work) == ["run0"]
    whole = train_mlm(cp=plain, max_iters=4, val_interval=2, **machine)
    # Cut off and resumed, it still is a `bert` with the dropout of its weights, although no setting said so.
    run = cut_off(train_mlm, monkeypatch, cp=plain, max_iters=4, val_interval=2, **machine)
    assert train_mlm(cp=run).step == 4
    weights = [load_file(path / "checkpoints" / "last" / "model.safetensors") for path in (whole.run, run)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert load_checkpoint(run / "checkpoints" / "last").model.config.hidden_dropout_prob == 0.1


def test_rows_of_another_length_are_refused_only_where_one_was_named(train_mlm: Train, work: Path) -> None:
    with pytest.raises(
        BertlingError, match=r"seq-len = 64: .*train_tiny_32_123 was prepared with rows of 32; prepare it"
    ):
        train_mlm(seq_len=64)
    assert not (work / "runs").exists()
    run = train_mlm(max_iters=1).run
    assert train_mlm(cp=run, max_iters=2).step == 2


def test_data_longer_than_the_checkpoint_takes_are_refused(
    train_mlm: Train, stopped: Path, work: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(
        stopped / "checkpoints" / "best", plain, ignore=shutil.ignore_patterns("training*", "manifest.json")
    )
    config = json.loads((plain / "config.json").read_text())
    assert config["max_position_embeddings"] == SEQ_LEN
    base = tmp_path / "long"
    prepare([ASSETS / "tiny.txt"], "long", base / "datasets", 136, tiny_tokenizer, workers=1)
    with pytest.raises(
        BertlingError, match=r"train_long_136_123: has rows of 136 ids, the model takes at most 32; .* again with -m 32"
    ):
        train_mlm(cp=plain, base_dir=base, device="cpu", dtype="fp32")
    assert not (base / "runs").exists()


def test_data_of_another_vocabulary_are_refused(
    train_mlm: Train, stopped: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    other = Tokenizer([*tiny_tokenizer.entries, "surplus"])
    base = tmp_path / "other"
    prepare([ASSETS / "tiny.txt"], "other", base / "datasets", SEQ_LEN, other, workers=1)
    plain = tmp_path / "plain"
    shutil.copytree(
        stopped / "checkpoints" / "best", plain, ignore=shutil.ignore_patterns("training_state*", "manifest*")
    )
    with pytest.raises(
        BertlingError, match=r"train_other_32_123: prepared with another vocabulary \(its vocab\.txt lies"
    ):
        train_mlm(cp=plain, base_dir=base, device="cpu", dtype="fp32")
    tiny_tokenizer.save(base / "vocab")
    with pytest.raises(BertlingError, match="train_other_32_123: prepared with another vocabulary"):
        train_mlm(base_dir=base)
    with pytest.raises(BertlingError, match="val_other_32_123: prepared with another vocabulary"):
        train_mlm(base_dir=base, dataset_pattern=str(Path("..") / ".." / "work" / "datasets" / "train_tiny*"))
    assert not (base / "runs").exists()


def test_a_run_that_goes_on_has_the_data_that_it_began_with(stopped: Path, train_mlm: Train, work: Path) -> None:
    shared = (work / "datasets").resolve()
    (work / "datasets").unlink()
    shutil.copytree(shared, work / "datasets")
    for split in ("train", "val"):
        shutil.copytree(work / "datasets" / f"{split}_tiny_32_123", work / "datasets" / f"{split}_also_32_123")
    said: list[str] = []
    assert train_mlm(cp=stopped, say=said.append).step == 4
    assert not any("also" in text for text in said)
    shutil.rmtree(work / "datasets" / "train_tiny_32_123")
    with pytest.raises(BertlingError, match=r"train_tiny_32_123: is gone, and the run .*run0 was trained on it"):
        train_mlm(cp=stopped, max_iters=6)
    tokenizer = Tokenizer.load(work / "vocab")
    prepare([ASSETS / "tiny.txt"] * 2, "tiny", work / "datasets", SEQ_LEN, tokenizer, workers=1, force=True)
    with pytest.raises(BertlingError, match=r"run0: was trained on train_tiny_32_123 of \d+ rows, and now it is"):
        train_mlm(cp=stopped, max_iters=6)


def test_a_resume_takes_the_run_that_is_named(
    stopped: Path, train_mlm: Train, monkeypatch: pytest.MonkeyPatch, work: Path
) -> None:
    newer = cut_off(train_mlm, monkeypatch, max_iters=4, val_interval=2, run_id="newer")
    assert resolve_start("pretrain", [], {"base_dir": work}, cp=None, resume=True).run == newer
    named = {"base_dir": work, "run_id": "run0"}
    assert resolve_start("pretrain", [], named, cp=None, resume=True).run == stopped
    with pytest.raises(BertlingError, match="holds no unfinished run of the name other to resume"):
        resolve_start("pretrain", [], named | {"run_id": "other"}, cp=None, resume=True)


def test_fewer_epochs_than_are_done_are_refused(train_mlm: Train) -> None:
    run = train_mlm(epochs=0.2).run
    with pytest.raises(BertlingError, match=r"run0: is finished: it has done its epochs = 0\.2; raise --epochs"):
        train_mlm(cp=run, epochs=0.1)


def test_fewer_epochs_than_the_usual_ones_are_refused_too(train_classifier: Classify) -> None:
    run = train_classifier(from_scratch=True).seeds[0].outcome.run
    with pytest.raises(BertlingError, match=r"run0: is finished: it has done its epochs = 3; raise --epochs"):
        resolve_start("finetune", [], {"epochs": 1.0}, cp=run, resume=False)


def test_epochs_that_are_done_end_a_run(train_mlm: Train) -> None:
    run = train_mlm(epochs=0.5).run
    with pytest.raises(BertlingError, match=r"run0: is finished: it has done its epochs = 0\.5; raise --epochs"):
        train_mlm(cp=run, max_iters=1000)
    assert train_mlm(cp=run, epochs=0.7).finished


def test_a_size_may_be_named_at_each_resume(train_mlm: Train) -> None:
    sized = {"size": "mini", "max_iters": 1}
    run = train_mlm(**sized).run
    for steps in (2, 3):
        assert train_mlm(cp=run, **sized | {"max_iters": steps}).step == steps


def test_a_vocabulary_that_is_missing_is_asked_for(train_classifier: Classify, tmp_path: Path) -> None:
    with pytest.raises(BertlingError, match=r"vocab\.txt: missing; place the vocabulary there, or name it by --vocab"):
        train_classifier(from_scratch=True, base_dir=tmp_path)


def test_a_fine_tuning_starts_from_something(train_classifier: Classify, work: Path) -> None:
    with pytest.raises(BertlingError, match="--cp: name the checkpoint to fine-tune, or give --from-scratch"):
        train_classifier()
    with pytest.raises(BertlingError, match="no such folder; --cp takes a run, a checkpoint or a Hugging Face model"):
        train_classifier(cp=work / "nowhere")
    result = train_classifier(from_scratch=True, max_iters=2)
    run = result.seeds[0].outcome.run
    with pytest.raises(BertlingError, match="--from-scratch and --cp exclude each other: give one of them"):
        train_classifier(from_scratch=True, cp=run, max_iters=3)


def test_a_fine_tuning_is_resumed_as_what_it_is(train_classifier: Classify) -> None:
    labels = {"preset": "distilbert", "max_iters": 2, "dropout": 0.2}
    run = train_classifier(from_scratch=True, **labels).seeds[0].outcome.run
    with pytest.raises(BertlingError, match=r"seeds = 3: the run .*run0 was started with 1 and keeps it"):
        train_classifier(cp=run, seeds=3, max_iters=4)
    again = train_classifier(cp=run, max_iters=4).seeds[0].outcome
    assert (again.run, again.step) == (run, 4)
    model = load_checkpoint(run).model
    assert isinstance(model, BertForSequenceClassification)
    assert (model.config.architecture, model.config.id2label) == ("distilbert", {0: "0", 1: "1"})


def test_settings_that_cannot_hold_together_leave_no_run_behind(train_mlm: Train, work: Path) -> None:
    with pytest.raises(
        BertlingError, match="warmup-iters and lr-decay-iters count steps, but max-minutes ends this run"
    ):
        train_mlm(max_minutes=1.0, warmup_iters=3)
    with pytest.raises(BertlingError, match="heads = 5 does not divide d-model = 256"):
        train_mlm(d_model=None, heads=5)
    assert not (work / "runs").exists()


def test_a_new_run_that_ends_before_its_first_checkpoint_leaves_no_folder(
    train_mlm: Train, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (BertlingError("no log"), KeyboardInterrupt()):
        monkeypatch.setattr(Trainer, "open_log", mock.Mock(side_effect=error))
        with pytest.raises(type(error)):
            train_mlm(max_iters=2)
    assert not list((work / "runs").iterdir())


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train_mlm: Train, stopped: Path) -> None:
    last = stopped / "checkpoints" / "last"
    assert os.readlink(last) == "step-0000002"
    path = last / "training_state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    start = resolve_start("pretrain", [], {}, cp=stopped, resume=False)
    assert start.checkpoint == stopped / "checkpoints" / "step-0000000"
    assert start.notes[0].startswith(f"{stopped}/checkpoints/step-0000002/training_state.safetensors: damaged")
    assert start.notes[1] == "going on from step-0000000, the newest checkpoint that is intact"
    with pytest.raises(BertlingError, match=r"training_state\.safetensors: damaged or truncated .* another checkpoint"):
        resolve_start("pretrain", [], {}, cp=last.resolve(), resume=False)
    (stopped / "checkpoints" / "step-0000000" / "manifest.json").unlink()
    with pytest.raises(BertlingError, match=r"checkpoints: holds no intact checkpoint \(.*step-0000002/training_state"):
        resolve_start("pretrain", [], {}, cp=stopped, resume=False)


def test_a_run_without_readable_settings_takes_those_of_its_checkpoint(train_mlm: Train, stopped: Path) -> None:
    before = (stopped / "config.ini").read_text()
    lines = before.splitlines(keepends=True)
    for harm in ("\0\xff", None, "", "".join(lines[:9]), before.replace("seed = 123", "seed = 7")):
        (stopped / "config.ini").unlink()
        if harm is not None:
            (stopped / "config.ini").write_text(harm)
        start = resolve_start("pretrain", [], {}, cp=stopped, resume=False)
        assert start.notes[-1].endswith(": restored from the checkpoint")
        assert (stopped / "config.ini").read_text() == before


@pytest.mark.parametrize("content", ["", "{}", '{"task": 3}'])
def test_a_run_without_readable_description_goes_on_by_its_settings(
    train_mlm: Train, stopped: Path, content: str
) -> None:
    (stopped / "run.json").write_text(content)
    outcome = train_mlm(resume=True)
    assert (outcome.run, outcome.finished) == (stopped, True)
    assert about(stopped) == {"task": "mlm", "finished": True}


def test_a_checkpoint_named_from_inside_its_folder_is_the_one_that_is_meant(
    train_mlm: Train, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stopped / "checkpoints" / "step-0000000"
    assert checkpoint_meant(first, stopped)[0] == first
    monkeypatch.chdir(stopped / "checkpoints")
    assert checkpoint_meant(Path(first.name), stopped)[0] == Path(first.name)
    assert checkpoint_meant(Path("best"), stopped)[0] == Path("best")


def test_a_run_named_from_inside_its_folder_is_the_one_that_is_meant(
    train_mlm: Train, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name in ((stopped, "."), (stopped / "checkpoints", "..")):
        monkeypatch.chdir(folder)
        assert resolve_start("pretrain", [], {}, cp=Path(name), resume=False).run == stopped


def test_whoever_goes_back_and_is_killed_goes_on_from_there(train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = train_mlm(max_iters=6, val_interval=1, max_checkpoints=9).run
    checkpoints = run / "checkpoints"
    point(checkpoints / "best", checkpoints / "step-0000004")
    earlier = json.loads((checkpoints / "step-0000002" / "training_state.json").read_text())["best_step"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda self, progress: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train_mlm(cp=checkpoints / "step-0000002", max_iters=8)
    assert (checkpoints / "last").readlink().name == "step-0000002"
    assert (checkpoints / "best").readlink().name == f"step-{earlier:07d}"
    assert read_metrics(run)[-1]["step"] == 2
    assert train_mlm(cp=run, max_iters=8).step == 8
    assert [entry["step"] for entry in read_metrics(run) if "train/loss" in entry] == list(range(1, 9))


def test_going_back_is_said_and_a_finished_run_is_not_cut_short(train_mlm: Train) -> None:
    run = train_mlm(max_iters=6, val_interval=1, max_checkpoints=9).run
    earlier = run / "checkpoints" / "step-0000002"
    with pytest.raises(BertlingError, match="is finished: it has done 6 of max-iters = 4; raise --max-iters"):
        train_mlm(cp=earlier, max_iters=4)
    assert [entry["step"] for entry in read_metrics(run)][-1] == 6
    start = resolve_start("pretrain", [], {"max_iters": 7}, cp=earlier, resume=False)
    assert start.notes == ("back from step 6 to step 2: all after it is given up; a new --run-id keeps both",)
    assert not resolve_start("pretrain", [], {"max_iters": 7}, cp=run, resume=False).notes


def test_a_length_that_is_over_is_refused(train_mlm: Train, stopped: Path) -> None:
    with pytest.raises(BertlingError, match="run0: has done 2 steps, and these settings end it after 1; raise what"):
        train_mlm(cp=stopped, max_iters=1)
    done = train_mlm(max_iters=3, epochs=1.0, batch_size=16)  # an epoch has three steps
    assert done.finished
    with pytest.raises(
        BertlingError, match=rf"has done {done.step} steps, and these settings end it after {done.step}"
    ):
        train_mlm(cp=done.run, max_iters=500)


def test_what_is_evaluated_on_and_trained_on_too_is_named(train_mlm: Train) -> None:
    said: list[str] = []
    train_mlm(max_iters=1, dataset_pattern="*", say=said.append)
    assert [line for line in said if line.startswith("warning: val_tiny_32_123 is trained on too: its scores say")]


def test_a_copy_whose_links_became_folders_goes_on(train_mlm: Train, stopped: Path) -> None:
    for name in ("best", "last"):
        link = stopped / "checkpoints" / name
        folder = link.resolve()
        link.unlink()
        shutil.copytree(folder, link)
    outcome = train_mlm(resume=True)
    assert outcome.finished
    assert (stopped / "checkpoints" / "last").readlink() == Path(f"step-{outcome.step:07d}")


def test_a_run_in_progress_is_left_alone(train_mlm: Train, stopped: Path, work: Path) -> None:
    with open_run(resolve_start("pretrain", [], {}, cp=stopped, resume=False)):
        for way in ({"cp": stopped}, {"resume": True, "base_dir": work}):
            with pytest.raises(BertlingError, match="run0: another process is training this run"):
                train_mlm(**way)
        with (
            pytest.raises(BertlingError, match="run0: another process is training this run; let it finish or stop it"),
            open_run(Start(Settings(base_dir=work), frozenset(), stopped)),
        ):
            pass
        assert train_mlm(cp=stopped, run_id="other", max_iters=1).finished
    assert train_mlm(cp=stopped).finished


def test_what_a_killed_process_left_half_written_is_taken_away(train_mlm: Train, stopped: Path) -> None:
    torn = stopped / "checkpoints" / ".step-0000004.x.bertling-tmp"
    torn.mkdir()
    (torn / "model.safetensors").write_text("half")
    (stopped / ".config.ini.x.bertling-tmp").write_text("half")
    replaced = stopped / "checkpoints" / ".step-0000002.y.bertling-old"
    replaced.mkdir()
    (stopped / "checkpoints" / "step-0000002").rename(replaced / "step-0000002")
    assert train_mlm(cp=stopped).step == 4
    assert [path for path in stopped.rglob(".*") if "bertling" in path.name] == []


def test_another_run_id_starts_anew_from_the_best_weights(train_mlm: Train, stopped: Path, work: Path) -> None:
    outcome = train_mlm(cp=stopped, run_id="anew", max_iters=1, batch_size=4)
    assert (outcome.run, outcome.step) == (work / "runs" / "anew", 1)
    assert (stopped / "run.json").exists()


def test_the_same_run_id_under_another_base_dir_starts_anew_too(
    train_mlm: Train, stopped: Path, work: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(work / "datasets", elsewhere / "datasets")
    before = about(stopped), (stopped / "config.ini").read_text()
    outcome = train_mlm(cp=stopped, base_dir=elsewhere, run_id="run0", max_iters=9)
    assert (outcome.run, outcome.step) == (elsewhere / "runs" / "run0", 9)
    assert (about(stopped), (stopped / "config.ini").read_text()) == before
    assert train_mlm(cp=stopped, base_dir=work, run_id="run0").run == stopped


def test_whoever_names_another_run_is_told_that_the_settings_stay_behind(stopped: Path) -> None:
    note = resolve_start("pretrain", [], {"run_id": "anew"}, cp=stopped, resume=False).notes[0]
    assert all(words in note for words in (str(stopped), "none of its settings", "leave out --run-id"))
    assert resolve_start("pretrain", [], {"run_id": stopped.name}, cp=stopped, resume=False).notes == ()


def test_a_new_run_begins_with_a_checkpoint_and_not_with_a_link_to_one(stopped: Path) -> None:
    start = resolve_start("pretrain", [], {"run_id": "anew"}, cp=stopped, resume=False)
    assert start.checkpoint == (stopped / "checkpoints" / "best").resolve()


@pytest.mark.parametrize("name", ["best", "step-lr"])
def test_a_run_may_be_called_like_a_checkpoint(name: str, train_mlm: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cut_off(train_mlm, monkeypatch, run_id=name, max_iters=4, val_interval=2)
    assert (run.name, train_mlm(cp=run).step) == (name, 4)


def test_a_run_finds_its_data_in_a_folder_below(train_mlm: Train, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree((work / "datasets").resolve(), work / "elsewhere" / "datasets" / "wiki")
    patterns = {"dataset_pattern": "wiki/train_*", "val_dataset_pattern": "wiki/val_*"}
    where = {"base_dir": work / "elsewhere", "vocab": work / "vocab"}
    run = cut_off(train_mlm, monkeypatch, max_iters=4, val_interval=2, **patterns, **where)
    (work / "elsewhere").rename(work / "moved")
    assert train_mlm(cp=work / "moved" / "runs" / run.name, base_dir=work / "moved").step == 4


def test_word_vectors_of_a_checkpoint_are_kept_and_that_is_said(train_mlm: Train, stopped: Path) -> None:
    said: list[str] = []
    train_mlm(cp=stopped, run_id="anew", max_iters=1, word_vectors="counts", say=said.append)
    assert "note: word-vectors = counts is for fresh weights; the checkpoint keeps its own" in said


def test_folders_of_all_seeds_must_be_free(train_classifier: Classify, work: Path) -> None:
    taken = work / "runs" / "mine-seed124" / "checkpoints" / "step-0000000"
    taken.mkdir(parents=True)
    with pytest.raises(BertlingError, match="mine-seed124: exists already"):
        train_classifier(from_scratch=True, run_id="mine", seeds=2, seed=123, max_iters=1)
    assert folders(work) == ["mine-seed124"]


def test_a_fine_tuning_with_another_vocabulary_is_refused(
    train_classifier: Classify, stopped: Path, work: Path
) -> None:
    words = (work / "vocab" / "vocab.txt").read_text().splitlines()
    (work / "other").mkdir()
    (work / "other" / "vocab.txt").write_text("\n".join([*words[:5], *reversed(words[5:])]) + "\n")
    with pytest.raises(BertlingError, match="a checkpoint's vocabulary wins; leave vocab out"):
        train_classifier(cp=stopped, vocab=work / "other")


def test_a_finished_run_names_the_limit_that_it_has_reached(train_mlm: Train) -> None:
    run = train_mlm(max_iters=2).run
    with pytest.raises(BertlingError, match=r"is finished: it has done 2 of max-iters = 2; raise --max-iters"):
        train_mlm(cp=run, max_minutes=60.0)


def test_the_record_of_a_run_has_the_shape_that_was_trained(train_mlm: Train, stopped: Path) -> None:
    written = read_ini(train_mlm(cp=stopped, run_id="anew", max_iters=1).run / "config.ini")
    assert (written["d_model"], written["n_layers"], written["heads"], written["seq_len"]) == (32, 2, 2, SEQ_LEN)
    assert "size" not in written


def test_a_vocabulary_beside_the_checkpoints_own_is_refused(
    train_mlm: Train, stopped: Path, tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    Tokenizer([*tiny_tokenizer.entries, "surplus"]).save(tmp_path / "vocab")
    with pytest.raises(
        BertlingError, match="the checkpoint has another vocabulary, and a checkpoint's vocabulary wins"
    ):
        train_mlm(cp=stopped, run_id="anew", vocab=tmp_path / "vocab")
