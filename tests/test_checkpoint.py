"""Checkpoints: what is saved comes back, transformers loads it, damage is named, and a full disk loses nothing."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bertling import checkpoint
from bertling.checkpoint import (
    TrainingState,
    find_checkpoint,
    load_checkpoint,
    load_state,
    newest_intact,
    run_of,
    save_checkpoint,
    step_folders,
    verify,
)
from bertling.files import BertlingError
from bertling.model import BertForMaskedLM, BertForSequenceClassification
from bertling.presets import preset_config
from bertling.tokenizer import Tokenizer

PRESETS = ["seed", "bert", "distilbert", "modern"]
LABELS = ["grim", "fair", "merry"]
FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "training_state.json",
    "training_state.safetensors",
    "manifest.json",
}
STATE = TrainingState(
    {"step": 7, "metrics": {"eval/loss": 0.1}}, {"0.0.step": torch.tensor(7.0), "0.0.m": torch.ones(3)}
)
Save = Callable[..., Path]


@pytest.fixture
def make(tiny_tokenizer: Tokenizer) -> Callable[..., BertForMaskedLM | BertForSequenceClassification]:
    def build(
        preset: str = "bert", kind: type = BertForMaskedLM, width: int = 32
    ) -> BertForMaskedLM | BertForSequenceClassification:
        config = preset_config(
            preset,
            "mini",
            tiny_tokenizer.vocab_size,
            max_position_embeddings=24,
            pad_token_id=tiny_tokenizer.pad_id,
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            labels=LABELS if kind is BertForSequenceClassification else None,
        )
        generator = torch.Generator().manual_seed(5)
        model = kind(config, generator)
        with torch.no_grad():  # away from zeros, so that every weight counts
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        return model.eval()

    return build


@pytest.fixture
def save(tmp_path: Path, tiny_tokenizer: Tokenizer, make: Callable[..., BertForMaskedLM]) -> Save:
    """`save(step, model, best=, keep=)` into a checkpoints folder."""

    def write(step: int = 1, model: nn.Module | None = None, *, best: bool = False, keep: int = 1) -> Path:
        return save_checkpoint(
            tmp_path / "checkpoints",
            step,
            make() if model is None else model,
            tiny_tokenizer,
            STATE,
            best=best,
            keep=keep,
        )

    return write


def test_a_kill_between_the_links_loses_no_best(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(1, best=True)
    swing = checkpoint.point

    def once(link: Path, folder: Path) -> None:
        swing(link, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "point", once)
    with pytest.raises(KeyboardInterrupt):
        save(2, best=True)
    # A resume begins at step 1, and comes to step 2 and its best once more.
    links = {name: (tmp_path / "checkpoints" / name).resolve().name for name in ("last", "best")}
    assert links == {"last": "step-0000001", "best": "step-0000002"}


def assert_equal_weights(first: nn.Module, second: nn.Module) -> None:
    vocabulary = first.config.vocab_size
    for (name, expected), (other, found) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        rows = vocabulary if name.endswith(("word_embeddings.weight", "decoder.weight")) else len(expected)
        assert (name, expected.shape) == (other, found.shape)
        assert torch.equal(expected[:rows], found[:rows]), name


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertForSequenceClassification])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_was_saved_comes_back(make: Callable[..., nn.Module], save: Save, preset: str, kind: type) -> None:
    model = make(preset, kind)
    folder = save(12, model)
    assert folder.name == "step-0000012"
    assert {path.name for path in folder.iterdir()} == FILES
    verify(folder)
    loaded = load_checkpoint(folder)
    assert type(loaded.model) is kind
    assert (loaded.model.config, loaded.report) == (model.config, ((), ()))
    assert_equal_weights(model, loaded.model)
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    state = load_state(folder)
    assert state is not None
    assert state.numbers == STATE.numbers
    assert {name: tensor.tolist() for name, tensor in state.tensors.items()} == {"0.0.step": 7.0, "0.0.m": [1.0] * 3}


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_transformers_loads_it_with_stock_classes(
    make: Callable[..., nn.Module], save: Save, tiny_tokenizer: Tokenizer, preset: str
) -> None:
    transformers = pytest.importorskip("transformers")
    text = "The old keeper lit the [MASK] in the tower."
    folder = save(1, make(preset))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer([text, "Paper."], return_tensors="pt", padding=True)
    assert encoded["input_ids"][0].tolist() == [
        tiny_tokenizer.cls_id,
        *tiny_tokenizer.encode(text),
        tiny_tokenizer.sep_id,
    ]
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    ours = load_checkpoint(folder).model.eval()
    real = encoded["attention_mask"].bool()
    with torch.inference_mode():
        expected = theirs(**encoded).logits
        found = ours(encoded["input_ids"], encoded["attention_mask"])
    assert found.shape == expected.shape == (*real.shape, tiny_tokenizer.vocab_size)
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
    answers = transformers.pipeline("fill-mask", model=str(folder), device="cpu")(text, top_k=2)
    place = int((encoded["input_ids"][0] == tiny_tokenizer.mask_id).nonzero())
    assert [answer["token"] for answer in answers] == found[0, place].topk(2).indices.tolist()


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_transformers_loads_a_classifier_with_its_labels(
    make: Callable[..., nn.Module], save: Save, preset: str
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = save(1, make(preset, BertForSequenceClassification))
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(
        ["A small lamp.", "Bread"], return_tensors="pt", padding=True
    )
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        expected = theirs(**encoded).logits
        found = load_checkpoint(folder).model.eval()(encoded["input_ids"], encoded["attention_mask"])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    answer = transformers.pipeline("text-classification", model=str(folder), device="cpu")("A small lamp.")[0]
    assert answer["label"] == LABELS[int(found[0].argmax())]
    assert answer["score"] == pytest.approx(float(found[0].softmax(0).max()), abs=1e-4)


def test_links_are_relative_and_follow_the_newest_and_the_best(save: Save, tmp_path: Path) -> None:
    links = tmp_path / "checkpoints"
    save(1)  # the first one is the best so far
    save(2, best=True)
    save(3)
    assert (os.readlink(links / "best"), os.readlink(links / "last")) == ("step-0000002", "step-0000003")
    moved = tmp_path / "elsewhere"
    links.rename(moved)
    assert load_checkpoint(moved / "best").folder == moved / "best"


def test_rotation_keeps_the_best_and_the_newest_besides(save: Save, tmp_path: Path) -> None:
    for step in range(1, 8):
        save(step, best=step == 2, keep=2)
    assert [path.name for path in step_folders(tmp_path / "checkpoints")] == [
        "step-0000002",
        "step-0000006",
        "step-0000007",
    ]
    save(8, best=True, keep=1)
    assert [path.name for path in step_folders(tmp_path / "checkpoints")] == ["step-0000007", "step-0000008"]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if "." in path.name) == []


def do_harm(path: Path, harm: str) -> None:
    """Remove a file, flip a bit in its middle, or cut it there."""
    raw = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw[: len(raw) // 2] if harm == "truncated" else raw)


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
def test_damage_to_any_file_is_refused_by_name(save: Save, name: str, harm: str) -> None:
    path = save() / name
    do_harm(path, harm)
    expected = f"{name}: missing from this checkpoint; use another one"
    if harm != "missing":
        expected = rf"{name}: damaged or truncated \("
    elif name == "config.json":
        expected = r"holds no checkpoint \(no config\.json\)"
    with pytest.raises(BertlingError, match=rf"^[^\n]*{expected}[^\n]*$"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("{}", "does not list files"), ('{"files": {"a": 1}}', "does not list files")],
)
def test_a_damaged_manifest_is_refused(save: Save, text: str, message: str) -> None:
    folder = save()
    (folder / "manifest.json").write_text(text)
    with pytest.raises(BertlingError, match=rf"manifest\.json: .*{message}"):
        load_checkpoint(folder)


def test_a_manifest_cannot_name_files_outside(save: Save) -> None:
    folder = save()
    (folder / "manifest.json").write_text(json.dumps({"files": {"../config.json": {}}}))
    with pytest.raises(BertlingError, match="missing from this checkpoint"):
        verify(folder)


def test_a_foreign_folder_is_checked_by_its_tensors(save: Save) -> None:
    folder = save()
    (folder / "manifest.json").unlink()
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-100])
    with pytest.raises(BertlingError, match=r"model\.safetensors: damaged or truncated"):
        load_checkpoint(folder)
    weights.unlink()
    with pytest.raises(BertlingError, match=r"model\.safetensors: missing; a checkpoint holds its weights"):
        load_checkpoint(folder)


def test_files_that_do_not_belong_together_are_refused(
    save: Save, make: Callable[..., nn.Module], tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    folder, other = save(1), save(2, make(width=48), keep=9)
    foreign = tmp_path / "foreign"
    shutil.copytree(folder, foreign, ignore=shutil.ignore_patterns("manifest.json"))
    shutil.copy(other / "model.safetensors", foreign)
    with pytest.raises(
        BertlingError, match=r"foreign: model\.safetensors does not fit config\.json \(bert\).*of the wrong"
    ):
        load_checkpoint(foreign)
    shutil.copy(save(3, make("distilbert"), keep=9) / "model.safetensors", foreign)
    with pytest.raises(BertlingError, match=r"does not fit config\.json \(bert\): missing: .*unexpected: "):
        load_checkpoint(foreign)
    shutil.copy(folder / "model.safetensors", foreign)
    Tokenizer([*tiny_tokenizer.entries, "surplus"]).save(foreign)
    with pytest.raises(
        BertlingError, match="its vocabulary has 401 entries but its model only 400: these files do not"
    ):
        load_checkpoint(foreign)


def test_another_architecture_is_refused(save: Save) -> None:
    folder = save()
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(BertlingError, match="model_type = 'gpt2' is not supported; use a checkpoint of one of"):
        load_checkpoint(folder)


def test_a_folder_is_found_from_its_run_and_nothing_else_is_taken(save: Save, tmp_path: Path) -> None:
    first = save(1)
    save(2, keep=5)
    assert find_checkpoint(tmp_path, "best").resolve() == first
    assert find_checkpoint(tmp_path / "checkpoints", "last").resolve().name == "step-0000002"
    assert run_of(first) is None  # no run.json
    (tmp_path / "run.json").write_text("{}")
    assert run_of(tmp_path / "checkpoints" / "best") == tmp_path
    for path, message in (
        (tmp_path / "nowhere", "no such folder; --cp takes a run, a checkpoint or a Hugging Face model folder"),
        (first / "vocab.txt", "this is a file; --cp takes the folder of a run or of a checkpoint"),
        (Path(__file__).parent, r"holds no checkpoint \(no config\.json\); name a run or a checkpoint folder"),
    ):
        with pytest.raises(BertlingError, match=rf"{path.name}: {message}"):
            find_checkpoint(path, "best")


class Wrapped(nn.Module):
    """As DistributedDataParallel holds a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_wrapped_model_is_saved_plainly(make: Callable[..., nn.Module], save: Save) -> None:
    model = make("modern")
    folder = save(1, Wrapped(model))
    assert_equal_weights(model, load_checkpoint(folder).model)


def test_a_compiled_model_is_saved_plainly_and_loads_bit_equal(make: Callable[..., nn.Module], save: Save) -> None:
    model = make("modern")
    model.compile(backend="eager")  # in place, as the training loop does; what is made of it does not matter here
    ids = torch.randint(5, 400, (2, 8), generator=torch.Generator().manual_seed(0))
    model.train()(ids, labels=ids).loss_sum.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert_equal_weights(model, load_checkpoint(save(1, model)).model)
    assert_equal_weights(
        model, load_checkpoint(save(2, torch.compile(model, backend="eager"))).model
    )  # wrapped in OptimizedModule


@pytest.mark.parametrize("victim", ["weights", "state", "fsync", "link"])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    first = save(1)
    full = OSError(errno.ENOSPC, "No space left on device")
    written = Path.write_bytes

    def write_bytes(path: Path, data: bytes) -> int:
        if path.name == {"weights": "model.safetensors", "state": "training_state.safetensors"}.get(victim):
            written(path, data[: len(data) // 2])
            raise full
        return written(path, data)

    def refuse(*arguments: object) -> None:
        raise full

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    if victim == "fsync":
        monkeypatch.setattr(os, "fsync", refuse)
    if victim == "link":
        monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(BertlingError, match=r"^[^\n]*: the disk is full: free some space[^\n]*$"):
        save(2, best=True)
    monkeypatch.undo()
    folder = tmp_path / "checkpoints"
    assert {name: os.readlink(folder / name) for name in ("best", "last")} == dict.fromkeys(
        ("best", "last"), first.name
    )
    assert [path for path in folder.iterdir() if path.name.startswith(".")] == []
    load_checkpoint(folder / "last")
    save(2, best=True)
    assert os.readlink(folder / "best") == "step-0000002"


def test_a_checkpoint_that_does_not_verify_never_becomes_the_last(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(1)
    monkeypatch.setattr(checkpoint, "verify", lambda folder: (_ for _ in ()).throw(BertlingError("damaged")))
    with pytest.raises(BertlingError, match="damaged"):
        save(2)
    assert [path.name for path in step_folders(tmp_path / "checkpoints")] == ["step-0000001"]
    assert os.readlink(tmp_path / "checkpoints" / "last") == "step-0000001"


def test_tensors_of_a_training_state_are_checked(save: Save) -> None:
    folder = save()
    save_file({"x": torch.ones(2)}, folder / "training_state.safetensors")
    with pytest.raises(BertlingError, match=r"training_state\.safetensors: damaged or truncated"):
        verify(folder)
    (folder / "training_state.json").unlink()
    assert load_state(folder) is None


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
def test_the_checkpoint_before_a_damaged_one_is_found(save: Save, tmp_path: Path, name: str, harm: str) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(step, keep=3)
    assert newest_intact(checkpoints) == (checkpoints / "step-0000003", [])
    path = checkpoints / "step-0000003" / name
    do_harm(path, harm)
    found, faults = newest_intact(checkpoints)
    assert (found.name, len(faults)) == ("step-0000002", 1)
    assert "step-0000003" in faults[0]


def test_a_checkpoint_whose_link_was_not_made_yet_does_no_harm(save: Save, tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save(step, keep=3)
    for target, expected in (("step-0000002", 2), ("step-0000009", 3), (None, 3)):
        (checkpoints / "last").unlink()
        if target:
            (checkpoints / "last").symlink_to(target)
        assert newest_intact(checkpoints)[0].name == f"step-000000{expected}"
        if target is None:
            break
    shutil.rmtree(checkpoints / "step-0000003")
    shutil.rmtree(checkpoints / "step-0000002")
    assert newest_intact(checkpoints)[0].name == "step-0000001"
    shutil.rmtree(checkpoints / "step-0000001")
    with pytest.raises(BertlingError, match="checkpoints: holds no intact checkpoint; start a new run, or restore"):
        newest_intact(checkpoints)
