"""The tables of sizes, and every value that a configuration refuses."""

from dataclasses import fields, replace
from typing import Any

import pytest

from bertling.files import BertlingError
from bertling.presets import PRESETS, SIZES, ModelConfig, preset_config


def build(name: str = "modern", size: str = "mini", **values: Any) -> ModelConfig:
    return preset_config(name, size, 1000, max_position_embeddings=64, pad_token_id=0, **values)


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("seed", "mini", (4, 256, 4, 1024)),
        ("seed", "base", (6, 768, 12, 3072)),
        ("bert", "small", (6, 512, 8, 2048)),
        ("bert", "base", (12, 768, 12, 3072)),
        ("distilbert", "base", (6, 768, 12, 3072)),
        ("modern", "mini", (4, 256, 4, 704)),
        ("modern", "small", (6, 512, 8, 1344)),
        ("modern", "base", (12, 768, 12, 2048)),
    ],
)
def test_sizes(name: str, size: str, shape: tuple[int, int, int, int]) -> None:
    config = build(name, size)
    assert shape == (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
    )


def test_explicit_sizes_win() -> None:
    config = build("seed", "base", hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 2, 2)
    assert config.intermediate_size == 256


@pytest.mark.parametrize("name", PRESETS)
def test_dropout_replaces_every_share(name: str) -> None:
    config = build(name, dropout=0.35)
    shares = {field.name: getattr(config, field.name) for field in fields(config) if "dropout" in field.name}
    assert len(shares) == 5
    if name == "distilbert":  # its stock class has none there
        assert shares.pop("attention_output_dropout_prob") == 0.0
    assert set(shares.values()) == {0.35}


def test_labels() -> None:
    config = build(labels=["negative", "positive", "none"])
    assert config.num_labels == 3
    assert config.id2label == {0: "negative", 1: "positive", 2: "none"}


def test_every_field_has_a_docstring() -> None:
    import ast
    import inspect
    import textwrap

    body = ast.parse(textwrap.dedent(inspect.getsource(ModelConfig))).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign):
            assert isinstance(following, ast.Expr), ast.unparse(statement)


def test_unknown_names() -> None:
    with pytest.raises(BertlingError, match="preset = 'roberta': no such preset; choose one of seed, bert"):
        build("roberta")
    with pytest.raises(BertlingError, match="size = 'huge': no such size; choose one of mini, small, base"):
        build("bert", "huge")
    assert list(SIZES) == ["mini", "small", "base"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads = 5 does not divide hidden_size = 256"),
        ({"hidden_size": 12, "num_attention_heads": 4}, "make the width of a head even"),
        ({"pad_token_id": 1000}, "pad_token_id = 1000 lies outside vocab_size = 1000"),
        ({"pad_token_id": -1}, "pad_token_id = -1: this must be an integer, 0 to"),
        ({"hidden_size": -256}, "hidden_size = -256: this must be an integer, 1 to"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: this must be an integer, 1 to"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: this must be an integer"),
        ({"vocab_size": "1000"}, "vocab_size = '1000': this must be an integer"),
        ({"vocab_size": True}, "vocab_size = True: this must be an integer"),
        ({"max_position_embeddings": 64.0}, "max_position_embeddings = 64.0: this must be an integer"),
        ({"type_vocab_size": [2]}, "type_vocab_size = .2.: this must be an integer"),
        ({"hidden_dropout_prob": 1}, "hidden_dropout_prob = 1: this must be a number from 0"),
        ({"attention_probs_dropout_prob": float("nan")}, "attention_probs_dropout_prob = nan: this must be a number"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps = 0.0: this must be a number above 0"),
        ({"initializer_range": float("inf")}, "initializer_range = inf: this must be a number above 0"),
        ({"glu": 1}, "glu = 1: this must be true or false"),
        ({"positions": "alibi"}, "positions = 'alibi': this must be one of learned, sinusoidal, rotary"),
        ({"labels": ("a", "a")}, "labels = .*: this must be one or more names, all different"),
        ({"labels": ()}, "labels = .*: this must be one or more names"),
        ({"labels": (1, 2)}, "labels = .*: this must be one or more names"),
    ],
)
def test_bad_values_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BertlingError, match=message) as raised:
        replace(build(), **change)
    assert "\n" not in str(raised.value)


def test_odd_width_for_sinusoidal_positions() -> None:
    with pytest.raises(BertlingError, match="positions are pairs of columns"):
        build("seed", hidden_size=15, num_attention_heads=3)


def test_padded_vocabulary_size() -> None:
    assert [replace(build(), vocab_size=size).padded_vocab_size for size in (1, 64, 65, 30_522)] == [
        64,
        64,
        128,
        30_528,
    ]


def test_windows_are_asked_for_and_only_modern_has_them() -> None:
    assert [build("modern").is_local(i) for i in range(4)] == [False] * 4
    config = build("modern", local_attention=16)
    assert [config.is_local(i) for i in range(7)] == [False, True, True, False, True, True, False]
    assert config.local_attention == 16
    with pytest.raises(BertlingError, match="local-attention: the preset bert has no windows"):
        build("bert", local_attention=16)
