"""What the anatomy promises: only masked places count, padding changes nothing, it learns, it compiles."""

import shutil
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bertling.files import BertlingError
from bertling.model import (
    BertEncoder,
    BertForMaskedLM,
    BertForSequenceClassification,
    MaskedOutput,
    ModelConfig,
    count_parameters,
    summary,
)
from bertling.presets import PRESETS, preset_config

VOCAB, LENGTH = 90, 12  # 90 entries run as 128 rows
Model = TypeVar("Model", bound=BertEncoder)
every_preset = pytest.mark.parametrize("name", PRESETS)


def tiny(name: str, *, dropout: float = 0.0, **changes: Any) -> ModelConfig:
    config = preset_config(
        name,
        "mini",
        VOCAB,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        dropout=dropout,
        labels=("a", "b", "c"),
    )
    return replace(config, **changes)


def shaken(model: Model) -> Model:
    """Give every weight a random share, so that no part is silent (zero) or neutral (one)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def some_ids(rows: int = 3) -> Tensor:
    return torch.randint(5, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(2))


@every_preset
def test_masked_only_loss_equals_full_loss(name: str) -> None:
    model, ids = shaken(BertForMaskedLM(tiny(name))), some_ids()
    positions = torch.tensor([3, 7, 13, 30, 0, 0])  # two slots are not used
    labels = torch.tensor([8, 9, 10, 11, -100, -100])
    full_labels = torch.full((ids.numel(),), -100).index_put((positions[:4],), labels[:4]).view_as(ids)
    gradients = []
    outputs: list[MaskedOutput] = []
    for output in (model(ids, None, wanted=positions, labels=labels), model(ids, labels=full_labels)):
        model.zero_grad()
        output.loss_sum.backward()
        outputs.append(output)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    reference = F.cross_entropy(model(ids).flatten(0, 1), full_labels.flatten(), reduction="sum")
    assert torch.allclose(outputs[0].loss_sum, reference, rtol=1e-5)
    assert torch.allclose(outputs[0].loss_sum, outputs[1].loss_sum, rtol=1e-5)
    for masked_only, full in zip(*gradients, strict=True):
        assert torch.allclose(masked_only, full, rtol=1e-4, atol=1e-5)


def test_positions_select_logits_and_correct_counts_them() -> None:
    model, ids = shaken(BertForMaskedLM(tiny("modern"))).eval(), some_ids()
    positions = torch.tensor([0, 5, 23])
    logits = model(ids, wanted=positions)
    assert logits.shape == (3, VOCAB)
    assert torch.allclose(logits, model(ids).flatten(0, 1)[positions], atol=1e-5)
    labels = logits.argmax(dim=-1)
    assert model(ids, wanted=positions, labels=labels).correct == 3
    labels[1] = (labels[1] + 1) % VOCAB
    labels[2] = -100
    assert model(ids, wanted=positions, labels=labels).correct == 1
    assert model.train()(ids, wanted=positions, labels=labels).correct is None


@every_preset
def test_padding_changes_nothing(name: str) -> None:
    short = some_ids()[:, :7]
    padded = F.pad(short, (0, LENGTH - 7), value=0)
    mask = padded != 0
    for model in (shaken(BertForMaskedLM(tiny(name))), shaken(BertForSequenceClassification(tiny(name)))):
        expected = model(short)
        for kind in (torch.bool, torch.int64):
            output = model(padded, mask.to(kind))
            output = output[:, :7] if output.ndim == 3 else output
            assert torch.allclose(output, expected, atol=1e-5)
        padded[~mask] = 77  # whatever stands there
        output = model(padded, mask)
        assert torch.allclose(output[:, :7] if output.ndim == 3 else output, expected, atol=1e-5)
        padded[~mask] = 0


@every_preset
def test_a_row_of_padding_alone_does_no_harm(name: str) -> None:
    model, ids = shaken(BertForMaskedLM(tiny(name))), some_ids()
    mask = torch.ones_like(ids)
    mask[1] = 0
    output = model(ids, mask, wanted=torch.tensor([0, 30]), labels=torch.tensor([8, 9]))
    output.loss_sum.backward()
    assert torch.isfinite(model(ids, mask)).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@every_preset
def test_rows_that_pad_the_vocabulary_stay_out(name: str) -> None:
    model, ids = shaken(BertForMaskedLM(tiny(name))).eval(), some_ids()
    positions, labels = torch.arange(ids.numel()), ids.flatten()
    before = model(ids, None, wanted=positions, labels=labels)
    matrix = model.mlm_head.decoder.weight
    with torch.no_grad():
        matrix[VOCAB:] = 1e4  # would win everywhere
    after = model(ids, None, wanted=positions, labels=labels)
    assert torch.equal(before.loss_sum, after.loss_sum)
    assert torch.equal(before.correct, after.correct)
    after.loss_sum.backward()
    assert matrix.grad is not None
    assert not matrix.grad[VOCAB:].any()
    assert matrix.grad[5:VOCAB].any()


@every_preset
def test_fresh_weights_follow_the_generator_alone(name: str) -> None:
    for kind in (BertForMaskedLM, BertForSequenceClassification):
        first = kind(tiny(name), generator=torch.Generator().manual_seed(3)).state_dict()
        torch.manual_seed(99)
        second = kind(tiny(name), generator=torch.Generator().manual_seed(3)).state_dict()
        other = kind(tiny(name), generator=torch.Generator().manual_seed(4)).state_dict()
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert not all(torch.equal(first[key], other[key]) for key in first)
        torch.manual_seed(5)
        third = kind(tiny(name)).state_dict()
        torch.manual_seed(5)
        assert all(torch.equal(value, third[key]) for key, value in kind(tiny(name)).state_dict().items())


@every_preset
def test_fresh_weights_have_the_right_spread(name: str) -> None:
    config = tiny(name, initializer_range=0.1)
    model = BertForMaskedLM(config, generator=torch.Generator().manual_seed(0))
    assert not model.embeddings.word_embeddings.weight[config.pad_token_id].any()
    for path, parameter in model.named_parameters():
        if path.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif path.endswith("bias"):
            assert not parameter.any()
        else:
            assert parameter.abs().max() <= 0.2
            assert parameter.std().item() == pytest.approx(0.088, rel=0.2)  # a normal cut at two deviations


@every_preset
def test_every_share_of_dropout_has_its_effect(name: str) -> None:
    places = [field for field in vars(tiny(name)) if "dropout" in field]
    ids = some_ids()
    for place in places:
        model = shaken(BertForSequenceClassification(tiny(name, **{place: 0.5})))
        assert not torch.equal(model(ids), model(ids)), place
        model.eval()
        assert torch.equal(model(ids), model(ids)), place
    model = shaken(BertForSequenceClassification(tiny(name)))
    assert torch.equal(model(ids), model(ids))


@every_preset
def test_overfits_one_batch(name: str) -> None:
    torch.manual_seed(0)
    model, ids = BertForMaskedLM(tiny(name)), some_ids(4)
    positions = torch.arange(0, ids.numel(), 4)
    labels = ids.flatten()[positions]
    masked = ids.flatten().index_fill(0, positions, 4).view_as(ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        output = model(masked, None, wanted=positions, labels=labels)
        optimizer.zero_grad()
        (output.loss_sum / len(labels)).backward()
        optimizer.step()
    output = model.eval()(masked, None, wanted=positions, labels=labels)
    assert output.correct == len(labels)
    assert output.loss_sum / len(labels) < 0.3


@every_preset
def test_bfloat16_autocast_is_near_and_its_loss_is_fp32(name: str) -> None:
    model, ids = shaken(BertForMaskedLM(tiny(name))), some_ids()
    positions, labels = torch.arange(ids.numel()), ids.flatten()
    exact = model(ids, ids > 9, wanted=positions, labels=labels)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, ids > 9, wanted=positions, labels=labels)
    assert output.loss_sum.dtype is torch.float32
    assert torch.allclose(output.loss_sum, exact.loss_sum, rtol=0.02)
    output.loss_sum.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def assert_compiled_equals_eager(model: BertForMaskedLM, backend: str) -> None:
    torch._dynamo.reset()
    ids = some_ids()
    batch = {"attention_mask": ids > 9, "wanted": torch.arange(0, 36, 3), "labels": ids.flatten()[::3]}
    eager = model(ids, **batch)
    eager.loss_sum.backward()
    expected = {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    output = compiled(ids, **batch)
    output.loss_sum.backward()
    assert torch.allclose(output.loss_sum, eager.loss_sum, rtol=1e-5)
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[path], rtol=1e-3, atol=1e-4), path
    model.eval()
    assert compiled(ids, **batch).correct == model(ids, **batch).correct


@every_preset
def test_traces_as_one_graph(name: str) -> None:
    assert_compiled_equals_eager(shaken(BertForMaskedLM(tiny(name))), "aot_eager")


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager() -> None:
    assert_compiled_equals_eager(shaken(BertForMaskedLM(tiny("modern", num_hidden_layers=1))), "inductor")


def test_segments_count_where_there_are_any() -> None:
    ids, segments = some_ids(), torch.arange(LENGTH).ge(5).long().expand(3, -1)
    bert, modern = (shaken(BertForSequenceClassification(tiny(name))) for name in ("bert", "modern"))
    assert torch.equal(bert(ids), bert(ids, token_type_ids=torch.zeros_like(segments)))
    assert not torch.allclose(bert(ids), bert(ids, token_type_ids=segments))
    assert torch.equal(modern(ids), modern(ids, token_type_ids=segments))


@every_preset
def test_order_matters(name: str) -> None:
    model, ids = shaken(BertForSequenceClassification(tiny(name))), some_ids()
    swapped = ids[:, [0, 2, 1, *range(3, LENGTH)]]
    assert not torch.allclose(model(ids), model(swapped), atol=1e-4)


@every_preset
def test_too_long_an_input(name: str) -> None:
    with pytest.raises(BertlingError, match="input of 13 tokens: this model has max_position_embeddings = 12; cut"):
        BertForMaskedLM(tiny(name))(torch.ones(1, 13, dtype=torch.long))


@every_preset
def test_summary_and_counts(name: str) -> None:
    config = tiny(name)
    model = BertForMaskedLM(config)
    rows = summary(model)
    padding = (config.padded_vocab_size - VOCAB) * 32 * (1 if config.tied else 2)
    weights = sum(p.numel() for p in model.parameters())
    embeddings = sum(p.numel() for p in model.embeddings.parameters() if p.ndim == 2) - (128 - VOCAB) * 32
    assert count_parameters(model) == (weights - padding, weights - padding - embeddings)
    assert rows[0] == ("embeddings.word_embeddings", "weight 90 x 32", VOCAB * 32)
    decoder = next(row for row in rows if row.path == "mlm_head.decoder")
    shared = ("weight 90 x 32 = embeddings.word_embeddings.weight", 0)
    assert decoder[1:] == (shared if config.tied else ("weight 90 x 32", VOCAB * 32))


def test_published_sizes() -> None:
    """BERT-base has 110 million weights (Devlin et al. 2019), DistilBERT 66 million (Sanh et al. 2019)."""
    for name, millions in (("bert", 109.5), ("distilbert", 67.0)):
        with torch.device("meta"):
            config = preset_config(name, "base", 30_522, max_position_embeddings=512, pad_token_id=0)
            total = count_parameters(BertForMaskedLM(config)).total
        assert total / 1e6 == pytest.approx(millions, abs=0.1)
