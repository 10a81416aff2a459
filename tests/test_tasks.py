"""What the tasks score: whole sets, frozen masks, equal for any number of processes, and sums that share out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ASSETS, SEQ_LEN
from torch import Tensor, nn

from bertling import tasks
from bertling.batches import evaluation_batches
from bertling.distributed import Ranks
from bertling.files import BertlingError
from bertling.labelled import LabelledTexts, load_labelled
from bertling.model import BertForMaskedLM, BertForSequenceClassification
from bertling.prepare import prepare
from bertling.presets import preset_config
from bertling.runtime import Runtime
from bertling.samples import Samples, match_samples, open_samples
from bertling.tasks import (
    ClassificationTask,
    MaskedLMTask,
    classification_floors,
    classifier_batches,
    evaluate_classifier,
    evaluate_masked_lm,
)
from bertling.tokenizer import Tokenizer

FP32 = Runtime(torch.device("cpu"), torch.float32, compile=False)
BF16 = Runtime(torch.device("cpu"), torch.bfloat16, compile=False)


def make_model(kind: type, tokenizer: Tokenizer) -> Any:
    config = preset_config(
        "bert",
        "mini",
        tokenizer.vocab_size,
        max_position_embeddings=SEQ_LEN,
        pad_token_id=tokenizer.pad_id,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return kind(config, torch.Generator().manual_seed(3))


def split(base: Path, name: str) -> Samples:
    return open_samples(match_samples(base, f"{name}_*")[0])


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """Rows of different lengths, and more of them than one batch of an evaluation."""
    base = tmp_path_factory.mktemp("padded")
    text = base / "text.txt"
    text.write_text((ASSETS / "tiny.txt").read_text() * 8)
    shares = (0.4, 0.5, 0.1)
    prepare([text], "cut", base / "datasets", SEQ_LEN, tiny_tokenizer, method="segment", split=shares, workers=1)
    return base


class Shared(Ranks):
    """A rank whose sums are made by hand afterwards."""

    def sum(self, tensor: Tensor) -> Tensor:
        self.__dict__["share"] = tensor.clone()
        return tensor


def test_an_evaluation_is_that_of_all_rows_together(
    padded: Path, tiny_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, val = make_model(BertForMaskedLM, tiny_tokenizer), split(padded, "val")
    assert val.rows > 2 * tasks.EVAL_BATCH
    whole = next(evaluation_batches(val, tiny_tokenizer, batch_size=val.rows, mlm_probability=0.15, seed=0))
    with torch.inference_mode():
        logits = model.eval()(whole.input_ids, whole.attention_mask, wanted=whole.wanted)
    used = whole.labels != -100
    found = evaluate_masked_lm(model, val, tiny_tokenizer, FP32)
    assert found["eval/scored"] == whole.count == int(used.sum())
    assert found["eval/loss"] == pytest.approx(float(F.cross_entropy(logits[used], whole.labels[used])), rel=1e-5)
    assert found["eval/accuracy"] == pytest.approx(float((logits.argmax(-1) == whole.labels)[used].float().mean()))
    assert model.training
    assert evaluate_masked_lm(model, val, tiny_tokenizer, FP32) == found  # dropout is off, the masks are frozen
    monkeypatch.setattr(tasks, "EVAL_TOKENS", 7 * val.seq_len)
    assert tasks.evaluation_rows(val.seq_len) == 7
    assert evaluate_masked_lm(model, val, tiny_tokenizer, FP32) == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 5])
def test_the_shares_of_the_processes_are_the_whole(padded: Path, tiny_tokenizer: Tokenizer, world_size: int) -> None:
    model, val = make_model(BertForMaskedLM, tiny_tokenizer), split(padded, "val")
    found = evaluate_masked_lm(model, val, tiny_tokenizer, FP32)
    total = torch.zeros(3)
    for rank in range(world_size):
        ranks = Shared(rank, world_size)
        evaluate_masked_lm(model, val, tiny_tokenizer, FP32, ranks)
        total += ranks.__dict__["share"]
    loss, correct, count = total.tolist()
    assert (correct / count, count) == (found["eval/accuracy"], found["eval/scored"])
    assert loss / count == pytest.approx(found["eval/loss"], rel=1e-6)


def test_evaluations_compute_in_the_number_format_asked_for(work: Path, tiny_tokenizer: Tokenizer) -> None:
    model, val = make_model(BertForMaskedLM, tiny_tokenizer), split(work, "val")
    exact, rough = (evaluate_masked_lm(model, val, tiny_tokenizer, runtime)["eval/loss"] for runtime in (FP32, BF16))
    assert exact != rough
    assert rough == pytest.approx(exact, rel=1e-2)


def make_task(base: Path, tokenizer: Tokenizer, **changes: Any) -> MaskedLMTask:
    arguments: dict[str, Any] = {"batch_size": 8, "seed": 1, "mlm_probability": 0.15} | changes
    return MaskedLMTask([split(base, "train")], split(base, "val"), tokenizer, **arguments)


def test_neither_seed_nor_mask_rate_of_the_training_changes_the_evaluation(
    work: Path, tiny_tokenizer: Tokenizer
) -> None:
    model = make_model(BertForMaskedLM, tiny_tokenizer)
    first = make_task(work, tiny_tokenizer)
    other = make_task(work, tiny_tokenizer, seed=9, mlm_probability=0.4)
    assert first.evaluate(model, FP32, Ranks()) == other.evaluate(model, FP32, Ranks())
    sizes = {"rank": 0, "world_size": 1, "micro_batch_size": 8}
    assert other.micro_batches(0, **sizes)[1] > 2 * first.micro_batches(0, **sizes)[1]
    assert first.floors == other.floors
    assert 0 < first.floors["floor/unigram"] < 0.2
    assert 3 < first.floors["floor_loss/unigram"] < np.log(tiny_tokenizer.vocab_size)


def test_the_loss_is_the_sum_over_the_masked_places(work: Path, tiny_tokenizer: Tokenizer) -> None:
    model = make_model(BertForMaskedLM, tiny_tokenizer).eval()
    task = make_task(work, tiny_tokenizer)
    parts, count = task.micro_batches(0, rank=0, world_size=1, micro_batch_size=3)
    whole, _ = task.micro_batches(0, rank=0, world_size=1, micro_batch_size=8)
    assert count == whole[0].count == sum(part.count for part in parts)
    with torch.inference_mode():
        total = sum(float(task.loss(model, part)) for part in parts)
        assert total == pytest.approx(float(task.loss(model, whole[0])), rel=1e-5)
    assert total / count == pytest.approx(np.log(tiny_tokenizer.vocab_size), rel=0.05)  # knows nothing yet


class Stubborn(nn.Module):
    """Answers each question with the same token."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.asked: list[list[int]] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, wanted: Tensor) -> Tensor:
        self.asked.append(input_ids[0].tolist())
        return F.one_hot(torch.full_like(wanted, 77), self.size).float()


def test_each_turn_shows_another_row(padded: Path, tiny_tokenizer: Tokenizer) -> None:
    task = make_task(padded, tiny_tokenizer)
    model = Stubborn(tiny_tokenizer.vocab_size)
    examples = [task.illustrate(model, FP32, turn) for turn in range(3)]
    assert len({str(asked) for asked in model.asked}) == 3
    for example, asked in zip(examples, model.asked, strict=True):
        assert example.total >= asked.count(tiny_tokenizer.mask_id) > 0
        assert example.correct < example.total
        assert example.plain.count(tiny_tokenizer.token(77).removeprefix("##")) >= example.total


def test_an_example_is_shown_without_dropout(work: Path, tiny_tokenizer: Tokenizer) -> None:
    task, model = make_task(work, tiny_tokenizer), make_model(BertForMaskedLM, tiny_tokenizer).train()
    assert model.config.hidden_dropout_prob > 0
    assert len({task.illustrate(model, FP32, 0).plain for _ in range(5)}) == 1
    assert model.training


def test_a_validation_set_of_another_vocabulary_is_refused(
    work: Path, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = Tokenizer([*tiny_tokenizer.entries, "surplus"])
    prepare([ASSETS / "tiny.txt"], "other", tmp_path / "datasets", SEQ_LEN, other, workers=1)
    with pytest.raises(BertlingError, match="val_other_32_123: prepared with another vocabulary"):
        MaskedLMTask(
            [split(work, "train")],
            split(tmp_path, "val"),
            tiny_tokenizer,
            batch_size=8,
            seed=1,
            mlm_probability=0.15,
        )


def test_a_classifier_is_scored_on_every_text(work: Path, tiny_tokenizer: Tokenizer) -> None:
    model = make_model(BertForSequenceClassification, tiny_tokenizer)
    dev = load_labelled(work / "dev.tsv")
    scores = evaluate_classifier(model, dev, classifier_batches(dev, tiny_tokenizer, SEQ_LEN), FP32)
    assert model.training
    right, loss = 0, 0.0
    for text, label in zip(dev.texts, dev.labels, strict=True):  # one by one, so without padding
        ids = torch.tensor([[tiny_tokenizer.cls_id, *tiny_tokenizer.encode(text), tiny_tokenizer.sep_id]])
        with torch.inference_mode():
            logits = model.eval()(ids)[0]
        right += int(logits.argmax() == label)
        loss -= float(logits.log_softmax(0)[label])
    assert scores["accuracy"] == pytest.approx(right / 24)
    assert scores["loss"] == pytest.approx(loss / 24, rel=1e-4)
    assert np.sum(scores["confusion"]) == 24


def test_a_classifier_trains_on_sums_and_knows_its_floors(work: Path, tiny_tokenizer: Tokenizer) -> None:
    train, dev = (load_labelled(work / f"{name}.tsv") for name in ("train", "dev"))
    floors = classification_floors(train, dev)
    assert floors["floor/majority"] == 0.5
    assert floors["floor/bag_of_words"] > 0.8  # a word tells the class
    many = LabelledTexts(train.path, [f"text {i}" for i in range(600)], np.arange(600))
    assert classification_floors(many, many) == {"floor/majority": pytest.approx(1 / 600)}
    task = ClassificationTask(train, dev, tiny_tokenizer, batch_size=7, seq_len=SEQ_LEN, seed=1, floors=floors)
    assert task.steps_per_epoch == 9
    model = make_model(BertForSequenceClassification, tiny_tokenizer).eval()
    whole, count = task.micro_batches(0, rank=0, world_size=1, micro_batch_size=7)
    shares = [task.micro_batches(0, rank=rank, world_size=3, micro_batch_size=2)[0] for rank in range(3)]
    with torch.inference_mode():
        total = sum(float(task.loss(model, batch)) for share in shares for batch in share)
        assert total == pytest.approx(float(task.loss(model, whole[0])), rel=1e-4)
    assert count in (5, 7)
    assert {len(share) for share in shares} == {2}
    assert task.illustrate(model, FP32, 0) is None
