"""What is exported loads elsewhere and gives our answers; what differs, or cannot be, is not written."""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from commands import bertling

import bertling as package
from bertling.checkpoint import write_model
from bertling.model import BertForMaskedLM, BertForSequenceClassification
from bertling.presets import preset_config
from bertling.runs import Outcome
from bertling.tokenizer import Tokenizer
from bertling.tools import export as module

transformers = pytest.importorskip("transformers")
TEXTS = ["the old [MASK] by the river .", "bread"]
every_stock = pytest.mark.parametrize("preset", ["bert", "distilbert", "modern"])


def write_small(base: Path, tokenizer: Tokenizer, preset: str, *, classifier: bool = False, **changes: Any) -> Path:
    """Write a small model with lively weights; returns its folder."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40}
    config = preset_config(
        preset,
        "mini",
        tokenizer.vocab_size,
        pad_token_id=tokenizer.pad_id,
        labels=("bad", "good"),
        **shape | changes,
    )
    generator = torch.Generator().manual_seed(3)
    model = (BertForSequenceClassification if classifier else BertForMaskedLM)(config, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = base / f"{preset} {classifier}"
    folder.mkdir()
    write_model(folder, model, tokenizer)
    return folder


@pytest.fixture
def save(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Any:
    """`save(preset, classifier=..., **changes)` writes a small model; returns its folder."""
    return functools.partial(write_small, tmp_path, tiny_tokenizer)


@dataclass(frozen=True)
class Exported:
    """A model, what it was exported to, and what the command answered."""

    model: Path
    out: Path
    answer: Any


@pytest.fixture(scope="module")
def onnx_of(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Any:
    """`onnx_of(preset, classifier)` exports a small model, once; the one that fills in as int8 too if it is modern."""
    pytest.importorskip("onnxruntime")

    @functools.cache
    def export(preset: str, classifier: bool) -> Exported:
        base = tmp_path_factory.mktemp("onnx")
        # Tracing takes seconds a block; only modern's second one differs from its first.
        changes = {"local_attention": 6} if preset == "modern" else {"num_hidden_layers": 1}
        folder = write_small(base, tiny_tokenizer, preset, classifier=classifier, **changes)
        more = ["--int8"] if preset == "modern" and not classifier else []
        ended = bertling("export", "--cp", folder, "--format", "onnx", *more, "-o", base / "out", "--json")
        return Exported(folder, base / "out", ended.answer)

    return export


@every_stock
def test_fill_mask_pipeline_gives_our_answers(preset: str, save: Any, tmp_path: Path) -> None:
    folder = save(preset)
    ended = bertling("export", "--cp", folder, "--format", "hf", "-o", tmp_path / "out")
    assert ended.status == 0, ended.err
    assert "stock class: within" in ended.out
    ours = package.load(folder).fill(TEXTS[0], top_k=3)[0]["masks"][0]
    theirs = transformers.pipeline("fill-mask", model=str(tmp_path / "out"))(TEXTS[0], top_k=3)
    assert [one["token_str"].replace(" ", "") for one in theirs] == [token for token, _ in ours]
    assert [one["score"] for one in theirs] == pytest.approx([share for _, share in ours], rel=1e-4)


@every_stock
def test_text_classification_pipeline_gives_our_answers(preset: str, save: Any, tmp_path: Path) -> None:
    folder = save(preset, classifier=True)
    assert bertling("export", "--cp", folder, "--format", "hf", "-o", tmp_path / "out").status == 0
    pipeline = transformers.pipeline("text-classification", model=str(tmp_path / "out"))
    for text in ("the old lamp .", "bread", "the old lamp " * 200):  # the last one is longer than the model reads
        ours, theirs = package.load(folder).classify(text)[0], pipeline(text, truncation=True)[0]
        assert theirs["label"] == ours["label"]
        assert theirs["score"] == pytest.approx(ours["score"], rel=1e-4)


def test_a_card_gives_no_scores_of_other_weights(train_mlm: Any, tmp_path: Path) -> None:
    run = train_mlm(max_iters=4, val_interval=4, save_every="2", max_checkpoints=5).run
    between = run / "checkpoints" / "step-0000002"
    assert bertling("export", "--cp", between, "-o", tmp_path / "out").status == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "None of these weights, which are of step 2: the latest evaluation before was that of step 0." in card
    assert "| accuracy |" not in card


def test_the_card_of_a_run_tells_its_training(train_mlm: Any, tmp_path: Path) -> None:
    outcome: Outcome = train_mlm(max_iters=3, preset="bert")
    ended = bertling("export", "--cp", outcome.run, "--format", "hf", "-o", tmp_path / "out", "--json")
    assert ended.status == 0, ended.err
    answer = json.loads(ended.out)
    assert answer["worst_difference"]["stock class"] < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    parts = (
        "3 steps in",
        "max-iters = 3",
        "15% of the ordinary tokens masked",
        "floor/unigram",
        '"label": "tiny"',
    )
    for part in parts:
        assert part in card
    assert sorted(answer["files"]) == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_copy_that_differs_is_not_written(save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("bert")
    real = module.ours_on
    monkeypatch.setattr(module, "ours_on", lambda *inputs: real(*inputs) * 1.01)
    ended = bertling("export", "--cp", folder, "--format", "hf", "-o", tmp_path / "out")
    assert ended.status == 2
    assert "the stock class differs from the original by" in ended.err
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.glob(".out*")) == []


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("preset", ["bert", "distilbert", "modern", "seed"])
def test_onnx_gives_our_scores_for_any_batch_and_length(preset: str, classifier: bool, onnx_of: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    exported = onnx_of(preset, classifier)
    assert exported.answer["worst_difference"]["model.onnx"] < 1e-4
    session = onnxruntime.InferenceSession(str(exported.out / "model.onnx"))
    model = package.load(exported.model)
    for rows, length in ((1, 3), (3, 17), (2, 40)):
        ids = torch.randint(5, model.tokenizer.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[-1, length // 2 + 1 :] = 0
        (theirs,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        with torch.inference_mode():
            ours = model.model(ids, mask).numpy()
        keep = np.ones(rows, bool) if classifier else mask.bool().numpy()
        np.testing.assert_allclose(theirs[keep], ours[keep], atol=1e-4 * np.abs(ours).max())


def test_int8_is_smaller_and_near(onnx_of: Any) -> None:
    # not a classifier: its two scores may both lie near 0, where any error is large
    answer = onnx_of("modern", False).answer
    assert answer["files"]["model_int8.onnx"] < answer["files"]["model.onnx"]
    assert 1e-6 < answer["worst_difference"]["model_int8.onnx"] < 0.2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "hf"], "the preset seed has no stock class"),
        (["--format", "hf", "--int8"], "--int8: only the onnx form has it"),
        (["--format", "pickle"], "'pickle' is not one of 'hf', 'onnx'"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str, save: Any, tmp_path: Path) -> None:
    ended = bertling("export", "--cp", save("seed"), "-o", tmp_path / "out", *words)
    assert ended.status == 2
    assert message in ended.err
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_goes_only_by_force(save: Any, tmp_path: Path) -> None:
    folder, out = save("bert"), tmp_path / "out"
    words = ["export", "--cp", folder, "--format", "hf", "-o", out]
    assert bertling(*words).status == 0
    before = (out / "config.json").stat().st_mtime_ns
    assert "--force" in bertling(*words).error
    assert (out / "config.json").stat().st_mtime_ns == before
    assert bertling(*words, "--force").status == 0
    assert (out / "config.json").stat().st_mtime_ns != before
    (out / "mine.txt").write_text("mine")
    assert bertling(*words, "--force").error.endswith("holds mine.txt, which no export wrote; choose another folder")
    assert (out / "mine.txt").exists()


def test_a_file_is_not_replaced_by_an_export(save: Any, tmp_path: Path) -> None:
    folder, notes = save("bert"), tmp_path / "notes.txt"
    notes.write_text("mine")
    for more in ([], ["--force"]):
        ended = bertling("export", "--cp", folder, "--format", "hf", "-o", notes, *more)
        assert ended.error == f"{notes}: is a file; give a folder for the model"
    assert notes.read_text() == "mine"


def test_a_model_is_not_replaced_by_its_export(train_mlm: Any, tmp_path: Path) -> None:
    run = train_mlm(max_iters=1, preset="bert").run
    for cp, out in ((run, run), (run, run.parent), (run / "checkpoints" / "last", run / "checkpoints")):
        done = bertling("export", "--cp", cp, "--format", "hf", "-o", out, "--force")
        assert done.error == f"{out}: the model to export lies there; choose another folder"
    assert (run / "checkpoints" / "last" / "model.safetensors").exists()


@pytest.mark.parametrize("form", ["hf", "onnx"])
def test_the_lines_on_a_card_run_and_name_the_class(
    form: str,
    save: Any,
    onnx_of: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if form == "onnx":
        folder, out = onnx_of("bert", True).model, onnx_of("bert", True).out
    else:
        folder, out = save("bert", classifier=True), tmp_path / "out"
        assert bertling("export", "--cp", folder, "--format", form, "-o", out).status == 0
    monkeypatch.chdir(out)
    code = Path("README.md").read_text().split("```python\n")[1].split("```")[0]
    label = package.load(folder).classify("a warm and funny film .")[0]["label"]
    exec(code, {})
    assert label in capsys.readouterr().out


def test_onnxruntime_is_told_to_keep_to_itself_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)

    def need(*libraries: str) -> None:
        assert "onnxruntime" in libraries
        assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
        raise RuntimeError("far enough")

    monkeypatch.setattr(module, "need", need)
    with pytest.raises(RuntimeError, match="far enough"):
        module.write_onnx(tmp_path, mock.Mock(), int8=False)
