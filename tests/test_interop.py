"""Against transformers' own classes: the same numbers, the same files; and every checkpoint that must be refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stock_models import stock_model
from torch import Tensor, nn

from bertling.files import BertlingError
from bertling.interop import LoadReport, from_hf, to_hf
from bertling.model import BertEncoder, BertForMaskedLM, BertForSequenceClassification, ModelConfig
from bertling.presets import PRESETS, preset_config
from bertling.stock import Head

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH = 90, 12
STOCK = ("bert", "distilbert", "modern")
HEADS: tuple[Head, ...] = ("masked_lm", "classification")
every_preset = pytest.mark.parametrize("name", PRESETS)
every_stock = pytest.mark.parametrize("name", STOCK)
every_head = pytest.mark.parametrize("head", HEADS)
Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def tiny(name: str, *, dropout: float = 0.0, labels: tuple[str, ...] = ("bad", "good", "so-so")) -> ModelConfig:
    config = preset_config(
        name,
        "mini",
        VOCAB,
        max_position_embeddings=LENGTH,
        pad_token_id=3,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        dropout=dropout,
        labels=labels,
    )
    return replace(config, local_attention=6, local_rope_theta=500.0) if name == "modern" else config


def build(name: str, head: Head, **options: Any) -> BertEncoder:
    """A model in which every weight has a random share, so that no part is silent (zero) or neutral (one)."""
    model = (BertForMaskedLM if head == "masked_lm" else BertForSequenceClassification)(tiny(name, **options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def padded_batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(LENGTH) < torch.tensor([12, 8, 3, 1])[:, None]).long()
    return ids * mask + 3 * (1 - mask), mask


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def test_segments_as_in_the_stock_class(tmp_path: Path) -> None:
    model = build("bert", "classification")
    stock = stock_model(tmp_path, *to_hf(model)).eval()
    ids, mask = padded_batch()
    segments = (torch.arange(LENGTH) > 4).long().expand(4, -1)
    theirs = stock(input_ids=ids, attention_mask=mask, token_type_ids=segments).logits
    assert relative(model(ids, mask, segments), theirs) < 1e-5


@every_stock
@every_head
def test_reads_what_the_stock_class_saves(name: str, head: Head, tmp_path: Path) -> None:
    model = build(name, head, dropout=0.25)
    stock = stock_model(tmp_path, *to_hf(model))
    saved = tmp_path / "saved"
    stock.save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    ours, report = from_hf(config, stock.state_dict())  # the state dict holds the second copies of tied weights too
    assert ours.config == model.config
    assert report == LoadReport((), ())
    expected, state = to_hf(model)[1], to_hf(ours)[1]
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)


@every_preset
@every_head
def test_round_trip_is_exact(name: str, head: Head) -> None:
    model = build(name, head, dropout=0.25)
    config, state = to_hf(model)
    assert json.loads(json.dumps(config)) == config
    back, report = from_hf(json.loads(json.dumps(config)), state)
    assert type(back) is type(model)
    assert report == LoadReport((), ())
    assert back.config == model.config
    config_again, state_again = to_hf(back)
    assert config_again == config
    assert state_again.keys() == state.keys()
    assert all(torch.equal(state[key], state_again[key]) for key in state)
    ids, mask = padded_batch()
    assert torch.equal(back.eval()(ids, mask), model.eval()(ids, mask))
    memory = [tensor.untyped_storage().data_ptr() for tensor in state.values()]
    assert len(set(memory)) == len(memory)  # a safetensors file takes no shared memory
    assert all(tensor.dtype is torch.float32 and tensor.is_contiguous() for tensor in state.values())


@every_preset
def test_files_hold_the_vocabulary_in_its_true_size(name: str) -> None:
    state = to_hf(build(name, "masked_lm"))[1]
    matrices = [tuple(tensor.shape) for key, tensor in state.items() if "tok_emb" in key or "word_emb" in key]
    assert matrices == [(VOCAB, 32)]
    if name == "seed":
        assert state["mlm_head.decoder.weight"].shape == (VOCAB, 32)


def test_a_tied_matrix_stays_tied() -> None:
    model, _ = from_hf(*to_hf(build("modern", "masked_lm")))
    assert isinstance(model, BertForMaskedLM)
    assert model.mlm_head.decoder.weight is model.embeddings.word_embeddings.weight


def test_wrappers_are_seen_through() -> None:
    model = build("modern", "masked_lm")
    expected = to_hf(model)
    wrapped = nn.Module()
    wrapped.add_module("module", torch.compile(model, backend="eager"))
    config, state = to_hf(wrapped)
    assert config == expected[0]
    assert all(torch.equal(state[key], expected[1][key]) for key in expected[1])
    with pytest.raises(TypeError, match="Linear is none of our models"):
        to_hf(nn.Linear(2, 2))


FRESH_CLASSIFIER = {
    "seed": ("classifier",),
    "bert": ("pooler.dense", "classifier"),
    "distilbert": ("pooler.dense", "classifier"),
    "modern": ("classifier",),
}
FRESH_MLM = {
    "seed": ("mlm_head", "mlm_head.transform.norm", "mlm_head.decoder"),
    "bert": ("mlm_head", "mlm_head.transform.dense", "mlm_head.transform.norm"),
    "distilbert": ("mlm_head", "mlm_head.transform.dense", "mlm_head.transform.norm"),
    "modern": ("mlm_head",),
}


@every_preset
def test_another_head_keeps_the_encoder(name: str) -> None:
    ids, mask = padded_batch()
    for stored, wanted, fresh in (
        ("masked_lm", "classification", FRESH_CLASSIFIER),
        ("classification", "masked_lm", FRESH_MLM),
    ):
        source = build(name, stored).eval()
        config, state = to_hf(source)
        generators = [torch.Generator().manual_seed(7) for _ in range(2)]
        model, report = from_hf(config, state, head=wanted, id2label={0: "no", 1: "yes"}, generator=generators[0])
        assert report.fresh == fresh[name]
        assert report.unused
        assert all(key in state for key in report.unused)
        assert torch.equal(model.eval().encode(ids, mask), source.encode(ids, mask))
        assert torch.isfinite(model(ids, mask)).all()
        again, _ = from_hf(config, state, head=wanted, id2label={0: "no", 1: "yes"}, generator=generators[1])
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
        if name == "modern":  # one transform for either head
            key = "mlm_head.transform.dense.weight" if wanted == "masked_lm" else "pooler.dense.weight"
            assert torch.equal(model.get_parameter(key), state["head.dense.weight"])


def test_labels() -> None:
    config, state = to_hf(build("bert", "classification"))
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "so-so"}
    assert config["label2id"] == {"bad": 0, "good": 1, "so-so": 2}
    names = {0: "bad", 1: "good", 2: "so-so"}
    for options in ({}, {"num_labels": 3}, {"id2label": names}):
        model, report = from_hf(config, state, **options)
        assert model.config.id2label == names
        assert report.fresh == ()
    model, report = from_hf(config, state, num_labels=5)
    assert (model.config.num_labels, model.config.labels[4], report.fresh) == (5, "LABEL_4", ("classifier",))
    assert report.unused == ("classifier.weight", "classifier.bias")
    model, report = from_hf(config, state, id2label={0: "good", 1: "bad", 2: "so-so"})  # the same names, other ids
    assert report.fresh == ("classifier",)
    config, state = to_hf(build("bert", "classification", labels=("LABEL_0", "LABEL_1")))
    model, report = from_hf(config, state, id2label={0: "no", 1: "yes"})  # the old names said nothing
    assert (model.config.labels, report.fresh) == (("no", "yes"), ())


def test_dropout_is_replaced() -> None:
    model, _ = from_hf(*to_hf(build("bert", "masked_lm", dropout=0.1)), dropout=0.3)
    assert model.config == tiny("bert", dropout=0.3)


def test_old_and_headless_files() -> None:
    """Names of 2018 (gamma, beta), and what the stock class without a head saves (no prefix)."""
    config, state = to_hf(build("bert", "masked_lm"))
    old = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in state.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    old["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    model, report = from_hf(config | {"architectures": ["BertForPreTraining"]}, old)
    assert report == LoadReport((), ("cls.seq_relationship.weight",))
    bare = {key.removeprefix("bert."): tensor for key, tensor in state.items() if key.startswith("bert.")}
    headless = config | {"architectures": ["BertModel"]}
    other, report = from_hf(headless, bare, head="masked_lm")
    assert report.fresh == FRESH_MLM["bert"]
    ids, mask = padded_batch()
    assert torch.equal(model.eval().encode(ids, mask), other.eval().encode(ids, mask))
    encoder, report = from_hf(headless, bare)
    assert (type(encoder), report) == (BertEncoder, LoadReport((), ()))
    assert torch.equal(model.eval().encode(ids, mask), encoder.eval().encode(ids, mask))
    assert to_hf(encoder)[0]["architectures"] == ["BertModel"]
    with pytest.raises(
        BertlingError, match=r"architectures = \['BertForQuestionAnswering'\]: neither masked words nor classes"
    ):
        from_hf(config | {"architectures": ["BertForQuestionAnswering"]}, bare)


def test_half_precision_files_load_as_fp32() -> None:
    config, state = to_hf(build("modern", "masked_lm"))
    model, _ = from_hf(config, {key: tensor.half() for key, tensor in state.items()})
    assert all(p.dtype is torch.float32 for p in model.parameters())


WORD, QUERY = "bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.attention.self.query.weight"


def test_a_model_that_gives_a_number_is_no_classifier() -> None:
    config, state = to_hf(build("bert", "classification"))
    state = {name: value[:1] if name.startswith("classifier.") else value for name, value in state.items()}
    config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    with pytest.raises(BertlingError, match="one label: this model gives a number"):
        from_hf(config, state)
    assert from_hf(config, state, head="none")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s: s.pop(QUERY), f"missing: {QUERY}; use files that belong together"),
        (lambda c, s: s.pop("cls.predictions.bias"), r"missing: cls\.predictions\.bias;"),
        (lambda c, s: s.clear(), r"missing: .*, .*, .* and \d+ more"),
        (lambda c, s: s.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda c, s: s.update({"a\nb" * 999: torch.zeros(1)}), "unexpected: a ba ba b"),
        (
            lambda c, s: s.update({WORD: torch.zeros(91, 32)}),
            r"wrong shape: .*word_emb.* is \[91, 32\], not \[90, 32\]",
        ),
        (lambda c, s: s.update({QUERY: torch.zeros(32)}), r"self\.query\.weight is \[32\], not \[32, 32\]"),
        (lambda c, s: s.update({QUERY: torch.tensor(1.0)}), r"self\.query\.weight is \[\], not \[32, 32\]"),
        (lambda c, s: s.update({QUERY: torch.zeros(32, 32).int()}), r"\[32, 32\] of torch.int32, not \[32, 32\]"),
        (lambda c, s: c.update(num_hidden_layers=4), r"missing: bert\.encoder\.layer\.3\."),
        (lambda c, s: c.update(num_hidden_layers=2), r"unexpected: bert\.encoder\.layer\.2\."),
        (lambda c, s: c.update(vocab_size=4_000_000), "of the wrong shape: "),
        (lambda c, s: c.update(hidden_size=16384, intermediate_size=131072), "of the wrong shape: "),
        (lambda c, s: c.update(model_type="t5"), "model_type = 't5' is not supported; use a checkpoint of one of"),
        (lambda c, s: c.update(model_type=["bert"]), "model_type = .* is not supported"),
        (lambda c, s: c.pop("hidden_size"), "config.json: no hidden_size; restore the file"),
        (lambda c, s: c.update(hidden_size=-32), "config.json: hidden_size = -32: this must be an integer"),
        (lambda c, s: c.update(vocab_size=10**15), "config.json: vocab_size = 1000000000000000: this must be"),
        (lambda c, s: c.update(num_attention_heads="2"), "config.json: num_attention_heads = '2': this must be"),
        (lambda c, s: c.update(layer_norm_eps=None), "config.json: layer_norm_eps = None: this must be a number"),
        (
            lambda c, s: c.update(hidden_act="relu"),
            "hidden_act = 'relu' is not supported; use a model with .* = 'gelu'",
        ),
        (lambda c, s: c.update(tie_word_embeddings=False), "tie_word_embeddings = False is not supported"),
        (lambda c, s: c.update(problem_type="regression"), "problem_type = 'regression' is not supported"),
        (lambda c, s: c.update(id2label={"0": "a", "2": "b"}), r"config.json: id2label = .*: this must map 0, 1, 2"),
        (lambda c, s: c.update(id2label=["a", "b"]), r"config.json: id2label = .*: this must map 0, 1, 2"),
    ],
)
def test_faults_are_named_in_one_line(change: Change, message: str) -> None:
    config, state = to_hf(build("bert", "masked_lm"))
    change(config, state)
    with pytest.raises(BertlingError, match=message) as raised:
        from_hf(config, state)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "config.json: layer_types is no pattern"),
        ({"layer_types": ["full_attention"] * 2}, "config.json: layer_types is no pattern"),
        ({"layer_types": None, "global_attn_every_n_layers": 0}, "global_attn_every_n_layers = 0: this must be"),
        ({"local_attention": -2}, "local_attention = -2: this must be"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "scaled rotary positions are not supported"),
        ({"rope_scaling": {"factor": 2}}, "scaled rotary positions are not supported"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": -1.0}}},
            "rope_theta = -1.0: this must be a number above 0",
        ),
        ({"classifier_pooling": "max"}, "pooling = 'max': this must be one of cls, mean"),
        ({"norm_bias": True}, "norm_bias = True is not supported"),
    ],
)
def test_modern_variants_that_are_not_ours(change: dict[str, Any], message: str) -> None:
    config, state = to_hf(build("modern", "masked_lm"))
    with pytest.raises(BertlingError, match=message):
        from_hf(config | change, state)


def test_rotary_base_in_both_spellings() -> None:
    config, state = to_hf(build("modern", "masked_lm"))
    five = config | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 5.0}}}
    four = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")}
    for variant in (five, four | {"global_rope_theta": 5.0}):
        assert from_hf(variant, state)[0].config.rope_theta == 5.0
    for key in ("global_rope_theta", "local_rope_theta", "local_attention", "global_attn_every_n_layers"):
        four.pop(key)
    stock = from_hf(four, state)[0].config  # what the stock class takes when nothing is said
    assert (stock.rope_theta, stock.local_rope_theta) == (160_000.0, 10_000.0)
    assert (stock.local_attention, stock.global_attn_every_n_layers) == (128, 3)


def test_layer_types_alone_tell_the_pattern() -> None:
    config, state = to_hf(build("modern", "masked_lm"))
    config.pop("global_attn_every_n_layers")
    for types, every in ((["full_attention"] * 3, 1), (["full_attention", "sliding_attention", "full_attention"], 2)):
        assert from_hf(config | {"layer_types": types}, state)[0].config.global_attn_every_n_layers == every


def test_an_anatomy_without_a_stock_class_is_refused() -> None:
    config = replace(tiny("bert"), norm_first=True, embedding_dropout_prob=0.5)
    with pytest.raises(BertlingError, match=r"embedding_dropout_prob = 0\.5, norm_first = True: the bert architecture"):
        to_hf(BertForMaskedLM(config))
